"""A part of a file, read as a file of its own."""

from __future__ import annotations

import io
from typing import Any, BinaryIO


class FilePart(io.RawIOBase):
    """Gives the bytes ``[begin, begin + size)`` of an open file, which stays open.

    Args:
        file: the whole file, open for reading.
        begin: the position of the first byte.
        size: the number of bytes.
    """

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file = file
        self._begin = begin
        self._size = size
        self._position = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Moves to a position in the part. A position outside of it becomes its nearest end."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = min(max(base + offset, 0), self._size)
        return self._position

    def tell(self) -> int:
        """Returns the position in the part."""
        return self._position

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, out: Any, /) -> int:
        """Fills ``out`` as far as the part goes. Returns the number of bytes."""
        self._file.seek(self._begin + self._position)
        data = self._file.read(min(len(out), self._size - self._position))
        out[: len(data)] = data
        self._position += len(data)
        return len(data)
