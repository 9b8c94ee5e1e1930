"""Reads elements of full tensors, by ranges of the safetensors files that a manifest lists; checks files before use."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dist_ema.checkpoints.dtypes import DTYPES
from dist_ema.checkpoints.manifest import MAX_BYTES, NAME, Manifest, StoredFile, StoredTensor, checksum
from dist_ema.checkpoints.storage import storage_reader
from dist_ema.checkpoints.storage.base import OpenFile
from dist_ema.checkpoints.storage.paths import StrPath, is_remote
from dist_ema.checkpoints.strict_json import parse, shown
from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.sharding.runs import Runs

T = TypeVar("T")
#: How often a reader starts over because a save has replaced the checkpoint that it was reading.
REREADS = 2
#: The longest header that safetensors itself reads.
_MAX_HEADER = 100_000_000
#: Levels of JSON: the header, one of its tensors, its shape.
_HEADER_DEPTH = 3
#: Files that one reader keeps open: far fewer than a process may open, and as many as most checkpoints have.
_OPEN_FILES = 256


def read_manifest(path: StrPath) -> Manifest:
    """The manifest of the checkpoint at ``path``, a directory or a URL. Local.

    Raises:
        CheckpointError: there is none, or it cannot be read, or it has another format version.
        CheckpointCorruptError: it is damaged.
    """
    return Manifest.from_bytes(read_manifest_bytes(path))


def read_manifest_bytes(path: StrPath) -> bytes:
    """The text of a manifest, as it is. Local. Raises as :func:`read_manifest`."""
    try:
        file = storage_reader(path).file(NAME)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: it has no {NAME}") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path} is no checkpoint: it is a file, and a checkpoint is a directory") from error
    except OSError as error:
        raise CheckpointError(f"{NAME} of {path} cannot be read: {error.strerror or error}") from error
    try:
        if file.size > MAX_BYTES:
            raise CheckpointCorruptError(f"{NAME} of {path} has {file.size} bytes; the limit is {MAX_BYTES}")
        text = bytearray(file.size)
        if not file.read([(0, memoryview(text))]):
            raise CheckpointCorruptError(f"{NAME} of {path} became shorter while it was read")
    except OSError as error:
        raise CheckpointError(f"{NAME} of {path} cannot be read: {error.strerror or error}") from error
    finally:
        file.close()
    return bytes(text)


class Version(Protocol):
    """A checkpoint as it was at one moment."""

    def was_replaced(self) -> bool:
        """Whether a save has put another checkpoint in its place since."""


V = TypeVar("V", bound=Version)


def read_anew_if_replaced(look: Callable[[], V], read: Callable[[V], T]) -> T:
    """``read(look())``; again, up to :data:`REREADS` times, where it met damage that a save has caused meanwhile.

    A save removes the data of the checkpoint that it replaces, and whoever is reading them finds files missing.
    Collective if ``was_replaced()`` is: ``read`` then raises CheckpointCorruptError on all ranks or on none.

    Raises what the two raise; CheckpointCorruptError for damage of a checkpoint that still stands.
    """
    attempts = REREADS
    while True:
        version = look()
        try:
            return read(version)
        except CheckpointCorruptError:
            attempts -= 1
            if attempts < 0 or not version.was_replaced():
                raise


class _LocalVersion:
    """The manifest as this process alone has read it."""

    def __init__(self, path: StrPath) -> None:
        self._path = path
        self.text = read_manifest_bytes(path)

    def was_replaced(self) -> bool:
        """As :meth:`Version.was_replaced`. Raises CheckpointError if there is no checkpoint any more."""
        return read_manifest_bytes(self._path) != self.text


def reread(path: StrPath, read: Callable[[Manifest], T]) -> T:
    """``read(manifest)`` by one process; see :func:`read_anew_if_replaced`. Raises as :func:`read_manifest`."""
    return read_anew_if_replaced(lambda: _LocalVersion(path), lambda version: read(Manifest.from_bytes(version.text)))


class RunReader:
    """Reads elements of full tensors. Local. A context manager; several threads may use it at a time.

    Opening it checks that every file is a plain file of the size that the manifest gives, with the very header that was
    written, and that the header describes the manifest's tensors, one after the other without a gap. So every byte of a
    file belongs to the header, which has a checksum, or to a tensor, which has a fingerprint. Files stay open, so a
    save that replaces the checkpoint meanwhile does not disturb the reader; where there are more than
    :data:`_OPEN_FILES`, some are closed and opened again.

    Args:
        path: of the checkpoint, a directory or a URL.
        data: name of the data folder, from the manifest.
        files: the files to open, by their path in that folder.
        tensors: the tensors in those files, by ``(folder, name)``.

    Raises:
        CheckpointCorruptError: names the file, and the tensor where the damage is in one.
    """

    def __init__(
        self,
        path: StrPath,
        data: str,
        files: Mapping[str, StoredFile],
        tensors: Mapping[tuple[str, str], StoredTensor],
    ) -> None:
        self._folder = storage_reader(path) / data
        self._open: dict[str, OpenFile] = {}  # the one that was used last comes last
        self._users: Counter[str] = Counter()  # threads that read a file now
        self._limit = sys.maxsize if is_remote(path) else _OPEN_FILES  # an object takes no file descriptor
        self._lock = threading.Lock()
        self._offsets: dict[tuple[str, str], int] = {}
        self._tensors = tensors
        try:
            # By file, so that many files of many tensors take no time that is their product.
            inside: dict[str, dict[tuple[str, str], StoredTensor]] = {name: {} for name in files}
            for key, tensor in tensors.items():
                if tensor.file in inside:
                    inside[tensor.file][key] = tensor
            for name, file in files.items():
                self._offsets |= self._check_file(name, file, inside[name])
        except BaseException:
            self.close()
            raise

    def dtype(self, key: tuple[str, str]) -> torch.dtype:
        """The dtype in the file."""
        return DTYPES[self._tensors[key].dtype]

    def read(self, key: tuple[str, str], runs: Runs, out: Tensor) -> None:
        """Puts the elements ``runs`` of a tensor into the flat CPU tensor ``out``, which has the dtype of the file.

        Raises CheckpointCorruptError if the file ends too early or is gone, OSError if it cannot be read.
        """
        tensor = self._tensors[key]
        data = memoryview(out.view(torch.uint8).numpy().data)
        item = out.element_size()
        parts = []
        position = 0
        for start, length in runs:
            parts.append((self._offsets[key] + start * item, data[position : position + length * item]))
            position += length * item
        with self._file(tensor.file) as file:
            if not file.read(parts):
                raise CheckpointCorruptError(f"{tensor.file} ends before {key[1]!r} does")

    @contextmanager
    def _file(self, name: str) -> Iterator[OpenFile]:
        """An open file, which no other thread closes inside the block."""
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
        except (FileNotFoundError, NotADirectoryError) as error:  # perhaps by a save: then all is read anew
            raise CheckpointCorruptError(f"{self._folder}/{name} is listed but cannot be read: {error}") from error

    def _close_some(self) -> None:
        """Closes the files that were not used for longest, as many as there are too many."""
        unused = (name for name in list(self._open) if not self._users[name])
        while len(self._open) > self._limit and (name := next(unused, None)) is not None:
            self._open.pop(name).close()

    def _check_file(
        self, name: str, file: StoredFile, tensors: Mapping[tuple[str, str], StoredTensor]
    ) -> dict[tuple[str, str], int]:
        path = f"{self._folder}/{name}"
        try:
            opened = self._open[name] = self._folder.file(name)
            self._close_some()
            if opened.size != file.size:
                raise CheckpointCorruptError(f"{path} has {opened.size} bytes, but {file.size} were written")
            length = int.from_bytes(_head(opened, 8), "little")
            if length > min(_MAX_HEADER, file.size - 8):
                raise CheckpointCorruptError(f"{path}: damaged header of {length} bytes")
            header = _head(opened, 8 + length)
        except OSError as error:
            raise CheckpointCorruptError(f"{path} is listed but cannot be read: {error}") from error
        if len(header) != 8 + length or checksum(header) != file.header:
            raise CheckpointCorruptError(f"{path}: damaged header, or the header of another file")
        return _offsets(path, header, file.size, tensors)

    def __enter__(self) -> RunReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def _head(file: OpenFile, length: int) -> bytes:
    """The first bytes of a file; fewer where it has fewer."""
    head = bytearray(min(length, file.size))
    return bytes(head) if file.read([(0, memoryview(head))]) else b""


def _offsets(
    path: str, header: bytes, size: int, tensors: Mapping[tuple[str, str], StoredTensor]
) -> dict[tuple[str, str], int]:
    """The first byte of each tensor. Checks that the header agrees with the manifest and accounts for every byte."""
    try:
        found = parse(header[8:], depth=_HEADER_DEPTH)
        found.pop("__metadata__", None)
        described = {}
        for name, entry in found.items():
            begin, end = map(_size, entry["data_offsets"])
            described[name] = (entry["dtype"], tuple(map(_size, entry["shape"])), begin, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{path}: invalid header: {str(error)[:200]}") from error
    listed = {name: (tensor.dtype, tensor.shape) for (_, name), tensor in tensors.items()}
    if {name: entry[:2] for name, entry in described.items()} != listed:
        raise CheckpointCorruptError(f"{path} does not hold the tensors that the manifest lists for it")
    position = 0
    offsets: dict[tuple[str, str], int] = {}
    for key, tensor in sorted(tensors.items(), key=lambda item: described[item[0][1]][2:]):
        begin, end = described[key[1]][2:]
        if begin != position or end - begin != tensor.nbytes:
            raise CheckpointCorruptError(
                f"{path}: {key[1]!r} lies at {begin} to {end}; expected {tensor.nbytes} bytes at {position}"
            )
        offsets[key] = len(header) + begin
        position = end
    if len(header) + position != size:
        raise CheckpointCorruptError(f"{path} has {size - len(header) - position} bytes that belong to no tensor")
    return offsets


def _size(number: object) -> int:
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{shown(number)} is not an offset or a size")
    return number
