"""Schedules whose decay moves from one value to another over the training: the teachers of DINO, BYOL and V-JEPA."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from dataclasses import dataclass, field, replace

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import set_fields, share
from dist_ema.schedules.clock import Progress, Time
from dist_ema.schedules.schedule import Position, ProgressFactors, Schedule


@dataclass(frozen=True)
class _Ramp(ProgressFactors):
    """Base class: batch n keeps end + (start - end) * left(n / over), where left falls from 1 to 0."""

    start: float
    end: float
    over: str
    time: Time = field(init=False, repr=False, compare=False)
    # The number n of the first batch after the first copy: 0 or 1, see begun().
    first: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        time = Time.parse(self.over, option="over")
        set_fields(self, start=share("start", self.start), end=share("end", self.end), time=time, over=str(time))
        set_fields(self, first=1)

    @property
    def unit(self) -> str:
        """Returns the unit of ``over``."""
        return self.time.unit

    def resolve(self, max_duration: Time | None) -> Schedule:
        """Returns this schedule with ``over`` in a unit of the clock.

        Raises EMAConfigError if ``over`` is in ``dur`` and there is no ``max_duration``.
        """
        return replace(self, over=str(self.time.resolve(max_duration, option="over")))

    def begun(self, start: Progress, interval: Time) -> Schedule:
        """Returns this schedule with the number of the first batch after the first copy.

        It is 0 if the first copy was made before any training. Otherwise a batch was trained before the copy, so the
        next batch has the number 1.
        """
        begun = copy.copy(self)
        trained = any((start.batches, start.samples, start.tokens, start.epochs))
        set_fields(begun, first=int(trained))
        return begun

    def _position(self, moment: Position, name: str) -> float:
        if self.unit == "dur":
            raise EMAConfigError(
                f"over={self.over!r} is a part of max_duration, which is not known here. Call resolve() first, or give "
                "a time such as '10000ba'"
            )
        return super()._position(moment, name)

    def _log_batches(self, start: float, size: float, count: int) -> float:
        start += (self.first - 1) * size  # if the first batch has the number 0, all are one batch earlier

        # ``moving`` batches end before ``over``; the others have the last decay.
        moving = count
        if size:
            moving = min(count, max(0, math.ceil((self.time.value - start) / size) - 1))
        elif start >= self.time.value:
            moving = 0
        logs = (_log_of_rest(self._rest((start + n * size) / self.time.value)) for n in range(1, moving + 1))
        flat = (count - moving) * _log_of_rest(1 - self.end) if moving < count else 0.0
        return math.fsum(logs) + flat

    def _rest(self, part: float) -> float:
        """Returns 1 - decay when ``part`` of the time has gone. Computing the decay first would lose digits."""
        return (1 - self.end) + (self.end - self.start) * self._left(part)

    @abstractmethod
    def _left(self, part: float) -> float:
        """Returns how much of the way is left when ``part`` of the time has gone: from 1 to 0."""


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Batch n keeps end + (start - end) * (1 + cos(pi * n / over)) / 2, and ``end`` once ``over`` has gone.

    n is 0 for the first step of the training, as in DINO (Caron et al. 2021, arXiv:2104.14294; .996 to 1) and BYOL
    (Grill et al. 2020, arXiv:2006.07733; .996 to 1), so every step has the same decay as there:

    - With ``ema_start="0ba"`` the weights of the first step are copied, and the second step has n = 1.
    - If the average began before the first step, by ``ema.update(batches=0, due=True)``, the first step has n = 0 and
      keeps ``start``.
    - If the average began later, n counts from the first copy.

    With ``over`` in samples, tokens or epochs, n is the progress at the end of each batch (at its beginning, if the
    average began before the first step). All batches between two readings of the clock are assumed to have the same
    size; between two plain numbers one batch is assumed. Half life at a decay m: log(1/2) / log(m) batches. The cost
    of a gap between two updates grows with its number of batches.

    Args:
        start: fraction that is kept per batch at the first copy, in [0, 1].
        end: fraction that is kept per batch at ``over`` and after it, in [0, 1].
        over: ``"300000ba"``, ``"100ep"``, an int number of batches, or ``"1dur"``, which needs ``max_duration``.

    >>> teacher = Cosine(0.996, 1.0, "1000ba")
    >>> round(teacher.retain(499, 500), 6), teacher.retain(2000, 2001)
    (0.998, 1.0)
    """

    def _left(self, part: float) -> float:
        return math.cos(math.pi / 2 * part) ** 2


@dataclass(frozen=True)
class Linear(_Ramp):
    """Batch n keeps start + (end - start) * n / over, and ``end`` once ``over`` has gone.

    This is the schedule of V-JEPA and I-JEPA (Bardes et al. 2024, arXiv:2404.08471; .998 to 1 over 1.25 times the
    training). n, units and cost are those of :class:`Cosine`.

    Args:
        start: fraction that is kept per batch at the first copy, in [0, 1].
        end: fraction that is kept per batch at ``over`` and after it, in [0, 1].
        over: ``"112500ba"``, ``"375ep"``, an int number of batches, or ``"1dur"``, which needs ``max_duration``.

    >>> round(Linear(0.9, 1.0, "1000ba").retain(499, 500), 6)
    0.95
    """

    def _left(self, part: float) -> float:
        return 1 - part


def _log_of_rest(rest: float) -> float:
    """Returns log(1 - rest); ``-inf`` if nothing is kept."""
    return math.log1p(-rest) if rest < 1 else -math.inf
