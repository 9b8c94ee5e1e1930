"""Defines schedules, and the kinds that are given as one factor for each batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import number, positive
from dist_ema.schedules.clock import Progress, Time

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dist_ema.schedules.profile import Profile

Position: TypeAlias = Progress | float

LOG_2 = math.log(2)
#: Names in files of the classes that ``schedules.register()`` was told of. The others have their class's name.
KIND_OF: dict[type, str] = {}


class Schedule(ABC):
    """Gives the fraction of an average that survives between two moments of training. Immutable, JSON-able."""

    #: Whether ``_log_retain`` takes arrays of positions as well.
    elementwise: ClassVar[bool] = False

    def log_retain(self, before: Position, after: Position) -> float:
        """Natural logarithm of :meth:`retain`: 0 where nothing is forgotten, ``-inf`` where everything is.

        Raises:
            EMAConfigError: ``after`` lies before ``before``, or a plain number is negative or not finite.
        """
        start, stop = self._positions(before, after)
        return self._log_retain(start, stop) if start < stop else 0.0

    def retain(self, before: Position, after: Position) -> float:
        """Returns the fraction, in [0, 1], of the average at ``before`` that is left at ``after``. Raises as
        ``log_retain``.
        """
        return math.exp(self.log_retain(before, after))

    def weight(self, before: Position, after: Position) -> float:
        """``1 - retain(before, after)`` to full double precision: the weight of ``lerp_``. Raises as ``log_retain``."""
        return -math.expm1(self.log_retain(before, after))

    def to_dict(self) -> dict[str, Any]:
        """Returns the name of the kind and the options, for JSON; :func:`from_dict` reads it."""
        options = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}  # type: ignore[arg-type]
        kind = KIND_OF.get(type(self), type(self).__name__)
        return {"kind": kind} | {name: value for name, value in options.items() if value is not None}

    @property
    def unit(self) -> str:
        """Returns the unit of the clock that the schedule depends on."""
        return "ba"

    @property
    def position_unit(self) -> str:
        """Returns the unit of its plain numbers: that of the clock, or ``updates``."""
        return self.unit

    def resolve(self, max_duration: Time | None) -> Schedule:
        """Returns this schedule with every ``dur`` made a part of ``max_duration``.

        Raises:
            EMAConfigError: it has one, and there is no ``max_duration``.
        """
        return self

    def begun(self, start: Progress, interval: Time) -> Schedule:
        """Returns this schedule for an average whose first copy was made at ``start`` on the clock of the training.

        Only :class:`Window` looks at that clock; the others count from the first copy.

        Args:
            start: the clock at the first copy.
            interval: time between updates.
        """
        return self

    def profile(self, progress: Position | str, *, every: float | None = None) -> Profile:
        """Returns how much the weights of each past step weigh in the average at ``progress``.

        Args:
            progress: the moment of the average: a Progress, a plain number, or a time string in the schedule's unit.
            every: between two updates, in the schedule's own unit; None means 1 (for epochs it has to be given). Where
                a factor per batch depends on samples, tokens or epochs, it is also the size of a batch.

        Returns:
            A function of a step, or an array of steps, counted as plain numbers from the first copy, which is step 0.
            Over the steps at which updates were, 0, ``every``, 2 ``every`` and so on, the weights sum to 1.

        Raises:
            EMAConfigError: not such a moment, or ``every`` is not a number more than 0.
        """
        from dist_ema.schedules.profile import SLACK, Profile

        if isinstance(progress, str):
            progress = Time.parse(progress, option="progress", units=(self.unit,), positive=False).value
        position = max(self._position(progress, "progress"), 0)  # -1 where no update has been counted
        if every is None and self.position_unit == "ep":
            raise EMAConfigError("every=None: along epochs the part of an epoch between two updates has to be given")
        every = positive("every", 1 if every is None else every)
        every = int(every) if every == int(every) else every
        return Profile(self, every, math.floor(position / every + SLACK))

    @abstractmethod
    def _log_retain(self, start: float, stop: float) -> float:
        """``log_retain`` between two different positions in the schedule's own unit."""

    def _read(self, progress: Progress) -> float:
        """Returns the position of a clock reading in the schedule's own unit."""
        return progress.value(self.unit)

    def _position(self, moment: Position, name: str) -> float:
        if isinstance(moment, Progress):
            return self._read(moment)
        position = number(name, moment, "a Progress or a finite number, 0 or more")
        if position < 0:
            raise EMAConfigError(f"{name}={moment!r}: allowed is a Progress or a finite number, 0 or more")
        return position

    def _positions(self, before: Position, after: Position) -> tuple[float, float]:
        start = self._position(before, "before")
        stop = self._position(after, "after")
        if stop < start:
            raise EMAConfigError(f"after={after!r}: allowed is a moment not earlier than before={before!r}")
        return start, stop

    def logs(self, every: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """For a profile of updates at 0, every, 2 * every and so on, ``count`` of them after the first copy.

        Returns:
            The logarithm of what each update left of the average before it; then, of what is left at the last one of
            the average after each update, the first copy included.
        """
        import numpy as np

        at = np.arange(count + 1) * every
        if self.elementwise and count:
            steps: NDArray[np.float64] = np.asarray(self._log_retain(at[:-1], at[1:]))  # type: ignore[arg-type]
            return steps, np.append(self._log_retain(at[:-1], at[-1]), 0.0)  # type: ignore[arg-type]
        steps = np.array([self.log_retain(a, b) for a, b in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)])
        return steps, np.append(np.cumsum(steps[::-1])[::-1], 0.0)


