"""The same fraction every batch or every update, and the plain mean of updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dist_ema.schedules.checks import fraction, set_fields
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.schedule import Schedule, log, log1p


@dataclass(frozen=True)
class ConstantDecay(Schedule):
    """Every batch keeps ``decay`` of the average: retain = decay ** batches.

    Half life: log(1/2) / log(decay) batches, about .693 / (1 - decay). A decay of 0 keeps the last weights only.

    Args:
        decay: kept fraction per batch, in [0, 1).

    >>> round(ConstantDecay(0.9).retain(0, 2), 4)
    0.81
    """

    elementwise: ClassVar[bool] = True
    decay: float

    def __post_init__(self) -> None:
        set_fields(self, decay=fraction("decay", self.decay))

    def _log_retain(self, start: float, stop: float) -> float:
        return (stop - start) * log(self.decay)


@dataclass(frozen=True)
class Smoothing(Schedule):
    """Every update keeps ``smoothing`` of the average, however much training lies between updates, as in Composer.

    Half life: log(1/2) / log(smoothing) updates. With updates every ``update_interval`` and a half life in the same
    unit, Composer uses smoothing = 2 ** -(update_interval / half_life), which is what :class:`HalfLife` amounts to.
    Plain numbers are updates since the first copy.

    Args:
        smoothing: kept fraction per update, in [0, 1).

    >>> round(Smoothing(0.9).retain(0, 1), 4)
    0.9
    """

    elementwise: ClassVar[bool] = True
    smoothing: float

    def __post_init__(self) -> None:
        set_fields(self, smoothing=fraction("smoothing", self.smoothing))

    @property
    def position_unit(self) -> str:
        """Updates."""
        return "updates"

    def _read(self, progress: Progress) -> float:
        return progress.updates - 1

    def _log_retain(self, start: float, stop: float) -> float:
        return (stop - start) * log(self.smoothing)


@dataclass(frozen=True)
class Uniform(Schedule):
    """The plain mean of the weights seen at updates, the first copy among them (stochastic weight averaging).

    retain = seen_before / seen_after. It counts updates, so fewer of them give another mean. Izmailov et al. 2018
    (arXiv:1803.05407). Half life: as many updates as have been seen. Plain numbers are updates since the first copy:
    retain = (before + 1) / (after + 1).

    >>> round(Uniform().weight(2, 3), 4)  # the fourth set of weights, after the first copy and two updates
    0.25
    """

    elementwise: ClassVar[bool] = True

    @property
    def position_unit(self) -> str:
        """Updates."""
        return "updates"

    def _read(self, progress: Progress) -> float:
        return progress.updates - 1

    def _log_retain(self, start: float, stop: float) -> float:
        if isinstance(start, (int, float)) and start <= -1:  # nothing has been seen
            return -math.inf
        return -log1p((stop - start) / (start + 1))
