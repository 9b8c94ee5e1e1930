"""Schedules: composition, bounds, limits, published values, precision."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ema.errors import EMAConfigError
from dist_ema.schedules import (
    KINDS,
    ConstantDecay,
    Cosine,
    Debiased,
    HalfLife,
    HalfLifeFraction,
    Linear,
    NumUpdatesWarmup,
    PowerFunction,
    Ramp,
    Schedule,
    Smoothing,
    Uniform,
    Warmup,
    Window,
    from_dict,
    sigma_rel_to_gamma,
)
from dist_ema.schedules.clock import Progress, Time

pytestmark = pytest.mark.core

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

EXAMPLES = [
    ConstantDecay(0.0),
    ConstantDecay(0.999),
    Cosine(0.996, 1, "2000ba"),
    Cosine(0.0, 0.999, 40),
    Debiased(0.0),
    Debiased(0.99),
    HalfLife("1000ba"),
    HalfLife("1000ba", ramp=0.05),
    HalfLife("10_000tok"),
    HalfLife("50000sp"),
    HalfLife("0.5ep"),
    HalfLifeFraction(0.05),
    Linear(0.998, 1.0, "1_500ba"),
    NumUpdatesWarmup(0.0),
    NumUpdatesWarmup(0.99),
    PowerFunction(sigma_rel=0.05),
    PowerFunction(gamma=0),
    Ramp(0.0, 5),
    Ramp(0.99, 30.5),
    Smoothing(0.9),
    Uniform(),
    Warmup(0.0),
    Warmup(0.95),
    Warmup(0.9999, inv_gamma=20.0, power=0.75),
    Warmup(0.99, min_decay=0.5),
    Window("7ba"),
    Window(7, "20ba", "cosine"),
]
# What lies between windows is left out, so those have rules of their own: tests/averaging/test_windows.py.
schedules = st.sampled_from([schedule for schedule in EXAMPLES if not isinstance(schedule, Window)])
moments = st.one_of(st.integers(0, 3000), st.floats(0, 3000))


def test_examples_cover_every_kind() -> None:
    assert {type(schedule).__name__ for schedule in EXAMPLES} == set(KINDS)


@given(schedules, st.tuples(moments, moments, moments).map(sorted))
def test_fractions_compose(schedule: Schedule, at: list[float]) -> None:
    before, middle, after = at
    parts = schedule.log_retain(before, middle) + schedule.log_retain(middle, after)
    assert schedule.log_retain(before, after) == pytest.approx(parts, rel=1e-11, abs=1e-13)


@given(schedules, st.tuples(moments, moments, moments).map(sorted))
def test_bounds_and_order(schedule: Schedule, at: list[float]) -> None:
    before, middle, after = at
    assert 0 <= schedule.retain(before, after) <= 1
    assert 0 <= schedule.weight(before, after) <= 1
    assert schedule.retain(before, before) == 1
    assert schedule.weight(before, before) == 0
    # Longer gaps keep no more, and old averages lose no more in the same gap than young ones.
    assert schedule.log_retain(before, after) <= schedule.log_retain(before, middle) + 1e-13
    gap = after - middle
    assert schedule.retain(middle, middle + gap) >= schedule.retain(before, before + gap) - 1e-12


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_progress_and_plain_numbers_agree(schedule: Schedule) -> None:
    before, after = Progress(10, 160, 4000, 0.25, 6), Progress(12, 200, 5500, 0.375, 7)
    unit = {"HalfLife('10000tok')": (4000, 5500), "HalfLife('50000sp')": (160, 200), "HalfLife('0.5ep')": (0.25, 0.375)}
    counted = (5, 6) if isinstance(schedule, Uniform | Smoothing) else (10, 12)
    plain = unit.get(repr(schedule).replace("half_life=", ""), counted)
    assert schedule.retain(before, after) == schedule.retain(*plain)
    assert schedule.weight(before, after) == -math.expm1(schedule.log_retain(*plain))


@pytest.mark.parametrize("schedule", [one for one in EXAMPLES if one != Window(7, 20, "cosine")], ids=repr)
def test_an_average_of_two_snapshots_lies_between_them(schedule: Schedule) -> None:
    weight = schedule.weight(Progress(updates=1), Progress(1, 8, 512, 0.01, 2))
    assert 0 < weight <= 1


def test_constant_decay() -> None:
    assert ConstantDecay(0.9).retain(5, 8) == pytest.approx(0.9**3, rel=1e-15)
    assert ConstantDecay(0.25).retain(1, 1.5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "schedule", [ConstantDecay(0), Smoothing(0.0), Warmup(0.0), NumUpdatesWarmup(0), Ramp(0, 9), Debiased(0)], ids=repr
)
@pytest.mark.parametrize("after", [1, 1.5, 2, 3.25, 10**9])
def test_decay_zero_keeps_only_the_last_weights(schedule: Schedule, after: float) -> None:
    assert schedule.retain(0, after) == 0
    assert schedule.weight(0, after) == 1
    assert schedule.retain(3, 3) == 1


@pytest.mark.parametrize("decay", [0.9, 0.9999, 0.999999, 1 - 1e-12])
@pytest.mark.parametrize("batches", [1, 10])
def test_the_weight_has_full_precision(decay: float, batches: int) -> None:
    exact = 1 - Fraction(decay) ** batches
    gap = (10**14, 10**14 + batches)  # past every warm-up
    for schedule in (
        ConstantDecay(decay),
        NumUpdatesWarmup(decay),
        Smoothing(decay),
        Ramp(decay, 100),
        Debiased(decay),
    ):
        assert schedule.weight(*gap) == pytest.approx(float(exact), rel=1e-12, abs=0)
    short = HalfLife("1000ba").weight(0, 1)
    assert short == pytest.approx(-math.expm1(-math.log(2) / 1000), rel=1e-15)


def test_half_life_is_composers() -> None:
    for half_life, interval in ((1000, 1), (1000, 10), (3, 7)):
        smoothing = 2 ** (-(interval / half_life))  # Composer's formula, fixed for every update
        schedule = HalfLife(f"{half_life}ba")
        assert schedule.retain(50, 50 + interval) == pytest.approx(smoothing, rel=1e-15)
        assert Smoothing(smoothing).retain(4, 5) == pytest.approx(smoothing, rel=1e-15)
        assert schedule.retain(17, 17 + half_life) == pytest.approx(0.5, rel=1e-15)
    assert ConstantDecay(2 ** (-1 / 1000)).retain(0, 1000) == pytest.approx(0.5, rel=1e-12)


def test_smoothing_is_not_rescaled_by_the_interval() -> None:
    assert Smoothing(0.9).retain(Progress(10, updates=2), Progress(20, updates=3)) == pytest.approx(0.9)
    assert ConstantDecay(0.9).retain(Progress(10, updates=2), Progress(20, updates=3)) == pytest.approx(0.9**10)


@pytest.mark.parametrize(("inv_gamma", "power"), [(1.0, 2 / 3), (20.0, 0.75), (1.0, 1.0), (0.5, 3.0)])
def test_warmup_is_diffusers(inv_gamma: float, power: float) -> None:
    for n in (1, 2, 3, 10, 500, 5000, 100_000):
        factor = min(0.999, max(0.0, 1 - (1 + n / inv_gamma) ** -power))
        assert Warmup(0.999, inv_gamma, power).retain(n - 1, n) == pytest.approx(factor, rel=1e-12)


def test_warmup_with_power_one_is_the_plain_mean() -> None:
    warmup = Warmup(1 - 1e-12, power=1.0)
    for n in (1, 2, 7, 1000):
        assert warmup.retain(0, n) == pytest.approx(1 / (n + 1), rel=1e-12)


def test_num_updates_warmup_is_tensorflows() -> None:
    for n in (1, 2, 3, 50, 890, 891, 892, 10_000):
        factor = min(0.99, (1 + n) / (10 + n))
        assert NumUpdatesWarmup(0.99).retain(n - 1, n) == pytest.approx(factor, rel=1e-12)
    product = math.prod(min(0.99, (1 + n) / (10 + n)) for n in range(4, 1201))
    assert NumUpdatesWarmup(0.99).retain(3, 1200) == pytest.approx(product, rel=1e-10)
    assert NumUpdatesWarmup(0.01).retain(0, 1) == pytest.approx(0.01)


@pytest.mark.parametrize("schedule", [Warmup(0.999), NumUpdatesWarmup(0.999999)], ids=repr)
def test_a_huge_gap_is_cheap_and_ends_in_the_decay(schedule: Warmup | NumUpdatesWarmup) -> None:
    far = 10**12
    assert schedule.log_retain(far, 2 * far) == pytest.approx(far * math.log(schedule.decay), rel=1e-12)
    assert schedule.log_retain(0, far) == pytest.approx(far * math.log(schedule.decay), rel=1e-3)


def test_warmup_that_never_ends() -> None:
    slow = Warmup(0.999999, power=1e-3)  # (1 - decay) ** (-1 / power) overflows
    assert 0 < slow.retain(0, 1) < slow.retain(1000, 1001) < 0.01


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_gamma_is_that_of_the_edm2_paper(sigma_rel: float, gamma: float) -> None:
    assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, abs=0.005)


@given(st.floats(1e-6, 12**-0.5))
def test_gamma_solves_the_papers_equation(sigma_rel: float) -> None:
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5 == pytest.approx(sigma_rel, rel=1e-14)
    if sigma_rel > 1e-3:  # the cubic of the paper's algorithm 2, where its terms do not cancel
        tail = sigma_rel**-2
        scale = gamma**3 + tail * gamma + 12
        assert abs(gamma**3 + 7 * gamma**2 + (16 - tail) * gamma + 12 - tail) <= 1e-11 * scale


def test_gamma_at_the_widest_profile() -> None:
    assert sigma_rel_to_gamma(12**-0.5) == pytest.approx(0, abs=1e-14)
    assert sigma_rel_to_gamma(1e-300) == pytest.approx(1e300)


def test_power_function_is_edm2s() -> None:
    for schedule in (PowerFunction(sigma_rel=0.1), PowerFunction(gamma=6.94)):
        for t in (2, 10, 5000):
            beta = (1 - 1 / t) ** (schedule.exponent + 1)
            assert schedule.retain(t - 2, t - 1) == pytest.approx(beta, rel=1e-12)
        assert schedule.retain(9, 99) == pytest.approx(0.1 ** (schedule.exponent + 1), rel=1e-12)


def test_power_function_with_gamma_zero_is_the_mean_over_batches() -> None:
    assert PowerFunction(gamma=0).retain(3, 7) == pytest.approx(4 / 8)


def test_least_decay_of_a_warmup_is_ema_pytorchs() -> None:
    """ema-pytorch: (1 - (1 + epoch / inv_gamma) ** -power).clamp(min=min_value, max=beta)."""
    schedule = Warmup(0.99, 10.0, 0.75, min_decay=0.5)
    for n in (1, 2, 10, 100, 10_000):
        factor = min(0.99, max(0.5, 1 - (1 + n / 10.0) ** -0.75))
        assert schedule.retain(n - 1, n) == pytest.approx(factor, rel=1e-12)
    assert schedule.retain(0, 5) == pytest.approx(0.5**5)


def test_ramp_is_ultralytics() -> None:
    """ModelEMA: updates += 1; decay = .9999 * (1 - exp(-updates / 2000)), from a copy of the model at construction."""
    schedule = Ramp(0.9999, 2000)
    for updates in (1, 2, 10, 2000, 50_000, 100_000):
        factor = 0.9999 * (1 - math.exp(-updates / 2000))
        assert schedule.retain(updates - 1, updates) == pytest.approx(factor, rel=1e-12)
    # mmengine's ExpMomentumEMA: (1 - momentum) * exp(-(1 + steps) / gamma) + momentum, steps = 1 after the first copy.
    for steps in (1, 7, 3000):
        momentum = (1 - 0.0002) * math.exp(-(1 + steps) / 2000) + 0.0002
        assert Ramp(0.9998, 2000).retain(steps, steps + 1) == pytest.approx(1 - momentum, rel=1e-12)
    far = 10**12  # past the ramp a gap is cheap
    assert schedule.log_retain(far, 2 * far) == pytest.approx(far * math.log(0.9999), rel=1e-12)


@pytest.mark.parametrize("decay", [0.5, 0.99, 1 - 1e-9])
def test_debiased_is_optaxs(decay: float) -> None:
    """optax.ema(decay, debias=True): from zero, divided by 1 - decay ** count. TensorFlow's zero_debias is the same."""
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0]
    biased, ours = Fraction(0), values[0]
    for count, value in enumerate(values, start=1):
        biased = Fraction(decay) * biased + (1 - Fraction(decay)) * Fraction(value)
        if count > 1:
            ours += Debiased(decay).weight(count - 2, count - 1) * (value - ours)
        assert ours == pytest.approx(float(biased / (1 - Fraction(decay) ** count)), rel=1e-13)
    # 1 / 1e6 is the plain mean's, and has lost no digits.
    exact = (1 - Fraction(decay)) / (1 - Fraction(decay) ** 1001)
    assert Debiased(decay).weight(999, 1000) == pytest.approx(float(exact), rel=1e-12)


