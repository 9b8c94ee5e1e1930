"""Directories of ``torch.distributed.checkpoint``, read without its unpickler, which would run what a file says.

``.metadata`` is a pickle. It is read by an unpickler that knows the names of DCP's own classes, makes plain records of
them, and refuses everything else. Each part of a tensor is a file of torch.save inside of a ``.distcp`` file, read with
``weights_only=True``; so are the few entries that are not tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.importers.foreign import Content, LazyTensor
from dist_ema.importers.pickles import load_bytes

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    (_MODULE, name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
}
_RECORDS |= {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")}
_RECORDS |= {("pathlib", name) for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")}
_MAX_BYTES = 1 << 31
#: The largest entry that is no tensor and is looked at.
_ENTRY_BYTES = 1 << 20


class _Record:
    """Stands in for an object of DCP: its arguments and its state, and no code."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __getitem__(self, key: str) -> Any:
        return self.state.get(key) if isinstance(self.state, dict) else None


class _Unpickler(pickle._Unpickler):  # the one in C takes memory for as many memos as a file of ten bytes says
    """Knows DCP's metadata, and gives each file classes of its own, which it cannot spoil for the next."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._classes: dict[tuple[str, str], type] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle means by a name. Raises UnpicklingError for any but DCP's."""
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _RECORDS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a class of torch.distributed.checkpoint's metadata")
        return self._classes.setdefault((module, name), type(name, (_Record,), {}))


