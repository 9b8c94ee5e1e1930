"""Reads objects of a store by ranges, and writes them in one process from the first byte to the last, through
fsspec.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import FilePlan
from dist_ema.geometry.runs import Runs

#: Two ranges with no more bytes than this between them are read by one request: bytes are cheaper than requests.
_GAP = 1 << 20
#: Bytes that are kept in memory and then sent.
_BLOCK = 16 << 20


# Reading.


class RemoteReader:
    """Reads objects under a prefix in a store; implements :class:`~dist_ema.storage.base.StorageReader`.

    Args:
        system: fsspec's file system.
        root: the path in it.
    """

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root

    def __truediv__(self, name: str) -> RemoteReader:
        return RemoteReader(self._system, f"{self._root}/{name}")

    def __str__(self) -> str:
        return str(self._system.unstrip_protocol(self._root))

    def file(self, name: str) -> RemoteFile:
        """Looks up an object. Raises OSError, whatever the file system raises."""
        path = f"{self._root}/{name}"
        with _os_errors(path):
            self._system.invalidate_cache(path.rpartition("/")[0])  # other processes write too
            facts = self._system.info(path)
        if facts["type"] != "file":
            raise OSError(f"{path} is not a file")
        if facts.get("size") is None:
            raise OSError(f"{path}: the file system reports no size")
        return RemoteFile(self._system, path, int(facts["size"]))


class RemoteFile:
    """Reads an object by ranges; implements :class:`~dist_ema.storage.base.OpenFile`."""

    link: str | None = None  # object stores have no symbolic links

    def __init__(self, system: Any, path: str, size: int) -> None:
        self.size = size
        self._system = system
        self._path = path

    def read(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """Implements :meth:`OpenFile.read`."""
        for group in _neighbours(parts):
            start = group[0][0]
            stop = group[-1][0] + len(group[-1][1])
            with _os_errors(self._path):
                data = memoryview(self._system.cat_file(self._path, start=start, end=stop))
            if len(data) < stop - start:
                return False
            for position, out in group:
                out[:] = data[position - start : position - start + len(out)]
        return True

    def close(self) -> None:
        """Does nothing: nothing is open."""


@contextmanager
def _os_errors(path: str) -> Iterator[None]:
    """Raises OSError in place of the errors of a file system, which has classes of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{path}: {type(error).__name__}: {error}") from error


def _neighbours(parts: Sequence[tuple[int, memoryview]]) -> list[list[tuple[int, memoryview]]]:
    """Groups ascending parts so that each group is read by one request."""
    groups: list[list[tuple[int, memoryview]]] = []
    end = 0
    for position, out in parts:
        if not out:
            continue
        if not groups or position - end > _GAP:
            groups.append([])
        groups[-1].append((position, out))
        end = position + len(out)
    return groups


# Writing.


class UploadWriter:
    """Writes the files of one folder, one after the other; implements :class:`~dist_ema.storage.base.TensorWriter`.

    Args:
        system: fsspec's file system.
        folder: the path in it.
        plans: the plans of the files, in the order in which their tensors will come.
    """

    def __init__(self, system: Any, folder: str, plans: Sequence[FilePlan]) -> None:
        self._system = system
        self._folder = folder
        self._left = list(reversed(plans))
        self._plan: FilePlan | None = None  # of the file that is being written
        self._file: Any = None
        self._position = 0  # bytes written to it

    def write(self, name: str, runs: Runs, values: Tensor) -> None:
        """Implements :meth:`TensorWriter.write`; in the order of the files. Raises what the file system raises."""
        while self._plan is None or name not in self._plan.offsets:
            self._next()
        ((start, _),) = runs  # gathered windows are single runs
        if self._position != self._plan.offsets[name] + start * values.itemsize:
            raise CheckpointError(f"{self._plan.name}: {name!r} came at byte {self._position}, out of its order")
        self._put(memoryview(values.contiguous().view(torch.uint8).numpy().data))

    def sync(self) -> None:
        """Completes all files."""
        while self._plan is not None or self._left:
            self._finish()
            if self._left:
                self._next()

    def _next(self) -> None:
        self._finish()
        if not self._left:
            raise CheckpointError(f"{self._folder}: more was written than was planned")
        plan = self._left.pop()
        self._file = self._system.open(f"{self._folder}/{plan.name}", "wb", block_size=_BLOCK)
        self._plan = plan
        self._position = 0
        self._put(memoryview(plan.header))

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._position += len(data)

    def _finish(self) -> None:
        """Completes a file, and checks the size that the store gives for it."""
        if self._plan is None:
            return
        plan, file, self._plan, self._file = self._plan, self._file, None, None
        file.close()
        path = f"{self._folder}/{plan.name}"
        self._system.invalidate_cache(self._folder)
        if (found := self._system.size(path)) != plan.size:
            raise CheckpointError(f"{path} has {found} bytes after writing {self._position}; {plan.size} were planned")

    def close(self) -> None:
        """Gives up a file that is not complete, so that half an upload never becomes an object."""
        file, self._file, self._plan = self._file, None, None
        if file is not None:
            with suppress(Exception):
                file.discard()
