"""Weighted sums of snapshots against the best there is, by brute force over steps, and against EDM2's formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_ema.errors import EMAConfigError
from dist_ema.offline.synthesis import fit, trailing
from dist_ema.schedules import ConstantDecay, HalfLife, PowerFunction, Schedule, Window, sigma_rel_to_gamma
from dist_ema.schedules.clock import Progress, Time
from dist_ema.schedules.profile import Profile

SIGMAS = (0.05, 0.10)


def snapshots(schedules: list[Schedule], steps: int, count: int) -> list[Profile]:
    return [schedule.profile(steps * n // count - 1) for n in range(1, count + 1) for schedule in schedules]


def matrix(profiles: list[Profile]) -> NDArray[np.float64]:
    columns = np.zeros((max(profile.updates for profile in profiles) + 1, len(profiles)))
    for index, profile in enumerate(profiles):
        columns[: profile.updates + 1, index] = profile.weights
    return columns


def mixed(columns: NDArray[np.float64], weights: Any, wanted: NDArray[np.float64]) -> float:
    """The norm that the fit minimises: of the error's tail sums, and of ten times the error."""
    error = columns @ np.asarray(weights) - wanted
    tails = np.cumsum(error[::-1])[::-1]
    return float(np.hypot(np.linalg.norm(tails), 10 * np.linalg.norm(error)))


