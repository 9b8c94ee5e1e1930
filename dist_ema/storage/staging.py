"""A directory that is written beside its place and renamed when it is whole: of checkpoints and of exports alike.

::

    parent/.dist_ema-saving-<hash of NAME>-<token>/lock       locked by the process that writes
    parent/.dist_ema-saving-<hash of NAME>-<token>/content/   becomes parent/NAME

The staging directory does not contain the target's name as text: Lightning takes every name that contains ``hpc_ckpt_``
for one of its checkpoints, and reads a number from all digits of the name.

A process that is killed gives up its lock. So every other process can tell a directory that is being written from a
leftover, and whoever writes into the same parent next removes the leftovers. The lock lies beside the content, not in
it, so that there is no moment at which a kill would leave a lock in the finished directory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import FilePlan
from dist_ema.storage.local import RunWriter, create_file, exchange, sync

#: The file that is locked.
LOCK = "lock"
_CONTENT = "content"
#: Seconds after which a staging directory that still has no lock is taken for a leftover.
_YOUNG = 60
_PREFIX = ".dist_ema-saving-"
#: Names of staging directories. Version 0.1 called them ``.NAME.saving-<token>``; killed processes may have left some.
_STAGING = re.compile(_PREFIX.replace(".", r"\.") + r"[0-9a-f]{16}-[0-9a-f]{32}|\..*\.saving-[0-9a-f]{32}", re.DOTALL)


class Staging:
    """Writes a directory beside its final place, and renames it when it is complete.

    Every rank has an object of its own, with the same token, and calls :meth:`is_visible` and :meth:`writer` on it. The
    other methods are for rank 0 alone.

    Args:
        target: the final directory, an absolute path.
        token: 32 hexadecimal digits that no other run uses.

    Attributes:
        target: as given.
        path: the staging directory.
        content: the directory inside it that is renamed to ``target`` at the end.
    """

    def __init__(self, target: Path, token: str) -> None:
        self.target = target
        self.path = staging_path(target, token)
        self.content = self.path / _CONTENT
        self._lock: int | None = None
        self._made: list[Path] = []  # parents of the target that this process has made
        self._kept = False  # whether the files may be needed after a power failure

    @staticmethod
    def new_token() -> str:
        """Returns a token that no other run uses."""
        return uuid.uuid4().hex

    def create(self) -> None:
        """Makes the directory and missing parents of the target; removes what killed processes have left.

        Raises CheckpointError, OSError; :meth:`discard` then removes what was made.
        """
        if not self.target.name:
            raise CheckpointError(f"{self.target} is the root of the file system: give a directory below it")
        self._make_parents()
        remove_leftovers(self.target.parent)  # first, because their space may be needed
        self.path.mkdir()
        unlocked = self.path / f"un{LOCK}ed"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR)
        try_lock(self._lock)
        unlocked.rename(self.path / LOCK)  # so that no process sees it without its lock
        self.content.mkdir()

    def _make_parents(self) -> None:
        parent = self.target.parent
        missing = []
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        if not parent.is_dir():
            raise CheckpointError(f"{parent} is not a directory, so nothing can be written into it")
        for parent in reversed(missing):
            with suppress(FileExistsError):  # another process has made it meanwhile
                parent.mkdir()
                self._made.append(parent)

    def create_files(self, folder: str, plans: Sequence[FilePlan]) -> None:
        """Makes files of their final sizes in a folder of the content; ``""`` is the content itself."""
        directory = self.content / folder
        directory.mkdir(parents=True, exist_ok=True)
        for plan in plans:
            create_file(directory, plan)

    def is_visible(self) -> bool:
        """Returns whether this process sees the directory that rank 0 made, so that both share a file system."""
        return os.path.exists(self.path / LOCK)  # noqa: PTH110 - Path's raises where access is denied

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> RunWriter:
        """Returns a writer for the files of a folder of the content."""
        return RunWriter(self.content / folder, plans)

    def sync(self) -> None:
        """Waits until all of the content is on disk. Writers sync their elements, but not headers and small files."""
        for directory, _, files in os.walk(
            self.content, topdown=False
        ):  # contents before the names of their directories
            for file in files:
                sync(Path(directory) / file)
            sync(Path(directory))
        for parent in self._made:  # a new directory is on disk when its name in the parent is
            sync(parent.parent)

    def put_in_place(self) -> None:
        """Renames the content to the target, which must not exist. Raises CheckpointError if it does, OSError."""
        try:
            self.content.rename(self.target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise CheckpointError(
                    f"{self.target} was made by another process while this one was writing: that one stands, and what "
                    "this one wrote is removed"
                ) from error
            raise
        try:
            sync(self.target.parent)  # makes the rename permanent
        except OSError:
            self._take_back(lambda: self.target.rename(self.content))
            raise
        self._made.clear()  # the parents are in use now
        self.discard()

    def _take_back(self, undo: Callable[[], object]) -> None:
        """Undoes a rename that may not be on disk. If that fails too, all files are kept, because any of them may be
        needed.
        """
        self._kept = True
        with suppress(OSError):
            undo()
            sync(self.target.parent)
            self._kept = False

    def take_place(self) -> None:
        """Replaces the directory at the target, which is removed, by the content.

        This is one step if the system can exchange two names (Linux). Elsewhere the old directory is renamed first, and
        keeps that name if the process is killed before the second step.
        """
        if exchange(self.content, self.target):
            try:
                sync(self.target.parent)
            except OSError:
                self._take_back(lambda: exchange(self.content, self.target))
                raise
            self.discard()  # the old directory is in here now
            return
        aside = self.target.with_name(f"{self.target.name}.replaced")
        self.target.rename(aside)
        try:
            self.put_in_place()
        except BaseException:
            aside.rename(self.target)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def discard(self) -> None:
        """Removes the staging directory, and parents that were made for nothing. May be called at any time.

        If a rename may or may not be on disk, the directory is kept for the next process to remove.
        """
        lock, self._lock = (
            self._lock,
            None,
        )  # reset first: if it were closed twice, its number could belong to another file
        if lock is not None:
            close_lock(lock)
        if not self._kept:
            shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # parents that are not empty stay
            while self._made:
                self._made.pop().rmdir()

    def rivals(self) -> Iterator[Path]:
        """Yields the contents that other live processes are writing for the same target."""
        pattern = re.compile(re.escape(_prefix(self.target)) + "[0-9a-f]{32}")
        for found in self.target.parent.iterdir():
            if pattern.fullmatch(found.name) and found != self.path and is_alive(found):
                yield found / _CONTENT


def staging_path(target: Path, token: str) -> Path:
    """Returns the staging directory for ``target``."""
    return target.parent / f"{_prefix(target)}{token}"


def _prefix(target: Path) -> str:
    """Returns the prefix of a target's staging directories; no other target in the same directory shares it."""
    return f"{_PREFIX}{name_hash(target)}-"


