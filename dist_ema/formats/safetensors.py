"""Reads the header of a safetensors file: where each tensor is. No other module reads one.

A header may come from anyone, so it is checked before anything in it is used. The tensors have to follow each other
from the end of the header to the end of the file, as the format demands::

    | length, 8 bytes | header, JSON | tensor | tensor | ... | tensor |
                                     ^ 0      ^ data_offsets          ^ end of the file

Tensors that overlap would let a small file fill a disk. Bytes between tensors would be covered by no checksum.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dist_ema.formats.dtypes import DTYPES
from dist_ema.formats.strict_json import is_count, is_shape, parse, shown
from dist_ema.storage.base import OpenFile

#: The longest header that safetensors itself reads.
_MAX_BYTES = 100_000_000
#: Levels of JSON: the header, one of its tensors, its shape.
_DEPTH = 3
_LENGTH = 8


@dataclass(frozen=True)
class Entry:
    """Describes one tensor of a file.

    Attributes:
        dtype: its dtype by safetensors' name, one of :data:`DTYPES`.
        shape: its shape.
        begin: the position of its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Returns the bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(file: OpenFile) -> bytes:
    """Returns the first bytes of a file up to its tensors. Raises ValueError if the file is shorter; OSError."""
    # The file says how long its header is; that is bounded before so much memory is allocated.
    length = int.from_bytes(_first(file, _LENGTH), "little")
    if length > min(_MAX_BYTES, file.size - _LENGTH):
        raise ValueError(f"damaged header of {length} bytes; the file has {file.size}")
    return _first(file, _LENGTH + length)


def parse_header(header: bytes, size: int) -> dict[str, Entry]:
    """Returns the tensors of a file by name, in the order of the file.

    Args:
        header: the result of :func:`read_header`.
        size: bytes of the file.

    Raises:
        ValueError: it is no header, or the tensors that it describes overlap, leave bytes out or are incomplete.
    """
    # A hostile header may have any types: what is missing or of another type raises one of the errors below.
    try:
        described = parse(header[_LENGTH:], depth=_DEPTH)
        described.pop("__metadata__", None)
        found = []
        for name, entry in described.items():
            (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
            if dtype not in DTYPES or not is_shape(shape, DTYPES[dtype].itemsize):
                raise ValueError(f"{shown(name)} has an invalid dtype {shown(dtype)} or an invalid shape")
            if not is_count(begin) or not is_count(end):
                raise ValueError(f"{shown(name)} has invalid data_offsets")
            found.append((begin, end, name, Entry(dtype, tuple(shape), len(header) + begin)))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"invalid header: {type(error).__name__}: {str(error)[:200]}") from error
    # The tensors must fill the rest of the file, without gaps and overlaps.
    position = 0
    for begin, end, name, entry in sorted(found, key=lambda one: one[:2]):
        if begin != position or end - begin != entry.nbytes:
            raise ValueError(
                f"{shown(name)} lies at {begin} to {end}; expected {entry.nbytes} bytes at {position}: tensors lie one "
                "after the other"
            )
        position = end
    if len(header) + position != size:
        raise ValueError(f"its tensors end at {len(header) + position}, and the file has {size} bytes")
    return {name: entry for _, _, name, entry in sorted(found, key=lambda one: one[:2])}


def _first(file: OpenFile, length: int) -> bytes:
    data = bytearray(length)
    if file.size < length or not file.read([(0, memoryview(data))]):
        raise ValueError(f"it ends within its header: it has {file.size} bytes")
    return bytes(data)
