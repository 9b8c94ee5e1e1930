"""A directory of safetensors files, of which ranges are read by position: no tensor is mapped or loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dist_ema.checkpoints.dtypes import DTYPES
from dist_ema.checkpoints.header import parse_header, read_header
from dist_ema.checkpoints.storage.local import LocalFile
from dist_ema.errors import CheckpointCorruptError


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
                file = LocalFile(Path(os.path.realpath(path)))
                stack.callback(file.close)
                tensors = parse_header(read_header(file), file.size)
            except (OSError, ValueError) as error:
                raise CheckpointCorruptError(f"{path} cannot be read: {str(error)[:200]}") from error
            for name, entry in tensors.items():
                if name in found.tensors:
                    raise CheckpointCorruptError(f"{directory}: two files hold a tensor {name!r}")
                found.tensors[name] = (entry.shape, DTYPES[entry.dtype])
                found.places[name] = (file, path, entry.begin)
        yield found