def name_hash(target: Path) -> str:
    """Returns sixteen hexadecimal digits that stand for the name of a file or directory."""
    return blake2b(os.fsencode(target.name), digest_size=8).hexdigest()


def replace_directory(source: Path, target: Path) -> None:
    """Renames ``source`` to ``target``, and removes the directory that was there. Local.

    A process that is killed meanwhile leaves ``source`` or ``target`` complete. Both must be on one file system. Raises
    OSError.
    """
    old = staging_path(
        target, Staging.new_token()
    )  # if this process is killed, the next save removes a directory of this name
    if target.exists():
        target.rename(old)
    source.rename(target)
    sync(target.parent)
    if source.parent != target.parent:
        sync(source.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Removes a directory such that a process that is killed meanwhile leaves no half of it under its name. Local.

    What such a process leaves is removed by the next save into the same parent. Raises OSError; the directory then is
    as it was.
    """
    old = staging_path(path, Staging.new_token())
    path.rename(old)
    try:
        sync(path.parent)  # otherwise a power failure may bring back the name, for a directory that has lost files
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def move_into(path: Path, folder: Path) -> None:
    """Moves a file or directory into a folder beside it, which is made if it is missing. Local. Raises OSError."""
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)
    sync(folder)
    sync(path.parent)


def remove_leftovers(parent: Path) -> None:
    """Removes the staging directories of killed processes. A live process holds the lock of its own."""
    for found in parent.iterdir():
        if _STAGING.fullmatch(found.name) and not found.is_symlink() and not is_alive(found):
            shutil.rmtree(found, ignore_errors=True)


def is_alive(staging: Path) -> bool:
    """Returns whether a process may still write into a staging directory; True if that cannot be determined."""
    try:
        lock = os.open(staging / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # it is being made or removed, or its process was killed at that moment; or it is gone
        try:
            return time.time() - staging.lstat().st_mtime <= _YOUNG
        except FileNotFoundError:
            return False
    except OSError:  # too many open files, or no permission: better keep it
        return True
    try:
        return not try_lock(lock)
    finally:
        close_lock(lock)


def close_lock(descriptor: int) -> None:
    """Closes the file of a lock, which releases it. The file is empty, so errors are ignored."""
    with suppress(OSError):
        os.close(descriptor)


def try_lock(descriptor: int) -> bool:
    """Returns whether this process could lock an open file. False also if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