def test_half_life_fraction_is_torchtitans() -> None:
    schedule = HalfLifeFraction(0.05)
    for n in (1, 2, 100, 10_000):
        assert schedule.retain(n - 1, n) == pytest.approx(2.0 ** (-1.0 / (0.05 * n)), rel=1e-13)
    # A half life of 100 batches at batch 2000.
    assert schedule.retain(1950, 2050) == pytest.approx(0.5, rel=1e-3)


@given(st.integers(0, 3000), st.integers(0, 20_000))
def test_half_life_fraction_over_long_gaps(before: int, gap: int) -> None:
    exact = -math.log(2) / 0.05 * math.fsum(1 / n for n in range(before + 1, before + gap + 1))
    assert HalfLifeFraction(0.05).log_retain(before, before + gap) == pytest.approx(exact, rel=1e-13)


def test_half_life_fraction_over_a_huge_gap() -> None:
    exact = -math.log(2) / 0.5 * math.log(10)
    assert HalfLifeFraction(0.5).log_retain(10**12, 10**13) == pytest.approx(exact, rel=1e-12)


def test_cosine_is_dinos() -> None:
    """utils.cosine_scheduler(0.996, 1, epochs, niter_per_ep), whose iteration 0 is our first copy."""
    epochs, niter = 100, 2502  # ImageNet, 512 a batch
    total, schedule = epochs * niter, Cosine(0.996, 1.0, "250200ba")
    for it in (1, 2, 2502, 125_100, 200_000, total - 1):
        momentum = 1 + 0.5 * (0.996 - 1) * (1 + math.cos(math.pi * it / total))
        assert schedule.retain(it - 1, it) == pytest.approx(momentum, rel=1e-15)
        # 1 - momentum has lost its digits at the end, the weight has not.
        assert schedule.weight(it - 1, it) == pytest.approx(0.004 * math.cos(math.pi / 2 * it / total) ** 2, rel=1e-12)
    assert schedule.retain(125_099, 125_100) == pytest.approx(0.998, rel=1e-15)
    assert schedule.weight(total - 1, total) == schedule.weight(total, 10**9) == 0


