"""Writes a checkpoint directory beside its place, and moves it there in one step when it is complete and on disk.

A checkpoint is a directory with ``ema.json``, the manifest, and a data folder that the manifest names::

    checkpoint/ema.json
    checkpoint/data-<token>/averages/<name>/model.safetensors
    checkpoint/data-<token>/live/model.safetensors              frozen parameters and others that are not averaged

A new checkpoint is its staging directory, renamed. An existing one is replaced in two renames: the new data folder
moves beside the old one, then the new manifest replaces the old one. So at every moment the manifest names one complete
set of data, and what it does not name is no part of the checkpoint::

    1. write        staging/data-B, staging/ema.json      checkpoint: ema.json -> data-A
    2. rename       checkpoint/data-B                     checkpoint: ema.json -> data-A, data-B not named yet
    3. rename       checkpoint/ema.json                   checkpoint: ema.json -> data-B, data-A not named any more
    4. remove       checkpoint/data-A

If two saves replace one checkpoint at the same time, one of them fails: the one that comes to its last rename and finds
another manifest than when it began. A save may also be suspended between looking and renaming. So before that rename
each save removes the manifests that others have prepared, and a save that wakes up later has nothing to rename. All of
this holds without locks. A lock makes running saves take turns, so that one of them succeeds. Data are removed only
when neither a live save nor the manifest can name them.
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

from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import FilePlan
from dist_ema.formats.manifest import BEGIN, DATA, MAX_BYTES, NAME, checksum
from dist_ema.storage.local import RunWriter, remove_tree, sync, write_synced, write_text
from dist_ema.storage.staging import LOCK, Staging, close_lock, is_alive, staging_path

logger = logging.getLogger(__name__)
#: Seconds to wait for another save that is replacing the same checkpoint; one that takes longer hangs, since that takes
#: milliseconds.
_PATIENCE = 3.0
_NAMES_DATA = re.compile(rb'"data":"(data-[0-9a-f]{32})"')


class LocalWriter:
    """Writes a checkpoint directory; implements :class:`~dist_ema.storage.base.StorageWriter`.

    Args:
        target: the directory.
        token: the token of this save.
    """

    def __init__(self, target: Path, token: str) -> None:
        self.data = f"data-{token}"
        self._target = target
        self._staging = Staging(target, token)
        self._sizes: dict[str, int] = {}  # size of every file, by its path in the data folder
        self._beside: list[str] = []  # small files beside the manifest
        self._created = False

    def create(self, folders: Mapping[str, Sequence[FilePlan]], overwrite: bool = True) -> None:
        """Implements :meth:`StorageWriter.create`."""
        _check_target(self._target, overwrite)
        self._before = _digest(self._target)
        self._created = True
        self._staging.create()
        (self._staging.content / self.data).mkdir()
        if self._target.exists():
            self._try_moving()
        for name, plans in folders.items():
            self._staging.create_files(f"{self.data}/{name}", plans)
            self._sizes |= {f"{name}/{plan.name}": plan.size for plan in plans}

    def _try_moving(self) -> None:
        """Moves the empty data folder to its final place and back, to fail now if that is impossible later."""
        try:
            (self._staging.content / self.data).rename(self._target / self.data)
            (self._target / self.data).rename(self._staging.content / self.data)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EBUSY):
                raise CheckpointError(
                    f"{self._target} is a mount point, or on another file system than {self._target.parent}, where a "
                    "checkpoint is written before it is moved: give a directory below it"
                ) from error
            raise

    def is_visible(self) -> bool:
        """Implements :meth:`StorageWriter.is_visible`."""
        return self._staging.is_visible()

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> RunWriter:
        """Implements :meth:`StorageWriter.writer`."""
        return self._staging.writer(f"{self.data}/{folder}", plans)

    def write_beside(self, name: str, text: str) -> None:
        """Writes a small file that ``commit()`` moves beside the manifest. Call it before ``commit()``."""
        write_text(self._staging.content / name, text)
        self._beside.append(name)

    def commit(self, manifest: bytes) -> None:
        """Implements :meth:`StorageWriter.commit`."""
        self._staging.sync()
        write_synced(self._staging.content / NAME, manifest)  # from now on another save may remove it
        sync(self._staging.content)
        if self._target.exists():
            self._replace(manifest)
            self._staging.discard()
        else:
            self._staging.put_in_place()
        _remove_old_data(self._target)  # also after a first save, which another save may have replaced by now

    def _replace(self, manifest: bytes) -> None:
        """Replaces data and manifest by two renames. Before the second rename the old manifest is valid, after it the
        new one.
        """
        with _taking_turns(self._target):
            self._check_unchanged()
            (self._staging.content / self.data).rename(self._target / self.data)
            sync(self._target)  # the data have to be on disk before a manifest names them
            # A rival that was suspended just before its rename finds nothing to rename when it wakes up.
            for rival in self._staging.rivals():
                (rival / NAME).unlink(missing_ok=True)
            # Checked again: a rival may have renamed its manifest before this save could remove it.
            self._check_unchanged()
            self._check_data()
            try:
                (self._staging.content / NAME).rename(self._target / NAME)
            except FileNotFoundError as error:
                # A network file system may repeat a request whose answer was lost, and then report the second try.
                if _digest(self._target) != checksum(manifest):
                    raise self._lost() from error
            for name in self._beside:
                (self._staging.content / name).rename(self._target / name)
            self._sync_names()

    def _sync_names(self) -> None:
        """Waits until the new manifest is on disk. Raises CheckpointError if that is not certain."""
        try:
            sync(self._target)
        except OSError as error:
            # After a power failure either manifest may be there, so the data of both stay. The next save removes them.
            raise CheckpointError(
                f"{self._target} has the new checkpoint, but the system could not confirm that it is on disk "
                f"({error.strerror}): after a power failure the old one may be there. Save again"
            ) from error

    def _check_unchanged(self) -> None:
        """Raises CheckpointError if another save has put a manifest there. A manifest that was removed does not
        matter.
        """
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
                raise CheckpointError(
                    f"{file}, which this save wrote, was removed or changed before the save was complete"
                )

    def abandon(self) -> None:
        """Implements :meth:`StorageWriter.abandon`."""
        if self._created:
            with suppress(OSError):  # if the manifest cannot be read, it may name the data, so they stay
                if _data_of(self._target) != self.data:
                    shutil.rmtree(self._target / self.data, ignore_errors=True)
            self._staging.discard()


def _check_target(target: Path, overwrite: bool) -> None:
    """Raises CheckpointError unless there is nothing, an empty directory, or a checkpoint, even a damaged one."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} is not a directory: give another path, or remove it")
    # A lock belongs to a save that is replacing the checkpoint now, or that was killed while it did.
    names = {found.name for found in target.iterdir()} - {LOCK} if target.exists() else set()
    if names and not any(map(DATA.fullmatch, names)) and not _text(target).startswith(BEGIN):
        raise CheckpointError(
            f"{target} holds {sorted(names)[0]!r} and is no checkpoint: give a path that does not exist, an empty "
            "directory, or that of a checkpoint to replace"
        )
    if NAME in names and not overwrite:
        raise CheckpointError(f"{target} is a checkpoint already: give another path, or overwrite=True")


