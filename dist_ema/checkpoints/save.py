"""Checkpoints of averages: written in place by all ranks, committed in one step, read by ranges at any world size."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

import torch.distributed as dist

from dist_ema.checkpoints.folder import Folder
from dist_ema.checkpoints.layout import DTYPE_NAMES, FilePlan
from dist_ema.checkpoints.manifest import LIVE, NAME, Manifest, StoredFile, StoredTensor, checksum
from dist_ema.checkpoints.storage import storage_writer
from dist_ema.checkpoints.storage.base import StorageWriter, TensorWriter
from dist_ema.checkpoints.storage.paths import StrPath, check_path
from dist_ema.collectives import agreed, rank_in, sum_integers
from dist_ema.errors import CheckpointError
from dist_ema.schedules import Schedule
from dist_ema.sharding.gather import LocalValues
from dist_ema.sharding.writers import FullTensor
from dist_ema.state import EMAState

#: Bytes of one file at most.
FILE_LIMIT = 5 * 10**9


@dataclass
class _Part:
    folder: Folder
    plans: list[FilePlan]


class Save:
    """One save of a checkpoint: ``run()``, or ``start()``, ``write_averages()`` and ``finish()``. Collective.

    Args:
        path: of the checkpoint, a directory or a URL.
        state: the clocks, and how many NaN and Inf elements this rank has left out.
        schedules: of each average.
        entries: every full tensor of the model.
        views: what this rank holds of each, for each average.
        group: the ranks.
        include_untracked: with what is not averaged; without, the manifest says what was left out.
        overwrite: replace a checkpoint that is there already.
    """

    def __init__(
        self,
        path: StrPath,
        state: EMAState,
        schedules: Mapping[str, Schedule],
        entries: Sequence[FullTensor],
        views: Mapping[str, Callable[[str], LocalValues | None]],
        group: dist.ProcessGroup | None,
        include_untracked: bool = True,
        overwrite: bool = True,
    ) -> None:
        self._overwrite = overwrite
        self._operation = f"save to {path}"
        self._path = path
        self._destination: StorageWriter | None = None
        self._failure: Exception | None = None  # of this rank's writing, until the ranks agree
        self._writers: list[TensorWriter] = []
        self._group = group
        self._first = rank_in(group) == 0
        self._record = Manifest(
            data="",
            state=state,
            schedules=schedules,
            averages={},
            live={},
            files={},
            lacking=() if include_untracked else tuple(entry.name for entry in entries if entry.mode == "live"),
        )
        self._entries = [entry for entry in entries if include_untracked or entry.mode != "live"]
        self._views = views

    @cached_property
    def _parts(self) -> dict[str, _Part]:
        """The folders and their files. Raises CheckpointError for what cannot be stored."""
        tracked = [entry for entry in self._entries if entry.mode != "live"]
        live = [entry for entry in self._entries if entry.mode == "live"]
        folders = {f"averages/{name}": (tracked, held) for name, held in self._views.items()}
        if live:
            folders[LIVE] = (live, next(iter(self._views.values())))
        parts = {}
        for name, (wanted, held) in folders.items():
            dtypes = {entry.name: entry.dtype for entry in wanted}
            folder = Folder(wanted, held, dtypes, FILE_LIMIT, tied=False)
            parts[name] = _Part(folder, folder.lay_out_files())
        return parts

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
            prefix = LIVE if self._record.started else ""
            self._write(prefix)
            if any(name.startswith(prefix) for name in self._parts):
                with agreed(self._group, self._operation):
                    self._report()
        except BaseException:
            self.abandon()
            raise

    def write_averages(self) -> None:
        """Writes the averages. Collective; local where ranks share the files, and ``finish()`` reports what failed."""
        if self._record.started:
            self._write("averages/")

    def _prepare(self) -> None:
        """Makes the files, or what is needed to make them. Collective."""
        own = os.urandom(16).hex()
        with agreed(self._group, self._operation) as round_:
            check_path(self._path)
            plans = {name: part.plans for name, part in self._parts.items()}
            if self._first:
                _readable(self._without_digests())  # before anything is written
                self._destination = storage_writer(self._path, own)
                self._destination.create(plans, self._overwrite)
            round_.send(own)
        token = round_.received[0]
        with agreed(self._group, self._operation) as round_:
            self._to = self._destination or storage_writer(self._path, token)
            round_.send(self._to.is_visible())
        self._shared = all(round_.received)

    def _write(self, prefix: str) -> None:
        """Fills the files of the folders whose names begin so. Collective, or local as ``write_averages``."""
        for name, part in self._parts.items():
            if name.startswith(prefix) and self._failure is None:
                try:
                    writer = self._to.writer(name, part.plans)
                    self._writers.append(writer)
                    part.folder.write(writer, part.plans, self._group, self._shared, True, self._operation)
                except Exception as error:
                    if not self._shared:
                        raise
                    self._failure = error

    def _report(self) -> None:
        """Raises what failed on this rank. Local."""
        if self._failure is not None:
            raise self._failure

    def _sync(self) -> None:
        """Waits until what this rank wrote is there for good. Local."""
        self._report()
        for writer in self._writers:
            if self._shared or self._first:
                writer.sync()
        self._close()

    def _close(self) -> None:
        while self._writers:
            self._writers.pop().close()

    def finish(self) -> None:
        """Waits for the disk, writes the manifest and puts the checkpoint in its place. Collective."""
        with agreed(self._group, self._operation):
            self._sync()
        digests = self._total_digests()
        with agreed(self._group, self._operation):
            if self._first:
                self._to.commit(_readable(self._manifest(digests, self._to.data)))

    def _total_digests(self) -> dict[str, dict[str, int]]:
        """Fingerprints of all full tensors, by folder and name, and all elements that were left out. Collective."""
        names = [(part, entry.name) for part, found in self._parts.items() for entry in found.folder.entries]
        own = [self._parts[part].folder.digests.get(name, 0) for part, name in names]
        state = self._record.state
        skipped, *totals = sum_integers([state.skipped, *own], self._group)
        self._record = replace(self._record, state=replace(state, skipped=skipped))
        digests: dict[str, dict[str, int]] = {part: {} for part in self._parts}
        for (part, name), total in zip(names, totals, strict=True):
            digests[part][name] = total
        return digests

    def abandon(self) -> None:
        """Removes what was written. Local; harmless after ``finish()``."""
        while self._writers:
            with suppress(OSError):  # it is another failure that is told
                self._writers.pop().close()
        if self._first and self._destination is not None:
            self._destination.abandon()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the checkpoint, by its path there, the manifest included. Pure; needs no group."""
        manifest = self._without_digests()
        files = {f"{manifest.data}/{name}": file.size for name, file in manifest.files.items()}
        return files | {NAME: len(manifest.to_bytes())}

    def _without_digests(self) -> Manifest:
        """The manifest but for what the data will say."""
        digests = {name: {entry.name: 0 for entry in part.folder.entries} for name, part in self._parts.items()}
        return self._manifest(digests, "data-" + "0" * 32)

    def _manifest(self, digests: Mapping[str, Mapping[str, int]], data: str) -> Manifest:
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
        return replace(self._record, data=data, averages=averages, live=tensors.get(LIVE, {}), files=files)


def _readable(manifest: Manifest) -> bytes:
    """The text of a manifest, after reading it. Raises CheckpointError for what ``load()`` would refuse."""
    text = manifest.to_bytes()
    try:
        Manifest.from_bytes(text)
    except CheckpointError as error:
        raise CheckpointError(f"this could be written but not read again: {error}") from error
    return text
