"""Reads ranges of full tensors from the safetensors files that a manifest lists, and checks the files before use."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError
from dist_ema.formats.dtypes import DTYPES
from dist_ema.formats.manifest import LIVE, Key, Manifest, checksum
from dist_ema.formats.safetensors import parse_header, read_header
from dist_ema.formats.stored import StoredFile, StoredTensor
from dist_ema.formats.tensors import ReadableTensor
from dist_ema.geometry.runs import Rows, Runs, count
from dist_ema.storage import storage_reader
from dist_ema.storage.base import Closing, OpenFile
from dist_ema.storage.paths import StrPath, is_remote

#: Number of files that one reader keeps open: far fewer than a process may open, and enough for most checkpoints.
_OPEN_FILES = 256
#: Bytes between two rows up to which reading them as well is faster than one read for each row (3 us on a local disk,
#: far more from an object store); and the bytes that are read at a time then.
_GAP = 1 << 14
_BLOCK = 1 << 20
_REMOTE_GAP = 1 << 20
_REMOTE_BLOCK = 1 << 24


class RunReader(Closing):
    """Reads elements of full tensors. Local. A context manager; several threads may use it at a time.

    Opening it checks that every file is a plain file of the size that the manifest gives and has exactly the header
    that was written, and that the header describes the manifest's tensors, one after the other without a gap. So every
    byte of a file belongs to the header, which has a checksum, or to a tensor, which has a fingerprint. Files stay
    open, so a save that replaces the checkpoint meanwhile does not disturb the reader. If there are more than
    :data:`_OPEN_FILES`, some are closed and opened again.

    Args:
        path: the checkpoint, a directory or a URL.
        data: name of the data folder, from the manifest.
        files: the files to open, by their path in that folder.
        tensors: the tensors in these files, by ``(folder, name)``.

    Raises:
        CheckpointCorruptError: names the damaged file, and the tensor if the damage is in one.
    """

    def __init__(
        self,
        path: StrPath,
        data: str,
        files: Mapping[str, StoredFile],
        tensors: Mapping[Key, StoredTensor],
    ) -> None:
        self._folder = storage_reader(path) / data
        self._open: dict[str, OpenFile] = {}  # in the order of their last use
        self._users: Counter[str] = Counter()  # number of threads that are reading each file
        remote = is_remote(path)
        self._limit = sys.maxsize if remote else _OPEN_FILES  # an object takes no file descriptor
        self._gap, self._block = (_REMOTE_GAP, _REMOTE_BLOCK) if remote else (_GAP, _BLOCK)
        self._lock = threading.Lock()
        self._offsets: dict[Key, int] = {}
        self._tensors = tensors
        try:
            # Grouped once. Searching all tensors for each file would take time proportional to tensors times files.
            inside: dict[str, dict[Key, StoredTensor]] = {name: {} for name in files}
            for key, tensor in tensors.items():
                if tensor.file in inside:
                    inside[tensor.file][key] = tensor
            for name, file in files.items():
                self._offsets |= self._check_file(name, file, inside[name])
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, path: StrPath, manifest: Manifest, tensors: Mapping[Key, StoredTensor] | None = None) -> RunReader:
        """Opens the files that hold some tensors of the checkpoint ``path``; None means all files. Raises as the class
        does.
        """
        if tensors is None:
            return cls(path, manifest.data, manifest.files, manifest.tensors())
        files = {tensor.file: manifest.files[tensor.file] for tensor in tensors.values()}
        return cls(path, manifest.data, files, tensors)

    def dtype(self, key: Key) -> torch.dtype:
        """Returns the dtype of a tensor in the file."""
        return DTYPES[self._tensors[key].dtype]

    def tensor(self, key: Key) -> ReadableTensor:
        """Returns a tensor whose ranges can be read until this reader is closed."""
        stored = self._tensors[key]

        def read(start: int, stop: int, out: Tensor) -> None:
            self.read(key, ((start, stop - start),), out)

        is_live = key[0] == LIVE
        return ReadableTensor(stored.shape, self.dtype(key), read, stored.aliases, stored.digest, is_live)

    def read(self, key: Key, runs: Runs, out: Tensor) -> None:
        """Copies the elements ``runs`` of a tensor into ``out``, a 1D CPU tensor of the dtype in the file.

        Raises CheckpointCorruptError if the file ends too early or is gone, OSError if it cannot be read.
        """
        tensor = self._tensors[key]
        position = 0
        with self._file(tensor.file) as file:
            for part in runs.parts() if isinstance(runs, Rows) else [runs]:
                numel = count(part)
                if not self._read_part(file, self._offsets[key], part, out[position : position + numel]):
                    raise CheckpointCorruptError(f"{tensor.file} ends before {key[1]!r} does")
                position += numel

    def _read_part(self, file: OpenFile, offset: int, runs: Runs, out: Tensor) -> bool:
        """Implements :meth:`OpenFile.read` for runs of a tensor that begins at ``offset``."""
        item = out.element_size()
        if isinstance(runs, Rows) and (runs.step - runs.length) * item <= self._gap and runs.step * item <= self._block:
            return _read_blocks(file, offset, runs, out, self._block)
        data = memoryview(out.view(torch.uint8).numpy().data)
        parts = []
        position = 0
        for start, length in runs:
            parts.append((offset + start * item, data[position : position + length * item]))
            position += length * item
        return file.read(parts)

    @contextmanager
    def _file(self, name: str) -> Iterator[OpenFile]:
        """Yields an open file, which no other thread closes inside the block."""
        with self._lock:
            file = self._open.pop(name) if name in self._open else self._opened(name)
            self._open[name] = file
            self._users[name] += 1
            self._close_some()
        try:
            yield file
        finally:
            with self._lock:
                self._users[name] -= 1

    def _opened(self, name: str) -> OpenFile:
        try:
            return self._folder.file(name)
        except (
            FileNotFoundError,
            NotADirectoryError,
        ) as error:  # perhaps a save has removed it; then everything is read again
            raise CheckpointCorruptError(f"{self._folder}/{name} is listed but cannot be read: {error}") from error

    def _close_some(self) -> None:
        """Closes the files that were not used for the longest time, until no more than the limit are open."""
        unused = (name for name in list(self._open) if not self._users[name])
        while len(self._open) > self._limit and (name := next(unused, None)) is not None:
            self._open.pop(name).close()

    def _check_file(self, name: str, file: StoredFile, tensors: Mapping[Key, StoredTensor]) -> dict[Key, int]:
        path = f"{self._folder}/{name}"
        link = ""
        try:
            opened = self._open[name] = self._folder.file(name)
            self._close_some()  # never this file, which is the last in order
            link = "" if opened.link is None else f" ({opened.link})"
            if opened.size != file.size:
                raise CheckpointCorruptError(f"{path} has {opened.size} bytes, but {file.size} were written{link}")
            header = read_header(opened)
            if checksum(header) != file.header:
                raise CheckpointCorruptError(f"{path}: damaged header, or the header of another file{link}")
            found = parse_header(header, file.size)
        except (OSError, ValueError) as error:
            why = "is listed but cannot be read" if isinstance(error, OSError) else "is damaged"
            raise CheckpointCorruptError(f"{path} {why}: {error}{link}") from error
        # Other readers of the file believe its header, so it has to name the same tensors as the manifest.
        listed = {name: (tensor.dtype, tensor.shape) for (_, name), tensor in tensors.items()}
        if {name: (entry.dtype, entry.shape) for name, entry in found.items()} != listed:
            raise CheckpointCorruptError(f"{path} does not hold the tensors that the manifest lists for it")
        return {key: found[key[1]].begin for key in tensors}

    def close(self) -> None:
        """Closes the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def _read_blocks(file: OpenFile, offset: int, rows: Rows, out: Tensor, limit: int) -> bool:
    """Reads rows at equal distances together with the elements between them, ``limit`` bytes at a time, and copies the
    rows.

    ::

        file   |####....|####....|####....|    one read
        out    |####|####|####|                one copy
    """
    item = out.element_size()
    in_block = min(limit // (rows.step * item), rows.number)
    block = torch.empty(in_block * rows.step, dtype=out.dtype)
    data = memoryview(block.view(torch.uint8).numpy().data)
    for first in range(0, rows.number, in_block):
        number = min(in_block, rows.number - first)
        # Nothing after the last row is read: the file may end there.
        size = ((number - 1) * rows.step + rows.length) * item
        if not file.read([(offset + (rows.start + first * rows.step) * item, data[:size])]):
            return False
        wanted = block.as_strided((number, rows.length), (rows.step, 1))
        out[first * rows.length : (first + number) * rows.length].view(number, rows.length).copy_(wanted)
    return True


def damaged_error(path: StrPath, found: Sequence[str]) -> CheckpointCorruptError:
    """Returns the error that lists the damaged files and tensors ``found`` in a checkpoint."""
    return CheckpointCorruptError(f"{path} is damaged, or not the checkpoint that was saved: {'; '.join(found)}")