@dataclass(frozen=True)
class _Part:
    """A box of a tensor, and where its bytes lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int
    length: int


def open_directory(path: Path) -> Content:
    """The tensors, and of the entries that are not tensors the small ones that are plain values.

    Raises:
        CheckpointError: the metadata name something that is not DCP's.
        CheckpointCorruptError: they are damaged, or parts do not make up their tensors.
    """
    metadata = _load_metadata(path / METADATA)
    storage: dict[str, list[tuple[Any, Any]]] = {}
    for index, info in _mapping(metadata["storage_data"]).items():
        if not isinstance(index, _Record) or not isinstance(info, _Record):
            raise CheckpointCorruptError(f"{path / METADATA}: {index!r} is not an entry")
        storage.setdefault(str(index["fqn"]), []).append((index, info))
    tensors: dict[str, LazyTensor] = {}
    values: dict[str, Any] = {}
    for name, described in _mapping(metadata["state_dict_metadata"]).items():
        try:
            if type(described).__name__ == "TensorStorageMetadata":
                tensors[str(name)] = _tensor(path, str(name), described, storage.get(str(name), []))
            else:
                values[str(name)] = _Entry(path, storage.get(str(name), []))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise CheckpointCorruptError(f"{path / METADATA}: {name!r} is not described: {error!r}") from error
    return Content("dcp", values, tensors)


class _Entry:
    """An entry that is not a tensor; ``read()`` gives its value, or None if it is more than plain data."""

    def __init__(self, path: Path, stored: list[tuple[Any, Any]]) -> None:
        self._path = path
        self._stored = stored

    def read(self) -> Any:
        """The value; a class in it is refused."""
        for _, info in self._stored:
            part = _part(self._path, (), (), info)
            if part.length <= _ENTRY_BYTES:
                try:
                    return _load_part(part)
                except CheckpointError:
                    return None
        return None


def read_value(content: Content, name: str) -> Any:
    """An entry of a DCP directory, a tensor of one element among them; None if there is none or it is not plain."""
    if name in content.tensors and content.tensors[name].numel == 1:
        tensor = content.tensors[name]
        out = torch.empty(1, dtype=tensor.dtype)
        tensor.read(0, 1, out)
        return out
    entry = content.values.get(name)
    return entry.read() if isinstance(entry, _Entry) else None


def _load_metadata(file: Path) -> _Record:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_BYTES)
        metadata = _Unpickler(data).load()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file} was not read, and none of it was run: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointCorruptError(f"{file} is damaged: {error!r}") from error
    if not isinstance(metadata, _Record) or type(metadata).__name__ != "Metadata":
        raise CheckpointCorruptError(f"{file} holds no metadata")
    return metadata


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointCorruptError(f"{METADATA}: {type(value).__name__} where a mapping is expected")
    return value


def _tensor(path: Path, name: str, described: _Record, stored: list[tuple[Any, Any]]) -> LazyTensor:
    state = described["properties"].state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    shape = _box(described["size"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{dtype!r} is not a dtype")
    infos = {_box(index["offset"]): info for index, info in stored}
    parts = [
        _part(path, _box(chunk["offsets"]), _box(chunk["sizes"]), infos[_box(chunk["offsets"])])
        for chunk in described["chunks"]
    ]
    _check_parts(path, name, shape, dtype, parts)
    return LazyTensor(shape, dtype, _assembly(name, shape, dtype, parts))


def _box(value: Any) -> tuple[int, ...]:
    sizes = tuple(value)
    if any(not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62 for size in sizes):
        raise ValueError(f"{sizes} are not sizes")
    return sizes


def _part(path: Path, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> _Part:
    name, (begin, length) = str(info["relative_path"]), _box((info["offset"], info["length"]))
    if PurePath(name).name != name or name in ("", ".", ".."):
        raise CheckpointCorruptError(f"{path / METADATA}: {name!r} is not a file of this directory")
    if info["transform_descriptors"]:
        raise CheckpointError(f"{path} was written with the extension {info['transform_descriptors']}: not supported")
    return _Part(offsets, sizes, path / name, begin, length)


def _check_parts(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: list[_Part]) -> None:
    """Raises CheckpointCorruptError unless the parts tile the tensor and have the bytes that they claim."""
    for part in parts:
        inside = len(part.offsets) == len(part.sizes) == len(shape) and all(
            begin + size <= end for begin, size, end in zip(part.offsets, part.sizes, shape, strict=True)
        )
        if not inside or prod(part.sizes) * dtype.itemsize > part.length:
            raise CheckpointCorruptError(f"{path}: a part of {name!r} lies outside of it, or has too few bytes")
    # Where thousands of ranks each have some rows, the rows of few begin before those of another end.
    open_parts: list[_Part] = []
    for part in sorted((part for part in parts if prod(part.sizes)), key=lambda part: part.offsets):
        open_parts = [other for other in open_parts if _end(other) > part.offsets[:1]]
        if any(_overlap(part, other) for other in open_parts):
            raise CheckpointCorruptError(f"{path}: two parts of {name!r} overlap")
        open_parts.append(part)
    if sum(prod(part.sizes) for part in parts) != prod(shape):
        raise CheckpointCorruptError(f"{path}: the parts of {name!r} do not make up the tensor")


def _end(part: _Part) -> tuple[int, ...]:
    """Of its rows; nothing has an end where there is no dimension."""
    return tuple(begin + size for begin, size in zip(part.offsets[:1], part.sizes[:1], strict=True))


def _overlap(a: _Part, b: _Part) -> bool:
    sides = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(p < q + m and q < p + n for p, n, q, m in sides)


def _assembly(name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: list[_Part]) -> Callable[[], Tensor]:
    def assemble() -> Tensor:
        full = torch.empty(shape, dtype=dtype)
        for part in parts:
            value = _load_part(part)
            if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != (part.sizes, dtype):
                raise CheckpointCorruptError(f"{part.file}: what lies at {part.begin} is no part of {name!r}")
            target = full
            for dimension, (begin, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
                target = target.narrow(dimension, begin, size)
            target.copy_(value)
        return full

    return assemble


def _load_part(part: _Part) -> Any:
    try:
        with part.file.open("rb") as file:
            file.seek(part.begin)
            data = file.read(part.length)
    except OSError as error:
        raise CheckpointCorruptError(f"{part.file} cannot be read: {error}") from error
    return load_bytes(data, f"{part.file} at {part.begin}")
