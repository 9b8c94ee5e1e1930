"""Computes the safetensors files of full tensors before a byte of them is written. Pure, so all ranks agree.

The format (safetensors 0.4 and later): eight bytes with the length of the header, little-endian; the header, JSON that
gives each tensor's dtype, shape and byte range; then the tensors, without a gap. All shapes are known in advance, and
so is the place of every element in the files. Each rank can therefore write its own elements.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple

import torch

from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats.dtypes import DTYPE_NAMES
from dist_ema.formats.stored import is_tensor_name

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class TensorPlan(NamedTuple):
    """Describes a full tensor that will be written under ``name``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Returns the number of bytes in the file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FilePlan:
    """Describes one safetensors file.

    Attributes:
        name: the name of the file.
        header: all bytes before the tensors.
        tensors: the tensors in the order of the file.
        offsets: position of each tensor's first byte in the file, by the tensor's name.
        size: bytes of the file.
    """

    name: str
    header: bytes
    tensors: tuple[TensorPlan, ...]
    offsets: dict[str, int]
    size: int


def parse_size(size: int | str) -> int:
    """Returns the bytes of ``"5GB"`` (decimal, as Hugging Face reads it), ``"512MiB"`` or an int. Raises
    EMAConfigError.

    >>> parse_size("5GB"), parse_size("0.5 KiB"), parse_size(7)
    (5000000000, 512, 7)
    """
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


def plan_files(
    tensors: Sequence[TensorPlan], limit: int, stem: str = "model", metadata: Mapping[str, str] | None = None
) -> list[FilePlan]:
    """Distributes tensors, in order, over files of at most ``limit`` bytes, including headers.

    A larger tensor gets a file of its own. A single file is called ``{stem}.safetensors``, several are called
    ``{stem}-00001-of-0000n.safetensors``. ``metadata`` is added to the header of each file. Raises CheckpointError for
    a dtype or a name that safetensors does not have.

    >>> (file,) = plan_files([TensorPlan("weight", torch.float32, (2, 3))], limit=10**9)
    >>> file.name, file.size - len(file.header), file.offsets["weight"] == len(file.header)
    ('model.safetensors', 24, True)
    """
    for tensor in tensors:
        if not is_tensor_name(tensor.name):
            raise CheckpointError(f"safetensors cannot store a tensor of the name {tensor.name!r}: rename it")
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{tensor.name!r} is {tensor.dtype}, which safetensors cannot store")
    # First the tensors are distributed: file names, and with them headers, depend on how many files there are.
    groups: list[list[TensorPlan]] = [[]]
    metadata = metadata or {}
    used = empty = len(_plan_file("", (), metadata).header)
    for tensor in tensors:
        # An upper bound: the tensor, and its entry in the header if its offsets had as many digits as the limit.
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
    return [_plan_file(name, group, metadata) for name, group in zip(names, groups, strict=True)]


def _plan_file(name: str, tensors: Sequence[TensorPlan], metadata: Mapping[str, str]) -> FilePlan:
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    begins: dict[str, int] = {}
    for tensor in ordered:
        begins[tensor.name] = position
        header[tensor.name] = _header_entry(tensor, position)
        position += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, as safetensors wants it
    prefix = len(text).to_bytes(8, "little") + text
    offsets = {key: len(prefix) + begin for key, begin in begins.items()}
    return FilePlan(name, prefix, tuple(ordered), offsets, len(prefix) + position)


def _header_entry(tensor: TensorPlan, begin: int) -> dict[str, object]:
    offsets = [begin, begin + tensor.nbytes]
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}


def index_json(files: Sequence[FilePlan]) -> str:
    """Returns the text of ``model.safetensors.index.json``, which says in which of several files each tensor is."""
    weight_map = {tensor.name: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
