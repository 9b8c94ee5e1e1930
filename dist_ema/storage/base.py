"""Defines a storage backend: two protocols for reading, two for writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Protocol, TypeVar

from torch import Tensor

from dist_ema.formats.layout import FilePlan
from dist_ema.geometry.runs import Runs

C = TypeVar("C", bound="Closing")


class Closing:
    """Closes an object at the end of a ``with`` block."""

    def close(self) -> None:
        """Releases files and memory."""
        raise NotImplementedError

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OpenFile(Protocol):
    """Reads a file by position. Several threads may read it at a time.

    Attributes:
        size: the number of bytes.
        link: which symbolic link led to the file, and where it points; None if the path has no links.
    """

    size: int
    link: str | None

    def read(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """Fills each part's memory with the bytes from its position on.

        Args:
            parts: ``(position, memory)``, in ascending order of the positions.

        Returns:
            False if the file ends before that.

        Raises:
            OSError: also where the backend raises errors of other classes.
        """

    def close(self) -> None:
        """Closes the file."""


class StorageReader(Protocol):
    """Reads files of a directory, or of its equivalent in a store. Local: each rank reads for itself."""

    def file(self, name: str) -> OpenFile:
        """Opens a file of this directory. Raises FileNotFoundError if there is none, OSError for other failures."""

    def __truediv__(self, name: str) -> StorageReader: ...


class TensorWriter(Protocol):
    """Writes elements of full tensors into the files of one folder."""

    def write(self, name: str, runs: Runs, values: Tensor) -> None:
        """Writes ``values`` to the elements ``runs`` of the tensor ``name``.

        ``values`` is 1D, on the CPU and of the planned dtype. The caller may change it afterwards. A backend that
        writes a file from its first byte to its last needs the tensors in the order of the files, and each from its
        first element on.
        """

    def sync(self) -> None:
        """Waits until everything that was written is permanent."""

    def close(self) -> None:
        """Releases files and memory. Elements that were not synced may be lost."""


class StorageWriter(Protocol):
    """Writes one checkpoint, which replaces the old one in one step or leaves it unchanged.

    Every rank makes an object, with the same token. The calls come in this order:

    1. (all ranks) the constructor, which touches nothing yet
    2. (rank 0) ``create()``: the files, at their final sizes and beside their final place
    3. (all ranks) ``is_visible()``; the ranks then tell each other whether all of them see the files
    4. (all ranks if they all see the files, else rank 0 alone) ``writer()`` for each folder, then its ``write()`` any
       number of times
    5. (the same ranks) ``sync()`` and ``close()`` of each; the ranks then tell each other whether all succeeded
    6. (rank 0) ``commit()`` with the manifest

    If any rank fails at any step, rank 0 calls ``abandon()`` in place of the remaining steps.

    Attributes:
        data: name of the data folder, ``data-<token>``, which the manifest names.
    """

    data: str

    def create(self, folders: Mapping[str, Sequence[FilePlan]], overwrite: bool) -> None:
        """Makes the files of every folder, or checks that they can be made.

        Raises CheckpointError if ``path`` holds anything but a checkpoint, or a checkpoint without ``overwrite``;
        OSError.
        """

    def is_visible(self) -> bool:
        """Returns whether this process can write into the files that rank 0 made."""

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> TensorWriter:
        """Returns a writer for the files of one folder."""

    def commit(self, manifest: bytes) -> None:
        """Puts the checkpoint in its place, where it is permanent afterwards.

        Raises CheckpointError if another save has replaced it since ``create()``; OSError.
        """

    def abandon(self) -> None:
        """Removes what was written. Does nothing before ``create()`` and after ``commit()``."""
