"""A directory that is written beside its place and put there in one step: of checkpoints and of exports alike.

While it is written, its process holds a lock on a file in it. So another process can tell a directory that is being
written from one that a killed process left; the latter is removed by whoever writes into the same parent next.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from dist_ema.checkpoints.storage import sync
from dist_ema.errors import CheckpointError

#: The file that is locked.
LOCK = "lock"
#: Seconds in which a staging directory may have no lock yet.
_YOUNG = 60
#: Bytes of the target's name that are kept; a name has at most 255, and some file systems allow fewer.
_NAME_BYTES = 100
_STAGING = re.compile(r"\..*\.saving-[0-9a-f]{32}", re.DOTALL)


class Staging:
    """A temporary sibling of a directory to come. One rank calls all but :meth:`is_visible`.

    Args:
        target: the directory to come, absolute.
        token: 32 hexadecimal digits that no other run uses.

    Attributes:
        target: as given.
        path: the directory that is written.
    """

    def __init__(self, target: Path, token: str) -> None:
        self.target = target
        self.path = staging_path(target, token)
        self._lock: int | None = None
        self._made: list[Path] = []

    @staticmethod
    def new_token() -> str:
        """A token of one's own."""
        return uuid.uuid4().hex

    def create(self) -> None:
        """Makes the directory and, where they are missing, the target's parents; removes what killed processes left.

        Raises CheckpointError, OSError; :meth:`discard` then removes what was made.
        """
        if not self.target.name:
            raise CheckpointError(f"{self.target} is the root of the file system: give a directory below it")
        self._make_parents()
        remove_leftovers(self.target.parent)
        self.path.mkdir()
        unlocked = self.path / f"un{LOCK}ed"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR)
        try_lock(self._lock)
        unlocked.rename(self.path / LOCK)  # whoever sees the lock sees it held

    def _make_parents(self) -> None:
        parent = self.target.parent
        missing = []
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        if not parent.is_dir():
            raise CheckpointError(f"{parent} is not a directory, so nothing can be written into it")
        for parent in reversed(missing):
            with suppress(FileExistsError):  # another process writes beside this one
                parent.mkdir()
                self._made.append(parent)

    def is_visible(self) -> bool:
        """Whether this process sees the directory that another one made: do the two share the file system?"""
        return os.path.exists(self.path / LOCK)  # noqa: PTH110 - Path's raises where access is denied

    def sync(self) -> None:
        """Waits until all that was written is on disk, of which no writer may have synced headers and small files."""
        for directory, _, files in os.walk(self.path, topdown=False):
            for file in files:
                sync(Path(directory) / file)
            sync(Path(directory))
        for parent in self._made:
            sync(parent.parent)

    def put_in_place(self) -> None:
        """Makes it the target, which must not be there. Raises CheckpointError if it is, OSError."""
        try:
            self.path.rename(self.target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise CheckpointError(
                    f"{self.target} was made by another process while this one was writing: that one stands, and what "
                    "this one wrote is removed"
                ) from error
            raise
        self._made.clear()
        (self.target / LOCK).unlink(missing_ok=True)
        sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Removes what is left here, and parents that were made for nothing. Harmless at any time."""
        lock, self._lock = self._lock, None  # in this order: a number that is closed twice may be another file by then
        if lock is not None:
            os.close(lock)
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # there is something in them
            while self._made:
                self._made.pop().rmdir()

    def rivals(self) -> Iterator[Path]:
        """Other directories that may still become the same target."""
        pattern = re.compile(re.escape(_prefix(self.target)) + "[0-9a-f]{32}")
        for found in self.target.parent.iterdir():
            if pattern.fullmatch(found.name) and found != self.path and is_alive(found):
                yield found


def staging_path(target: Path, token: str) -> Path:
    """Where what is to become ``target`` is written."""
    return target.parent / f"{_prefix(target)}{token}"


def _prefix(target: Path) -> str:
    """Of the names of a target's staging directories, and of those of no other target."""
    name = os.fsencode(target.name)
    text = name.decode("utf-8", "ignore")
    if len(name) > _NAME_BYTES or text != target.name:
        cut = name[: _NAME_BYTES - 17].decode("utf-8", "ignore")  # no half of a character
        text = f"{cut}~{blake2b(name, digest_size=8).hexdigest()}"
    return f".{text}.saving-"


def remove_leftovers(parent: Path) -> None:
    """Removes the staging directories of processes that were killed; those that are alive hold the lock of theirs."""
    for found in parent.iterdir():
        if _STAGING.fullmatch(found.name) and not found.is_symlink() and not is_alive(found):
            shutil.rmtree(found, ignore_errors=True)


def is_alive(staging: Path) -> bool:
    """Whether a process may still write into this staging directory; True where nobody can tell."""
    try:
        lock = os.open(staging / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # made a moment ago, or killed in that moment; or put in its place
        try:
            return time.time() - staging.lstat().st_mtime <= _YOUNG
        except FileNotFoundError:
            return False
    except OSError:
        return True
    try:
        return not try_lock(lock)
    finally:
        os.close(lock)


def try_lock(descriptor: int) -> bool:
    """Whether this process has the lock of an open file now. False where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
