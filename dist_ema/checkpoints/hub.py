"""Finds names and configuration files as ``save_pretrained`` of transformers, diffusers and peft writes them.

They come from the model's own class and from functions of these libraries. None of them is imported here: if the model
is one of theirs, the library is in memory. Read in transformers 5.23, diffusers 0.42, peft 0.21.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_ema.checkpoints.trace import Convert
from dist_ema.engines.names import plain_type, walk_modules
from dist_ema.errors import EMAConfigError

#: Names of the weight files in each layout, without number and suffix; None means that of transformers.
STEMS = {
    None: "model",
    "transformers": "model",
    "diffusers": "diffusion_pytorch_model",
    "peft": "adapter_model",
}


def check_layout(layout: object, model: nn.Module | None) -> None:
    """Raises EMAConfigError for an unknown layout, or one that does not fit the model. Local."""
    if not (layout is None or isinstance(layout, str)) or layout not in STEMS:
        raise EMAConfigError(f"layout={layout!r}: allowed are None, 'transformers', 'diffusers' and 'peft'")
    if layout == "peft":
        if model is None or not _adapters(model):
            found = "a list of modules" if model is None else f"a {plain_type(model).__name__} without any"
            raise EMAConfigError(f"layout='peft' writes the adapter of a peft model, and the target is {found}")
        _active_adapter(model)
    if layout == "transformers" and model is not None and _adapters(model):
        raise EMAConfigError(
            f"layout='transformers': the {plain_type(model).__name__} has adapters, which from_pretrained would not "
            "find. layout='peft' writes them alone, layout=None everything under the module's own names"
        )


# Names.


def conversion(model: nn.Module, layout: str | None) -> Convert | None:
    """Returns the function from the model's state dict to the one that its library saves; None if they are the same.
    Local.

    Args:
        model: the model without wrappers.
        layout: as of ``ShardedEMA.export``.
    """
    if layout == "peft":
        return lambda state: _adapter_state(model, state)
    if layout == "diffusers" or not _is_pretrained(model) or _adapters(model):
        return None
    # transformers 5 has conversions between its modules and its files; version 4 has none.
    revert = getattr(sys.modules.get("transformers.core_model_loading"), "revert_weight_conversion", None)
    untie = getattr(sys.modules["transformers.modeling_utils"], "remove_tied_weights_from_state_dict", None)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())

    def convert(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
        saved = {name: tensor for name, tensor in state.items() if name not in ignored}
        stand_in = _stand_in(model, state)
        if untie is not None:
            try:
                saved = untie(dict(saved), stand_in)
            except RuntimeError:  # tied tensors that the class does not declare: save_pretrained refuses such a model
                if layout == "transformers":
                    raise
        return saved if revert is None else revert(stand_in, saved)

    return convert


def _is_pretrained(model: nn.Module) -> bool:
    # If the library is not in memory, the model cannot be one of its classes.
    kind = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    return kind is not None and isinstance(model, kind)


def _stand_in(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Returns a replacement of the model for these functions, with the classes, names and shapes of before sharding.

    The functions look up conversions by the classes and names of the transformers models inside the model. They also
    ask
    for parameters: for their shapes, and to find tied ones.
    """
    parts = [(name, _empty(part)) for name, part in walk_modules(model) if _is_pretrained(part)]
    root = parts[0][1]
    answers: dict[str, Any] = {
        "named_modules": lambda: iter(parts),
        "get_parameter": state.__getitem__,
        "get_parameter_or_buffer": state.__getitem__,
        "_weight_conversions": getattr(model, "_weight_conversions", None),
    }
    for name, answer in answers.items():  # nn.Module.__setattr__ would register the modules
        object.__setattr__(root, name, answer)
    return root


def _empty(model: nn.Module) -> nn.Module:
    """Returns a module of the same class, without wrappers, that has the configuration and nothing else."""
    kind = plain_type(model)
    empty: nn.Module = object.__new__(kind)  # its __init__ would allocate all weights
    nn.Module.__init__(empty)
    for name in ("config", "_internal_dict"):
        if name in vars(model):
            object.__setattr__(empty, name, copy.deepcopy(vars(model)[name]))
    return empty


