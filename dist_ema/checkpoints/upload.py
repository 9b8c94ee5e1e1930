"""A checkpoint in an object store, or whatever else fsspec writes to: files one after the other, the manifest last.

Objects appear when they are complete, and cannot be renamed. So the data folder is written in its place, under a name
that no other save has, and the one object that is replaced is the manifest: until then the old one stands, with the
data that it names. Where an object replaces another in one step, as in all object stores, so does the checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dist_ema.checkpoints.manifest import DATA, NAME
from dist_ema.checkpoints.storage import FilePlan
from dist_ema.errors import CheckpointError
from dist_ema.geometry import Runs

logger = logging.getLogger(__name__)
#: Bytes that are kept in memory and then sent.
_BLOCK = 16 << 20


class Upload:
    """A checkpoint in a file system of fsspec, written by rank 0; a ``destination.Destination``.

    What saves left that were killed is removed by the next one to the same place, so no two may run at a time.

    Args:
        system: the file system.
        root: the path in it.
        token: of this save.
    """

    def __init__(self, system: Any, root: str, token: str) -> None:
        self.data = f"data-{token}"
        self._system = system
        self._root = root
        self._begun = False

    def create(self, folders: Mapping[str, Sequence[FilePlan]]) -> None:
        """Makes directories where there are such things: a path of an object store begins with its bucket."""
        if not self._root.strip("/"):
            raise CheckpointError("a checkpoint needs a path of its own: the URL names none")
        if self._system.isfile(self._root):
            raise CheckpointError(f"{self._root} is a file: give another path, or remove it")
        self._begun = True
        for name in folders if self._root.startswith("/") else ():
            self._system.makedirs(f"{self._root}/{self.data}/{name}", exist_ok=True)

    def is_visible(self) -> bool:
        """False: a file has to be written from its first byte to its last, by one process."""
        return False

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> UploadWriter:
        """Of the files of one folder, to be written to in their order."""
        return UploadWriter(self._system, f"{self._root}/{self.data}/{folder}", plans)

    def commit(self, manifest: bytes) -> None:
        """Replaces the manifest, and removes the data that nothing names any more."""
        self._system.pipe_file(f"{self._root}/{NAME}", manifest)
        self._begun = False
        try:
            self._system.invalidate_cache(self._root)
            found = [str(name).rstrip("/") for name in self._system.ls(self._root, detail=False)]
            for old in found:
                folder = old.rpartition("/")[2]
                if DATA.fullmatch(folder) and folder != self.data:
                    self._system.rm(old, recursive=True)
        except Exception as error:  # the new checkpoint stands
            logger.warning("%s: data of an older save could not be removed: %s", self._root, error)

    def abandon(self) -> None:
        """Removes the data folder."""
        if self._begun:
            self._begun = False
            with suppress(Exception):  # there is an error already
                self._system.rm(f"{self._root}/{self.data}", recursive=True)


class UploadWriter:
    """Writes tensors in the order of the files, each from its first element to its last."""

    def __init__(self, system: Any, folder: str, plans: Sequence[FilePlan]) -> None:
        self._system = system
        self._folder = folder
        self._plans = list(reversed(plans))  # those to come
        self._plan: FilePlan | None = None
        self._file: Any = None
        self._position = 0

    def write(self, name: str, runs: Runs, values: Tensor) -> None:
        """Takes the next elements: flat, on the CPU, of the planned dtype. Raises what the file system raises."""
        while self._plan is None or name not in self._plan.offsets:
            self._next()
        ((start, _),) = runs
        if self._position != self._plan.offsets[name] + start * values.itemsize:
            raise CheckpointError(f"{self._plan.name}: {name!r} came at byte {self._position}, out of its order")
        self._put(memoryview(values.contiguous().view(torch.uint8).numpy().data))

    def sync(self) -> None:
        """Completes all files."""
        while self._plan is not None or self._plans:
            self._finish()
            if self._plans:
                self._next()

    def _next(self) -> None:
        self._finish()
        if not self._plans:
            raise CheckpointError(f"{self._folder}: more was written than was planned")
        plan = self._plans.pop()
        self._file = self._system.open(f"{self._folder}/{plan.name}", "wb", block_size=_BLOCK)
        self._plan = plan
        self._position = 0
        self._put(memoryview(plan.header))

    def _put(self, data: memoryview) -> None:
        self._file.write(data)
        self._position += len(data)

    def _finish(self) -> None:
        """Completes a file, and looks whether it is there as it should be."""
        if self._plan is None:
            return
        plan, file, self._plan, self._file = self._plan, self._file, None, None
        file.close()
        path = f"{self._folder}/{plan.name}"
        self._system.invalidate_cache(self._folder)
        if (found := self._system.size(path)) != plan.size:
            raise CheckpointError(f"{path} has {found} bytes after writing {self._position}; {plan.size} were planned")

    def close(self) -> None:
        """Gives up a file that is not complete: an upload of which half is done must not become an object."""
        file, self._file, self._plan = self._file, None, None
        if file is not None:
            with suppress(Exception):
                file.discard()
