"""Writes a checkpoint: in place by all ranks, or through rank 0 if they do not share a disk; committed in one step.

::

    start()    create the files        rank 0 makes them in a hidden directory; do all ranks see it?
               write what is live      training may change it as soon as start() returns
    finish()   write the averages      they may change again as soon as ``reading`` is left
               sync                    all bytes of all ranks are on disk
               commit                  rank 0 writes the manifest and renames: old or new checkpoint, never a mixture
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import torch.distributed as dist

from dist_ema.checkpoints.contents import Contents
from dist_ema.comm.agreement import FirstFailure, agreed
from dist_ema.comm.collectives import rank_in, sum_integers
from dist_ema.errors import CheckpointError
from dist_ema.formats.manifest import LIVE, Manifest
from dist_ema.storage import storage_writer
from dist_ema.storage.base import StorageWriter, TensorWriter
from dist_ema.storage.paths import StrPath, check_path


class Save:
    """Carries out one save: ``start()``, then ``finish()``. Collective.

    An error of one rank is raised on all of them, and everything that was written is removed then. The calls of a
    storage backend that this makes are listed in :class:`~dist_ema.storage.base.StorageWriter`.

    Args:
        path: the checkpoint, a directory or a URL.
        contents: what to write.
        group: the ranks.
        overwrite: replace a checkpoint that exists at ``path``.
    """

    def __init__(
        self, path: StrPath, contents: Contents, group: dist.ProcessGroup | None, overwrite: bool = True
    ) -> None:
        self._path = path
        self._contents = contents
        self._group = group
        self._overwrite = overwrite
        self._operation = f"save to {path}"
        self._first = rank_in(group) == 0
        self._storage: StorageWriter | None = None  # rank 0's, from when a failure has to undo something
        self._writers: list[TensorWriter] = []  # open writers, to be synced and closed

    def run(self) -> None:
        """Runs the whole save. Collective."""
        self.start()
        self.finish()

    def start(self) -> None:
        """Makes the files and writes all live tensors, which training may change once this returns. Collective.

        Before the first update the averages are live tensors, too.
        """
        with self._undone_on_failure():
            self._create()
            live = [name for name in self._contents.folders if name == LIVE or not self._contents.state.started]
            if live and self._shared:
                # The caller continues training after this, so every rank has to know of a failure now.
                with agreed(self._group, self._operation):
                    self._write(live)
            elif live:
                self._write(live)  # raises on all ranks by itself

    def finish(
        self,
        reading: AbstractContextManager[object] = nullcontext(),  # noqa: B008 - has no state
        turn: AbstractContextManager[dist.ProcessGroup | None] | None = None,
    ) -> None:
        """Writes the averages, waits for the disk and puts the checkpoint in its place. Collective.

        Args:
            reading: entered while the averages are read. When it is left, they may change again, although this rank may
                still wait for its disk, or for other ranks.
            turn: waits for this save's turn, and gives another group of the same ranks to communicate in. Everything
                that needs no other rank is done before, so that a caller who waits for ``reading`` does not wait for
                other saves.
        """
        with self._undone_on_failure():
            averages = [name for name in self._contents.folders if name != LIVE and self._contents.state.started]
            failure = FirstFailure()
            if self._shared:
                with failure.kept(), reading:
                    self._write(averages)
            with turn or nullcontext(self._group) as self._group:
                # Gathering is collective, so it must not be in the block below, which a failing rank leaves
                # immediately.
                if not self._shared:
                    with reading:
                        self._write(averages)
                # All bytes have to be on disk on all ranks before rank 0 names them in the manifest.
                with agreed(self._group, self._operation):
                    failure.raise_first()
                    self._sync()
                skipped, digests = self._totals()
                with agreed(self._group, self._operation):
                    if self._first:
                        manifest = self._contents.manifest(self._to.data, skipped, digests)
                        self._to.commit(_readable(manifest))

    @contextmanager
    def _undone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            while self._writers:
                with suppress(OSError):  # the first failure is raised, not this one
                    self._writers.pop().close()
            if self._first and self._storage is not None:
                self._storage.abandon()
            raise

    def _create(self) -> None:
        """Has rank 0 make the files, and finds out whether all ranks see them. Collective."""
        own = os.urandom(16).hex()  # rank 0's is used; every rank makes one, so that it is sent in the same round
        with agreed(self._group, self._operation) as round_:
            check_path(self._path)
            plans = self._contents.plans
            if self._first:
                _readable(self._contents.manifest())  # refuses, before anything is written, what load() would refuse
                self._storage = storage_writer(self._path, own)
                self._storage.create(plans, self._overwrite)
            round_.send(own)
        # A rank sees the files if it finds the directory that has rank 0's token in its name: the same path on a disk
        # of its own has no such directory.
        token = round_.received[0]
        with agreed(self._group, self._operation) as round_:
            self._to = self._storage or storage_writer(self._path, token)
            round_.send(self._to.is_visible())
        self._shared = all(round_.received)

    def _write(self, folders: list[str]) -> None:
        """Fills the files of these folders. Local if all ranks see the files, else collective."""
        for name in folders:
            folder = self._contents.folders[name]
            writer = self._to.writer(name, folder.plans)
            self._writers.append(writer)
            if self._shared:
                folder.write_own(writer, self._group)
            else:
                folder.write_gathered(writer, self._group, self._operation)

    def _sync(self) -> None:
        """Waits until everything that this rank has written is on disk, and closes the files. Local."""
        for writer in self._writers:
            if self._shared or self._first:  # otherwise this rank has written nothing
                writer.sync()
        while self._writers:
            self._writers.pop().close()

    def _totals(self) -> tuple[int, dict[tuple[str, str], int]]:
        """Returns sums over all ranks: elements left out, and the fingerprint of each tensor, by folder and name.
        Collective.

        Each rank has the sum over the elements that it has written. Modulo 2^64 these sums add up to the fingerprint.
        """
        own = {
            (name, entry.name): folder.digests.get(entry.name, 0)
            for name, folder in self._contents.folders.items()
            for entry in folder.entries
        }
        # One collective call for all tensors: 8 bytes each.
        skipped, *totals = sum_integers([self._contents.state.skipped, *own.values()], self._group)
        return skipped, dict(zip(own, totals, strict=True))


def _readable(manifest: Manifest) -> bytes:
    """Returns the text of a manifest. Raises CheckpointError for one that ``load()`` would refuse."""
    text = manifest.to_bytes()
    try:
        Manifest.from_bytes(text)
    except CheckpointError as error:
        raise CheckpointError(f"this could be written but not read again: {error}") from error
    return text
