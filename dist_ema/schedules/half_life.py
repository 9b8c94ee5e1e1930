"""Averages given by their half life: a fixed one, one that ramps up, one in proportion to the training so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dist_ema.schedules.checks import positive, set_fields
from dist_ema.schedules.clock import CLOCK_UNITS, Time
from dist_ema.schedules.schedule import LOG_2, PerBatch, Position, ProgressFactors, Schedule, harmonic


@dataclass(frozen=True, repr=False)
class HalfLife(ProgressFactors):
    """Half of the average is left after ``half_life`` more of training: retain = 2 ** -(passed / half_life).

    Composer's definition, in any unit of the clock. Plain numbers are in that unit.

    With ``ramp`` the half life is min(half_life, ramp * progress), progress being that at the end of each batch:
    ``ema_rampup`` of StyleGAN 2 and 3, ``ema_rampup_ratio`` of EDM (Karras et al. 2022, arXiv:2206.00364), whose first
    update copies the weights, as ours does. A batch of size s that ends at p keeps 2 ** (-s / min(half_life, ramp *
    p)). Batches between two readings of the clock are taken to be of one size; what lies between two plain numbers in
    another unit than batches is one batch.

    Args:
        half_life: ``"1000ba"``, ``"10000000tok"``, ``"50000sp"``, ``"2ep"``, or an int number of batches; more than 0.
        ramp: half life over progress until ``half_life`` is reached, more than 0 (EDM's is .05); None means no ramp.

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
        """Without a ramp."""
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
        # The first batch at whose end the half life is no longer on the ramp.
        flat = math.ceil(min(max((self.time.value / self.ramp - start) / size, 1), count + 1))
        rising = harmonic(start / size, flat - 1) / self.ramp
        return -LOG_2 * (rising + (count + 1 - flat) * (size / self.time.value))


@dataclass(frozen=True)
class HalfLifeFraction(PerBatch):
    """The half life is a fixed fraction of the training so far: batch n keeps 2 ** (-1 / (fraction * n)).

    torchtitan's ``half_life_fraction``; n = 1 for the first batch after the first copy. Over batches a + 1 to b it
    comes to 2 ** (-(H_b - H_a) / fraction), H the harmonic numbers, close to (a / b) ** (.693 / fraction). Half life:
    fraction * n batches at batch n.

    Args:
        fraction: half life over training so far, more than 0 (torchtitan's default is .05).

    >>> round(HalfLifeFraction(0.1).retain(99, 100), 4)  # batch 100 has a half life of 10 batches
    0.933
    """

    fraction: float

    def __post_init__(self) -> None:
        set_fields(self, fraction=positive("fraction", self.fraction))

    def _log_factors(self, first: int, last: int) -> float:
        return -LOG_2 * (harmonic(first - 1, last - first + 1) / self.fraction)
