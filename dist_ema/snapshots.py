"""Saves of the averages at regular moments of the training, each under a name of its own."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from dist_ema.checkpoints.contents import Contents
from dist_ema.checkpoints.save import Save
from dist_ema.checkpoints.storage.local import remove_tree
from dist_ema.checkpoints.storage.paths import StrPath, check_path, is_remote, local_path
from dist_ema.clock import CLOCK_UNITS, Progress, Time, crossed
from dist_ema.collectives import rank_in
from dist_ema.errors import EMAConfigError
from dist_ema.options import check_cast

logger = logging.getLogger(__name__)


class Snapshots:
    """What :meth:`ShardedEMA.snapshot` returns: where snapshots go, when, and which there are. Local but for ``save``.

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

    def is_due(self, before: Progress, now: Progress) -> bool:
        """Whether the clock passes a multiple of ``every`` on its way from ``before`` to ``now``."""
        return not self._removed and crossed(before, now, self.every)

    def path(self, now: Progress) -> str:
        """Of the snapshot of that moment: ``"FOLDER/20000ba"``."""
        value = now.value(self.every.unit)
        name = f"{int(value)}" if value == int(value) else f"{value:g}"
        return f"{self.folder.rstrip('/')}/{name}{self.every.unit}"

    def paths(self) -> list[Path]:
        """Those that there are, the oldest first, by their names alone; of a folder of this machine."""
        folder = local_path(self.folder)
        found = {path: self._moment(path) for path in (folder.iterdir() if folder.is_dir() else ())}
        return sorted((path for path, moment in found.items() if moment is not None), key=lambda path: found[path] or 0)

    def _moment(self, path: Path) -> float | None:
        match = re.fullmatch(rf"(\d+(?:\.\d+)?(?:e[+-]?\d+)?){self.every.unit}", path.name)
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
        save = Save(path, make(group), group)
        save.start()
        save.finish(reading)
        if self._keep is not None and rank_in(group) == 0:
            for old in self.paths()[: -self._keep]:
                remove_tree(old)

    def remove(self) -> None:
        """Makes no more snapshots. Local; on every rank."""
        self._removed = True
