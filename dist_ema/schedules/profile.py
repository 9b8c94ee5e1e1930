"""``Profile``: how much the weights of each past step weigh in an average.

An update gives its weights the fraction ``weight``; each later update multiplies that by its ``retain``. So the weights
of update n have weight(n) * retain(n, now) in the average, and all of them add up to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

#: Epochs are sums of fractions, with rounding errors. A step that misses an update by less than this part is at it.
SLACK = 1e-9


class Logged(Protocol):
    """Declares the methods of a schedule that a profile uses."""

    @property
    def position_unit(self) -> str:
        """Returns the unit of plain numbers."""

    def logs(self, every: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """:meth:`Schedule.logs`."""


@dataclass(frozen=True)
class Profile:
    """Gives how much the weights of each past step weigh in an average, in float64. See :meth:`Schedule.profile`.

    Steps are counted in ``unit`` from the first copy, which is step 0.

    Attributes:
        schedule: the schedule of the average.
        every: training between two updates, in ``unit``.
        updates: number of updates after the first copy.

    >>> from dist_ema.schedules import ConstantDecay
    >>> profile = ConstantDecay(0.5).profile(4)
    >>> [round(float(weight), 4) for weight in profile.weights]
    [0.0625, 0.0625, 0.125, 0.25, 0.5]
    """

    schedule: Logged
    every: float
    updates: int

    @property
    def unit(self) -> str:
        """Returns the unit of steps and ages: a unit of the clock, or ``"updates"``."""
        return self.schedule.position_unit

    @overload
    def __call__(self, step: float) -> float: ...

    @overload
    def __call__(self, step: NDArray[np.float64]) -> NDArray[np.float64]: ...

    def __call__(self, step: ArrayLike) -> float | NDArray[np.float64]:
        """Returns the weight of the update at ``step``; 0 if there was none. An array of steps gives an array."""
        import numpy as np

        steps: NDArray[np.float64] = np.asarray(step, dtype=np.float64) / self.every
        index = np.rint(steps)
        is_multiple = np.abs(steps - index) <= SLACK * np.maximum(index, 1)
        is_update = is_multiple & (index >= 0) & (index <= self.updates)
        safe_index = np.where(is_update, index, 0).astype(np.int64)  # any valid index; its weight is not used
        found: NDArray[np.float64] = np.where(is_update, self.weights[safe_index], 0.0)
        return float(found) if found.ndim == 0 else found

    @property
    def steps(self) -> NDArray[np.float64]:
        """Returns the steps of all updates, that of the first copy included."""
        import numpy as np

        return np.arange(self.updates + 1, dtype=np.float64) * self.every

    @property
    def older(self) -> NDArray[np.float64]:
        """Returns for each of ``steps`` the sum of the weights of this step and all before it."""
        return self._parts[0]

    @property
    def weights(self) -> NDArray[np.float64]:
        """Returns the weight of each of ``steps``. The weights sum to 1."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Returns ``older`` and ``weights``."""
        import numpy as np

        steps, kept = self.schedule.logs(self.every, self.updates)
        older = np.exp(kept)
        put_in = np.append(1.0, -np.expm1(steps))  # the first copy is the whole average at its time
        return older, put_in * older

    @property
    def mean_age(self) -> float:
        """Returns the mean age of the weights in the average at the last update, in ``unit``."""
        import numpy as np

        return float(np.sum(self.older[:-1])) * self.every

    @property
    def half_life(self) -> float:
        """Returns the age that half of the average exceeds, in ``unit``.

        It is the age of the first copy if that weighs more than half.
        """
        import numpy as np

        younger = int(np.searchsorted(self.older, 0.5, side="right"))  # the first step with more than half up to it
        if younger == 0:
            return self.updates * self.every
        low = self.older[younger - 1]
        high = self.older[younger]
        # Between two updates the sum of weights is taken to be exponential. For constant decays that is exact.
        part = math.log(0.5 / low) / math.log(high / low) if low > 0 else (0.5 - low) / (high - low)
        return (self.updates - younger + 1 - part) * self.every

    @property
    def effective_window(self) -> float:
        """Returns the length of a plain mean with the same variance: 1 / the sum of squared weights, in ``unit``."""
        import numpy as np

        return self.every / float(np.sum(self.weights**2))
