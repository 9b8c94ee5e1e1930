"""Elements of full tensors out of safetensors files that a manifest lists, by range; nothing in them is believed.

With :mod:`dist_ema.storage`, the only module that opens files.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.geometry import Runs
from dist_ema.manifest import MAX_BYTES, NAME, Manifest, StoredFile, StoredTensor, checksum
from dist_ema.storage import DTYPE_NAMES

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
#: The longest header that safetensors itself reads.
_MAX_HEADER = 100_000_000


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``. Local.

    Raises:
        CheckpointError: there is none, or it cannot be read, or it has another format version.
        CheckpointCorruptError: it is damaged.
    """
    return Manifest.from_bytes(read_manifest_bytes(path))


def read_manifest_bytes(path: Path) -> bytes:
    """The text of a manifest, unchecked. Raises as :func:`read_manifest`."""
    file = path / NAME
    try:
        descriptor = _open_regular(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: it has no {NAME}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    with os.fdopen(descriptor, "rb") as opened:
        return opened.read(MAX_BYTES + 1)


class RunReader:
    """Reads elements of full tensors. A context manager; may be used from several threads.

    Opening it checks that every file is there, a plain file of the size that the manifest gives, with the very header
    that was written, and that the header describes the manifest's tensors, one after the other without a gap. So every
    byte of a file belongs to its header or to a tensor, which has a fingerprint.

    Args:
        folder: the checkpoint's data folder.
        files: of the manifest.
        tensors: what to look for: the tensors of all folders, by ``(folder, name)``.

    Raises:
        CheckpointCorruptError: names the file, and the tensor if it is one.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, StoredFile], tensors: Mapping[tuple[str, str], StoredTensor]
    ) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._offsets: dict[tuple[str, str], int] = {}
        self._tensors = tensors
        try:
            for name, file in files.items():
                inside = {key: tensor for key, tensor in tensors.items() if tensor.file == name}
                self._offsets |= self._check_file(name, file, inside)
        except BaseException:
            self.close()
            raise

    def dtype(self, key: tuple[str, str]) -> torch.dtype:
        """The dtype in the file."""
        return DTYPES[self._tensors[key].dtype]

    def read(self, key: tuple[str, str], runs: Runs, out: Tensor) -> None:
        """Puts the elements ``runs`` of a tensor into the flat CPU tensor ``out`` of the dtype in the file."""
        tensor = self._tensors[key]
        data = memoryview(out.view(torch.uint8).numpy().data)
        item = out.element_size()
        for start, length in runs:
            position = self._offsets[key] + start * item
            part, data = data[: length * item], data[length * item :]
            while part:
                count = os.preadv(self._open[tensor.file], [part], position)
                if count == 0:
                    raise CheckpointCorruptError(f"{tensor.file} ends before {key[1]!r} does")
                part, position = part[count:], position + count

    def _check_file(
        self, name: str, file: StoredFile, tensors: Mapping[tuple[str, str], StoredTensor]
    ) -> dict[tuple[str, str], int]:
        path = self._folder / name
        for parent in (self._folder, *(self._folder / folder for folder in list(Path(name).parents)[:-1])):
            if parent.is_symlink():
                raise CheckpointCorruptError(f"{parent} is a symbolic link: not followed")
        try:
            descriptor = self._open[name] = _open_regular(path)
        except OSError as error:
            raise CheckpointCorruptError(f"{path} is listed but cannot be read: {error}") from error
        size = os.fstat(descriptor).st_size
        if size != file.size:
            raise CheckpointCorruptError(f"{path} has {size} bytes, but {file.size} were written")
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if length > min(_MAX_HEADER, size - 8):
            raise CheckpointCorruptError(f"{path} has a damaged header: {length} bytes long")
        header = os.pread(descriptor, 8 + length, 0)
        if len(header) != 8 + length or checksum(header) != file.header:
            raise CheckpointCorruptError(f"{path} has a damaged header, or that of another file")
        return _offsets(path, header, size, tensors)

    def __enter__(self) -> RunReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()


def _offsets(
    path: Path, header: bytes, size: int, tensors: Mapping[tuple[str, str], StoredTensor]
) -> dict[tuple[str, str], int]:
    """Where each tensor begins, after checking that the header says what the manifest says, and covers the file."""
    try:
        found = json.loads(header[8:])
        found.pop("__metadata__", None)
        described = {}
        for name, entry in found.items():
            begin, end = map(_size, entry["data_offsets"])
            described[name] = (entry["dtype"], tuple(map(_size, entry["shape"])), begin, end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{path} has a header that is none: {error!r}") from error
    listed = {name: (tensor.dtype, tensor.shape) for (_, name), tensor in tensors.items()}
    if {name: entry[:2] for name, entry in described.items()} != listed:
        raise CheckpointCorruptError(f"{path} does not hold the tensors that the manifest lists for it")
    position = 0
    offsets: dict[tuple[str, str], int] = {}
    for key, tensor in sorted(tensors.items(), key=lambda item: described[item[0][1]][2:]):
        begin, end = described[key[1]][2:]
        if begin != position or end - begin != tensor.nbytes:
            raise CheckpointCorruptError(f"{path}: {key[1]!r} lies at {begin} to {end}, where it cannot")
        offsets[key] = len(header) + begin
        position = end
    if len(header) + position != size:
        raise CheckpointCorruptError(f"{path} has {size - len(header) - position} bytes that belong to no tensor")
    return offsets


def _size(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{number!r} is not an offset or a size")
    return number


def _open_regular(path: Path) -> int:
    """Opens a plain file for reading; never through a symbolic link, and without waiting for a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return descriptor
