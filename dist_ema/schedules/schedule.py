"""Defines ``Schedule``, and base classes of schedules that are given as one factor for each batch.

A subclass of :class:`Schedule` gives ``_log_retain()`` between two positions. The other base classes compute it from
the factors of single batches::

    Schedule          _log_retain(start, stop)
      PerBatch        _log_factors(first, last)          factors of whole batches, by number
        ProgressFactors  _log_batches(start, size, n)    factors that depend on the progress, in any unit
        Capped           _log_ramp(first, last)          factors that rise to a final decay

Everything is computed in logarithms, because the product of a million factors would underflow or lose digits.
"""

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
#: Names in files of the classes that were given to ``schedules.register()``. Other classes have their own name there.
KIND_OF: dict[type, str] = {}


class Schedule(ABC):
    """Gives the fraction of an average that is left between two moments of training. Immutable; JSON can hold it."""

    #: Whether ``_log_retain`` also takes arrays of positions.
    elementwise: ClassVar[bool] = False

    def log_retain(self, before: Position, after: Position) -> float:
        """Returns the natural logarithm of :meth:`retain`: 0 if nothing is forgotten, ``-inf`` if everything is.

        Raises:
            EMAConfigError: ``after`` is earlier than ``before``, or a plain number is negative or not finite.
        """
        start, stop = self._positions(before, after)
        return self._log_retain(start, stop) if start < stop else 0.0

    def retain(self, before: Position, after: Position) -> float:
        """Returns the fraction of the average at ``before`` that is left at ``after``, in [0, 1].

        Raises the same errors as :meth:`log_retain`.
        """
        return math.exp(self.log_retain(before, after))

    def weight(self, before: Position, after: Position) -> float:
        """Returns ``1 - retain(before, after)`` to full double precision: the weight of ``lerp_``.

        Raises the same errors as :meth:`log_retain`.
        """
        return -math.expm1(self.log_retain(before, after))

    def to_dict(self) -> dict[str, Any]:
        """Returns the name of the kind and the options as a dict for JSON. :func:`from_dict` reads it."""
        options = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}  # type: ignore[arg-type]
        kind = KIND_OF.get(type(self), type(self).__name__)
        return {"kind": kind} | {name: value for name, value in options.items() if value is not None}

    @property
    def unit(self) -> str:
        """Returns the unit of the clock that the schedule depends on."""
        return "ba"

    @property
    def position_unit(self) -> str:
        """Returns the unit of positions that are given as plain numbers: :attr:`unit`, or ``"updates"``."""
        return self.unit

    def resolve(self, max_duration: Time | None) -> Schedule:
        """Returns this schedule with each time in ``dur`` replaced by that part of ``max_duration``.

        Raises:
            EMAConfigError: the schedule has a time in ``dur``, and ``max_duration`` is None.
        """
        return self

    def begun(self, start: Progress, interval: Time) -> Schedule:
        """Returns this schedule for an average whose first copy was made at ``start`` on the training clock.

        Most schedules count from the first copy, and return themselves. :class:`Window` has its periods on the training
        clock; :class:`Cosine` and :class:`Linear` number their batches by whether training had begun.

        Args:
            start: the reading of the training clock at the first copy.
            interval: time between updates.
        """
        return self

    def profile(self, progress: Position | str, *, every: float | None = None) -> Profile:
        """Returns how much the weights of each past step weigh in the average at ``progress``.

        Args:
            progress: the moment of the average: a Progress, a plain number, or a time string in the schedule's unit.
            every: training between two updates, in the schedule's own unit. None means 1; it is not allowed for epochs.
                For schedules with a factor per batch in samples, tokens or epochs, it is also the size of a batch.

        Returns:
            A function of a step or an array of steps. Steps are plain numbers; the first copy is step 0. Updates are at
            the steps 0, ``every``, 2 ``every`` and so on. The weights of these sum to 1.

        Raises:
            EMAConfigError: ``progress`` is not such a moment, or ``every`` is not a number more than 0.
        """
        from dist_ema.schedules.profile import SLACK, Profile

        if isinstance(progress, str):
            progress = Time.parse(progress, option="progress", units=(self.unit,), positive=False).value
        # A Progress without any update is at position -1 of a schedule that counts updates.
        position = max(self._position(progress, "progress"), 0)
        if every is None and self.position_unit == "ep":
            raise EMAConfigError(
                "every=None: the schedule counts in epochs, so every= has to be given. It is the part of an epoch "
                "between two updates, such as 0.01"
            )
        every = positive("every", 1 if every is None else every)
        every = int(every) if every == int(every) else every  # ints are exact, so multiples of it are too
        return Profile(self, every, math.floor(position / every + SLACK))

    @abstractmethod
    def _log_retain(self, start: float, stop: float) -> float:
        """Returns ``log_retain`` between two positions in the schedule's own unit; ``start`` is less than ``stop``."""

    def _read(self, progress: Progress) -> float:
        """Returns the position of a clock reading in the schedule's own unit."""
        return progress.value(self.unit)

    def _position(self, moment: Position, name: str) -> float:
        """Returns the position of a moment in the schedule's own unit. ``name`` is the argument's, for errors."""
        if isinstance(moment, Progress):
            return self._read(moment)
        position = number(name, moment, "a Progress or a finite number, 0 or more")
        if position < 0:
            raise EMAConfigError(f"{name}={moment!r}: allowed is a Progress or a finite number, 0 or more")
        return position

    def _positions(self, before: Position, after: Position) -> tuple[float, float]:
        """Returns the positions of two moments. Raises EMAConfigError if the second is earlier than the first."""
        start = self._position(before, "before")
        stop = self._position(after, "after")
        if stop < start:
            raise EMAConfigError(f"after={after!r}: allowed is a moment not earlier than before={before!r}")
        return start, stop

    def logs(self, every: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Computes the logarithms that a profile needs, for updates at positions 0, every, ..., count * every.

        Returns:
            Two float64 arrays. The first has ``count`` elements: ``log_retain`` between each update and the next. The
            second has ``count + 1`` elements: ``log_retain`` between each update and the last one.
        """
        import numpy as np

        at = np.arange(count + 1) * every
        if self.elementwise and count:
            # One call for all updates, and the second array exact instead of a sum of the first.
            steps: NDArray[np.float64] = np.asarray(self._log_retain(at[:-1], at[1:]))  # type: ignore[arg-type]
            return steps, np.append(self._log_retain(at[:-1], at[-1]), 0.0)  # type: ignore[arg-type]
        steps = np.array([self.log_retain(a, b) for a, b in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)])
        return steps, np.append(np.cumsum(steps[::-1])[::-1], 0.0)


class PerBatch(Schedule):
    """Base class of schedules that are given as one factor for each batch. Positions are in batches.

    Batch n lies between the positions n - 1 and n. Within it the average decays at a constant rate, so a part of a
    batch has that part of its logarithm::

        position   0         1         2         3         4
                   | batch 1 | batch 2 | batch 3 | batch 4 |
        retain          [start ............ stop]
                          head   inner     tail
    """

    def _log_retain(self, start: float, stop: float) -> float:
        first = math.floor(start) + 1
        last = math.ceil(stop)
        if first == last:  # both positions are in one batch
            return (stop - start) * self._log_factors(first, last)
        inner = self._log_factors(first + 1, last - 1) if first + 1 < last else 0.0
        head = (first - start) * self._log_factors(first, first)
        tail = (stop - last + 1) * self._log_factors(last, last)
        return head + inner + tail

    @abstractmethod
    def _log_factors(self, first: int, last: int) -> float:
        """Returns the sum of the logarithms of the factors of batches ``first`` to ``last``, both included.

        1 <= first <= last.
        """


class ProgressFactors(PerBatch):
    """Base class of schedules whose factor of a batch depends on the progress, in any unit.

    All batches between two readings of the clock are assumed to have the same size. If no batches were counted between
    them, or the positions are plain numbers in another unit than batches, one batch is assumed.
    """

    def log_retain(self, before: Position, after: Position) -> float:
        if self.unit == "ba":
            return super().log_retain(before, after)
        start, stop = self._positions(before, after)
        both = isinstance(before, Progress) and isinstance(after, Progress)
        batches = after.batches - before.batches if both else 0  # type: ignore[union-attr]
        if not batches:
            batches = int(start < stop)  # a user may count only samples: then there was at least one batch
        if not batches:
            return 0.0
        return self._log_batches(start, (stop - start) / batches, batches)

    def _log_factors(self, first: int, last: int) -> float:
        return self._log_batches(first - 1, 1, last - first + 1)

    @abstractmethod
    def _log_batches(self, start: float, size: float, count: int) -> float:
        """Returns the sum of the logarithms of the factors of ``count`` batches of ``size`` each, after ``start``."""


class Capped(PerBatch):
    """Base class of schedules whose factor rises to a final decay and stays there.

    The cost of a gap between two updates grows with the batches of the ramp in it, not with those after the ramp.
    """

    decay: float

    @abstractmethod
    def _ramp_end(self) -> float:
        """Returns the first batch whose factor is ``decay``; infinite if there is none."""

    @abstractmethod
    def _log_ramp(self, first: int, last: int) -> float:
        """Returns ``_log_factors(first, last)`` of batches before the end of the ramp."""

    def _log_factors(self, first: int, last: int) -> float:
        first_flat = max(first, math.ceil(min(self._ramp_end(), last + 1)))  # the first batch past the ramp
        total = 0.0
        if first < first_flat:
            total += self._log_ramp(first, first_flat - 1)
        if first_flat <= last:
            total += (last + 1 - first_flat) * log(self.decay)
        return total


def log(value: float) -> float:
    """Returns the natural logarithm; ``-inf`` for 0."""
    return math.log(value) if value > 0 else -math.inf


def log1p(value: float) -> float:
    """Returns log(1 + value), of a number or an array."""
    if isinstance(value, (int, float)):
        return math.log1p(value)
    import numpy as np

    return np.log1p(value)


def harmonic(start: float, count: int) -> float:
    """Returns 1 / (start + 1) + ... + 1 / (start + count), to double precision and at a bounded cost.

    At most about 1000 terms are added one by one. The others are H(high) - H(low) of the asymptotic series
    H(n) = log(n) + gamma + 1 / (2 n) - 1 / (12 n^2) + 1 / (120 n^4) - ..., whose next term is below 1e-20 past 1000.
    """
    exact = min(count, max(0, 1000 - math.floor(start))) if count > 1000 else count
    terms = [1 / (start + n) for n in range(1, exact + 1)]
    if exact < count:
        low = start + exact
        high = start + count
        series = [1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4) for n in (high, low)]
        terms += [math.log1p((count - exact) / low), series[0], -series[1]]
    return math.fsum(terms)
