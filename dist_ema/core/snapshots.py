"""Names, schedules and removes snapshots: saves at regular moments of the training, each under its own name.

A run that diverged is often resumed from an earlier checkpoint. Later snapshots of the abandoned part of the run then
belong to another history: ``synthesize`` must not mix them with the new ones, and ``keep=`` must not prefer them
because of their larger numbers. So the first snapshot after a resume sets them aside::

    before        FOLDER/ 10000ba  20000ba  30000ba  40000ba
    resumed at 25000ba; first new snapshot at 30000ba
    after         FOLDER/ 10000ba  20000ba  30000ba (new)  abandoned-1/ 30000ba  40000ba

A store cannot rename folders, so at a URL the manifests are renamed: a folder without a manifest is not a checkpoint.
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
    """Holds one series of snapshots, as :meth:`ShardedEMA.snapshot` begins it. Local, except ``save``.

    Args:
        folder: the folder of the snapshots, or a URL. Each snapshot is a directory in it.
        every: training between two snapshots.
        keep: how many of the newest snapshots are kept; None means all.
        dtype: the dtype of floating-point averages on disk; None means that of the shadow.

    Raises:
        EMAConfigError: an argument has a value that is not allowed.
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
        # The moment at which this run started or was resumed. None after its first snapshot: later ones are its own.
        self._begin: float | None = 0.0

    def begin(self, now: Progress) -> None:
        """Records that the run starts or resumes at this moment. Existing snapshots beyond it are abandoned. Local."""
        self._begin = now.value(self.every.unit)

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Returns whether the clock passes a multiple of ``every`` on its way from ``before`` to ``now``."""
        return not self._removed and crossed(before, now, self.every)

    def path(self, now: Progress) -> str:
        """Returns the path of the snapshot of a moment, such as ``"FOLDER/20000ba"``."""
        value = now.value(self.every.unit)
        name = f"{int(value)}" if value == int(value) else f"{value:g}"
        if float(name) != value:
            name = repr(value)  # "%g" has six digits, which two moments of a long run may have in common
        return f"{self.folder.rstrip('/')}/{name}{self.every.unit}"

    def paths(self) -> list[Path]:
        """Lists the snapshots in a local folder, the oldest first. It reads only names, not the snapshots."""
        folder = local_path(self.folder)
        found: list[tuple[float, Path]] = []
        for path in folder.iterdir() if folder.is_dir() else ():
            moment = self._moment(path.name)
            if moment is not None:
                found.append((moment, path))
        found.sort(key=lambda entry: entry[0])
        return [path for _, path in found]

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
        """Writes a snapshot, and removes the oldest ones if ``keep`` asks for it. Collective; runs in a thread.

        Args:
            path: the path of the snapshot.
            make: returns what to write. It is called first, with ``group``, and may communicate.
            reading: a context that is entered while the averages are read.
            group: the ranks that take part.
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
        # Old snapshots are removed only now that the new one is complete.
        with agreed(group, f"removing old snapshots in {self.folder}"):
            if rank_in(group) == 0:
                for old in self.paths()[: -self._keep]:
                    remove_directory(old)

    def _set_aside(self, begin: float) -> None:
        """Sets the snapshots beyond a moment aside, and logs which. Runs on one rank. Raises what the storage raises.

        The log comes before the first move: if a move fails, the log still says where the others are.
        """
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
        moments: dict[str, float] = {}
        for name in names:
            moment = self._moment(name)
            if moment is not None and moment > begin:
                moments[name] = moment
        return sorted(moments, key=lambda name: moments[name])

    def _log_abandoned(self, begin: float, names: Sequence[str], where: str) -> None:
        """Warns that snapshots are set aside; ``where`` says where they are afterwards."""
        if names:
            logger.warning(
                "%s has snapshots from beyond %g%s, where this run continues: %s. They are of a run that was "
                "abandoned; %s.",
                self.folder,
                begin,
                self.every.unit,
                ", ".join(names),
                where,
            )

    def remove(self) -> None:
        """Ends the series: no more snapshots are made. Local; call it on every rank."""
        self._removed = True
