"""``Window``: a mean over the last part of each period of the training.

For example ``Window("3ba", "5ba")`` on the training clock, with an update after each batch::

    batch              1    2    3    4    5  |  6    7    8    9    10  |  11
                                [   window   ]|           [    window   ]|
    mean over batches  1    1    3   3-4  3-5 | 3-5  3-5   8   8-9  8-10 | 8-10

The first update in a window starts a new mean, the next ones add to it, and updates in a gap change nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import set_fields
from dist_ema.schedules.clock import Progress, Time
from dist_ema.schedules.schedule import Position, Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: For each shape the weight of the part from a to b of a window, with 0 <= a <= b <= 1. The whole window has the weight
#: 1. It is d(a) - d(b), rewritten so that it does not subtract nearly equal numbers.
SHAPES: Mapping[str, Callable[[float, float], float]] = {
    "uniform": lambda a, b: b - a,
    "linear": lambda a, b: b - a,
    "sqrt": lambda a, b: (b - a) / (math.sqrt(a) + math.sqrt(b)),
    "cosine": lambda a, b: math.sin(math.pi / 2 * (b - a)) * math.sin(math.pi / 2 * (b + a)),
}
# Epochs are sums of fractions, with rounding errors. A reading that misses a boundary by less than this part of a
# period has reached it.
_SLACK = 1e-9


@dataclass(frozen=True)
class Window(Schedule):
    """Computes the mean of the weights in the last ``length`` of each period of ``every``.

    The first update in a window starts a new mean (retain = 0). Between windows the average does not change, so the
    mean of the last window can be used and saved until the next one begins. Weights from outside a window are never
    mixed in. The weights of an update count for the training since the update before it, or since the window began; at
    a regular interval that divides the window all count the same. The only state is the clock: a run that is resumed
    inside a window continues the same mean.

    Periods end at multiples of ``every`` on the training clock, independent of ``ema_start``: after step 10000
    ``Window("1000ba", "10000ba")`` is the mean over the steps 9001 to 10000, and ``Window(".1dur", "1dur")`` is the
    mean over the last tenth of the training. Outside of :class:`ShardedEMA` a schedule assumes that the first copy was
    made after the first batch (sample, token), as with ``ema_start="0ba"`` and an interval of one. A first copy inside
    a window counts for one interval.

    ``shape`` weighs the steps of a window as a decaying learning rate would (WSM, Tian et al. 2025, arXiv:2507.17634).
    Let u be the part of the window that has passed, and d(u) the learning rate. The weights are in proportion to
    -d'(u):

    - ``"uniform"``: all weights are equal;
    - ``"linear"``: d = 1 - u, which is the same plain mean;
    - ``"sqrt"``: d = 1 - u ** .5, so early steps weigh more;
    - ``"cosine"``: d = (1 + cos(pi * u)) / 2, so steps in the middle weigh more.

    During a window the average is the mean, with these weights, of the steps so far. For several windows, also
    overlapping ones, use several ``averages``. Half life: half of ``length`` at the end of a uniform window.

    Args:
        length: ``"1000ba"``, ``"1ep"``, ``"0.1dur"``, which needs ``max_duration``, or an int number of batches.
        every: length of a period, in the same unit, not less than ``length``. None means that a window begins where the
            last one ended.
        shape: ``"uniform"``, ``"linear"``, ``"sqrt"`` or ``"cosine"``.

    >>> window = Window("4ba")
    >>> round(window.retain(0, 3), 4), window.retain(3, 4)
    (0.25, 0.0)
    """

    length: str
    every: str | None = None
    shape: str = "uniform"
    time: Time = field(init=False, repr=False, compare=False)
    period: Time = field(init=False, repr=False, compare=False)
    # Readings of the training clock: at the first copy, and at the beginning of the training that the copy counts for.
    first: float = field(init=False, repr=False, compare=False)
    origin: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        time = Time.parse(self.length, option="length")
        period = time if self.every is None else Time.parse(self.every, option="every")
        # If only one of the two is in ``dur``, they can be compared only after resolve().
        one_is_open = (time.unit == "dur") != (period.unit == "dur")
        if not one_is_open and (period.unit != time.unit or period.value < time.value):
            raise EMAConfigError(
                f"every={self.every!r}: allowed is a time in {time.unit}, as length={str(time)!r}, and not less than it"
            )
        if not isinstance(self.shape, str) or self.shape not in SHAPES:
            raise EMAConfigError(f"shape={self.shape!r}: allowed are {', '.join(map(repr, SHAPES))}")
        every = None if self.every is None else str(period)
        set_fields(self, length=str(time), every=every, time=time, period=period)
        set_fields(self, first=0 if time.unit == "ep" else 1, origin=0)

    @property
    def unit(self) -> str:
        """Returns the unit of ``length``."""
        return self.time.unit if self.period.unit != "dur" else "dur"

    def resolve(self, max_duration: Time | None) -> Schedule:
        """Returns this schedule with times in units of the clock.

        Raises EMAConfigError if a time is in ``dur`` and there is no ``max_duration``.
        """
        every = None
        if self.every is not None:
            every = str(self.period.resolve(max_duration, option="every"))
        return replace(self, length=str(self.time.resolve(max_duration, option="length")), every=every)

    def begun(self, start: Progress, interval: Time) -> Schedule:
        """Returns this schedule with the clock at the first copy, which counts for one interval of training."""
        first = start.value(self.unit)
        passed = start.value(interval.unit)
        # One interval in this schedule's unit. If the units differ, it is converted by the training so far.
        span: float = interval.value
        if interval.unit != self.unit:
            span = first * interval.value / passed if passed else 0
        begun = copy.copy(self)
        set_fields(begun, first=first, origin=max(first - span, 0))
        return begun

    def _position(self, moment: Position, name: str) -> float:
        if self.unit == "dur":
            raise EMAConfigError(
                f"length={self.length!r}, every={self.every!r}: a part of max_duration, which is not known here. Call "
                "resolve() first, or give times such as '10000ba'"
            )
        return super()._position(moment, name)

    def _log_retain(self, start: float, stop: float) -> float:
        # Positions count from the first copy; windows are on the training clock.
        old = start + self.first
        new = stop + self.first
        begin = self._window(new)
        if begin is None:
            return 0.0  # the update is in a gap: everything is kept
        if old <= begin + self._slack(new):
            return -math.inf  # the first update in a window: nothing is kept

        # The mean so far has the weight of the window up to ``old``, and the update that from ``old`` to ``new``.
        size = self.time.value
        origin = max(begin, self.origin)
        weigh = SHAPES[self.shape]
        low, middle, high = ((at - begin) / size for at in (origin, old, new))
        kept = weigh(low, middle)
        added = weigh(middle, min(high, 1.0))
        if kept <= 0:
            return -math.inf
        return math.log1p(-added / (kept + added)) if added < kept else math.log(kept / (kept + added))

    def _window(self, at: float) -> float | None:
        """Returns where the window that contains ``at`` begins, on the training clock; None if ``at`` is in a gap."""
        slack = self._slack(at)
        end = -((slack - at) // self.period.value) * self.period.value  # the next multiple of the period, or ``at``
        begin = end - self.time.value
        return begin if at > begin + slack else None

    def _slack(self, at: float) -> float:
        """Returns the rounding error that is allowed at ``at``; 0 for whole numbers."""
        return _SLACK * max(self.period.value, at) if self.unit == "ep" else 0

    def logs(self, every: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        import numpy as np

        # Only the last window matters, so nothing is computed for the updates before it.
        steps = np.zeros(count)
        kept = np.zeros(count + 1)
        last = self._last_inside(every, count)
        if last is None:  # no update was in a window: the first copy is the average
            return steps, kept
        # Only the last window counts. Nothing is left of what was before it.
        kept[:last] = -np.inf
        for n in range(last, 0, -1):
            steps[n - 1] = self.log_retain((n - 1) * every, n * every)
            if steps[n - 1] == -np.inf:
                break
            kept[n - 1] = self.log_retain((n - 1) * every, last * every)
        return steps, kept

    def _last_inside(self, every: float, count: int) -> int | None:
        """Returns the last of the updates up to ``count`` that is in a window; None if there is none."""
        at = count
        while at > 0:
            clock = at * every + self.first
            if self._window(clock) is not None:
                return at
            # All updates since the last period ended are in the gap. Go to the last update of that period.
            end = (clock // self.period.value) * self.period.value
            at = min(at - 1, math.floor((end + self._slack(end) - self.first) / every))
        return None