class _Canonical:
    """Represents a model with the canonical names of its modules, also if it contains wrappers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return walk_modules(self._model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _adapters(model: nn.Module) -> Mapping[str, Any]:
    """Returns the configurations of a model's adapters, by the names of the adapters; empty if there are none."""
    found = getattr(model, "peft_config", None)
    return found if isinstance(found, Mapping) else {}


def _active_adapter(model: Any) -> str:
    active = model.active_adapters() if callable(getattr(model, "active_adapters", None)) else model.active_adapter
    names = [active] if isinstance(active, str) else list(active)
    if len(names) != 1:
        raise EMAConfigError(
            f"layout='peft' writes one adapter, and {len(names)} are active ({', '.join(map(repr, names))}): activate "
            "the one that is meant with set_adapter()"
        )
    return str(names[0])


def _is_peft_model(model: nn.Module) -> bool:
    kind = getattr(sys.modules.get("peft"), "PeftModel", None)
    return kind is not None and isinstance(model, kind)


def _adapter_state(model: nn.Module, state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    peft = sys.modules["peft"]  # peft is in memory, because the adapter's configuration is one of its objects
    adapter = _active_adapter(model)
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(_Canonical(model), state_dict=state, adapter_name=adapter)
    # If the model holds the adapter without a PeftModel around it, its save_pretrained adds this prefix.
    prefix = "" if _is_peft_model(model) else "base_model.model."
    return {f"{prefix}{name}": tensor for name, tensor in found.items()}


# Configurations.


def has_config(model: nn.Module) -> bool:
    """Returns whether ``write_config`` writes something for a model without wrappers. Local."""
    return not _adapters(model) and (
        _is_configured(model) or hasattr(getattr(model, "config", None), "save_pretrained")
    )


def write_config(model: nn.Module, directory: Path, dtype: torch.dtype | None) -> None:
    """Writes the configuration files of ``save_pretrained``, for weights of ``dtype``. One rank. The model is not
    changed.

    For a transformers model that can generate, this includes its generation configuration; for one that was registered
    with ``register_for_auto_class``, its code.
    """
    if _is_configured(model):
        with _without_messages(
            "diffusers.configuration_utils"
        ):  # these messages name the folder, which is a temporary one
            _empty(model).save_config(str(directory))  # type: ignore[operator]
    elif _is_pretrained(model):
        _write_pretrained(model, directory, dtype)
    else:
        model.config.save_pretrained(str(directory))  # type: ignore[union-attr,operator]


@contextmanager
def _without_messages(name: str) -> Iterator[None]:
    """Silences the info messages of a logger, but not its warnings."""

    def is_shown(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO

    logger = logging.getLogger(name)
    logger.addFilter(is_shown)
    try:
        yield
    finally:
        logger.removeFilter(is_shown)


def _is_configured(model: nn.Module) -> bool:
    """Returns whether a model is one of diffusers."""
    kind = getattr(sys.modules.get("diffusers.configuration_utils"), "ConfigMixin", None)
    return kind is not None and isinstance(model, kind)


def _write_pretrained(model: Any, directory: Path, dtype: torch.dtype | None) -> None:
    config = copy.deepcopy(model.config)
    if dtype is not None:
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(dtype).removeprefix("torch."))
    config.architectures = [
        plain_type(model).__name__
    ]  # FSDP gives the class another name, which from_pretrained cannot find
    save_code = getattr(sys.modules.get("transformers.dynamic_module_utils"), "custom_object_save", None)
    if getattr(model, "_auto_class", None) is not None and save_code is not None:
        save_code(_empty(model), str(directory), config=config)
    config.save_pretrained(str(directory))
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(directory))


def write_adapter_config(model: nn.Module, directory: Path) -> None:
    """Writes ``adapter_config.json`` of the active adapter. One rank. The model is not changed."""
    config = copy.deepcopy(_adapters(model)[_active_adapter(model)])
    mapping = None
    if _is_peft_model(model):
        base = dict(walk_modules(model))["base_model" if config.is_prompt_learning else "base_model.model"]
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = vars(base).get("name_or_path") or None
        config.inference_mode = True
        if config.task_type is None:
            kind = plain_type(base)
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(str(directory), auto_mapping_dict=mapping)
