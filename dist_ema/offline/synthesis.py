"""Finds the weighted sum of saved averages that is closest to an average that was never kept. float64; reads no file.

An average is a weighted sum of the weights of past steps. So a weighted sum of averages is one as well. The *profile*
of an average says how much each step weighs. The fit makes the error e (the profile of the sum minus the wanted
profile) small in a norm over steps. Which norm is right depends on how the weights of different steps differ:

- by independent noise: the error of the result is the L2 norm of e, as in EDM2 (Karras et al. 2024, arXiv:2312.02696,
  section 3.3 and algorithm 3, for power functions);
- by a random walk: summation by parts gives the L2 norm of the tail sums of e, (T e)[i] = e[i] + e[i+1] + ...

Weights in training do both, so the fit minimises |T e|^2 + NOISE^2 |e|^2, which is right for a walk with noise of NOISE
times its step. If the snapshots can give the profile exactly, any norm has the same solution. The L2 norm then finds
it,
because its matrix is conditioned best.

EDM2 solves the normal equations, and divides by the sum of the weights afterwards. Here the profiles are decomposed
(QR, by blocks of steps), which does not square the condition number: neighbours among hundreds of snapshots agree to
many digits. That the weights sum to one is a constraint of the problem here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import positive
from dist_ema.schedules.profile import SLACK, Profile
from dist_ema.schedules.window import SHAPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector: TypeAlias = NDArray[np.float64]
    Curve: TypeAlias = Callable[[Vector], Vector]

#: Steps at a time.
BLOCK = 1 << 13
#: Directions of at most this relative size count as rounding errors: fitting them would make weights large in vain.
CUTOFF = 1e-12
#: The noise of one step, relative to a step of the random walk.
NOISE = 10.0
#: A fit in the L2 norm with at most this residual is exact.
EXACT = 1e-9


@dataclass(frozen=True)
class Fit:
    """Describes a weighted sum of snapshots.

    Attributes:
        weights: the weight of each snapshot, in their order; they sum to 1, and may be negative.
        residual: distance of its profile from the wanted one, divided by the norm of the wanted one. 0 is exact. From 1
            on the snapshots have nothing in common with it.
        gain: sum of the absolute weights. In the worst case rounding errors of the snapshots are multiplied by this.
    """

    weights: tuple[float, ...]
    residual: float
    gain: float


def fit(snapshots: Sequence[Profile], target: Profile | Curve, *, cutoff: float = CUTOFF) -> Fit:
    """Returns the weights that sum to 1 and bring the sum of ``snapshots`` closest to ``target``.

    Takes 16 bytes per snapshot and step. For long trainings make all profiles with a larger ``every``.

    Args:
        snapshots: the profiles of the saved averages, of one unit and interval (``schedule.profile(moment, every=)``),
            each as of its own moment.
        target: the wanted profile, or a curve: a function from an array of steps, counted as in the profiles, to their
            weights. A curve is divided by its sum.
        cutoff: relative size of the directions that are left out. Larger values keep the weights smaller.

    Raises:
        EMAConfigError: no snapshots, different units or intervals, or a curve that gives no valid weights.
    """
    import numpy as np

    unit, every = _grid(snapshots, target)
    count = max(one.updates for one in (*snapshots, target) if isinstance(one, Profile)) + 1
    # Copies, so that what they have computed does not stay with the caller's.
    columns = [replace(snapshot).weights for snapshot in snapshots]
    columns.append(replace(target).weights if isinstance(target, Profile) else _curve(target, count, every, unit))
    independent = _Rows(columns, count)
    weights = independent.fit(cutoff)
    if independent.distance(weights) > EXACT:
        tails = [np.cumsum(column[::-1])[::-1] for column in columns]
        weights = _Rows(columns, count, tails, NOISE).fit(cutoff)
    return Fit(tuple(weights.tolist()), independent.distance(weights), float(np.abs(weights).sum()))


class _Rows:
    """Solves a least-squares problem with one column for each snapshot and one for the target, by blocks of rows.

    Args:
        columns: the profiles, each of at most ``count`` steps; the target's is the last one.
        count: number of steps.
        tails: adds the tail sums of the profiles as further rows.
        factor: multiplies the rows of ``columns``.
    """

    def __init__(
        self, columns: Sequence[Vector], count: int, tails: Sequence[Vector] = (), factor: float = 1.0
    ) -> None:
        import numpy as np

        # Columns of norm 1, so that the cutoff, which is relative, treats snapshots of few and of many steps alike.
        norms = [factor * float(np.linalg.norm(column)) for column in columns]
        for index, tail in enumerate(tails):
            norms[index] = float(np.hypot(norms[index], np.linalg.norm(tail)))
        self._scale = np.array(norms)
        triangle = np.zeros((0, len(columns)))
        # Each block of rows is decomposed together with the triangle of those before it: memory does not grow with
        # the number of steps.
        for part, times in ((columns, factor), (tails, 1.0)):
            for low in range(0, count if part else 0, BLOCK):
                block = np.zeros((min(BLOCK, count - low), len(columns)))
                for index, column in enumerate(part):
                    rows = column[low : low + BLOCK] * (times / self._scale[index])
                    block[: len(rows), index] = rows
                triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block]), mode="r"))
        self._matrix = triangle[:, :-1]
        self._wanted = triangle[:, -1]

    def fit(self, cutoff: float) -> Vector:
        """Returns the weights that sum to 1 and have the smallest distance."""
        scaled = _solve(self._matrix, self._wanted, self._scale[:-1] / self._scale[-1], cutoff)
        weights: Vector = scaled * self._scale[-1] / self._scale[:-1]
        weights += (1 - weights.sum()) / len(weights)  # rounding
        return weights

    def distance(self, weights: Vector) -> float:
        """Returns the norm of the error of a sum, divided by the norm of the target."""
        import numpy as np

        scaled = weights * self._scale[:-1] / self._scale[-1]
        return float(np.linalg.norm(self._matrix @ scaled - self._wanted))


def trailing(length: float, at: float, *, every: float = 1, shape: str = "uniform") -> Curve:
    """Returns the curve of the mean over the last ``length`` before ``at``, wherever periods of a :class:`Window` would
    end.

    With a ``shape`` it is the average that corresponds to a learning rate that falls in this shape from ``at - length``
    to ``at`` (WSM).

    Args:
        length, at: in the unit of the profiles' steps, counted from the first copy. Steps after ``at - length`` count.
        every: time between two updates.
        shape: as for :class:`Window`.

    Raises:
        EMAConfigError: a number is not above 0, ``length`` goes beyond the first copy, or there is no such shape.
    """
    length = positive("length", length)
    every = positive("every", every)
    if length > positive("at", at) + every:
        raise EMAConfigError(f"length={length:g}: allowed is at most {at + every:g}, from the first copy to at={at:g}")
    if shape not in SHAPES:
        raise EMAConfigError(f"shape={shape!r}: allowed are {', '.join(map(repr, SHAPES))}")

    def curve(steps: Vector) -> Vector:
        import numpy as np

        # Each set of weights stands for the training since the one before it.
        high = np.clip((steps - at) / length + 1, 0, 1)
        low = np.clip((steps - every - at) / length + 1, 0, 1)
        seen = (high > low) & (steps <= at * (1 + SLACK))
        weights = np.zeros(len(steps))
        weights[seen] = [SHAPES[shape](a, b) for a, b in zip(low[seen].tolist(), high[seen].tolist(), strict=True)]
        return weights

    return curve


def _solve(matrix: Vector, wanted: Vector, norms: Vector, cutoff: float) -> Vector:
    """Returns the least-squares solution x of ``matrix @ x = wanted`` among those for which ``x / norms`` sums to 1."""
    import numpy as np

    total = 1 / norms
    start = total / (total @ total)
    # An orthonormal basis of the directions in which the sum does not change.
    basis = np.linalg.qr(total[:, None], mode="complete")[0][:, 1:]
    moved: Vector = np.linalg.lstsq(matrix @ basis, wanted - matrix @ start, rcond=cutoff)[0]
    return start + basis @ moved


def _grid(snapshots: Sequence[Profile], target: Profile | Curve) -> tuple[str, float]:
    if not snapshots:
        raise EMAConfigError("snapshots=[]: allowed is one profile or more")
    profiles = [*snapshots, target] if isinstance(target, Profile) else list(snapshots)
    for index, one in enumerate(profiles):
        if not isinstance(one, Profile):
            raise EMAConfigError(f"snapshots[{index}]={one!r}: allowed is what schedule.profile() gives")
        first = profiles[0]
        if (one.unit, one.every) != (first.unit, first.every):
            name = f"snapshots[{index}]" if index < len(snapshots) else "target"
            raise EMAConfigError(
                f"{name} has an update every {one.every:g}{one.unit} and snapshots[0] every "
                f"{first.every:g}{first.unit}: allowed are profiles of one unit and interval"
            )
    return profiles[0].unit, profiles[0].every


def _curve(target: Curve, count: int, every: float, unit: str) -> Vector:
    import numpy as np

    if not callable(target):
        raise EMAConfigError(f"target={target!r}: allowed is what schedule.profile() gives, or a function of steps")
    values = np.asarray(target(np.arange(count, dtype=np.float64) * every), dtype=np.float64)
    if values.shape != (count,):
        raise EMAConfigError(f"target={target!r}: it gave shape {values.shape} for {count} steps; allowed is one each")
    total = float(values.sum())
    if not np.isfinite(values).all() or abs(total) < 1e-12 * float(np.abs(values).sum()) or total == 0:
        raise EMAConfigError(
            f"target={target!r}: weights of steps 0 to {(count - 1) * every:g}{unit} that sum to {total:g}; allowed "
            "are finite ones whose sum is not 0"
        )
    return np.asarray(values / total)