@pytest.mark.parametrize("over", ["250ba", "2000sp", "1024000tok", "25ep"])
def test_first_step_of_a_teacher_that_began_before_it_keeps_the_first_momentum(over: str) -> None:
    """DINO's and I-JEPA's loops: the teacher is a copy of the untrained student, and step 0 uses m_0.

    It used to be m_1, as where the first copy is made after the first step.
    """
    started, interval = Progress(), Time(1, "ba")
    for unbegun in (Cosine(0.9, 1.0, over), Linear(0.9, 1.0, over)):
        schedule, later = unbegun.begun(started, interval), unbegun.begun(clock(1, 10), interval)
        assert schedule.retain(clock(0, 10), clock(1, 10)) == pytest.approx(0.9, rel=1e-14)
        momenta = [1 - 0.1 * (1 + math.cos(math.pi * it / 250)) / 2 for it in range(260)]
        if isinstance(unbegun, Linear):
            momenta = [0.9 + 0.1 * it / 250 for it in range(260)]
        for it in (1, 2, 100, 249, 250, 251):
            expected = min(momenta[it], 1.0) if it < 250 else 1.0
            assert schedule.retain(clock(it, 10), clock(it + 1, 10)) == pytest.approx(expected, rel=1e-12)
            assert later.retain(clock(it - 1, 10), clock(it, 10)) == pytest.approx(expected, rel=1e-12)
        product = math.prod(momenta[3:24])
        assert schedule.retain(clock(3, 10), clock(24, 10)) == pytest.approx(product, rel=1e-12)
        assert schedule == unbegun and schedule.to_dict() == unbegun.to_dict()


