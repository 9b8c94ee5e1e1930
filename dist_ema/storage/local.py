"""Reads files of this machine by position, and lets every rank write its elements in place."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import FilePlan
from dist_ema.geometry.runs import Runs
from dist_ema.storage.base import Closing

#: Bytes written to a file after which the system is asked to start bringing them to disk.
_WRITE_BEHIND = 4 << 20
#: Files that one writer keeps open.
_OPEN_FILES = 8
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
# linux/fcntl.h, linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
#: What to do about links whose files are missing.
_FETCH = (
    "Fetch the files that the links stand for (git annex get, dvc pull, a new download), or copy the folder with "
    "cp -RL where they are"
)


# Reading.


class LocalReader:
    """Opens the files of one directory; implements :class:`~dist_ema.storage.base.StorageReader`.

    Symbolic links are followed, because download caches and data version control (the Hub's cache, DVC, git-annex) keep
    a checkpoint as links. This is safe for checkpoints from strangers: a reader compares the size and the checksum of
    every file with the manifest before it returns anything. Only plain files are opened; opening a pipe would block.

    Args:
        path: the directory.
        inside: path of a subdirectory, relative to ``path``.
    """

    def __init__(self, path: Path, inside: str = "") -> None:
        self._path = path
        self._inside = inside

    def __truediv__(self, name: str) -> LocalReader:
        return LocalReader(self._path, f"{self._inside}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return str(self._path / self._inside)

    def file(self, name: str) -> LocalFile:
        """Opens a plain file. Raises FileNotFoundError, or OSError that names a link whose target cannot be opened."""
        inside = Path(self._inside) / name
        return LocalFile(self._path / inside, _first_link(self._path, inside))


class LocalFile:
    """Reads an open plain file; implements :class:`~dist_ema.storage.base.OpenFile`.

    Args:
        path: the file.
        link: the first symbolic link on that path, for error messages; None if there is none.
    """

    def __init__(self, path: Path, link: Path | None = None) -> None:
        self.link = None if link is None else f"{link} is a symbolic link to {link.readlink()}"
        try:
            # Looked at before it is opened: opening a device can have an effect.
            is_plain = stat.S_ISREG(path.stat().st_mode)
            # O_NONBLOCK: the path may be a pipe by now, and opening a pipe waits for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if is_plain else -1
        except OSError as error:
            if self.link is None:
                raise
            raise OSError(f"{self.link}, which cannot be opened ({error.strerror}). {_FETCH}") from error
        if not is_plain:
            raise OSError(f"{path} is not a plain file")
        facts = os.fstat(self._descriptor)
        self.size = facts.st_size
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise OSError(f"{path} is not a plain file")

    def read(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """Implements :meth:`OpenFile.read`."""
        for position, out in parts:
            while out:  # the system may give a part only
                count = os.preadv(self._descriptor, [out], position)
                if count == 0:
                    return False
                out = out[count:]
                position = position + count
        return True

    def close(self) -> None:
        """Implements :meth:`OpenFile.close`."""
        os.close(self._descriptor)


def _first_link(directory: Path, name: Path) -> Path | None:
    """Returns the first symbolic link on the path from a directory to a file in it, including the file; None if
    none.
    """
    for part in [*reversed(name.parents), name]:
        if part != Path() and (directory / part).is_symlink():
            return directory / part
    return None


def open_ranges(path: Path) -> LocalFile:
    """Opens a file that a user has named, to read ranges of it. Raises as :meth:`LocalReader.file` does."""
    return LocalFile(path, path if path.is_symlink() else None)


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file that a user has named, also through links. Raises OSError for a pipe, which would block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if not path.is_symlink():
            raise
        raise OSError(f"{path} is a symbolic link to {path.readlink()}, which is not there. {_FETCH}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return os.fdopen(descriptor, "rb")


# Writing.


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the path to an OSError that names no file, as errors of write, fsync and close do not."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def create_file(directory: Path, plan: FilePlan) -> None:
    """Makes a file of its final size with its header. The tensors are holes until they are written."""
    path = directory / plan.name
    with naming(path), path.open("xb") as file:  # x: there must be none, nor a link
        file.write(plan.header)
        file.truncate(plan.size)  # so that ranks can write anywhere in it, in any order


def write_text(path: Path, text: str) -> None:
    """Writes a small file."""
    with naming(path):
        path.write_text(text, encoding="utf-8")


def write_synced(path: Path, content: bytes) -> None:
    """Writes a small file and waits until its bytes are on disk."""
    with naming(path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copies the bytes of a file, but not its permissions."""
    with naming(target):
        shutil.copyfile(source, target)


def remove_tree(path: Path) -> None:
    """Removes a directory and its contents, as far as possible; of a symbolic link, only the link."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Exchanges two names in one step. Returns False, and does nothing, if the system or the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    found = libc.renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return bool(found == 0)


def sync(path: Path) -> None:
    """Waits until a file is on disk; for a directory, until the names in it are."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunWriter(Closing):
    """Writes runs of elements in place into existing files. Several ranks may write into one file at a time.

    Implements :class:`~dist_ema.storage.base.TensorWriter`; as a context manager it closes the files.

    Args:
        directory: the directory of the files.
        plans: the plans of the files.
    """

    def __init__(self, directory: Path, plans: Sequence[FilePlan]) -> None:
        self._directory = directory
        self._places = {
            tensor.name: (plan.name, plan.offsets[tensor.name], tensor) for plan in plans for tensor in plan.tensors
        }
        self._open: dict[str, int] = {}
        self._dirty: dict[str, int] = {}  # bytes written since the system was last asked to bring a file to disk

    def write(self, name: str, runs: Runs, values: Tensor) -> None:
        """Implements :meth:`TensorWriter.write`; in any order. Raises CheckpointError for another dtype, OSError."""
        file, offset, tensor = self._places[name]
        if values.dtype != tensor.dtype:
            raise CheckpointError(f"{name!r} is planned as {tensor.dtype}, got {values.dtype}")
        descriptor = self._descriptor(file)
        data = memoryview(values.contiguous().view(torch.uint8).numpy().data)
        item = tensor.dtype.itemsize
        with naming(self._directory / file):
            for start, length in runs:
                _pwrite(descriptor, data[: length * item], offset + start * item)
                data = data[length * item :]
        self._dirty[file] = self._dirty.get(file, 0) + values.nbytes
        if self._dirty[file] >= _WRITE_BEHIND:
            _write_behind(descriptor)
            self._dirty[file] = 0

    def _descriptor(self, file: str) -> int:
        """Returns the descriptor of a file. Few files are open at a time, because tensors come file after file."""
        if file not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._close(next(iter(self._open)))
            self._open[file] = os.open(self._directory / file, os.O_WRONLY)
        return self._open[file]

    def sync(self) -> None:
        """Waits until what was written is on disk."""
        for file in self._dirty:
            with naming(self._directory / file):
                os.fsync(self._descriptor(file))

    def close(self) -> None:
        """Closes all files, even if closing one fails: some file systems report an exceeded quota only then."""
        with ExitStack() as stack:
            for file in self._open:
                stack.callback(self._close, file)

    def _close(self, file: str) -> None:
        # Forgotten first: Linux closes a file even where it reports an error, and may use the number again.
        descriptor = self._open.pop(file)
        with naming(self._directory / file):
            os.close(descriptor)


def _write_behind(descriptor: int) -> None:
    """Asks the system to start writing a file to disk, without waiting. Otherwise Linux starts at fsync only.

    It guarantees nothing, so a system without the call is only slower.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _pwrite(descriptor: int, data: memoryview, position: int) -> None:
    while data:  # the system may take a part only
        written = os.pwrite(descriptor, data, position)
        data = data[written:]
        position = position + written