def _text(target: Path) -> bytes:
    """Returns the text of the manifest; empty if there is none."""
    try:
        descriptor = os.open(target / NAME, os.O_RDONLY | os.O_NONBLOCK)  # follows links
    except (FileNotFoundError, NotADirectoryError):
        return b""
    with os.fdopen(descriptor, "rb") as file:
        return file.read(MAX_BYTES)


def _digest(target: Path) -> str | None:
    """Returns what identifies a manifest; None if there is none."""
    text = _text(target)
    return checksum(text) if text else None


def _data_of(target: Path) -> str | None:
    """Returns the data folder that the manifest names, even if the manifest is damaged elsewhere."""
    found = _NAMES_DATA.search(_text(target))
    return found[1].decode() if found else None


@contextmanager
def _taking_turns(target: Path) -> Iterator[None]:
    """Holds the lock of a checkpoint directory. The file of the lock is removed when it is released.

    Continues without the lock if the file system has none, and if its holder hangs. The lock only saves work: without
    it one of two saves fails.
    """
    lock = _lock(target / LOCK)
    try:
        yield
    finally:
        if lock is not None:
            (target / LOCK).unlink(missing_ok=True)
            close_lock(lock)


def _lock(path: Path) -> int | None:
    last = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder removes the file before it releases the lock, so the file that was locked here may not be
            # the one of this name any more.
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:  # the holder has removed it: try the next file of this name
            pass
        except BlockingIOError:
            if time.monotonic() > last:
                age = time.time() - os.fstat(descriptor).st_mtime
                close_lock(descriptor)
                logger.warning(
                    "Continuing without the lock %s: another save to this path has held it for %.0f s and seems to "
                    "hang. Have only one run save to a path",
                    path,
                    age,
                )
                return None
            time.sleep(0.01)
        except OSError:
            close_lock(descriptor)
            path.unlink(missing_ok=True)
            return None
        close_lock(descriptor)


def _remove_old_data(target: Path) -> None:
    """Removes data folders that the manifest does not name and that no live save is about to name.

    It looks for a live save first, because a save moves its data here, then its manifest, and only then stops being
    alive.
    """
    with suppress(OSError):  # the new checkpoint is valid; the next save tries again
        for found in target.iterdir():
            if DATA.fullmatch(found.name):
                alive = is_alive(staging_path(target, found.name.removeprefix("data-")))
                if not alive and _data_of(target) != found.name:
                    remove_tree(found)
