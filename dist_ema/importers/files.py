"""Opens foreign files and directories. No other module of the importers opens files."""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats import dcp_directory as dcp
from dist_ema.formats.manifest import NAME
from dist_ema.formats.safetensors import parse_header, read_header
from dist_ema.formats.strict_json import parse
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.formats.torch_save import load_file
from dist_ema.importers.folders import choose_files
from dist_ema.importers.foreign import Model, read_tensors
from dist_ema.storage.local import open_plain, open_ranges

_CONFIG_BYTES = 1 << 24
_CONFIG_DEPTH = 32


def open_foreign(path: Path, key: str | None = None) -> Content:
    """Opens the file or directory ``path``, whichever library wrote it.

    Args:
        path: the file or directory.
        key: in a directory of safetensors files, the file or index to take; see :func:`.folders.choose_files`. Ignored
            for anything else.

    Raises:
        CheckpointError: nothing is there, it is no known kind of file, it is a pickle that holds more than data, or a
            directory of several models that does not say which one is meant.
        CheckpointCorruptError: it is damaged.
    """
    if path.is_dir():
        if (path / dcp.METADATA).exists():
            return dcp.open_directory(path)
        if (path / NAME).exists():
            raise CheckpointError(f"{path} is a checkpoint of this library already: load() reads it")
        config = _read_config(path)
        weights = choose_files(path, key)
        note = (f"{path}: {weights.note}",) if weights.note else ()
        return Content("pretrained", config, _open_safetensors(weights.files), note, chosen=key is not None)
    _check_plain(path)
    if path.suffix == ".safetensors":
        return Content("pretrained", {}, _open_safetensors({path: None}))
    values = load_file(path)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a dict, as every known format has")
    return Content("file", values)


def _check_plain(path: Path) -> None:
    """Raises CheckpointError unless ``path`` is a file or a link. Opening a broken link raises a better error."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if path.is_symlink():
            return
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} is neither a file nor a directory")


def open_model(path: Path, frozen: re.Pattern[str] | None) -> Model:
    """Returns a model's state dict, from a safetensors file, a directory of those, or a file of torch.save.

    Raises as :func:`open_foreign` does.
    """
    if path.is_dir() or path.suffix == ".safetensors":
        return Model(open_foreign(path).tensors, ordered=False, frozen=frozen)
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


def _open_safetensors(files: Mapping[Path, Collection[str] | None]) -> dict[str, LazyTensor]:
    """Returns the tensors of some files, mapped: their bytes are read at the first access.

    Args:
        files: the names to take from each file; None means all.
    """
    tensors: dict[str, Tensor] = {}
    for file, names in files.items():
        _check_header(file)
        try:
            with safe_open(file, framework="pt") as opened:
                there = set(opened.keys())
                if lacking := [name for name in names or () if name not in there]:
                    raise CheckpointError(f"{file} has no tensor {lacking[0]!r}, which the index says is in it")
                found = {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}
        except (OSError, SafetensorError) as error:
            raise CheckpointCorruptError(f"{file} cannot be read: {error}") from error
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(
                f"{file} and a file before it both hold a tensor {min(twice)!r}, and there is no index that says which "
                f"counts; --key {file.name} takes one file alone"
            )
        tensors |= found
    return read_tensors(tensors, ", ".join(map(str, list(files)[:1])))


def _check_header(file: Path) -> None:
    """Checks a header before safetensors and torch, which would trust it, see it. Raises CheckpointCorruptError."""
    try:
        with closing(open_ranges(file)) as opened:
            parse_header(read_header(opened), opened.size)
    except OSError as error:
        raise CheckpointCorruptError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointCorruptError(f"{file} is damaged: {str(error)[:200]}") from error