def test_cosine_is_byols() -> None:
    """tau = 1 - (1 - .996) * (cos(pi k / K) + 1) / 2, k = 0 at the first update."""
    schedule = Cosine(0.996, 1, 10_000)
    for k in (1, 77, 5000, 9999, 10_000):
        assert schedule.retain(k - 1, k) == pytest.approx(
            1 - 0.004 * (math.cos(math.pi * k / 10_000) + 1) / 2, rel=1e-15
        )


def test_linear_is_vjepas() -> None:
    """ema: [.998, 1.], 300 epochs of 300 iterations, ipe_scale 1.25, of which the last fifth is never trained."""
    ipe, epochs, scale, ema = 300, 300, 1.25, (0.998, 1.0)
    schedule = Linear(*ema, over="112500ba")
    for i in (1, 2, 299, 45_000, 89_999):
        momentum = ema[0] + i * (ema[1] - ema[0]) / (ipe * epochs * scale)
        assert schedule.retain(i - 1, i) == pytest.approx(momentum, rel=1e-15)
    assert schedule.retain(89_999, 90_000) == pytest.approx(0.9996, rel=1e-15)


def test_half_life_ramp_is_edms() -> None:
    """ema_halflife_kimg=500, ema_rampup_ratio=.05, batches of 512: beta = .5 ** (512 / min(500000, .05 * nimg))."""
    schedule = HalfLife("500000sp", ramp=0.05)
    for n in (1, 2, 20, 1000, 19_531, 19_532, 100_000):  # 10 million images are 19531.25 batches
        nimg = 512 * n
        beta = 0.5 ** (512 / max(min(500_000, nimg * 0.05), 1e-8))
        before, after = Progress(n - 1, nimg - 512, updates=n), Progress(n, nimg, updates=n + 1)
        assert schedule.retain(before, after) == pytest.approx(beta, rel=1e-13)
        assert schedule.retain(nimg - 512, nimg) == pytest.approx(beta, rel=1e-13)  # what lies between is one batch
    assert HalfLife("500000sp", ramp=None) == HalfLife("500000sp")
    assert HalfLife("500000sp").to_dict() == {"kind": "HalfLife", "half_life": "500000sp"}  # as it was written before
    assert repr(HalfLife("500000sp")) == "HalfLife(half_life='500000sp')"


