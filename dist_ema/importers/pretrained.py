"""A directory of safetensors files, of which ranges are read by position: no tensor is mapped or loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dist_ema.checkpoints.dtypes import DTYPES
from dist_ema.checkpoints.storage.local import LocalFile
from dist_ema.checkpoints.strict_json import is_count, is_shape, parse
from dist_ema.errors import CheckpointCorruptError

#: The longest header that safetensors itself reads; levels of JSON: the header, one of its tensors, its shape.
_HEADER_BYTES, _HEADER_DEPTH = 100_000_000, 3


@dataclass
class Ranges:
    """The tensors of such a directory; several threads may read at a time.

    Attributes:
        tensors: shape and dtype of each, by name.
    """

    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    places: dict[str, tuple[LocalFile, Path, int]] = field(default_factory=dict)

    def read(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Puts elements ``[start, stop)`` of a tensor, flattened, into the flat CPU tensor ``out`` of its dtype.

        Raises CheckpointCorruptError if the file ends before that, OSError.
        """
        file, path, begin = self.places[name]
        data = memoryview(out.view(torch.uint8).numpy().data)
        if not file.read([(begin + start * out.itemsize, data)]):
            raise CheckpointCorruptError(f"{path} ends before {name!r} does")


@contextmanager
def open_pretrained(directory: Path) -> Iterator[Ranges]:
    """Opens all safetensors files of a directory, links among them, as the Hugging Face hub's cache has them.

    Raises CheckpointCorruptError for one whose header is not that of its file, or two that have one tensor.
    """
    found = Ranges()
    with ExitStack() as stack:
        for path in sorted(directory.glob("*.safetensors")):
            try:
                file = LocalFile(path.resolve())
                stack.callback(file.close)
                tensors = _header(file)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointCorruptError(f"{path} cannot be read: {str(error)[:200]}") from error
            for name, (shape, dtype, begin) in tensors.items():
                if name in found.tensors:
                    raise CheckpointCorruptError(f"{directory}: two files hold a tensor {name!r}")
                found.tensors[name], found.places[name] = (shape, dtype), (file, path, begin)
        yield found


def _header(file: LocalFile) -> dict[str, tuple[tuple[int, ...], torch.dtype, int]]:
    """Shape, dtype and first byte of each tensor. Raises ValueError and others for a header that cannot be right."""
    length = int.from_bytes(_bytes(file, 0, 8), "little")
    if length > min(_HEADER_BYTES, file.size - 8):
        raise ValueError(f"its header has {length} bytes, and the file {file.size}")
    described = parse(_bytes(file, 8, length), depth=_HEADER_DEPTH)
    described.pop("__metadata__", None)
    tensors = {}
    for name, entry in described.items():
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not (is_shape(shape, dtype.itemsize) and is_count(begin) and is_count(end)):
            raise ValueError(f"{name!r} has an invalid shape or invalid data_offsets")
        if end - begin != torch.Size(shape).numel() * dtype.itemsize or 8 + length + end > file.size:
            raise ValueError(f"{name!r} lies at {begin} to {end}, which is not its size, or not in the file")
        tensors[name] = (tuple(shape), dtype, 8 + length + begin)
    return tensors


def _bytes(file: LocalFile, begin: int, count: int) -> bytes:
    data = bytearray(count)
    if file.size < begin + count or not file.read([(begin, memoryview(data))]):
        raise ValueError("it ends within its header")
    return bytes(data)
