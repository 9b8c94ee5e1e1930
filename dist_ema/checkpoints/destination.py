"""Where a checkpoint is written: beside its place first, and put there in one step when it is whole and on disk.

A checkpoint is a directory with ``ema.json``, the manifest, and a data folder that it names::

    checkpoint/ema.json
    checkpoint/data-<token>/averages/<name>/model.safetensors
    checkpoint/data-<token>/live/model.safetensors              what is not averaged: frozen parameters, buffers

Everything is written into a temporary sibling first. A new checkpoint is that sibling, renamed. An existing one is
replaced by moving the new data folder beside the old and then renaming the new manifest over the old one, so that at
every moment the manifest names one whole set of data; what it does not name is no part of the checkpoint.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from dist_ema.checkpoints.manifest import DATA, NAME
from dist_ema.checkpoints.places import StrPath, file_system, is_remote, local_path
from dist_ema.checkpoints.storage import FilePlan, RunWriter, Writer, create_file, sync
from dist_ema.checkpoints.upload import Upload
from dist_ema.errors import CheckpointError

_LOCK = "lock"
#: Seconds in which a staging directory may have no lock yet.
_YOUNG = 60
_STAGING = re.compile(r"\..+\.saving-[0-9a-f]{32}")


class Destination(Protocol):
    """One checkpoint in the making. Rank 0 calls ``create``, ``commit`` and ``abandon``; every rank has an object."""

    #: The data folder.
    data: str

    def create(self, folders: Mapping[str, Sequence[FilePlan]]) -> None:
        """Makes the files of every folder, or what is needed to make them."""

    def is_visible(self) -> bool:
        """Whether this process can write into what rank 0 made."""

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> Writer:
        """What fills the files of a folder."""

    def commit(self, manifest: bytes) -> None:
        """Puts the checkpoint in its place."""

    def abandon(self) -> None:
        """Removes what was written; harmless before ``create`` and after ``commit``."""


def destination(path: StrPath, token: str) -> Destination:
    """Where to write the checkpoint ``path``; ``token``, 32 hexadecimal digits, is this save's own."""
    if is_remote(path):
        return Upload(*file_system(os.fspath(path)), token)
    return Directory(local_path(path), token)


class Directory:
    """A directory of a file system that the ranks may share.

    Args:
        target: the checkpoint to be.
        token: of this save.
    """

    def __init__(self, target: Path, token: str) -> None:
        self.data = f"data-{token}"
        self._target = target
        self._staging = target.parent / f".{target.name[:100]}.saving-{token}"
        self._lock: int | None = None

    def create(self, folders: Mapping[str, Sequence[FilePlan]]) -> None:
        """As :meth:`Destination.create`. Raises CheckpointError, OSError."""
        parent = self._target.parent
        if not parent.is_dir():
            raise CheckpointError(f"the directory {parent} does not exist: make it first")
        if self._target.is_symlink() or (self._target.exists() and not self._target.is_dir()):
            raise CheckpointError(f"{self._target} is not a directory: give another path, or remove it")
        remove_leftovers(parent)
        self._staging.mkdir()
        unlocked = self._staging / f"un{_LOCK}ed"
        self._lock = os.open(unlocked, os.O_CREAT | os.O_RDWR)
        _try_lock(self._lock)
        unlocked.rename(self._staging / _LOCK)  # whoever sees the lock sees it held
        for name, plans in folders.items():
            directory = self._staging / self.data / name
            directory.mkdir(parents=True)
            for plan in plans:
                create_file(directory, plan)

    def is_visible(self) -> bool:
        """As :meth:`Destination.is_visible`."""
        return os.path.exists(self._staging / _LOCK)  # noqa: PTH110 - Path's raises where access is denied

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> RunWriter:
        """As :meth:`Destination.writer`."""
        return RunWriter(self._staging / self.data / folder, plans)

    def commit(self, manifest: bytes) -> None:
        """As :meth:`Destination.commit`; all is on disk then. Raises OSError."""
        (self._staging / NAME).write_bytes(manifest)
        for directory, _, files in os.walk(self._staging, topdown=False):
            for file in files:  # headers among them, which no writer may have synced
                sync(Path(directory) / file)
            sync(Path(directory))
        if self._target.exists():
            self._replace()
        else:
            self._staging.rename(self._target)
            (self._target / _LOCK).unlink()
        sync(self._target.parent)
        self._unlock()

    def _replace(self) -> None:
        """Until the second rename the old manifest stands, and after it the new one: each with all of its data."""
        (self._staging / self.data).rename(self._target / self.data)
        sync(self._target)
        (self._staging / NAME).rename(self._target / NAME)
        sync(self._target)
        shutil.rmtree(self._staging, ignore_errors=True)
        for found in self._target.iterdir():
            if DATA.fullmatch(found.name) and found.name != self.data:
                shutil.rmtree(found, ignore_errors=True)
        (self._target / _LOCK).unlink(missing_ok=True)  # of a save that was killed just after its rename

    def abandon(self) -> None:
        """As :meth:`Destination.abandon`."""
        if self._lock is not None:
            self._unlock()
            if (self._staging / NAME).exists():  # so the old one stands, and does not name the new data
                shutil.rmtree(self._target / self.data, ignore_errors=True)
            shutil.rmtree(self._staging, ignore_errors=True)

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None  # in this order: a number that is closed twice may be another file by then
        if lock is not None:
            os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes the staging directories of saves that were killed. A save that is under way holds a lock on its own."""
    for found in parent.iterdir():
        if not _STAGING.fullmatch(found.name) or found.is_symlink():
            continue
        try:
            lock = os.open(found / _LOCK, os.O_RDWR)
        except FileNotFoundError:  # made a moment ago, or killed in that moment
            with suppress(FileNotFoundError):  # another save has put it in its place
                if time.time() - found.lstat().st_mtime > _YOUNG:
                    shutil.rmtree(found, ignore_errors=True)
            continue
        except OSError:  # nobody can tell whether it is under way
            continue
        try:
            if _try_lock(lock):
                shutil.rmtree(found, ignore_errors=True)
        finally:
            os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Whether nobody else holds the lock. False where the file system has no locks: then nothing is removed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
