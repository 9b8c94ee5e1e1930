"""Schedules that are given by a half life: fixed, ramping up, or in proportion to the training so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dist_ema.schedules.checks import positive, set_fields
from dist_ema.schedules.clock import CLOCK_UNITS, Time
from dist_ema.schedules.schedule import LOG_2, PerBatch, Position, ProgressFactors, Schedule, harmonic


@dataclass(frozen=True, repr=False)
class HalfLife(ProgressFactors):
    """Keeps half of the average over ``half_life`` of training: retain = 2 ** -(passed / half_life).

    This is Composer's definition, in any unit of the clock. Plain numbers are in that unit.

    With ``ramp`` the half life is min(half_life, ramp * progress), with the progress at the end of each batch. A batch
    of size s that ends at progress p keeps 2 ** (-s / min(half_life, ramp * p)). This is ``ema_rampup`` of StyleGAN 2
    and 3, and ``ema_rampup_ratio`` of EDM (Karras et al. 2022, arXiv:2206.00364). All batches between two readings of
    the clock are assumed to have the same size; between two plain numbers in another unit than batches, one batch is
    assumed.

    Args:
        half_life: ``"1000ba"``, ``"10000000tok"``, ``"50000sp"``, ``"2ep"``, or an int number of batches; more than 0.
        ramp: half life divided by progress, until ``half_life`` is reached; more than 0 (.05 in EDM). None means no
            ramp.

    >>> round(HalfLife("1000ba").retain(0, 1000), 4)
    0.5
    """

    half_life: str
    ramp: float | None = None
    time: Time = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        time = Time.parse(self.half_life, option="half_life", units=CLOCK_UNITS)
        ramp = None if self.ramp is None else positive("ramp", self.ramp)
        set_fields(self, time=time, half_life=str(time), ramp=ramp)

    def __repr__(self) -> str:
        ramp = "" if self.ramp is None else f", ramp={self.ramp!r}"
        return f"HalfLife(half_life={self.half_life!r}{ramp})"

    @property
    def elementwise(self) -> bool:  # type: ignore[override]
        """Returns whether there is no ramp: then the fraction depends only on the difference of two positions."""
        return self.ramp is None

    @property
    def unit(self) -> str:
        """Returns the unit of the half life."""
        return self.time.unit

    def log_retain(self, before: Position, after: Position) -> float:
        """Returns the logarithm of the retained fraction, see :class:`Schedule`."""
        if self.ramp is None:
            return Schedule.log_retain(self, before, after)
        return super().log_retain(before, after)

    def _log_retain(self, start: float, stop: float) -> float:
        if self.ramp is None:
            return -LOG_2 * ((stop - start) / self.time.value)
        return super()._log_retain(start, stop)

    def _log_batches(self, start: float, size: float, count: int) -> float:
        if self.ramp is None or not size:
            return -LOG_2 * (count * size / self.time.value)
        # The ramp ends at progress half_life / ramp. ``first_flat`` is the first batch that ends there or later.
        first_flat = math.ceil(min(max((self.time.value / self.ramp - start) / size, 1), count + 1))
        # Batch n of the ramp has size / (ramp * (start + n * size)) half lives. Their sum is a harmonic one.
        half_lives_on_ramp = harmonic(start / size, first_flat - 1) / self.ramp
        half_lives_after_it = (count + 1 - first_flat) * (size / self.time.value)
        return -LOG_2 * (half_lives_on_ramp + half_lives_after_it)


@dataclass(frozen=True)
class HalfLifeFraction(PerBatch):
    """Has a half life that is a fixed fraction of the training so far: batch n keeps 2 ** (-1 / (fraction * n)).

    This is torchtitan's ``half_life_fraction``. n is 1 for the first batch after the first copy. The batches a + 1 to b
    keep 2 ** (-(H_b - H_a) / fraction) together, with the harmonic numbers H, which is close to
    (a / b) ** (.693 / fraction). Half life: fraction * n batches at batch n.

    Args:
        fraction: half life divided by the training so far, more than 0 (.05 by default in torchtitan).

    >>> round(HalfLifeFraction(0.1).retain(99, 100), 4)  # batch 100 has a half life of 10 batches
    0.933
    """

    fraction: float

    def __post_init__(self) -> None:
        set_fields(self, fraction=positive("fraction", self.fraction))

    def _log_factors(self, first: int, last: int) -> float:
        return -LOG_2 * (harmonic(first - 1, last - first + 1) / self.fraction)
