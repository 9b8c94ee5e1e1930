"""Opens foreign files. Of the importers, this and :mod:`dist_ema.importers.dcp` alone do; both map what they can.

Pickles are read with ``weights_only=True``: tensors and plain values. Real files also hold leftovers of their trainer
(arguments, times, generators' states). A class on the list below becomes an empty stand-in, so it is never imported and
none of its code runs; a file that names anything else is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.importers import dcp
from dist_ema.importers.foreign import Content, LazyTensor, Model, read_tensors
from dist_ema.manifest import NAME

#: Classes of values that no average needs.
_LEFTOVERS = re.compile(
    r"(numpy|omegaconf|composer|lightning|lightning_fabric|pytorch_lightning|nemo|timm|datetime|pathlib|typing)\..+"
    r"|argparse\.Namespace|torch\.torch_version\.TorchVersion|collections\.defaultdict"
    r"|(builtins|__builtin__)\.(dict|list|tuple|set|int|float|str|bool|bytes|object)"
)
_CONFIG_BYTES = 1 << 24


class _Leftover:
    """Stands in for an object of a class that is not imported."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def open_foreign(path: Path) -> Content:
    """What is at ``path``, whatever its library.

    Raises:
        CheckpointError: there is nothing, nothing that is known, or a pickle that is not mere data.
        CheckpointCorruptError: it is damaged.
    """
    if path.is_dir():
        if (path / dcp.METADATA).exists():
            return dcp.open_directory(path)
        if (path / NAME).exists():
            raise CheckpointError(f"{path} is a checkpoint of this library already: load() reads it")
        config = _read_config(path)
        return Content("pretrained", config, _open_safetensors(path))
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    values = load_pickle(path)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, where every known format has a dict")
    return Content("file", values)


def open_model(path: Path, frozen: re.Pattern[str] | None) -> Model:
    """A model's state dict: a safetensors file, a directory of those, or a file of torch.save. Raises as above."""
    if path.is_dir() or path.suffix == ".safetensors":
        return Model(_open_safetensors(path), ordered=False, frozen=frozen)
    values = open_foreign(path).values
    inner = values.get("state") if isinstance(values.get("state"), Mapping) else {}
    found = (*(values.get(key) for key in ("state_dict", "model")), inner.get("model"))  # type: ignore[union-attr]
    state = next((value for value in found if isinstance(value, Mapping)), values)
    return Model(read_tensors(state, str(path)), ordered=True, frozen=frozen)


def load_pickle(path: Path) -> Any:
    """What torch.save wrote, mapped and not read, where the file is of the kind that can be."""
    try:
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if mapped else []
        with torch.serialization.safe_globals([_stand_in(name) for name in unknown if _LEFTOVERS.fullmatch(name)]):
            return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except UnpicklingError as error:
        raise CheckpointError(
            f"{path} was not read, since it holds more than data, and no code of a file is run: {_first_line(error)} "
            "If you trust it, load it where its library is installed, and save with torch.save only the dict that has "
            "the average"
        ) from error
    except Exception as error:  # damaged files make torch.load raise nearly anything
        raise CheckpointCorruptError(f"{path} is damaged, or not a file of torch.save: {_first_line(error)}") from error


def _stand_in(full_name: str) -> type:
    module, _, name = full_name.rpartition(".")
    return type(name, (_Leftover,), {"__module__": module, "__qualname__": name})


def _first_line(error: Exception) -> str:
    """What torch says is wrong, without its advice to switch the protection off."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "lobal" in line]
    text = next(iter(lines or str(error).splitlines() or [repr(error)]))
    return text.split(" Please use")[0].split(" was not an allowed")[0].removeprefix("WeightsUnpickler error: ")[:300]


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        with file.open("rb") as opened:
            config = json.loads(opened.read(_CONFIG_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointCorruptError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointCorruptError(f"{file} is not a configuration")
    return config


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        try:
            # The file is mapped: a tensor's bytes are read when they are looked at.
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise CheckpointCorruptError(f"{file} cannot be read: {error}") from error
        if twice := found.keys() & tensors.keys():
            raise CheckpointCorruptError(f"{path}: {min(twice)!r} is in two files")
        tensors |= read_tensors(found, str(file))
    if not tensors:
        raise CheckpointError(f"{path} has no safetensors files")
    return tensors
