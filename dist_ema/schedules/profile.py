"""Computes how much each past step weighs in an average."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

#: Epochs are sums of fractions: an update that is missed by less than this share of an interval has been made.
SLACK = 1e-9


class Logged(Protocol):
    """Declares what a profile needs of a schedule."""

    @property
    def position_unit(self) -> str:
        """Returns the unit of plain numbers."""

    def logs(self, every: float, count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """:meth:`Schedule.logs`."""


@dataclass(frozen=True)
class Profile:
    """A function of past steps: how much the weights of each weigh. float64; made by :meth:`Schedule.profile`.

    Steps are counted in ``unit`` from the first copy, which is step 0.

    Attributes:
        schedule: of the average.
        every: between two updates.
        updates: after the first copy.

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
        """Returns the unit of steps and ages: one of the clock, or ``updates`` for a schedule that counts these."""
        return self.schedule.position_unit

    @overload
    def __call__(self, step: float) -> float: ...

    @overload
    def __call__(self, step: NDArray[np.float64]) -> NDArray[np.float64]: ...

    def __call__(self, step: ArrayLike) -> float | NDArray[np.float64]:
        """Returns the weight of the update at ``step``; 0 where there was none. An array of steps gives an array."""
        import numpy as np

        steps: NDArray[np.float64] = np.asarray(step, dtype=np.float64) / self.every
        index = np.rint(steps)
        known = (np.abs(steps - index) <= SLACK * np.maximum(index, 1)) & (index >= 0) & (index <= self.updates)
        found: NDArray[np.float64] = np.where(known, self.weights[np.where(known, index, 0).astype(np.int64)], 0.0)
        return float(found) if found.ndim == 0 else found

    @property
    def steps(self) -> NDArray[np.float64]:
        """Steps at which updates were, the first copy among them."""
        import numpy as np

        return np.arange(self.updates + 1, dtype=np.float64) * self.every

    @property
    def older(self) -> NDArray[np.float64]:
        """Returns what all steps up to each of ``steps`` weigh together."""
        return self._parts[0]

    @property
    def weights(self) -> NDArray[np.float64]:
        """Returns for each step what an update put in, times how much of that is left. The weights sum to 1."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        import numpy as np

        steps, kept = self.schedule.logs(self.every, self.updates)
        older = np.exp(kept)
        return older, np.append(1.0, -np.expm1(steps)) * older

    @property
    def mean_age(self) -> float:
        """Returns the mean age of the weights in the average, at the last update."""
        import numpy as np

        return float(np.sum(self.older[:-1])) * self.every

    @property
    def half_life(self) -> float:
        """Returns the age that half of the average has passed; that of the first copy, if this weighs more than
        half.
        """
        import numpy as np

        younger = int(np.searchsorted(self.older, 0.5, side="right"))  # the first step with more than half up to it
        if younger == 0:
            return self.updates * self.every
        low = self.older[younger - 1]
        high = self.older[younger]
        # Between two updates as an exponential one would be, which makes it exact for those.
        part = math.log(0.5 / low) / math.log(high / low) if low > 0 else (0.5 - low) / (high - low)
        return (self.updates - younger + 1 - part) * self.every

    @property
    def effective_window(self) -> float:
        """Returns the length of the plain mean that averages out as much noise: 1 / the sum of squared weights."""
        import numpy as np

        return self.every / float(np.sum(self.weights**2))