def test_half_life_ramp_is_stylegans() -> None:
    """ema_kimg=10, ema_rampup=.05, batches of 32, whose count is of the images before the batch, as EDM's."""
    for n in (1, 500, 6249, 6250, 6251, 9000):
        beta = 0.5 ** (32 / max(min(10_000, 32 * n * 0.05), 1e-8))
        before, after = Progress(n - 1, 32 * (n - 1), updates=1), Progress(n, 32 * n, updates=2)
        assert HalfLife("10000sp", 0.05).retain(before, after) == pytest.approx(beta, rel=1e-13)


def clock(batches: int, of: int) -> Progress:
    return Progress(batches, 8 * batches, 4096 * batches, batches / of, updates=batches + 1)


@pytest.mark.parametrize(
    ("schedule", "same"),
    [
        (Cosine(0.9, 1, "25ba"), Cosine(0.9, 1, "102400tok")),
        (Cosine(0.9, 1, "25ba"), Cosine(0.9, 1, "2.5ep")),
        (Linear(0.9, 0.99, "25ba"), Linear(0.9, 0.99, "200sp")),
        (HalfLife("50ba", ramp=0.8), HalfLife("204800tok", ramp=0.8)),
        (HalfLife("50ba", ramp=0.8), HalfLife("5ep", ramp=0.8)),
    ],
    ids=repr,
)
def test_a_factor_per_batch_does_not_depend_on_the_unit_nor_on_the_interval(schedule: Schedule, same: Schedule) -> None:
    """One update after k batches decays as k updates after one, also where those are counted in something else."""
    single = [schedule.log_retain(n, n + 1) for n in range(100)]
    for before, after in ((0, 1), (0, 7), (3, 24), (24, 27), (20, 99), (60, 61)):
        expected = pytest.approx(math.fsum(single[before:after]), rel=1e-12)
        assert schedule.log_retain(before, after) == expected
        assert schedule.log_retain(clock(before, 10), clock(after, 10)) == expected
        assert same.log_retain(clock(before, 10), clock(after, 10)) == expected