class PerBatch(Schedule):
    """A schedule given as one factor for each batch. Within a batch the average decays at a constant rate."""

    def _log_retain(self, start: float, stop: float) -> float:
        first = math.floor(start) + 1
        last = math.ceil(stop)
        if first == last:
            return (stop - start) * self._log_factors(first, last)
        inner = self._log_factors(first + 1, last - 1) if first + 1 < last else 0.0
        head = (first - start) * self._log_factors(first, first)
        return head + inner + (stop - last + 1) * self._log_factors(last, last)

    @abstractmethod
    def _log_factors(self, first: int, last: int) -> float:
        """Returns the sum of the logarithms of the factors of batches ``first`` to ``last``, both included; 1 <= first
        <= last.
        """


class ProgressFactors(PerBatch):
    """A factor for each batch that depends on how much has been trained, in any unit.

    Batches between two readings of the clock are taken to be of one size. Between plain numbers in another unit than
    batches lies one batch, since they do not say how many there were; so it does where no batches were counted.
    """

    def log_retain(self, before: Position, after: Position) -> float:
        if self.unit == "ba":
            return super().log_retain(before, after)
        start, stop = self._positions(before, after)
        both = isinstance(before, Progress) and isinstance(after, Progress)
        batches = after.batches - before.batches if both else 0  # type: ignore[union-attr]
        batches = batches or int(start < stop)  # who counts samples alone has trained all the same
        return self._log_batches(start, (stop - start) / batches, batches) if batches else 0.0

    def _log_factors(self, first: int, last: int) -> float:
        return self._log_batches(first - 1, 1, last - first + 1)

    @abstractmethod
    def _log_batches(self, start: float, size: float, count: int) -> float:
        """Returns the sum of the logarithms of the factors of ``count`` batches of ``size`` after ``start``."""


class Capped(PerBatch):
    """A per-batch schedule whose factor rises to a final decay and stays there; from then on any gap is cheap."""

    decay: float

    @abstractmethod
    def _ramp_end(self) -> float:
        """Returns the batch from which on the factor is ``decay``; infinite if there is none."""

    @abstractmethod
    def _log_ramp(self, first: int, last: int) -> float:
        """``_log_factors`` of batches before the ramp's end."""

    def _log_factors(self, first: int, last: int) -> float:
        flat = max(first, math.ceil(min(self._ramp_end(), last + 1)))  # the first batch past the ramp
        ramp = self._log_ramp(first, flat - 1) if first < flat else 0.0
        return ramp + (last + 1 - flat) * log(self.decay) if flat <= last else ramp


def log(value: float) -> float:
    """Natural logarithm; ``-inf`` of 0."""
    return math.log(value) if value > 0 else -math.inf


def log1p(value: float) -> float:
    """``math.log1p``, of arrays too."""
    if isinstance(value, (int, float)):
        return math.log1p(value)
    import numpy as np

    return np.log1p(value)


def harmonic(start: float, count: int) -> float:
    """1 / (start + 1) + ... + 1 / (start + count), to double precision and at a bounded cost."""
    exact = min(count, max(0, 1000 - math.floor(start))) if count > 1000 else count
    terms = [1 / (start + n) for n in range(1, exact + 1)]
    if exact < count:  # both past 1000: the asymptotic series, whose next term is below 1e-20
        low = start + exact
        high = start + count
        series = [1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4) for n in (high, low)]
        terms += [math.log1p((count - exact) / low), series[0], -series[1]]
    return math.fsum(terms)
