"""A checkpoint in an object store, or in another file system of fsspec: the data first, the manifest last.

Objects appear when they are complete, and cannot be renamed. So the data folder is written where it will stay, under a
name that no other save has, and the one object that is replaced is the manifest: until then the old one stands, with
the data that it names. All object stores replace one object in one step, and with it the checkpoint is replaced.

Only one run may save to a URL at a time, since stores have no locks. If two do, the later one finds a manifest that
changed since it began, and fails. A save may also be delayed between this check and its write. So the first manifest is
written on condition that there is none, and on S3 a later one on condition that the old one is unchanged. Other stores
have no conditional writes. There the save checks again afterwards, and raises if its own data or the other run's data
are gone.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import FilePlan
from dist_ema.formats.manifest import BEGIN, DATA, MAX_BYTES, NAME
from dist_ema.storage.remote import UploadWriter

logger = logging.getLogger(__name__)
#: What the manifest of a checkpoint is called that was set aside. Its data stay until the next save to the same path.
ABANDONED = f"{NAME}.abandoned"
#: The errors of a store that takes no conditions.
_UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP)


class RemoteWriter:
    """A checkpoint in a store in the making; a :class:`~dist_ema.storage.base.StorageWriter`.

    What a killed save left is removed by the next save to the same URL.

    Args:
        system: fsspec's file system.
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
        """Implements :meth:`StorageWriter.create`; makes no objects yet."""
        if not self._root.strip("/"):
            raise CheckpointError("a checkpoint needs a path of its own: the URL names none")
        if self._system.isfile(self._root):
            raise CheckpointError(f"{self._root} is a file: give another path, or remove it")
        self._before = self._manifest()
        self._check_place(overwrite)
        self._begun = True
        for name, plans in folders.items():
            self._sizes |= {f"{name}/{plan.name}": plan.size for plan in plans}
            if self._root.startswith("/"):  # a store has no directories, and its paths begin with a bucket
                self._system.makedirs(f"{self._root}/{self.data}/{name}", exist_ok=True)

    def _check_place(self, overwrite: bool) -> None:
        """Raises CheckpointError unless nothing is there, or a checkpoint, however damaged."""
        if self._before is not None and not overwrite:
            raise CheckpointError(f"{self._root} is a checkpoint already: give another path, or overwrite=True")
        names = [name.rpartition("/")[2] for name in self._list()]
        ours = self._before is not None and self._before.text.startswith(BEGIN)
        if names and not ours and not any(map(DATA.fullmatch, names)):
            raise CheckpointError(f"{self._root} holds {min(names)!r} and is no checkpoint: give another path")

    def _list(self) -> list[str]:
        """Returns the paths of all that lies directly under the root."""
        try:
            self._system.invalidate_cache(self._root)
            found = [str(name).rstrip("/") for name in self._system.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        # An empty object named like the folder, which some tools make, stands for the folder itself.
        return [name for name in found if name.strip("/") != self._root.strip("/")]

    def _manifest(self) -> _Object | None:
        """Returns the manifest that is there now, or the first bytes of what is too large to be one."""
        path = f"{self._root}/{NAME}"
        try:
            self._system.invalidate_cache(self._root)
            facts = self._system.info(path)
            size = min(facts.get("size") or 0, MAX_BYTES)
            text = self._system.cat_file(path, start=0, end=size) if size else b""  # a range of no bytes is an error
            return _Object(text, facts.get("ETag"))
        except FileNotFoundError:
            return None

    def is_visible(self) -> bool:
        """False: a file has to be written from its first byte to its last, by one process."""
        return False

    def writer(self, folder: str, plans: Sequence[FilePlan]) -> UploadWriter:
        """Implements :meth:`StorageWriter.writer`."""
        return UploadWriter(self._system, f"{self._root}/{self.data}/{folder}", plans)

    def commit(self, manifest: bytes) -> None:
        """Implements :meth:`StorageWriter.commit`; removes the data of older saves."""
        self._check_data()  # another save may have taken them for leftovers
        found = self._manifest()
        if found is not None and (self._before is None or found.text != self._before.text):
            raise self._lost()
        self._put(manifest, found)
        self._begun = False
        # Where the store takes no conditions, another save may have come between: look whose manifest and data stand.
        after = self._manifest()
        if after is None or after.text != manifest:
            raise self._lost()
        self._check_data()
        self._remove_old_data()

    def _put(self, manifest: bytes, found: _Object | None) -> None:
        """Writes the manifest on condition that ``found`` is still there, if the store takes conditions."""
        path = f"{self._root}/{NAME}"
        condition: dict[str, Any] = {}
        if found is None:
            condition = {"mode": "create"}  # fsspec: fails if there is one
        elif found.tag is not None and "s3" in _protocols(self._system):
            condition = {"IfMatch": found.tag, "chunksize": MAX_BYTES}  # s3fs: one request, as a condition needs
        try:
            self._system.pipe_file(path, manifest, **condition)
        except Exception as error:
            now = self._manifest()
            if now is not None and now.text == manifest:  # it was written, and only the answer was lost
                return
            if (now and now.text) != (found and found.text):
                raise self._lost() from error
            unknown = isinstance(error, (TypeError, NotImplementedError)) or getattr(error, "errno", None) in _UNKNOWN
            if not condition or not unknown:
                raise
            self._system.pipe_file(path, manifest)

    def _check_data(self) -> None:
        """Raises CheckpointError unless all that was written is there. One listing, however many files there are."""
        folder = f"{self._root}/{self.data}"
        self._system.invalidate_cache(folder)
        found = {str(name).strip("/"): facts["size"] for name, facts in self._system.find(folder, detail=True).items()}
        for name, size in self._sizes.items():
            if found.get(f"{folder}/{name}".strip("/")) != size:
                raise CheckpointError(
                    f"{folder}/{name}, which this save wrote, was removed or changed before the save was complete: "
                    "another save to this path was running. Save again, and have only one run save to a path"
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
                if folder == ABANDONED:
                    self._system.rm(old)
                elif DATA.fullmatch(folder) and folder != self.data:
                    self._system.rm(old, recursive=True)
        except Exception as error:  # the new checkpoint stands
            logger.warning("%s: data of an older save could not be removed: %s", self._root, error)

    def abandon(self) -> None:
        """Implements :meth:`StorageWriter.abandon`. Keeps data that the manifest names, or may name if unreadable."""
        if self._begun:
            self._begun = False
            with suppress(Exception):  # the error that ended the save is raised, not this one
                found = self._manifest()
                if found is None or self.data.encode() not in found.text:
                    self._system.rm(f"{self._root}/{self.data}", recursive=True)


def checkpoints_at(system: Any, root: str) -> list[str]:
    """Returns the names of the checkpoints that lie directly under a path of a store. Raises what the store raises."""
    system.invalidate_cache(root)
    try:
        found = [str(name).rstrip("/") for name in system.ls(root, detail=False)]
    except FileNotFoundError:
        return []
    return [path.rpartition("/")[2] for path in found if system.exists(f"{path}/{NAME}")]


def set_aside(system: Any, root: str) -> None:
    """Renames the manifest of a checkpoint to :data:`ABANDONED`, so that nothing takes it for a checkpoint.

    Its data stay where they are, since a store can only copy them. Renaming the manifest back restores the checkpoint.
    Raises what the store raises.
    """
    system.copy(f"{root}/{NAME}", f"{root}/{ABANDONED}")
    system.rm(f"{root}/{NAME}")
    system.invalidate_cache(root)


class _Object(NamedTuple):
    """The content of an object, and the store's tag of this version of it."""

    text: bytes
    tag: str | None


def _protocols(system: Any) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)
