"""A part of a file, read as a file of its own."""

from __future__ import annotations

import io
from typing import Any, BinaryIO


class Region(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = min(max(base + offset, 0), self._size)
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, out: Any, /) -> int:
        """As of any file."""
        self._file.seek(self._begin + self._at)
        data = self._file.read(min(len(out), self._size - self._at))
        out[: len(data)] = data
        self._at += len(data)
        return len(data)
