"""A directory of safetensors files, of which ranges are read by position: no tensor is mapped or loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.dtypes import DTYPES
from dist_ema.formats.safetensors import parse_header, read_header
from dist_ema.storage.local import LocalFile


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
def open_pretrained(files: Mapping[Path, Collection[str] | None]) -> Iterator[Ranges]:
    """Opens safetensors files, links among them, as the Hugging Face hub's cache has them.

    Args:
        files: the names of the tensors to take from each; None means all. What :func:`.folders.choose_files` gives.

    Raises:
        CheckpointCorruptError: the header of a file is not that of its bytes.
        CheckpointError: a file lacks a tensor that is wanted, or two have one tensor and no index says which counts.
    """
    found = Ranges()
    with ExitStack() as stack:
        for path, names in files.items():
            try:
                file = LocalFile(Path(os.path.realpath(path)))
                stack.callback(file.close)
                tensors = parse_header(read_header(file), file.size)
            except (OSError, ValueError) as error:
                raise CheckpointCorruptError(f"{path} cannot be read: {str(error)[:200]}") from error
            for name in tensors if names is None else names:
                if name not in tensors:
                    raise CheckpointError(f"{path} has no tensor {name!r}, which the index says is in it")
                if name in found.tensors:
                    other = found.places[name][1].name
                    raise CheckpointError(
                        f"{path.parent}: {other} and {path.name} both hold a tensor {name!r}, and there is no index "
                        f"(model.safetensors.index.json) that says which counts; --key {other} takes one file alone"
                    )
                found.tensors[name] = (tensors[name].shape, DTYPES[tensors[name].dtype])
                found.places[name] = (file, path, tensors[name].begin)
        yield found
