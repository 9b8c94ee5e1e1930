"""Reads directories of ``torch.distributed.checkpoint`` without its unpickler, which would run code that a file names.

``.metadata`` is a pickle. The unpickler here accepts only the names of DCP's own classes, and makes plain records of
their objects. Each part of a tensor is a file of torch.save inside a ``.distcp`` file, and is read by
:mod:`.torch_save` as any such file. So are the few entries that are not tensors.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.strict_json import MAX_DIMENSIONS, is_count, is_shape, shown
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.formats.torch_inert import InertUnpickler, Record, RefusedError
from dist_ema.formats.torch_save import load_bytes, locate
from dist_ema.geometry.runs import Runs, box_runs, overlap
from dist_ema.storage.local import open_plain, open_ranges

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    f"{_MODULE}.{name}"
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
_RECORDS |= {"torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout"}
_RECORDS |= {f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath")}
_MAX_BYTES = 1 << 28
#: Comparisons of two parts that one tensor may take, about a second: enough for half a million parts in rows, or for
#: rows of 512 parts beside each other.
_COMPARISONS = 1 << 20
#: Bytes at most of an entry that is not a tensor; larger ones are not read.
_ENTRY_BYTES = 1 << 20


class _Unpickler(InertUnpickler):
    """Accepts the names that occur in DCP's metadata."""

    def named(self, name: str) -> None:
        """Implements :meth:`InertUnpickler.named`."""
        if name not in _RECORDS:
            raise RefusedError(f"{name} is not a class of torch.distributed.checkpoint's metadata")


def _get(record: Any, key: str) -> Any:
    """Returns an attribute of an object of DCP."""
    return record.state.get(key) if isinstance(record.state, dict) else None


