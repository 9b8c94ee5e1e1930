"""Opens directories of safetensors files, and reads ranges by position: no tensor is mapped or loaded whole."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.dtypes import DTYPES
from dist_ema.formats.safetensors import parse_header, read_header
from dist_ema.formats.tensors import Read, ReadableTensor
from dist_ema.storage.local import LocalFile, open_ranges


@contextmanager
def open_pretrained(files: Mapping[Path, Collection[str] | None]) -> Iterator[dict[str, ReadableTensor]]:
    """Opens safetensors files. They may be links, as in the cache of the Hugging Face Hub.

    Args:
        files: the names of the tensors to take from each file, as :func:`.folders.choose_files` returns them; None
            means all.

    Raises:
        CheckpointCorruptError: the header of a file does not describe its bytes.
        CheckpointError: a file lacks a tensor that is wanted, or two files have one tensor and no index says which
            counts.
    """
    found: dict[str, ReadableTensor] = {}
    holders: dict[str, Path] = {}
    with ExitStack() as stack:
        for path, names in files.items():
            try:
                file = open_ranges(path)
                stack.callback(file.close)
                tensors = parse_header(read_header(file), file.size)
            except OSError as error:
                raise CheckpointCorruptError(f"{path} cannot be read: {error.strerror or error}") from error
            except ValueError as error:
                raise CheckpointCorruptError(f"{path} is damaged: {str(error)[:200]}") from error
            for name in tensors if names is None else names:
                if name not in tensors:
                    raise CheckpointError(f"{path} has no tensor {name!r}, which the index says is in it")
                if name in found:
                    other = holders[name].name
                    raise CheckpointError(
                        f"{path.parent}: {other} and {path.name} both hold a tensor {name!r}, and there is no index "
                        f"(model.safetensors.index.json) that says which counts; --key {other} takes one file alone"
                    )
                entry = tensors[name]
                found[name] = ReadableTensor(entry.shape, DTYPES[entry.dtype], _reader(file, path, name, entry.begin))
                holders[name] = path
        yield found


def _reader(file: LocalFile, path: Path, name: str, begin: int) -> Read:
    """Returns a function that reads a tensor whose bytes start at ``begin`` of a file."""

    def read(start: int, stop: int, out: Tensor) -> None:
        data = memoryview(out.view(torch.uint8).numpy().data)
        if not file.read([(begin + start * out.itemsize, data)]):
            raise CheckpointCorruptError(f"{path} ends before {name!r} does")

    return read