def inner_products(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Equation 151 of EDM2: of the profiles of (moment, gamma), continuous in time."""
    (t, g), (u, h) = a[:, :, None], b[:, None, :]
    return (g + 1) * (h + 1) * (t / u) ** np.where(t < u, h, -g) / ((g + h + 1) * np.maximum(t, u))


def edm2(saved: list[Profile], target: Profile) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Algorithm 3: weights, and the inner products of the saved."""

    def of(profiles: list[Profile]) -> NDArray[np.float64]:
        return np.array([[one.updates + 1, one.schedule.exponent] for one in profiles], dtype=float).T

    gram = inner_products(of(saved), of(saved))
    solved = np.linalg.solve(gram, inner_products(of(saved), of([target])))[:, 0]
    return solved / solved.sum(), gram


def test_power_functions_have_the_published_inner_products() -> None:
    """A profile that is not EDM2's would still be fitted, to something else."""
    assert [sigma_rel_to_gamma(sigma) for sigma in SIGMAS] == pytest.approx([16.97, 6.94], abs=0.005)
    saved = snapshots([PowerFunction(sigma_rel=sigma) for sigma in SIGMAS], 20_000, 8)
    columns = matrix(saved)
    _, gram = edm2(saved, saved[-1])
    # Discrete steps against continuous time: relative differences of gamma over steps.
    assert columns.T @ columns == pytest.approx(gram, rel=2e-2, abs=1e-12)
    late = columns[:, -2:]
    assert late.T @ late == pytest.approx(gram[-2:, -2:], rel=2e-3)


@pytest.mark.parametrize("sigma", [0.06, 0.075, 0.09, 0.12])
def test_power_functions_from_snapshots_are_as_near_as_edm2_brings_them(sigma: float) -> None:
    saved = snapshots([PowerFunction(sigma_rel=sigma) for sigma in SIGMAS], 16_000, 16)
    target = PowerFunction(sigma_rel=sigma).profile(15_999)
    found = fit(saved, target)
    theirs, _ = edm2(saved, target)
    columns, wanted = matrix(saved), target.weights

    def distance(weights: Any) -> float:
        return float(np.linalg.norm(columns @ np.asarray(weights) - wanted) / np.linalg.norm(wanted))

    assert sum(found.weights) == pytest.approx(1, rel=1e-14)
    assert found.residual == pytest.approx(distance(found.weights), rel=1e-6, abs=1e-9)
    assert mixed(columns, found.weights, wanted) <= mixed(columns, theirs, wanted) * (1 + 1e-9)
    assert distance(theirs) == pytest.approx(found.residual, rel=0.04)  # and they are nearly the same thing
    assert found.residual < (0.02 if sigma < 0.1 else 0.2)


@pytest.mark.parametrize(
    "target",
    [
        HalfLife("300ba").profile(3999),
        Window(1000).profile(3999),
        PowerFunction(sigma_rel=0.15).profile(3499),
        lambda steps: np.where(steps >= 2000, np.sqrt(np.maximum(4000 - steps, 0)), 0.0),
    ],
    ids=["half life", "window", "an earlier moment", "curve"],
)
@pytest.mark.parametrize("count", [4, 20])
def test_nothing_comes_closer(target: Any, count: int) -> None:
    """Brute force over steps and their tail sums; the solution without a constraint is a bound."""
    saved = snapshots([HalfLife("100ba"), ConstantDecay(0.999)], 4000, count)
    found, columns = fit(saved, target), matrix(saved)
    wanted = np.zeros(len(columns))
    weights = target.weights if isinstance(target, Profile) else target(np.arange(len(columns)))
    wanted[: len(weights)] = weights / weights.sum()
    rows = np.concatenate([np.cumsum(columns[::-1], axis=0)[::-1], 10 * columns])
    bound = np.linalg.lstsq(rows, np.concatenate([np.cumsum(wanted[::-1])[::-1], 10 * wanted]), rcond=None)[0]
    best = mixed(columns, bound, wanted)
    assert best * (1 - 1e-9) <= mixed(columns, found.weights, wanted) <= 1.1 * best + 1e-9
    assert found.residual == pytest.approx(
        float(np.linalg.norm(columns @ np.array(found.weights) - wanted) / np.linalg.norm(wanted)), rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("shape", ["uniform", "linear", "sqrt", "cosine"])
@pytest.mark.parametrize("every", [1, 10])
def test_trailing_is_the_window_that_ends_there(shape: str, every: int) -> None:
    """The same numbers where a period ends, and as many where none does."""
    window = Window(200, 1000, shape).begun(Progress(every), Time(every, "ba")).profile(3000 - every, every=every)
    curve = trailing(200, 3000 - every, every=every, shape=shape)(window.steps)
    assert curve == pytest.approx(window.weights, rel=1e-9, abs=1e-15)
    other = trailing(200, 2500, every=every, shape=shape)(window.steps)
    assert np.count_nonzero(other) == 200 // every
    assert other.sum() == pytest.approx(1)
    assert (window.steps[other > 0].min(), window.steps[other > 0].max()) == (2300 + every, 2500)


def test_trailing_that_cannot_be() -> None:
    for arguments, says in (((0, 5), "length=0"), ((7, 5), "at most 6"), ((2, -1), "at=-1")):
        with pytest.raises(EMAConfigError, match=says):
            trailing(*arguments)
    with pytest.raises(EMAConfigError, match="shape='square'"):
        trailing(2, 5, shape="square")


def test_what_was_saved_is_found_again_among_hundreds() -> None:
    """Normal equations of so many snapshots that are alike have lost every digit."""
    saved = snapshots([PowerFunction(sigma_rel=sigma) for sigma in (0.05, 0.06, 0.07, 0.08, 0.09, 0.10)], 6000, 50)
    columns, one = matrix(saved), np.eye(300)[171]
    found = fit(saved, saved[171])
    assert found.residual < 1e-12
    assert np.abs(np.array(found.weights) - one).max() < 1e-5
    assert np.abs(edm2(saved, saved[171])[0] - one).max() > 0.1  # why they are not used
    mix = 0.3 * columns[:, 100] + 0.7 * columns[:, 299]
    assert fit(saved, lambda steps: mix).residual < 1e-12
    between = fit(saved, PowerFunction(sigma_rel=0.075).profile(5999))
    assert between.residual < 1e-10
    assert between.gain < 10


def test_the_same_snapshot_twice_is_no_harm() -> None:
    """Singular: of all solutions the smallest."""
    once = snapshots([HalfLife("100ba")], 1000, 5)
    found = fit([*once, *once], once[2])
    assert found.residual < 1e-12
    assert (found.weights[2], found.weights[7]) == (pytest.approx(0.5), pytest.approx(0.5))
    assert found.gain == pytest.approx(1)


def test_one_snapshot_is_what_there_is() -> None:
    found = fit([HalfLife("100ba").profile(999)], HalfLife("200ba").profile(999))
    assert found.weights == (1.0,)
    assert 0.3 < found.residual < 1


def test_averages_that_were_really_kept() -> None:
    """Random walks with noise, averaged step by step; the sum of what was saved of them is the average not kept."""
    generator = np.random.default_rng(0)
    weights = np.cumsum(generator.normal(size=(4000, 50)) * 0.02, axis=0) + generator.normal(size=(4000, 50))
    schedules: list[Schedule] = [PowerFunction(sigma_rel=sigma) for sigma in SIGMAS]
    wanted = PowerFunction(sigma_rel=0.08)
    averages = dict.fromkeys((*schedules, wanted), weights[0])
    kept = []
    for step in range(1, 4000):
        for schedule in averages:
            averages[schedule] = averages[schedule] + schedule.weight(step - 1, step) * (
                weights[step] - averages[schedule]
            )
        if (step + 1) % 250 == 0:
            kept += [averages[schedule] for schedule in schedules]
    found = fit(snapshots(schedules, 4000, 16), wanted.profile(3999))
    result = np.array(found.weights) @ np.array(kept)
    size = np.linalg.norm(wanted.profile(3999).weights) * np.sqrt(50)  # of noise of 1 after averaging
    assert np.linalg.norm(result - averages[wanted]) < 2 * found.residual * size
    assert found.residual < 0.02


@pytest.mark.parametrize(("kind", "ours", "gain"), [("walk", 0.005, 3), ("noise", 0.006, 0.9), ("both", 0.005, 2)])
def test_the_weights_of_different_steps_are_not_independent(kind: str, ours: float, gain: float) -> None:
    """A fit in the L2 norm alone is right for noise, and several times further off where the weights drift.

    The error is that of the sum, as a part of the way from the last weights to the average that was never kept.
    """
    steps, target = 1536, HalfLife("200ba").profile(1535)
    saved = snapshots([PowerFunction(sigma_rel=sigma) for sigma in SIGMAS], steps, 16)
    columns, wanted = matrix(saved), target.weights
    fitted = np.array(fit(saved, target).weights)
    basis = np.linalg.svd(np.ones((1, len(saved))))[2][1:].T  # directions in which the weights keep their sum
    start = np.full(len(saved), 1 / len(saved))
    plain = start + basis @ np.linalg.lstsq(columns @ basis, wanted - columns @ start, rcond=None)[0]
    errors: dict[str, list[float]] = {"mixed": [], "l2": []}
    for seed in range(5):
        generator = np.random.default_rng(seed)
        walk = np.cumsum(generator.normal(size=(steps, 200)), axis=0)
        noise = generator.normal(size=(steps, 200))
        path = {"walk": walk, "noise": noise, "both": walk + 10 * noise}[kind]
        kept = wanted @ path
        for name, weights in (("mixed", fitted), ("l2", plain)):
            off = np.linalg.norm((columns @ weights) @ path - kept)
            errors[name].append(float(off / np.linalg.norm(kept - path[-1])))
    assert np.mean(errors["mixed"]) < ours
    assert np.mean(errors["l2"]) > gain * np.mean(errors["mixed"])


@pytest.mark.parametrize(
    ("saved", "target", "says"),
    [
        ([], lambda steps: steps, "snapshots=[]"),
        ([HalfLife(5)], lambda steps: steps, "snapshots[0]=HalfLife"),
        (
            [HalfLife(5).profile(9), HalfLife(5).profile(9, every=3)],
            lambda steps: steps,
            "snapshots[1] has an update every 3ba",
        ),
        ([HalfLife(5).profile(9)], HalfLife("5tok").profile(9), "target has an update every 1tok"),
        ([HalfLife(5).profile(9)], 0.5, "target=0.5"),
        ([HalfLife(5).profile(9)], lambda steps: steps[1:], "it gave shape (9,) for 10 steps"),
        ([HalfLife(5).profile(9)], lambda steps: steps * np.nan, "that sum to nan"),
        ([HalfLife(5).profile(9)], lambda steps: steps * 0, "that sum to 0"),
    ],
)
def test_what_cannot_be_fitted(saved: Any, target: Any, says: str) -> None:
    with pytest.raises(EMAConfigError) as caught:
        fit(saved, target)
    assert says in str(caught.value)