@dataclass(frozen=True)
class _Part:
    """Describes a box of a tensor, and where its bytes are."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int
    length: int


def open_directory(path: Path) -> Content:
    """Opens a directory; ``values`` are its entries that are not tensors, as :func:`read_value` takes them.

    Raises:
        CheckpointError: the metadata name a class that is not DCP's.
        CheckpointCorruptError: they are damaged, or the parts of a tensor overlap or do not make it up.
    """
    metadata = _load_metadata(path / METADATA)
    storage: dict[str, list[tuple[Any, Any]]] = {}
    for index, info in _mapping(_get(metadata, "storage_data")).items():
        if not isinstance(index, Record) or not isinstance(info, Record):
            raise CheckpointCorruptError(f"{path / METADATA}: invalid index {shown(index)}")
        storage.setdefault(_name(_get(index, "fqn")), []).append((index, info))
    tensors: dict[str, LazyTensor] = {}
    values: dict[str, Any] = {}
    for name, described in _mapping(_get(metadata, "state_dict_metadata")).items():
        known = _name(name)
        try:
            if type(described).__name__ == "TensorStorageMetadata":
                tensors[known] = _tensor(path, known, described, storage.get(known, []))
            else:
                values[known] = _Entry(path, storage.get(known, []))
        except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            raise CheckpointCorruptError(
                f"{path / METADATA}: invalid description of {shown(known)}: {str(error)[:200]}"
            ) from error
    return Content("dcp", values, tensors)


class _Entry:
    """Describes an entry that is not a tensor."""

    def __init__(self, path: Path, stored: list[tuple[Any, Any]]) -> None:
        self._path = path
        self._stored = stored

    def read(self) -> Any:
        """Returns the value; None if it is large, damaged, or holds more than data."""
        for _, info in self._stored:
            part = _part(self._path, (), (), info)
            if part.length <= _ENTRY_BYTES:
                try:
                    return _load_part(part)
                except CheckpointError:
                    return None
        return None


def read_value(content: Content, name: str) -> Any:
    """Returns an entry of a DCP directory, or a tensor of one element; None if there is none, or as
    :meth:`_Entry.read`.
    """
    if name in content.tensors and content.tensors[name].numel == 1:
        tensor = content.tensors[name]
        out = torch.empty(1, dtype=tensor.dtype)
        tensor.read(0, 1, out)
        return out
    entry = content.values.get(name)
    return entry.read() if isinstance(entry, _Entry) else None


def _load_metadata(file: Path) -> Record:
    try:
        with open_plain(file) as opened:
            data = opened.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        metadata = _Unpickler(io.BytesIO(data)).load()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from error
    except RefusedError as error:
        raise CheckpointError(f"{file} was not read, and none of it was run: {error}") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointCorruptError(f"{file} is damaged: {type(error).__name__}: {str(error)[:200]}") from error
    if not isinstance(metadata, Record) or type(metadata).__name__ != "Metadata":
        raise CheckpointCorruptError(f"{file} holds no metadata")
    return metadata


def _mapping(value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointCorruptError(f"{METADATA}: {type(value).__name__}; expected a mapping")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise CheckpointCorruptError(f"{METADATA}: invalid name {shown(value)} of an entry")
    return value


def _tensor(path: Path, name: str, described: Record, stored: list[tuple[Any, Any]]) -> LazyTensor:
    state = _get(described, "properties").state
    dtype = state[0] if isinstance(state, tuple) else state["dtype"]
    shape = _box(_get(described, "size"))
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{shown(dtype)} is not a dtype")
    if not is_shape(shape, dtype.itemsize):
        raise ValueError(f"invalid shape of {len(shape)} dimensions")
    # The description lists boxes, the storage data say where their bytes are; they meet by the box's offsets.
    infos = {_box(_get(index, "offset")): info for index, info in stored}
    parts = [
        _part(path, _box(_get(chunk, "offsets")), _box(_get(chunk, "sizes")), infos[_box(_get(chunk, "offsets"))])
        for chunk in _get(described, "chunks")
    ]
    _check_parts(path, name, shape, dtype, parts)
    return _Parted(name, shape, dtype, parts)


def _box(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or len(value) > MAX_DIMENSIONS or not all(map(is_count, value)):
        raise ValueError(f"invalid sizes {shown(value)}, {len(value)} of them")
    return tuple(value)


def _part(path: Path, offsets: tuple[int, ...], sizes: tuple[int, ...], info: Any) -> _Part:
    name, (begin, length) = _get(info, "relative_path"), _box((_get(info, "offset"), _get(info, "length")))
    if not isinstance(name, str):
        raise ValueError(f"{shown(name)} is not the name of a file")
    if PurePath(name).name != name or name in ("", ".", ".."):  # it would be a way out of the directory
        raise CheckpointCorruptError(f"{path / METADATA}: {shown(name)} is not a file of this directory")
    if _get(info, "transform_descriptors"):
        used = [shown(one) for one in _get(info, "transform_descriptors")][:8]
        raise CheckpointError(f"{path} was written with the extensions {', '.join(used)}: not supported")
    return _Part(offsets, sizes, path / name, begin, length)


def _check_parts(path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: list[_Part]) -> None:
    """Raises CheckpointCorruptError unless the parts tile the tensor and have the bytes that they claim."""
    for part in parts:
        inside = len(part.offsets) == len(part.sizes) == len(shape) and all(
            begin + size <= end for begin, size, end in zip(part.offsets, part.sizes, shape, strict=True)
        )
        if not inside or prod(part.sizes) * dtype.itemsize > part.length:
            raise CheckpointCorruptError(f"{path}: a part of {name!r} lies outside of it, or has too few bytes")
    # Parts inside of the tensor that do not overlap and have as many elements as the tensor make it up.
    if sum(prod(part.sizes) for part in parts) != prod(shape):
        problem = "overlap" if _any_overlap(path, name, parts) else "do not make up the tensor"
        raise CheckpointCorruptError(f"{path}: the parts of {name!r} {problem}")
    if _any_overlap(path, name, parts):
        raise CheckpointCorruptError(f"{path}: two parts of {name!r} overlap")


def _any_overlap(path: Path, name: str, parts: list[_Part]) -> bool:
    """Returns whether two parts of a tensor overlap, quickly also if thousands of ranks hold some rows each.

    Parts are sorted along the dimension with the most different starts, and each is compared only with those that have
    not ended there. Raises CheckpointError if even that takes too many comparisons.
    """
    parts = [part for part in parts if prod(part.sizes)]
    if len(parts) < 2:
        return False
    dimensions = range(len(parts[0].offsets))
    along = max(dimensions, key=lambda dimension: len({part.offsets[dimension] for part in parts}), default=None)
    if along is None:
        return True  # two parts of a tensor of no dimensions, which has one element
    open_parts: list[_Part] = []
    left = _COMPARISONS
    for part in sorted(parts, key=lambda part: part.offsets[along]):
        open_parts = [other for other in open_parts if other.offsets[along] + other.sizes[along] > part.offsets[along]]
        left -= len(open_parts)
        if left < 0:
            raise CheckpointError(
                f"{path}: {name!r} has {len(parts)} parts, and too many beside each other to compare them"
            )
        if any(_overlap(part, other) for other in open_parts):
            return True
        open_parts.append(part)
    return False


def _overlap(a: _Part, b: _Part) -> bool:
    sides = zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    return all(p < q + m and q < p + n for p, n, q, m in sides)


class _Parted(LazyTensor):
    """Reads ranges of a tensor in parts, from the places of the parts in the files."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: list[_Part]) -> None:
        super().__init__(shape, dtype, _assembly(name, shape, dtype, parts))
        self._name = name
        self._parts = parts

    @cached_property
    def _runs(self) -> list[Runs]:
        """Returns the runs of each part in the tensor."""
        boxes = [zip(part.offsets, part.sizes, strict=True) for part in self._parts]
        return [box_runs(self.shape, [((begin, size),) if size else () for begin, size in box]) for box in boxes]

    @cached_property
    def _begins(self) -> list[int] | None:
        """Returns the position of each part's elements in its file; None if they are not contiguous."""
        begins = []
        for part in self._parts:
            view, begin = locate(part.file, part.begin, part.length, f"{part.file} at {part.begin}")
            _check_value(view.shape, view.dtype, part, self.dtype, self._name)
            if not view.is_contiguous:
                return None
            begins.append(begin + view.offset * view.dtype.itemsize)
        return begins

    def read_range(self, start: int, stop: int, out: Tensor) -> None:
        """Implements :meth:`LazyTensor.read_range` without loading the tensor."""
        if self._begins is None:
            super().read_range(start, stop, out)
            return
        for part, runs, begin in zip(self._parts, self._runs, self._begins, strict=True):
            found = list(overlap(runs, start, stop))
            if found:
                wanted = [
                    (
                        begin + local * out.itemsize,
                        memoryview(out[inside : inside + size].view(torch.uint8).numpy().data),
                    )
                    for local, inside, size in found
                ]
                with closing(open_ranges(part.file)) as file:
                    if not file.read(wanted):
                        raise CheckpointCorruptError(f"{part.file} ends before a part of {self._name!r} does")


