"""A checkpoint in an object store, or whatever else fsspec writes to: files one after the other, the manifest last.

Objects appear when they are complete, and cannot be renamed. So the data folder is written in its place, under a name
that no other save has, and the one object that is replaced is the manifest: until then the old one stands, with the
data that it names. Where an object replaces another in one step, as in all object stores, so does the checkpoint.

Only one run may save to a URL at a time: stores have no locks. Of two that do, the one that comes last to the manifest
finds another than was there when it began, and fails. A new manifest is only written where there still is none, and on
S3 an old one is only replaced if it is still the same; elsewhere a save that sleeps between looking and writing, while
another replaces the checkpoint, writes a manifest whose data are gone. It looks once more afterwards, and says so.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_ema.checkpoints.manifest import BEGIN, DATA, MAX_BYTES, NAME
from dist_ema.checkpoints.storage import FilePlan
from dist_ema.errors import CheckpointError
from dist_ema.sharding.runs import Runs

logger = logging.getLogger(__name__)
#: Bytes that are kept in memory and then sent.
_BLOCK = 16 << 20
#: What a store says that does not know conditions.
_UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP)


class Upload:
    """A checkpoint in a file system of fsspec, written by rank 0; a ``destination.Destination``.

    What saves left that were killed is removed by the next one to the same place.

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
        self._sizes: dict[str, int] = {}
        self._before: _Object | None = None

    def create(self, folders: Mapping[str, Sequence[FilePlan]], overwrite: bool = True) -> None:
        """Makes directories where there are such things: a path of an object store begins with its bucket."""
        if not self._root.strip("/"):
            raise CheckpointError("a checkpoint needs a path of its own: the URL names none")
        if self._system.isfile(self._root):
            raise CheckpointError(f"{self._root} is a file: give another path, or remove it")
        self._before = self._manifest()
        self._check_place(overwrite)
        self._begun = True
        for name, plans in folders.items():
            self._sizes |= {f"{name}/{plan.name}": plan.size for plan in plans}
            if self._root.startswith("/"):
                self._system.makedirs(f"{self._root}/{self.data}/{name}", exist_ok=True)

    def _check_place(self, overwrite: bool) -> None:
        """As for a directory: refuses one that holds something else than a checkpoint, or what is left of one."""
        if self._before is not None and not overwrite:
            raise CheckpointError(
                f"{self._root} is a checkpoint already: give another path, or overwrite=True (--overwrite)"
            )
        names = [name.rpartition("/")[2] for name in self._list()]
        ours = self._before is not None and self._before.text.startswith(BEGIN)
        if names and not ours and not any(map(DATA.fullmatch, names)):
            raise CheckpointError(f"{self._root} holds {min(names)!r} and is no checkpoint: give another path")

    def _list(self) -> list[str]:
        """The paths of what lies here."""
        try:
            self._system.invalidate_cache(self._root)
            found = [str(name).rstrip("/") for name in self._system.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        return [name for name in found if name.strip("/") != self._root.strip("/")]  # a store's mark of a folder

    def _manifest(self) -> _Object | None:
        """The manifest that is there now."""
        path = f"{self._root}/{NAME}"
        try:
            self._system.invalidate_cache(self._root)
            facts = self._system.info(path)
            return _Object(self._system.cat_file(path), facts.get("ETag"))
        except FileNotFoundError:
            return None

    def is_visible(self) -> bool:
        """False: a file has to be written from its first byte to its last, by one process."""
        return False

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> UploadWriter:
        """Of the files of one folder, to be written to in their order."""
        return UploadWriter(self._system, f"{self._root}/{self.data}/{folder}", plans)

    def commit(self, manifest: bytes) -> None:
        """Replaces the manifest, and removes the data that nothing names any more. Raises CheckpointError."""
        self._check_data()
        found = self._manifest()
        if found is not None and (self._before is None or found.text != self._before.text):
            raise self._lost()
        self._put(manifest, found)
        self._begun = False
        after = self._manifest()
        if after is None or after.text != manifest:
            raise self._lost()
        self._check_data()
        self._remove_old_data()

    def _put(self, manifest: bytes, found: _Object | None) -> None:
        """Writes the manifest if what is there is still ``found``, as far as the store can tell."""
        path = f"{self._root}/{NAME}"
        condition: dict[str, Any] = {}
        if found is None:
            condition = {"mode": "create"}  # fsspec: only if there is none
        elif found.tag is not None and "s3" in _protocols(self._system):
            condition = {"IfMatch": found.tag, "chunksize": MAX_BYTES}  # s3fs: in one request, which alone may have it
        try:
            self._system.pipe_file(path, manifest, **condition)
        except Exception as error:
            now = self._manifest()
            if now is not None and now.text == manifest:  # it is the answer that was lost
                return
            if (now and now.text) != (found and found.text):
                raise self._lost() from error
            unknown = isinstance(error, (TypeError, NotImplementedError)) or getattr(error, "errno", None) in _UNKNOWN
            if not condition or not unknown:
                raise
            self._system.pipe_file(path, manifest)

    def _check_data(self) -> None:
        """Raises CheckpointError unless everything that was written is there. One listing, for any number of files."""
        folder = f"{self._root}/{self.data}"
        self._system.invalidate_cache(folder)
        found = {str(name).strip("/"): facts["size"] for name, facts in self._system.find(folder, detail=True).items()}
        for name, size in self._sizes.items():
            if found.get(f"{folder}/{name}".strip("/")) != size:
                raise CheckpointError(
                    f"{folder}/{name}, which this save wrote, was removed or changed before it was done: another save "
                    "to this path has run at the same time. Have only one run save to a path, and save again"
                )

    def _lost(self) -> CheckpointError:
        return CheckpointError(
            f"{self._root} was replaced by another save while this one was writing: that one stands. Have only one run "
            "save to a path"
        )

    def _remove_old_data(self) -> None:
        try:
            for old in self._list():
                folder = old.rpartition("/")[2]
                if DATA.fullmatch(folder) and folder != self.data:
                    self._system.rm(old, recursive=True)
        except Exception as error:  # the new checkpoint stands
            logger.warning("%s: data of an older save could not be removed: %s", self._root, error)

    def abandon(self) -> None:
        """Removes the data folder, unless the manifest names it, or cannot be read."""
        if self._begun:
            self._begun = False
            with suppress(Exception):  # there is an error already
                found = self._manifest()
                if found is None or self.data.encode() not in found.text:
                    self._system.rm(f"{self._root}/{self.data}", recursive=True)


class _Object(NamedTuple):
    """What an object holds, and the store's tag of this version of it."""

    text: bytes
    tag: str | None


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


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
