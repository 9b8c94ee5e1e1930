"""Saves of the averages at regular moments of the training, each under a name of its own.

A run that diverged is often resumed from an earlier checkpoint. The snapshots that the abandoned part of the run has
left beyond that moment belong to another history: ``synthesize`` must not mix them with the new ones, and ``keep=``
must not prefer them because of their larger numbers. They are moved into ``FOLDER/abandoned-<number>``. A store cannot
rename folders, so at a URL their manifests are renamed: a folder without a manifest is no checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from dist_ema.checkpoints.contents import Contents
from dist_ema.checkpoints.save import Save
from dist_ema.comm.agreement import agreed
from dist_ema.comm.collectives import rank_in
from dist_ema.errors import EMAConfigError
from dist_ema.formats.manifest import NAME
from dist_ema.options import check_cast
from dist_ema.schedules.clock import CLOCK_UNITS, Progress, Time, crossed
from dist_ema.storage.paths import StrPath, check_path, file_system, is_remote, local_path
from dist_ema.storage.remote_commit import ABANDONED, checkpoints_at, set_aside
from dist_ema.storage.staging import move_into, remove_directory

logger = logging.getLogger(__name__)


class Snapshots:
    """Says where snapshots go, when, and which there are, for :meth:`ShardedEMA.snapshot`. Local but for ``save``.

    Args:
        folder: of the snapshots; each is a directory in it, or under it where ``folder`` is a URL.
        every: training between two.
        keep: how many of the newest are kept; None means all.
        dtype: of floating-point averages on disk; None means the shadow's own.

    Raises:
        EMAConfigError: one has a value that is not allowed.
    """

    def __init__(
        self,
        folder: StrPath,
        every: str | int,
        keep: int | None,
        dtype: torch.dtype | None,
    ) -> None:
        check_path(folder)
        check_cast(dtype)
        if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
            raise EMAConfigError(f"keep={keep!r}: allowed is a number of snapshots, 1 or more, or None for all")
        if keep is not None and is_remote(folder):
            raise EMAConfigError(f"keep={keep!r}: snapshots at a URL are not removed; give None")
        self.folder = os.fspath(folder)
        self.every = Time.parse(every, option="every", units=CLOCK_UNITS)
        self.dtype = dtype
        self._keep = keep
        self._removed = False
        self._begin: float | None = 0.0  # moment from which this run goes on; None when it has made a snapshot

    def begin(self, now: Progress) -> None:
        """The run goes on from this moment: snapshots beyond it, which are there already, are of another run. Local."""
        self._begin = now.value(self.every.unit)

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Returns whether the clock passes a multiple of ``every`` on its way from ``before`` to ``now``."""
        return not self._removed and crossed(before, now, self.every)

    def path(self, now: Progress) -> str:
        """Returns the path of the snapshot of a moment: ``"FOLDER/20000ba"``."""
        value = now.value(self.every.unit)
        name = f"{int(value)}" if value == int(value) else f"{value:g}"
        if float(name) != value:  # two moments of a long run may have the same six digits
            name = repr(value)
        return f"{self.folder.rstrip('/')}/{name}{self.every.unit}"

    def paths(self) -> list[Path]:
        """Lists the snapshots in a folder of this machine, the oldest first, by their names alone."""
        folder = local_path(self.folder)
        found = {path: self._moment(path.name) for path in (folder.iterdir() if folder.is_dir() else ())}
        return sorted((path for path, moment in found.items() if moment is not None), key=lambda path: found[path] or 0)

    def _moment(self, name: str) -> float | None:
        """Returns the moment that the name of a snapshot states; None for any other name."""
        match = re.fullmatch(rf"(\d+(?:\.\d+)?(?:e[+-]?\d+)?){self.every.unit}", name)
        return float(match[1]) if match else None

    def save(
        self,
        path: str,
        make: Callable[[dist.ProcessGroup | None], Contents],
        reading: AbstractContextManager[object],
        group: dist.ProcessGroup | None,
    ) -> None:
        """Writes one, and removes what is too many. Collective among the group; in a thread.

        Args:
            path: of it.
            make: called first, with ``group``, for what to write.
            reading: entered while the averages are read.
            group: in which ranks talk.
        """
        contents = make(group)
        with agreed(group, f"snapshot {path}"):
            if rank_in(group) == 0 and self._begin is not None:
                self._set_aside(self._begin)
        save = Save(path, contents, group)
        save.start()
        save.finish(reading)
        self._begin = None
        if self._keep is None:
            return
        with agreed(group, f"removing old snapshots in {self.folder}"):
            if rank_in(group) == 0:
                for old in self.paths()[: -self._keep]:
                    remove_directory(old)

    def _set_aside(self, begin: float) -> None:
        """Sets the snapshots beyond a moment aside, and logs which. On one rank. Raises what the storage raises."""
        if is_remote(self.folder):
            system, root = file_system(self.folder)
            names = self._beyond(begin, checkpoints_at(system, root))
            where = f"their {NAME} is now {ABANDONED}, and the next snapshot of the same moment replaces their data"
            self._log_abandoned(begin, names, where)
            for name in names:
                set_aside(system, f"{root}/{name}")
            return
        folder = local_path(self.folder)
        names = self._beyond(begin, [path.name for path in self.paths()])
        number = next(number for number in itertools.count(1) if not (folder / f"abandoned-{number}").exists())
        self._log_abandoned(begin, names, f"they are now in abandoned-{number}")
        for name in names:
            move_into(folder / name, folder / f"abandoned-{number}")

    def _beyond(self, begin: float, names: Iterable[str]) -> list[str]:
        """Returns the names of snapshots beyond a moment, the oldest first."""
        moments = {name: moment for name in names if (moment := self._moment(name)) is not None and moment > begin}
        return sorted(moments, key=lambda name: moments[name])

    def _log_abandoned(self, begin: float, names: Sequence[str], where: str) -> None:
        # Called before anything is moved: if moving one fails, the log still says where the others are.
        if names:
            logger.warning(
                "%s has snapshots from beyond %g%s, where this run goes on: %s. They are of a run that was abandoned; "
                "%s.",
                self.folder,
                begin,
                self.every.unit,
                ", ".join(names),
                where,
            )

    def remove(self) -> None:
        """Makes no more snapshots. Local; on every rank."""
        self._removed = True
