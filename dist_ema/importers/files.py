"""Opens foreign files and directories; with the modules for pickles and for DCP, the importers' only one that does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dist_ema.checkpoints.manifest import NAME
from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.importers import dcp
from dist_ema.importers.foreign import Content, LazyTensor, Model, read_tensors
from dist_ema.importers.pickles import load_file

_CONFIG_BYTES = 1 << 24


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
    values = load_file(path)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, where every known format has a dict")
    return Content("file", values)


def open_model(path: Path, frozen: re.Pattern[str] | None) -> Model:
    """A model's state dict: a safetensors file, a directory of those, or a file of torch.save. Raises as above."""
    if path.is_dir() or path.suffix == ".safetensors":
        tensors = _open_safetensors(path)
        if not tensors:
            raise CheckpointError(f"{path} has no safetensors files")
        return Model(tensors, ordered=False, frozen=frozen)
    values = open_foreign(path).values
    inner = values.get("state") if isinstance(values.get("state"), Mapping) else {}
    found = (*(values.get(key) for key in ("state_dict", "model")), inner.get("model"))  # type: ignore[union-attr]
    state = next((value for value in found if isinstance(value, Mapping)), values)
    return Model(read_tensors(state, str(path)), ordered=True, frozen=frozen)


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
    return tensors
