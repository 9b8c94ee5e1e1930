"""Opens foreign files and directories. Of the importers only this module, ``torch_files`` and ``dcp`` open any."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dist_ema.checkpoints.header import parse_header, read_header
from dist_ema.checkpoints.manifest import NAME
from dist_ema.checkpoints.storage.local import LocalFile, open_plain
from dist_ema.checkpoints.strict_json import parse
from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.importers import dcp
from dist_ema.importers.foreign import Content, LazyTensor, Model, read_tensors
from dist_ema.importers.torch_files import load_file

_CONFIG_BYTES = 1 << 24
_CONFIG_DEPTH = 32


def open_foreign(path: Path) -> Content:
    """Opens the file or directory ``path``, whichever library wrote it.

    Raises:
        CheckpointError: nothing is there, or it is no known kind of file, or a pickle that holds more than data.
        CheckpointCorruptError: it is damaged.
    """
    if path.is_dir():
        if (path / dcp.METADATA).exists():
            return dcp.open_directory(path)
        if (path / NAME).exists():
            raise CheckpointError(f"{path} is a checkpoint of this library already: load() reads it")
        config = _read_config(path)
        return Content("pretrained", config, _open_safetensors(path))
    _check_plain(path)
    if path.suffix == ".safetensors":
        return Content("pretrained", {}, _open_safetensors(path))
    values = load_file(path)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a dict, as every known format has")
    return Content("file", values)


def _check_plain(path: Path) -> None:
    """Raises CheckpointError unless there is a file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is neither a file nor a directory")


def open_model(path: Path, frozen: re.Pattern[str] | None) -> Model:
    """A model's state dict: a safetensors file, a directory of those, or a file of torch.save.

    Raises as :func:`open_foreign`.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        if not path.is_dir():
            _check_plain(path)
        tensors = _open_safetensors(path)
        if not tensors:
            raise CheckpointError(f"{path} has no safetensors files")
        return Model(tensors, ordered=False, frozen=frozen)
    # The state dict may be the file itself, or under the names that trainers give it.
    values = open_foreign(path).values
    inner = values.get("state") if isinstance(values.get("state"), Mapping) else {}
    found = (*(values.get(key) for key in ("state_dict", "model")), inner.get("model"))  # type: ignore[union-attr]
    state = next((value for value in found if isinstance(value, Mapping)), values)
    return Model(read_tensors(state, str(path)), ordered=True, frozen=frozen)


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    try:
        with open_plain(file) as opened:
            config = parse(opened.read(_CONFIG_BYTES), depth=_CONFIG_DEPTH)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointCorruptError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointCorruptError(f"{file} is not a configuration")
    return config


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    # All files of a directory: an index may be missing, and the tensors' names say what is in them.
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        _check_header(file)
        try:
            # The file is mapped: a tensor's bytes are read when they are looked at.
            with safe_open(file, framework="pt") as opened:
                found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise CheckpointCorruptError(f"{file} cannot be read: {error}") from error
        if twice := found.keys() & tensors.keys():
            raise CheckpointCorruptError(f"{path}: two files hold a tensor {min(twice)!r}")
        tensors |= read_tensors(found, str(file))
    return tensors


def _check_header(file: Path) -> None:
    """Checks a header before safetensors and torch, which would believe it, see it. Raises CheckpointCorruptError."""
    try:
        with closing(LocalFile(Path(os.path.realpath(file)))) as opened:
            parse_header(read_header(opened), opened.size)
    except (OSError, ValueError) as error:
        raise CheckpointCorruptError(f"{file} cannot be read: {str(error)[:200]}") from error
