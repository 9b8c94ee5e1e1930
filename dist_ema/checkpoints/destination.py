"""Where a checkpoint is written: beside its place first, and put there in one step when it is whole and on disk.

A checkpoint is a directory with ``ema.json``, the manifest, and a data folder that it names::

    checkpoint/ema.json
    checkpoint/data-<token>/averages/<name>/model.safetensors
    checkpoint/data-<token>/live/model.safetensors              what is not averaged: frozen parameters, buffers

Everything is written into a temporary sibling first. A new checkpoint is that sibling, renamed. An existing one is
replaced by moving the new data folder beside the old and then renaming the new manifest over the old one, so that at
every moment the manifest names one whole set of data; what it does not name is no part of the checkpoint.

Where two saves replace one checkpoint at a time, one of them fails: that which comes to its last rename and finds
another manifest than was there when it began. Before that rename each takes away the manifests that others have ready,
so that one which slept between looking and renaming has nothing to rename when it wakes. All of this holds without
locks; a lock makes saves that are awake take turns, so that one of them succeeds. Data are removed only when no save
that is alive, and not the manifest, can name them.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from dist_ema.checkpoints.manifest import BEGIN, DATA, MAX_BYTES, NAME, checksum
from dist_ema.checkpoints.places import StrPath, file_system, is_remote, local_path
from dist_ema.checkpoints.staging import LOCK, Staging, is_alive, staging_path
from dist_ema.checkpoints.storage import FilePlan, RunWriter, Writer, create_file, sync
from dist_ema.checkpoints.upload import Upload
from dist_ema.errors import CheckpointError

logger = logging.getLogger(__name__)
#: Seconds to wait for a save that is just replacing the same checkpoint, which takes milliseconds; then it hangs.
_PATIENCE = 3.0
_NAMES_DATA = re.compile(rb'"data":"(data-[0-9a-f]{32})"')


class Destination(Protocol):
    """One checkpoint in the making. Rank 0 calls ``create``, ``commit`` and ``abandon``; every rank has an object."""

    #: The data folder.
    data: str

    def create(self, folders: Mapping[str, Sequence[FilePlan]], overwrite: bool) -> None:
        """Makes the files of every folder, or what is needed to make them.

        Refuses a place that holds something else than a checkpoint and, unless ``overwrite``, one that holds one.
        """

    def is_visible(self) -> bool:
        """Whether this process can write into what rank 0 made."""

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> Writer:
        """What fills the files of a folder."""

    def commit(self, manifest: bytes) -> None:
        """Puts the checkpoint in its place. Raises CheckpointError if another save has done so since ``create``."""

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
        self._staging = Staging(target, token)
        self._sizes: dict[str, int] = {}
        self._created = False

    def create(self, folders: Mapping[str, Sequence[FilePlan]], overwrite: bool = True) -> None:
        """As :meth:`Destination.create`. Raises CheckpointError, OSError."""
        _check_target(self._target, overwrite)
        self._before = _digest(self._target)
        self._created = True
        self._staging.create()
        (self._staging.path / self.data).mkdir()
        if self._target.exists():
            self._try_moving()
        for name, plans in folders.items():
            directory = self._staging.path / self.data / name
            directory.mkdir(parents=True)
            for plan in plans:
                create_file(directory, plan)
                self._sizes[f"{name}/{plan.name}"] = plan.size

    def _try_moving(self) -> None:
        """Moves the empty data folder to where it will go, and back: what cannot be done is known before the work."""
        try:
            (self._staging.path / self.data).rename(self._target / self.data)
            (self._target / self.data).rename(self._staging.path / self.data)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EBUSY):
                raise CheckpointError(
                    f"{self._target} is a mount point, or on another file system than {self._target.parent}, where a "
                    "checkpoint is written before it is moved: give a directory below it"
                ) from error
            raise

    def is_visible(self) -> bool:
        """As :meth:`Destination.is_visible`."""
        return self._staging.is_visible()

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> RunWriter:
        """As :meth:`Destination.writer`."""
        return RunWriter(self._staging.path / self.data / folder, plans)

    def commit(self, manifest: bytes) -> None:
        """As :meth:`Destination.commit`; all is on disk then. Raises CheckpointError, OSError."""
        self._staging.sync()
        with (self._staging.path / NAME).open("wb") as file:  # which another save may take away from now on
            file.write(manifest)
            file.flush()
            os.fsync(file.fileno())
        sync(self._staging.path)
        if self._target.exists():
            self._replace(manifest)
            self._staging.discard()
            _remove_old_data(self._target)
        else:
            self._staging.put_in_place()

    def _replace(self, manifest: bytes) -> None:
        """Until the second rename the old manifest stands, and after it the new one: each with all of its data."""
        with _taking_turns(self._target):
            self._check_unchanged()
            (self._staging.path / self.data).rename(self._target / self.data)
            sync(self._target)
            for rival in self._staging.rivals():
                (rival / NAME).unlink(missing_ok=True)
            self._check_unchanged()
            self._check_data()
            try:
                (self._staging.path / NAME).rename(self._target / NAME)
            except FileNotFoundError as error:
                if _digest(self._target) != checksum(manifest):  # a network's file system may say so after it is done
                    raise self._lost() from error
            sync(self._target)

    def _check_unchanged(self) -> None:
        """What was removed meanwhile cannot be lost any more; what was put there can."""
        if _digest(self._target) not in (None, self._before):
            raise self._lost()

    def _lost(self) -> CheckpointError:
        return CheckpointError(
            f"{self._target} was replaced by another save while this one was writing: that one stands, and what this "
            "one wrote is removed. Have only one run save to a path"
        )

    def _check_data(self) -> None:
        for name, size in self._sizes.items():
            file = self._target / self.data / name
            if not file.is_file() or file.stat().st_size != size:
                raise CheckpointError(f"{file}, which this save wrote, was removed or changed before it was done")

    def abandon(self) -> None:
        """As :meth:`Destination.abandon`."""
        if self._created:
            with suppress(OSError):  # where the manifest cannot be read, it may name them
                if _data_of(self._target) != self.data:
                    shutil.rmtree(self._target / self.data, ignore_errors=True)
            self._staging.discard()


def _check_target(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError unless a checkpoint may be put there: where nothing is, or one, or what is left of one."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is not a directory: give another path, or remove it")
    names = {found.name for found in target.iterdir()} - {LOCK} if target.exists() else set()
    if names and not any(map(DATA.fullmatch, names)) and not _text(target).startswith(BEGIN):
        raise CheckpointError(
            f"{target} holds {sorted(names)[0]!r} and is no checkpoint: give a path that does not exist, an empty "
            "directory, or that of a checkpoint to replace"
        )
    if NAME in names and not overwrite:
        raise CheckpointError(f"{target} is a checkpoint already: give another path, or overwrite=True (--overwrite)")


def _text(target: Path) -> bytes:
    """Of the manifest; empty where there is none."""
    try:
        descriptor = os.open(target / NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_BYTES)


def _digest(target: Path) -> str | None:
    """What tells one manifest from another; None where there is none."""
    text = _text(target)
    return checksum(text) if text else None


def _data_of(target: Path) -> str | None:
    """The data folder that the manifest names, be it damaged elsewhere."""
    found = _NAMES_DATA.search(_text(target))
    return found[1].decode() if found else None


@contextmanager
def _taking_turns(target: Path) -> Iterator[None]:
    """Holds the lock of a directory that exists, in a file that is there no longer than it is held.

    Goes on without it where there are no locks, and where another process does not give it back, since that one hangs.
    """
    lock = _lock(target / LOCK)
    try:
        yield
    finally:
        if lock is not None:
            (target / LOCK).unlink(missing_ok=True)
            os.close(lock)


def _lock(path: Path) -> int | None:
    last = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:  # who held it has removed it
            pass
        except BlockingIOError:
            if time.monotonic() > last:
                os.close(descriptor)
                logger.warning("%s has been locked for %g s by a save that seems to hang", path.parent, _PATIENCE)
                return None
            time.sleep(0.01)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            return None
        os.close(descriptor)


def _remove_old_data(target: Path) -> None:
    """Removes the data folders that no save that is alive is about to name, and that the manifest does not.

    In this order: a save moves its data there, names them, and only then is not alive any more.
    """
    with suppress(OSError):  # the new checkpoint stands; the next save tries again
        for found in target.iterdir():
            if DATA.fullmatch(found.name):
                alive = is_alive(staging_path(target, found.name.removeprefix("data-")))
                if not alive and _data_of(target) != found.name:
                    shutil.rmtree(found, ignore_errors=True)
