"""Means over the last part of each period of the training."""

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

#: Weight of the part from a to b of a window, whole ones weighing 1, without the digits that a difference would lose.
SHAPES: Mapping[str, Callable[[float, float], float]] = {
    "uniform": lambda a, b: b - a,
    "linear": lambda a, b: b - a,
    "sqrt": lambda a, b: (b - a) / (math.sqrt(a) + math.sqrt(b)),
    "cosine": lambda a, b: math.sin(math.pi / 2 * (b - a)) * math.sin(math.pi / 2 * (b + a)),
}
# Epochs are sums of fractions: what misses a boundary by less than this share of a period has reached it.
_SLACK = 1e-9


@dataclass(frozen=True)
class Window(Schedule):
    """The mean of the weights seen in the last ``length`` of each period of ``every``.

    It starts anew at the first update in a window (retain = 0), and stands still between windows, so that the mean of
    the last one can be used and saved until the next begins. What lies outside is never mixed in. A set of weights
    stands for the training since the update before it, or since the window began: at a regular interval that fits the
    window all weigh the same. It has no state but the clock: a run that is resumed inside a window goes on with it.

    Periods end at multiples of ``every`` on the clock of the training, wherever averaging started: after step 10000
    ``Window("1000ba", "10000ba")`` is the mean over steps 9001 to 10000, and ``Window(".1dur", "1dur")`` that over
    the last tenth of the training. Used by itself, outside of :class:`ShardedEMA`, a schedule takes the first copy to
    be made after the first batch (sample, token), as it is with ``ema_start="0ba"`` and an interval of one. If the
    first copy lies inside a window, it stands for one interval.

    A shape gives the weights that a learning rate which falls so over the window would have given to the same steps
    (WSM, Tian et al. 2025, arXiv:2507.17634). With u the part of the window that has gone, and the learning rate d(u),
    the weights are in proportion to -d'(u):

    - ``"uniform"``: all equal;
    - ``"linear"``: d = 1 - u, which is the same plain mean;
    - ``"sqrt"``: d = 1 - u ** .5, so that early ones weigh more;
    - ``"cosine"``: d = (1 + cos(pi * u)) / 2, so that those in the middle weigh more.

    Inside a window it is the mean, so weighted, of what has been seen of it. Several windows at once, overlapping ones
    too, are several ``averages``. Half life: half of ``length`` at the end of a uniform window.

    Args:
        length: ``"1000ba"``, ``"1ep"``, ``"0.1dur"``, which needs ``max_duration``, or an int number of batches.
        every: length of a period, in the same unit, not less than ``length``; None means one window after another.
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
    # On the clock of the training: of the first copy, and where the part of training began that it stands for.
    first: float = field(init=False, repr=False, compare=False)
    origin: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        time = Time.parse(self.length, option="length")
        period = time if self.every is None else Time.parse(self.every, option="every")
        one_is_open = (time.unit == "dur") != (period.unit == "dur")  # of which more is known with max_duration
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
        """With times in units of the clock. Raises EMAConfigError for a ``dur`` without ``max_duration``."""
        every = None
        if self.every is not None:
            every = str(self.period.resolve(max_duration, option="every"))
        return replace(self, length=str(self.time.resolve(max_duration, option="length")), every=every)

    def begun(self, start: Progress, interval: Time) -> Schedule:
        """With the clock at the first copy, and what that copy stands for: the interval, in this schedule's unit."""
        first = start.value(self.unit)
        passed = start.value(interval.unit)
        span = interval.value if interval.unit == self.unit else first * interval.value / passed if passed else 0
        begun = copy.copy(self)
        set_fields(begun, first=first, origin=max(first - span, 0))
        return begun

    def _position(self, moment: Position, name: str) -> float:
        if self.unit == "dur":
            raise EMAConfigError(
                f"length={self.length!r}, every={self.every!r}: a part of max_duration, which is not known here: "
                "resolve() it, or give times such as '10000ba'"
            )
        return super()._position(moment, name)

    def _log_retain(self, start: float, stop: float) -> float:
        old = start + self.first
        new = stop + self.first
        begin = self._window(new)
        if begin is None:
            return 0.0
        if old <= begin + self._slack(new):
            return -math.inf
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
        """Returns where the window that contains ``at`` begins, on the clock of the training."""
        slack = self._slack(at)
        end = -((slack - at) // self.period.value) * self.period.value
        begin = end - self.time.value
        return begin if at > begin + slack else None

    def _slack(self, at: float) -> float:
        return _SLACK * max(self.period.value, at) if self.unit == "ep" else 0

    def logs(self, every: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        import numpy as np

        steps = np.zeros(count)
        kept = np.zeros(count + 1)
        last = self._last_inside(every, count)
        if last is None:  # the first copy has not been replaced yet
            return steps, kept
        kept[:last] = -np.inf  # of what lies before the window, in which nothing was left of it
        for n in range(last, 0, -1):
            steps[n - 1] = self.log_retain((n - 1) * every, n * every)
            if steps[n - 1] == -np.inf:
                break
            kept[n - 1] = self.log_retain((n - 1) * every, last * every)
        return steps, kept

    def _last_inside(self, every: float, count: int) -> int | None:
        """Returns the last of the updates up to ``count`` that lies in a window."""
        at = count
        while at > 0:
            clock = at * every + self.first
            if self._window(clock) is not None:
                return at
            # To the last update in the period before: all since then are in the gap.
            end = (clock // self.period.value) * self.period.value
            at = min(at - 1, math.floor((end + self._slack(end) - self.first) / every))
        return None
