"""The safetensors files of full tensors, laid out before anyone writes, and written in place by whoever has the bytes.

The format (safetensors 0.4 and later): eight bytes with the length of the header, little-endian; the header, JSON that
gives each tensor's dtype, shape and byte range; then the tensors, without a gap.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dist_ema.checkpoints.manifest import is_tensor_name
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.sharding.runs import Runs

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
#: Bytes after which a file's writing to disk begins, while more is made ready.
_WRITE_BEHIND = 4 << 20
_OPEN_FILES = 8
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class TensorPlan(NamedTuple):
    """A full tensor to be written under ``name``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """One safetensors file.

    Attributes:
        name: of the file.
        header: everything before the tensors.
        tensors: what is in it, in the order of the file.
        offsets: of each tensor's first byte in the file, by tensor name.
        size: of the whole file.
    """

    name: str
    header: bytes
    tensors: tuple[TensorPlan, ...]
    offsets: dict[str, int]
    size: int


def parse_size(size: int | str) -> int:
    """Bytes of ``"5GB"`` (decimal, as Hugging Face reads it), ``"512MiB"`` or an int. Raises EMAConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size) if isinstance(size, str) else None
    unit = _UNITS.get(match[2].upper()) if match else None
    if match and unit:
        number = int(Decimal(match[1]) * unit)
    elif isinstance(size, int) and not isinstance(size, bool):
        number = size
    else:
        number = 0
    if number <= 0:
        raise EMAConfigError(f"max_shard_size={size!r}: allowed is a positive number of bytes, or a string like '5GB'")
    return number


def plan_files(tensors: Sequence[TensorPlan], limit: int, stem: str = "model") -> list[FilePlan]:
    """Distributes tensors, in order, over files of at most ``limit`` bytes, headers included; a tensor too large for
    that has a file of its own.

    One file is called ``{stem}.safetensors``, several ``{stem}-00001-of-0000n.safetensors``. Pure: every rank computes
    the same. Raises CheckpointError for a dtype or a name that safetensors does not have.
    """
    for tensor in tensors:
        if not is_tensor_name(tensor.name):
            raise CheckpointError(f"safetensors cannot store a tensor of the name {tensor.name!r}: rename it")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{tensor.name!r} is {tensor.dtype}, which safetensors cannot store")
    groups: list[list[TensorPlan]] = [[]]
    used = empty = len(_plan_file("", ()).header)
    for tensor in tensors:
        # A bound: the header of this tensor alone, with offsets that have as many digits as the limit.
        size = tensor.nbytes + len(json.dumps({tensor.name: _header_entry(tensor, limit)})) + 8
        if groups[-1] and used + size > limit:
            groups.append([])
            used = empty
        groups[-1].append(tensor)
        used += size
    count = len(groups)
    names = [f"{stem}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    return [_plan_file(name, group) for name, group in zip(names, groups, strict=True)]


def _plan_file(name: str, tensors: Sequence[TensorPlan]) -> FilePlan:
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    begins: dict[str, int] = {}
    for tensor in ordered:
        begins[tensor.name] = position
        header[tensor.name] = _header_entry(tensor, position)
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    offsets = {key: len(prefix) + begin for key, begin in begins.items()}
    return FilePlan(name, prefix, tuple(ordered), offsets, len(prefix) + position)


def _header_entry(tensor: TensorPlan, begin: int) -> dict[str, object]:
    offsets = [begin, begin + tensor.nbytes]
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}


def index_json(files: Sequence[FilePlan]) -> str:
    """The ``model.safetensors.index.json`` of several files."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)


def write_text(path: Path, text: str) -> None:
    """Writes a small file."""
    path.write_text(text, encoding="utf-8")


def create_file(directory: Path, plan: FilePlan) -> None:
    """Makes a file of its final size with its header; the tensors are holes yet."""
    with (directory / plan.name).open("xb") as file:
        file.write(plan.header)
        file.truncate(plan.size)


class Writer(Protocol):
    """Takes elements of full tensors."""

    def write(self, name: str, runs: Runs, values: Tensor) -> None:
        """Puts flat CPU ``values``, of the planned dtype, into the elements ``runs`` of the tensor ``name``."""

    def sync(self) -> None:
        """Waits until what was written is there for good."""

    def close(self) -> None:
        """Gives back what it holds. What was not synced need not be there."""


class RunWriter:
    """Writes elements of full tensors into files that exist, at the places that the plans give. A context manager."""

    def __init__(self, directory: Path, plans: Sequence[FilePlan]) -> None:
        self._directory = directory
        self._places = {
            tensor.name: (plan.name, plan.offsets[tensor.name], tensor) for plan in plans for tensor in plan.tensors
        }
        self._open: dict[str, int] = {}
        self._waiting: dict[str, int] = {}  # bytes of each file that was written to and not yet brought to disk

    def write(self, name: str, runs: Runs, values: Tensor) -> None:
        """Puts flat CPU ``values``, of the planned dtype, into the elements ``runs`` of the tensor ``name``."""
        file, offset, tensor = self._places[name]
        if values.dtype != tensor.dtype:
            raise CheckpointError(f"{name!r} is planned as {tensor.dtype}, got {values.dtype}")
        descriptor = self._descriptor(file)
        data = memoryview(values.contiguous().view(torch.uint8).numpy().data)
        item = tensor.dtype.itemsize
        for start, length in runs:
            _pwrite(descriptor, data[: length * item], offset + start * item)
            data = data[length * item :]
        self._waiting[file] = self._waiting.get(file, 0) + values.nbytes
        if self._waiting[file] >= _WRITE_BEHIND:
            _write_behind(descriptor)
            self._waiting[file] = 0

    def _descriptor(self, file: str) -> int:
        """Of an open file. Only a few are open at a time: tensors come in the order of the files, of which are many."""
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[file] = os.open(self._directory / file, os.O_WRONLY)
        return self._open[file]

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def sync(self) -> None:
        """Waits until what was written is on disk."""
        for file in self._waiting:
            os.fsync(self._descriptor(file))

    def close(self) -> None:
        """Closes the files, all of them even if one cannot be (a quota that only closing shows)."""
        with ExitStack() as stack:
            while self._open:
                stack.callback(os.close, self._open.popitem()[1])


def _write_behind(descriptor: int) -> None:
    """Has the system begin to bring a file's data to the disk, and does not wait: Linux would not begin before fsync.

    Guarantees nothing, so that a system without the call only takes longer.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    while data:  # the system may take a part only
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def sync(path: Path) -> None:
    """Waits until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