def _check_value(shape: Any, found: Any, part: _Part, dtype: torch.dtype, name: str) -> None:
    if (tuple(shape), found) != (part.sizes, dtype):
        raise CheckpointCorruptError(
            f"{part.file}: no part of {name!r} at byte {part.begin}, where the metadata expect one"
        )


def _assembly(name: str, shape: tuple[int, ...], dtype: torch.dtype, parts: list[_Part]) -> Callable[[], Tensor]:
    def assemble() -> Tensor:
        full = torch.empty(shape, dtype=dtype)
        for part in parts:
            value = _load_part(part)
            if not isinstance(value, Tensor):
                raise CheckpointCorruptError(f"{part.file} holds no tensor at byte {part.begin}")
            _check_value(value.shape, value.dtype, part, dtype, name)
            target = full
            for dimension, (begin, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
                target = target.narrow(dimension, begin, size)
            target.copy_(value)
        return full

    return assemble


def _load_part(part: _Part) -> Any:
    try:
        with open_plain(part.file) as file:
            if part.begin + part.length > file.seek(0, io.SEEK_END):
                raise CheckpointCorruptError(f"{part.file} ends before the part at byte {part.begin} does")
            file.seek(part.begin)
            data = file.read(part.length)
    except OSError as error:
        raise CheckpointCorruptError(f"{part.file} cannot be read: {error}") from error
    return load_bytes(data, f"{part.file} at {part.begin}")
