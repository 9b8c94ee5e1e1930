"""Lists the tensors of a model that nobody has built: from a Hugging Face config.json, or from a number of parameters.

transformers builds the model on the meta device, where it has shapes and no memory: 671 billion parameters take less
than a second. Only one function here imports it. If it is not installed, :mod:`dist_ema.planning.families` knows the
sizes of common families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from dist_ema.engines.plain import PlainEngine
from dist_ema.errors import EMAConfigError
from dist_ema.formats.strict_json import parse
from dist_ema.geometry.spec import TensorSpec
from dist_ema.planning.families import FAMILIES, Config
from dist_ema.storage.local import open_plain

_CONFIG_BYTES = 1 << 24
_CONFIG_DEPTH = 32
#: Modules of a model at most; those of 384 experts in 61 layers are 70,000.
_MODULES = 500_000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST = 10**17  # whose bytes torch can still count
_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
#: The dimension of a linear layer's weight, counted from the end, that a style of transformers' plans shards.
_COLWISE = -2
_ROWWISE = -1


@dataclass(frozen=True)
class Architecture:
    """Lists the tensors of a plain model.

    Attributes:
        tensors: its parameters and persistent buffers, unsharded.
        styles: the dimension that tensor parallelism shards, by the name of the parameter; None for replicated.
    """

    tensors: list[TensorSpec]
    styles: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Returns the number of elements of all parameters. Tied ones are counted once."""
        return sum(spec.numel for spec in self.tensors if spec.kind != "buffer")


def parse_count(text: str) -> int:
    """Returns ``"70B"``, ``"1.5b"`` or ``"125000000"`` as a number. Raises EMAConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", text.upper())
    number = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if not 1 <= number <= _MOST:
        raise EMAConfigError(
            f"parameters={text!r}: allowed is a number from 1 to 100000T, such as 70B, 1.5B, 350M or 125000000"
        )
    return number


def of_count(count: int, dtype: torch.dtype) -> Architecture:
    """Returns a model of one 1D tensor of ``count`` elements, which every engine divides evenly up to rounding."""
    spec = TensorSpec.unsharded("parameters", torch.empty(count, dtype=dtype, device="meta"), partitioned=False)
    return Architecture([spec], {spec.name: 0})


def of_module(model: nn.Module) -> Architecture:
    """Returns the tensors of a plain module, on any device, with transformers' plan of tensor parallelism if it has
    one.
    """
    tensors = PlainEngine(model).specs()
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    return Architecture(tensors, _styles(tensors, plan))


def of_config(path: Path, dtype: torch.dtype | None) -> Architecture:
    """Returns the model that a Hugging Face config.json describes. Reads no other file, and runs no code beside it.

    Args:
        path: the file, or its directory.
        dtype: dtype of the parameters; None means what the file says, else fp32.

    Raises:
        EMAConfigError: it cannot be read, is no such file, or its model is unknown to transformers or, without
            transformers, to :mod:`dist_ema.planning.families`.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        with open_plain(file) as opened:
            text = opened.read(_CONFIG_BYTES + 1)
        if len(text) > _CONFIG_BYTES:
            raise ValueError(f"it has more than {_CONFIG_BYTES} bytes")
        values = parse(text, depth=_CONFIG_DEPTH)
    except FileNotFoundError as error:
        raise EMAConfigError(
            f"{file} does not exist: allowed is a config.json of Hugging Face, or its directory"
        ) from error
    except OSError as error:
        raise EMAConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise EMAConfigError(f"{file} cannot be read as a config.json: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise EMAConfigError(f"{file} has no model_type: it is not the config.json of a Hugging Face model")
    if dtype is None:
        name = values.get("dtype") or values.get("torch_dtype") or "float32"
        if name not in _DTYPES:
            raise EMAConfigError(f"{file} has the dtype {name!r}: give --param-dtype")
        dtype = _DTYPES[name]
    try:
        return of_module(_build(values, dtype))
    except EMAConfigError:
        raise
    except Exception as error:  # whatever a model's own code raises for numbers that do not fit
        raise EMAConfigError(f"{file}: this model cannot be built: {error}") from error


def _build(values: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """Returns the model on the meta device."""
    build = _builder(values)
    with torch.device("meta"), _default_dtype(dtype), _counted_modules():
        return build()


def _builder(values: Mapping[str, Any]) -> Callable[[], nn.Module]:
    """Returns a function that builds the model: by transformers or, without it, by the known families."""
    kind = values["model_type"]
    names = values.get("architectures") or [None]
    try:
        import transformers
    except ImportError as error:
        if kind in FAMILIES and names[0] in (None, FAMILIES[kind][0]):
            return partial(FAMILIES[kind][1], Config(values))
        raise EMAConfigError(
            f"a model {names[0] or kind} needs transformers, which is not installed: pip install transformers, or give "
            f"--parameters. Without it the sizes of these are known: {', '.join(FAMILIES[one][0] for one in FAMILIES)}"
        ) from error
    # How the published weights were quantized, and code from elsewhere, say nothing of a model in training.
    rest = {key: value for key, value in values.items() if key not in ("model_type", "quantization_config", "auto_map")}
    config = transformers.AutoConfig.for_model(kind, **rest)
    from_config = transformers.AutoModelForCausalLM.from_config
    return partial(getattr(transformers, str(names[0]), from_config), config)


@contextmanager
def _counted_modules() -> Iterator[None]:
    """Stops building a model with too many modules, such as that of a config.json with a billion layers."""
    count = 0

    def add(*_: object) -> None:
        nonlocal count
        count += 1
        if count > _MODULES:
            raise ValueError(f"it has more than {_MODULES} modules")

    hook = register_module_module_registration_hook(add)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _styles(tensors: list[TensorSpec], plan: Mapping[str, str]) -> dict[str, int | None]:
    """Returns what a plan of transformers shards. The plan names layers or parameters, with ``*`` for a number.

    Styles that leave a parameter whole (of norms, of routers) make no DTensors, and are left out.
    """
    patterns = [(re.escape(name).replace(r"\*", r"\d+"), style) for name, style in plan.items()]
    styles: dict[str, int | None] = {}
    for spec in tensors:
        layer, _, key = spec.name.rpartition(".")
        for pattern, style in patterns:
            if spec.kind == "buffer" or not (re.fullmatch(pattern, layer) or re.fullmatch(pattern, spec.name)):
                continue
            dims = len(spec.shape)
            if style == "embedding_rowwise":
                styles[spec.name] = 0
            elif "colwise" in style:
                styles[spec.name] = max(dims + _COLWISE, 0)
            elif "rowwise" in style:
                styles[spec.name] = None if key == "bias" else dims + _ROWWISE
    return styles
