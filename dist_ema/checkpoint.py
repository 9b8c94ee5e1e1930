"""Checkpoints of averages: written in place by all ranks, committed by one rename, read by ranges at any world size.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from dist_ema.collectives import agree, broadcast_object, gather_objects, rank_in, sum_integers
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.gather import Entry, Held
from dist_ema.manifest import LIVE, NAME, Manifest, StoredFile, StoredTensor, checksum
from dist_ema.storage import DTYPE_NAMES, FilePlan, create_file, sync
from dist_ema.track import Track
from dist_ema.writing import Folder

#: Bytes of one file at most.
FILE_LIMIT = 5 * 10**9
_LOCK = "lock"
#: Seconds in which a staging directory may have no lock yet.
_YOUNG = 60
_STAGING = re.compile(r"\..+\.saving-[0-9a-f]{32}")
_DATA = re.compile(r"data-[0-9a-f]{32}")


@dataclass
class _Part:
    folder: Folder
    plans: list[FilePlan]


class Save:
    """One save of a checkpoint: ``run()``, or ``start()``, ``write_averages()`` and ``finish()``. Collective.

    Args:
        path: of the checkpoint.
        track: the clocks.
        started: whether there is an average yet.
        skipped: how many NaN and Inf elements this rank has left out.
        entries: every full tensor of the model.
        views: what this rank holds of each, for each average.
        group: the ranks.
    """

    def __init__(
        self,
        path: object,
        track: Track,
        started: bool,
        skipped: int,
        entries: Sequence[Entry],
        views: Mapping[str, Callable[[str], Held | None]],
        group: dist.ProcessGroup | None,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise EMAConfigError(f"path={path!r}: allowed is a str or a path of the checkpoint's directory")
        self._doing = f"save to {os.fspath(path)}"
        self._target = Path(path).absolute()
        self._group = group
        self._first = rank_in(group) == 0
        self._skipped = skipped
        self._record = Manifest(
            data="",
            started=started,
            clock=track.clock,
            start=track.start,
            seen=track.seen,
            skipped=0,
            schedules=track.schedules,
            averages={},
            live={},
            files={},
        )
        tracked = [entry for entry in entries if entry.mode != "live"]
        live = [entry for entry in entries if entry.mode == "live"]
        folders = {f"averages/{name}": (tracked, held) for name, held in views.items()}
        if live:
            folders[LIVE] = (live, next(iter(views.values())))
        self._data = "data-" + "0" * 32  # until a save begins
        self._parts: dict[str, _Part] = {}
        for name, (wanted, held) in folders.items():
            dtypes = {entry.name: entry.dtype for entry in wanted}
            folder = Folder(wanted, held, dtypes, FILE_LIMIT, tied=False)
            self._parts[name] = _Part(folder, folder.plan())

    def run(self) -> None:
        """The whole save; an error of one rank is raised on all, and nothing is left behind. Collective."""
        try:
            self.start()
            self.write_averages()
            self.finish()
        except BaseException:
            self.abandon()
            raise

    def start(self) -> None:
        """Makes the files, and writes what training may change at any time: all that is live. Collective."""
        try:
            self._prepare()
            self._write(LIVE if self._record.started else "")
        except BaseException:
            self.abandon()
            raise

    def write_averages(self) -> None:
        """Writes the averages. Collective."""
        if self._record.started:
            self._write("averages/")

    def _prepare(self) -> None:
        """Makes the staging directory and its files. Collective."""
        token = broadcast_object(os.urandom(16).hex(), self._group)
        self._data = f"data-{token}"
        self._staging = self._target.parent / f".{self._target.name[:100]}.saving-{token}"
        agree(lambda: self._create() if self._first else None, self._group, self._doing)
        self._shared = all(gather_objects((self._staging / _LOCK).exists(), self._group))

    def _write(self, prefix: str) -> None:
        """Fills the files of the folders whose names begin so. Collective."""
        for name, part in self._parts.items():
            if name.startswith(prefix):
                directory = self._staging / self._data / name
                part.folder.write(directory, part.plans, self._group, self._shared, True, self._doing)

    def finish(self) -> None:
        """Writes the manifest and puts the checkpoint in its place. Collective."""
        digests = {name: part.folder.total_digests(self._group) for name, part in self._parts.items()}
        (skipped,) = sum_integers([self._skipped], self._group)
        self._record = replace(self._record, skipped=skipped)
        agree(lambda: self._commit(digests) if self._first else None, self._group, self._doing)

    def abandon(self) -> None:
        """Removes what was written. Local; harmless after ``finish()``."""
        if self._first and hasattr(self, "_lock"):
            os.close(self._lock)
            del self._lock
            shutil.rmtree(self._staging, ignore_errors=True)

    def _create(self) -> None:
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
        for name, part in self._parts.items():
            directory = self._staging / self._data / name
            directory.mkdir(parents=True)
            for plan in part.plans:
                create_file(directory, plan)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the checkpoint, by its path there, the manifest included. Pure; needs no group."""
        digests = {name: {entry.name: 0 for entry in part.folder.entries} for name, part in self._parts.items()}
        manifest = self._manifest(digests)
        files = {f"{manifest.data}/{name}": file.size for name, file in manifest.files.items()}
        return files | {NAME: len(manifest.to_bytes())}

    def _manifest(self, digests: Mapping[str, Mapping[str, int]]) -> Manifest:
        files: dict[str, StoredFile] = {}
        tensors: dict[str, dict[str, StoredTensor]] = {}
        for folder, part in self._parts.items():
            aliases = {entry.name: entry.aliases for entry in part.folder.entries}
            stored: dict[str, StoredTensor] = {}
            for plan in part.plans:
                file = f"{folder}/{plan.name}"
                files[file] = StoredFile(plan.size, checksum(plan.header))
                for tensor in plan.tensors:
                    stored[tensor.name] = StoredTensor(
                        file,
                        DTYPE_NAMES[tensor.dtype],
                        tensor.shape,
                        digests[folder][tensor.name],
                        aliases[tensor.name],
                    )
            tensors[folder] = stored
        averages = {name: tensors[f"averages/{name}"] for name in self._record.schedules}
        return replace(self._record, data=self._data, averages=averages, live=tensors.get(LIVE, {}), files=files)

    def _commit(self, digests: Mapping[str, Mapping[str, int]]) -> None:
        (self._staging / NAME).write_bytes(self._manifest(digests).to_bytes())
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
        os.close(self._lock)
        del self._lock

    def _replace(self) -> None:
        """Until the second rename the old manifest stands, and after it the new one: each with all of its data."""
        (self._staging / self._data).rename(self._target / self._data)
        sync(self._target)
        (self._staging / NAME).rename(self._target / NAME)
        sync(self._target)
        shutil.rmtree(self._staging, ignore_errors=True)
        for found in self._target.iterdir():
            if _DATA.fullmatch(found.name) and found.name != self._data:
                shutil.rmtree(found, ignore_errors=True)
        (self._target / _LOCK).unlink(missing_ok=True)  # of a save that was killed just after its rename


def remove_leftovers(parent: Path) -> None:
    """Removes the staging directories of saves that were killed. A save that is under way holds a lock on its own."""
    for found in parent.iterdir():
        if not _STAGING.fullmatch(found.name) or found.is_symlink():
            continue
        try:
            lock = os.open(found / _LOCK, os.O_RDWR)
        except OSError:  # made a moment ago, or killed in that moment
            with suppress(FileNotFoundError):  # another save has put it in its place
                if time.time() - found.lstat().st_mtime > _YOUNG:
                    shutil.rmtree(found, ignore_errors=True)
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
