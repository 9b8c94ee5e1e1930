"""Closes and syncs of files that fail, as on a disk that is full, over its quota or broken.

Some file systems report only then that what was written earlier has not arrived.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class _Opened:
    """A file that Python's ``open()`` gave, for a ``with`` statement; closing it may fail."""

    def __init__(self, file: Any, path: str, faults: Faults) -> None:
        self._file, self._path, self._faults = file, path, faults

    def __enter__(self) -> Any:
        return self._file.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)  # Linux closes the file even where it reports an error
        self._faults.strike("close", self._path, errno.EDQUOT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Faults:
    """Fails one of the closes and syncs of what is written below a directory.

    Args:
        root: the directory.
        number: of the call that fails, counted from 0.

    Attributes:
        struck: the call that failed and its file; None if there were fewer calls.
    """

    def __init__(self, root: Path, number: int) -> None:
        self._root, self._number = f"{root}/", number
        self._lock = threading.Lock()
        self.struck: tuple[str, str] | None = None

    def strike(self, call: str, path: str, code: int) -> None:
        """Raises OSError without a name, as the system's own calls do, if this call is the one that fails."""
        if not f"{path}/".startswith(self._root):
            return
        with self._lock:
            self._number -= 1
            if self._number != -1:
                return
            self.struck = (call, path.removeprefix(self._root))
        raise OSError(code, os.strerror(code))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the call fails."""
        close, sync, real_open = os.close, os.fsync, io.open

        def failing_close(descriptor: int) -> None:
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_WRONLY | os.O_RDWR)
            close(descriptor)
            if writes:
                self.strike("close", path, errno.EDQUOT)

        def failing_sync(descriptor: int) -> None:
            self.strike("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()), errno.EIO)
            sync(descriptor)

        def failing_open(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            opened = real_open(file, mode, *rest, **options)
            writes = not isinstance(file, int) and set(mode) & set("wxa+")
            return _Opened(opened, os.path.abspath(file), self) if writes else opened  # noqa: PTH100

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "close", failing_close)
            patch.setattr(os, "fsync", failing_sync)
            patch.setattr(io, "open", failing_open)
            patch.setattr(builtins, "open", failing_open)
            yield