def test_a_clock_that_stands_still_in_the_schedules_unit() -> None:
    """Batches without tokens stay where the schedule was; tokens of which no batch was counted are those of one."""
    cosine, ramp = Cosine(0.9, 1, "100tok"), HalfLife("100tok", ramp=0.1)
    still, moved = (Progress(3, tokens=50), Progress(5, tokens=50)), (Progress(3, tokens=50), Progress(3, tokens=60))
    assert cosine.retain(*still) == pytest.approx(0.95**2, rel=1e-13)
    assert ramp.retain(*still) == 1
    assert cosine.retain(*moved) == cosine.retain(moved[0], Progress(4, tokens=60)) < 1
    past = (Progress(3, tokens=100), Progress(5, tokens=100))
    assert cosine.retain(*past) == 1


def test_dur_is_resolved_with_the_duration() -> None:
    duration = Time(3000, "ba")
    assert Cosine(0.9, 1, "1dur").resolve(duration) == Cosine(0.9, 1, "3000ba")
    assert Linear(0.9, 1, "0.5dur").resolve(Time(3.0, "ep")) == Linear(0.9, 1, "1.5ep")
    assert Window("0.1dur", "0.5dur").resolve(duration) == Window("300ba", "1500ba")
    assert Window("100ba", "1dur").resolve(duration) == Window("100ba", "3000ba")
    for schedule in EXAMPLES:
        assert schedule.resolve(None) == schedule
    for schedule in (Cosine(0.9, 1, "1dur"), Window("0.1dur"), Window("5ba", "1dur")):
        with pytest.raises(EMAConfigError, match=r"='.*dur' needs max_duration"):
            schedule.resolve(None)
        with pytest.raises(EMAConfigError, match="part of max_duration"):
            schedule.retain(0, 1)
        with pytest.raises(EMAConfigError, match="part of max_duration"):
            schedule.retain(Progress(), Progress(1))
        assert from_dict(schedule.to_dict()) == schedule
    with pytest.raises(EMAConfigError, match="every='3000ba'"):
        Window("4000ba", "1dur").resolve(duration)
    with pytest.raises(EMAConfigError, match="every='3ep'"):
        Window("40ba", "1dur").resolve(Time(3, "ep"))


@pytest.mark.parametrize("value", [1.001, -0.1, math.nan, math.inf, True, "0.9", None])
def test_ends_of_a_ramp_are_fractions(value: Any) -> None:
    for kind in (Cosine, Linear):
        with pytest.raises(EMAConfigError, match=r"start=.*allowed is a number in \[0, 1\]"):
            kind(value, 1, "10ba")
        with pytest.raises(EMAConfigError, match=r"end=.*allowed is a number in \[0, 1\]"):
            kind(0.9, value, "10ba")
    with pytest.raises(EMAConfigError, match="ramp="):
        HalfLife("10ba", ramp=0 if value in (None, 1.001) else value)


@pytest.mark.parametrize("value", ["0ba", "2dur", "5min", "", 1.5, None, True])
def test_over_and_length_are_times(value: Any) -> None:
    for option, make in (("over", lambda: Linear(0.9, 1, value)), ("length", lambda: Window(value))):
        with pytest.raises(EMAConfigError, match=f"{option}="):
            make()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 10, "every": 9}, "every=9: allowed is a time in ba, as length='10ba', and not less than it"),
        ({"length": "10ba", "every": "2ep"}, "every='2ep': allowed is a time in ba"),
        ({"length": "0.2dur", "every": "0.1dur"}, "every='0.1dur': allowed is a time in dur"),
        ({"length": 10, "every": 0}, "every=0: not positive"),
        ({"length": 10, "shape": "square"}, "shape='square': allowed are 'uniform', 'linear', 'sqrt', 'cosine'"),
        ({"length": 10, "shape": ["sqrt"]}, "shape="),
    ],
)
def test_windows_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(EMAConfigError) as caught:
        Window(**options)
    assert says in str(caught.value)


def test_uniform_is_the_plain_mean() -> None:
    values, mean = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], 3.0
    for n, value in enumerate(values[1:], start=1):
        mean += Uniform().weight(n - 1, n) * (value - mean)
        assert Uniform().weight(Progress(updates=n), Progress(10 * n, updates=n + 1)) == Uniform().weight(n - 1, n)
    assert mean == pytest.approx(sum(values) / len(values), rel=1e-15)
    assert Uniform().retain(Progress(), Progress(updates=1)) == 0


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_round_trip(schedule: Schedule) -> None:
    data = json.loads(json.dumps(schedule.to_dict()))
    assert from_dict(data) == schedule
    assert from_dict(data).retain(3, 5) == schedule.retain(3, 5)
    assert data["kind"] == type(schedule).__name__


