"""Schedules with a fixed decay for each batch or each update, and the plain mean of all updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dist_ema.schedules.checks import fraction, set_fields
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.schedule import Schedule, log, log1p


@dataclass(frozen=True)
class ConstantDecay(Schedule):
    """Keeps ``decay`` of the average in every batch: retain = decay ** batches.

    Half life: log(1/2) / log(decay) batches, about .693 / (1 - decay). With a decay of 0 the average is the last
    weights.

    Args:
        decay: fraction that is kept per batch, in [0, 1).

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
    """Keeps ``smoothing`` of the average in every update, independent of ``update_interval``. As in Composer.

    Half life: log(1/2) / log(smoothing) updates. Composer computes smoothing = 2 ** -(update_interval / half_life) from
    a half life; :class:`HalfLife` gives the same average. Plain numbers are updates since the first copy.

    Args:
        smoothing: fraction that is kept per update, in [0, 1).

    >>> round(Smoothing(0.9).retain(0, 1), 4)
    0.9
    """

    elementwise: ClassVar[bool] = True
    smoothing: float

    def __post_init__(self) -> None:
        set_fields(self, smoothing=fraction("smoothing", self.smoothing))

    @property
    def position_unit(self) -> str:
        """Returns ``"updates"``."""
        return "updates"

    def _read(self, progress: Progress) -> float:
        return progress.updates - 1

    def _log_retain(self, start: float, stop: float) -> float:
        return (stop - start) * log(self.smoothing)


@dataclass(frozen=True)
class Uniform(Schedule):
    """Computes the plain mean of the weights at all updates, the first copy included (stochastic weight averaging).

    retain = (before + 1) / (after + 1), where plain numbers are updates since the first copy. The mean depends on
    ``update_interval``, because it counts updates. Izmailov et al. 2018 (arXiv:1803.05407). Half life: as many updates
    as were made so far.

    >>> round(Uniform().weight(2, 3), 4)  # the fourth set of weights, after the first copy and two updates
    0.25
    """

    elementwise: ClassVar[bool] = True

    @property
    def position_unit(self) -> str:
        """Returns ``"updates"``."""
        return "updates"

    def _read(self, progress: Progress) -> float:
        return progress.updates - 1

    def _log_retain(self, start: float, stop: float) -> float:
        if isinstance(start, (int, float)) and start <= -1:  # before the first copy there is nothing to keep
            return -math.inf
        return -log1p((stop - start) / (start + 1))