def test_equal_options_are_equal_schedules() -> None:
    assert HalfLife("1_000ba") == HalfLife("1e3ba") == HalfLife(1000)  # type: ignore[arg-type]
    assert ConstantDecay(0.5) != ConstantDecay(0.6)
    assert ConstantDecay(0.5).to_dict() != Smoothing(0.5).to_dict()
    assert len({PowerFunction(gamma=7), PowerFunction(gamma=7.0), PowerFunction(sigma_rel=0.1)}) == 2


@pytest.mark.parametrize("value", [1, 1.5, -0.1, math.nan, math.inf, True, False, "0.9", None, 10**400, 1j])
def test_decay_is_a_number_below_one(value: Any) -> None:
    for kind in (ConstantDecay, Warmup, NumUpdatesWarmup, Debiased, lambda decay: Ramp(decay, 10)):
        with pytest.raises(EMAConfigError, match=r"decay=.*allowed is a number in \[0, 1\)"):
            kind(value)
    with pytest.raises(EMAConfigError, match=r"smoothing=.*\[0, 1\)"):
        Smoothing(value)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, True, "1", None])
def test_positive_options(value: Any) -> None:
    with pytest.raises(EMAConfigError, match="inv_gamma="):
        Warmup(0.9, inv_gamma=value)
    with pytest.raises(EMAConfigError, match="power="):
        Warmup(0.9, power=value)
    with pytest.raises(EMAConfigError, match="fraction="):
        HalfLifeFraction(value)
    with pytest.raises(EMAConfigError, match="tau="):
        Ramp(0.9, value)


@pytest.mark.parametrize("value", [-0.1, 0.91, 1, math.nan, True, "0.1"])
def test_the_least_decay_is_not_more_than_the_last(value: Any) -> None:
    with pytest.raises(EMAConfigError, match="min_decay="):
        Warmup(0.9, min_decay=value)
    assert Warmup(0.9).to_dict() == {"kind": "Warmup", "decay": 0.9, "inv_gamma": 1.0, "power": 2 / 3}  # as before


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 0.289, 1, math.nan, True, "0.1", 5e-324])
def test_sigma_rel_range(value: Any) -> None:
    with pytest.raises(EMAConfigError, match=r"sigma_rel=.*at most 12"):
        PowerFunction(sigma_rel=value)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, True, "7"])
def test_gamma_range(value: Any) -> None:
    with pytest.raises(EMAConfigError, match=r"gamma=.*0 or more"):
        PowerFunction(gamma=value)


def test_power_function_takes_one_option() -> None:
    for options in ({}, {"sigma_rel": 0.1, "gamma": 7.0}):
        with pytest.raises(EMAConfigError, match="exactly one"):
            PowerFunction(**options)


@pytest.mark.parametrize("value", ["0ba", "-5ba", "0.1dur", "5min", "", 1.5, True, None])
def test_half_life_refuses(value: Any) -> None:
    with pytest.raises(EMAConfigError, match="half_life="):
        HalfLife(value)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"kind": "Cosine"},
        {"kind": "Cosine", "start": 0.9, "end": 1, "over": "10ba", "first": 3},
        {"kind": "HalfLife", "half_life": "10ba", "time": 3},
        {"kind": "Square"},
        {"kind": "Window", "length": "10ba", "origin": 3},
        {"kind": ["ConstantDecay"]},
        {"kind": "ConstantDecay"},
        {"kind": "ConstantDecay", "decay": 2},
        {"kind": "ConstantDecay", "decay": 0.9, "power": 1},
        {"kind": "PowerFunction", "exponent": 7},
        {"kind": "Uniform", 3: 4},
    ],
)
def test_from_dict_refuses(data: Any) -> None:
    with pytest.raises(EMAConfigError):
        from_dict(data)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_moments_are_checked(schedule: Schedule) -> None:
    with pytest.raises(EMAConfigError, match="not earlier"):
        schedule.retain(2, 1)
    for bad in (-1, math.nan, math.inf, "3", True, None):
        with pytest.raises(EMAConfigError, match="before="):
            schedule.retain(bad, 3)  # type: ignore[arg-type]
