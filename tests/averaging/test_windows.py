"""Schedules that begin, stand still or end: windows, teachers, ramps. In training, against dense float64 averages."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.errors import EMAConfigError
from dist_ema.schedules import Cosine, HalfLife, Linear, Schedule, Window

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

#: What the learning rate has come down to when a part of the window has gone.
DECAYS: dict[str, Callable[[float], float]] = {
    "uniform": lambda u: 1 - u,
    "linear": lambda u: 1 - u,
    "sqrt": lambda u: 1 - math.sqrt(u),
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
}


def dense_window(
    seen: list[tuple[int, float]], interval: int, length: int, every: int, shape: str = "uniform"
) -> float:
    """The mean over the last window from which anything was seen, from moments of the clock and values at updates."""
    inside = [clock for clock, _ in seen if (clock - 1) % every >= every - length]
    if not inside:
        return seen[0][1]
    end = -(-inside[-1] // every) * every
    begin, total, weights = end - length, 0.0, 0.0
    before = max(begin, seen[0][0] - interval)
    for clock, value in seen:
        if begin < clock <= end:
            weight = DECAYS[shape]((before - begin) / length) - DECAYS[shape]((clock - begin) / length)
            total, weights, before = total + weight * value, weights + weight, clock
    return total / weights


def one_number(**options: Any) -> tuple[nn.Module, ShardedEMA]:
    model = nn.Linear(1, 1, bias=False)
    return model, ShardedEMA(model, dtype=torch.float64, **options)


def value(step: int) -> float:
    """Weights after this step of training."""
    return math.sin(step) + 0.01 * step


def averaged(ema: ShardedEMA, name: str | None = None) -> float:
    return ema.full_state_dict(name)["weight"].item()


@pytest.mark.parametrize(("length", "every"), [(3, 10), (10, 10), (1, 4), (7, 20)])
@pytest.mark.parametrize(("start", "interval"), [(0, 1), (6, 1), (20, 1), (0, 2), (8, 3)])
def test_window_is_the_mean_over_the_end_of_each_period(length: int, every: int, start: int, interval: int) -> None:
    """A window that is off by one, mixes in what lies outside, or hangs on to what was there before it."""
    windows = {shape: Window(length, every, shape) for shape in DECAYS}
    model, ema = one_number(averages=windows, ema_start=start, update_interval=interval)
    seen = []
    for step in range(1, 46):
        nn.init.constant_(model.weight, value(step))
        if ema.update():
            seen.append((step, model.weight.item()))
            for shape in DECAYS:
                expected = dense_window(seen, interval, length, every, shape)
                assert averaged(ema, shape) == pytest.approx(expected, rel=1e-13), (step, shape)


def test_window_at_the_end_of_the_training() -> None:
    """``Window(".1dur")`` from ``ema_start=".9dur"``: an anchor at the first copy would start anew in the last step."""
    for start in ("0ba", "0.9dur"):
        model, ema = one_number(schedule=Window("0.1dur", "1dur"), ema_start=start, max_duration="50ba")
        for step in range(1, 51):
            nn.init.constant_(model.weight, value(step))
            ema.update()
        last = [torch.tensor(value(step)).item() for step in range(46 if start == "0ba" else 45, 51)]
        # With the start at .9 the first copy, which was made at 45, is all there is until the window begins.
        assert averaged(ema) == pytest.approx(sum(last[-5:]) / 5, rel=1e-13)


def test_window_in_tokens_weighs_by_tokens() -> None:
    """Batches of other sizes: the mean is that over tokens, as one update for many batches decays as many updates."""
    model, ema = one_number(schedule=Window("100tok", "200tok"))
    seen, clock = [], 0
    for step, tokens in enumerate([10, 30, 20, 40, 10, 60, 30, 40, 60, 20, 80, 70, 30, 10]):
        clock += tokens
        nn.init.constant_(model.weight, value(step))
        ema.update(tokens=tokens)
        seen.append((clock, model.weight.item()))
        assert averaged(ema) == pytest.approx(dense_window(seen, 10, 100, 200), rel=1e-13), clock


def test_window_in_epochs_reaches_its_bounds_in_spite_of_rounding() -> None:
    """Ten tenths of an epoch are less than one: the period's last update would be the next one's first."""
    model, ema = one_number(schedule=Window("0.3ep", "1ep"))
    seen = []
    for step in range(1, 41):
        nn.init.constant_(model.weight, value(step))
        ema.update(epochs=0.1)
        seen.append((step, model.weight.item()))
        assert averaged(ema) == pytest.approx(dense_window(seen, 1, 3, 10), rel=1e-12), step


def test_overlapping_windows_beside_others() -> None:
    averages = {"short": Window(3, 12), "long": Window(9, 12, "sqrt"), "always": Window(12), "decay": 0.5}
    model, ema = one_number(averages=averages)
    seen, decayed = [], None
    for step in range(1, 41):
        nn.init.constant_(model.weight, value(step))
        ema.update()
        live = model.weight.item()
        seen.append((step, live))
        decayed = live if decayed is None else (decayed + live) / 2
        assert averaged(ema, "short") == pytest.approx(dense_window(seen, 1, 3, 12), rel=1e-13)
        assert averaged(ema, "long") == pytest.approx(dense_window(seen, 1, 9, 12, "sqrt"), rel=1e-13)
        assert averaged(ema, "always") == pytest.approx(dense_window(seen, 1, 12, 12), rel=1e-13)
        assert averaged(ema, "decay") == pytest.approx(decayed, rel=1e-13)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_window_stands_still_with_its_buffers_until_the_next_one(offload: str | None) -> None:
    """Weights of one moment with running statistics of another."""
    model = nn.BatchNorm1d(1)
    ema = ShardedEMA(model, schedule=Window(2, 6), offload=offload)
    states = []
    for step in range(1, 12):
        with torch.no_grad():
            model.weight.fill_(value(step))
            model.running_mean.fill_(step)
        assert ema.update()
        states.append({name: tensor.item() for name, tensor in ema.full_state_dict().items()})
    assert states[5] == states[6] == states[9] != states[10]
    assert (states[5]["running_mean"], states[10]["running_mean"]) == (6, 11)
    assert ema.metrics()["ema/decay"] == 0  # the update before started anew
    ema.close()


def test_window_starts_anew_after_reset() -> None:
    """The copy that follows is one of the window's, and stands for one interval."""
    model, ema = one_number(schedule=Window(5, 10))
    seen: list[tuple[int, float]] = []
    for step in range(1, 31):
        if step == 18:
            ema.reset()
            seen = []
        nn.init.constant_(model.weight, value(step))
        ema.update()
        seen.append((step, model.weight.item()))
        assert averaged(ema) == pytest.approx(dense_window(seen, 1, 5, 10), rel=1e-13), step


def test_what_was_not_finite_when_the_window_began_is_left_as_it_was() -> None:
    model = nn.Linear(2, 1, bias=False)
    ema = ShardedEMA(model, schedule=Window(2, 4))
    for step in range(1, 9):
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[float(step), math.nan if step == 7 else float(step)]]))
        ema.update()
    # Steps 7 and 8; where 7 was no number, the mean of the window before, 3.5, takes its place.
    assert ema.full_state_dict()["weight"].tolist() == [[7.5, (3.5 + 8) / 2]]
    assert ema.metrics()["ema/skipped_elements"] == 1


@given(
    st.sampled_from([Window(7), Window(7, 20), Window(5, 9, "sqrt"), Window("5ep", "9ep", "cosine")]),
    st.lists(st.integers(0, 60), min_size=3, max_size=3).map(sorted),
)
def test_fractions_compose_inside_of_a_window(schedule: Window, at: list[int]) -> None:
    """Between windows nothing is lost, at a window's first update everything; inside of one, updates can be put off."""
    a, b, c = at
    first = 0 if schedule.unit == "ep" else 1
    length, every = int(schedule.time.value), int(schedule.period.value)
    periods = {-(-(moment + first) // every) for moment in at}
    inside = [(moment + first - 1) % every >= every - length for moment in at]
    if all(inside) and len(periods) == 1:
        parts = schedule.log_retain(a, b) + schedule.log_retain(b, c)
        assert schedule.log_retain(a, c) == pytest.approx(parts, rel=1e-11, abs=1e-13)
        if a < c and a > 0:
            assert 0 < schedule.retain(a, c) < 1
    elif a < c:
        assert schedule.retain(a, c) == (0 if inside[2] else 1)


# Teachers.


class Dense:
    """The average by definition: one blend per update, with decays that the test gives."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def update(self, model: nn.Module, decay: float) -> None:
        for name, parameter in model.named_parameters():
            live = parameter.detach().double()
            old = self.average.get(name)
            self.average[name] = live.clone() if old is None else decay * old + (1 - decay) * live

    def check(self, state: dict[str, Tensor]) -> None:
        for name, expected in self.average.items():
            torch.testing.assert_close(state[name].double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("schedule", "decay"),
    [
        (Cosine(0.9, 1.0, "1dur"), lambda n: 1 - 0.1 * (math.cos(math.pi * min(n / 12, 1)) + 1) / 2),
        (Cosine(0.9, 1.0, "120sp"), lambda n: 1 - 0.1 * (math.cos(math.pi * min(n / 12, 1)) + 1) / 2),
        (Linear(0.5, 1.0, "1dur"), lambda n: min(0.5 + 0.5 * n / 12, 1)),
        (HalfLife("40sp", ramp=0.5), lambda n: 0.5 ** (10 / max(min(40, 5 * n), 1e-8))),
    ],
    ids=["cosine", "cosine-in-samples", "linear", "ramp"],
)
def test_teacher_follows_its_published_decays(schedule: Schedule, decay: Callable[[int], float]) -> None:
    """A real optimizer, and updates that are counted from the first copy, which is the published step 0."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
    ema, dense = ShardedEMA(student, schedule=schedule, max_duration=12), Dense()
    for n in range(16):
        optimizer.zero_grad()
        student(torch.randn(10, 6)).square().mean().backward()
        optimizer.step()
        ema.update(samples=10)
        dense.update(student, decay(n))
        dense.check(ema.full_state_dict())


def test_dur_without_a_duration_is_refused_before_training() -> None:
    for options in ({"schedule": Cosine(0.9, 1, "1dur")}, {"averages": {"a": 0.9, "b": Window("0.1dur", "1dur")}}):
        with pytest.raises(EMAConfigError, match=r"='.*dur' needs max_duration, such as '10000ba'"):
            ShardedEMA(nn.Linear(2, 2), **options)


def test_attach_refuses_what_it_cannot_count() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for schedule in (Cosine(0.9, 1, "1dur"), HalfLife("5ep", ramp=0.1), Window("1ep")):
        with pytest.raises(EMAConfigError, match="count in ep"):
            ShardedEMA(model, schedule=schedule, max_duration="5ep").attach(optimizer)
    ShardedEMA(model, schedule=Cosine(0.9, 1, "1dur"), max_duration="500ba").attach(optimizer)


def test_standing_still_on_purpose_is_no_mistake_to_warn_of(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    with caplog.at_level(logging.WARNING, "dist_ema"):
        ema = ShardedEMA(model, averages={"a": Window("5tok", "100tok"), "b": Linear(0.9, 1, "10tok")})
        for _ in range(5):
            ema.update(tokens=10)
        assert not caplog.records
        ema.update()
    assert "counts in tok" in caplog.text


# Interrupted inside of a window.

AVERAGES = {
    "window": Window(5, 8),
    "shaped": Window("80sp", "80sp", "cosine"),
    "teacher": Cosine(0.5, 1.0, "1dur"),
    "ramp": HalfLife("50sp", ramp=0.3),
}
STEPS, STOP = 18, 13  # the window of steps 12 to 16 is open


@torch.no_grad()
def _train(ema: ShardedEMA, steps: range) -> None:
    """Multiplies every trained element by the same number: the same bits on any shard."""
    for step in steps:
        for share, source in zip(ema._average.shares, ema._average.engine.sources(), strict=True):
            if share.spec.kind == "parameter":
                source.mul_(1.0 + 0.25 * math.sin(step))
        ema._average.engine.publish()
        ema.update(samples=10)


def _make(case: str) -> ShardedEMA:
    return ShardedEMA(CASES[case].wrap(build(scalar=False, hidden=12)), averages=AVERAGES, max_duration=20)


def _reference() -> dict[str, float]:
    """How the average of each relates to the first weights, by the definitions, in float64."""
    factors = [1.0]
    for step in range(1, STEPS + 1):
        factors.append(factors[-1] * (1.0 + 0.25 * math.sin(step)))
    seen = [(step, factors[step]) for step in range(1, STEPS + 1)]
    teacher, ramp = factors[1], factors[1]
    for n in range(1, STEPS):
        m = 1 - 0.5 * (math.cos(math.pi * n / 20) + 1) / 2
        teacher = m * teacher + (1 - m) * factors[n + 1]
        m = 0.5 ** (10 / min(50, 0.3 * 10 * n))
        ramp = m * ramp + (1 - m) * factors[n + 1]
    windows = {"window": dense_window(seen, 1, 5, 8), "shaped": dense_window(seen, 1, 8, 8, "cosine")}
    return windows | {"teacher": teacher, "ramp": ramp}


def leave(case: str, path: Path) -> None:
    """A run that is killed after a checkpoint: of what it averaged afterwards, nothing is left. Collective."""
    ema = _make(case)
    _train(ema, range(1, STOP + 1))
    ema.save(path)
    _train(ema, range(STOP + 1, STEPS))


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), [("plain", 1), ("fsdp2", 3), ("hsdp", 4), ("fsdp1-full", 2)])
def test_resumed_inside_a_window(case: str, rank: int, world_size: int, tmp_path: Path, killed: Path) -> None:
    """Where a window began is not on disk as such, and neither are ranks of the run before: the clock says it all."""
    ema = _make(case)
    _train(ema, range(1, STOP + 1))  # the weights come back by the trainer's checkpoint
    ema.reset()
    ema.load(killed)
    _train(ema, range(STOP + 1, STEPS + 1))
    expected, first = _reference(), dict(build(scalar=False, hidden=12).named_parameters())
    whole = _make("plain")
    _train(whole, range(1, STEPS + 1))
    for name in AVERAGES:
        assert ema.fingerprint(name) == whole.fingerprint(name), name  # as without interruption, bit for bit
        state = ema.full_state_dict(name)
        if rank == 0:
            for key, parameter in first.items():
                if parameter.requires_grad:
                    dense = parameter.detach().double() * expected[name]
                    torch.testing.assert_close(state[key].double(), dense, rtol=4e-6, atol=1e-7)


@pytest.fixture(scope="session")
def _shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture
def killed(_shelf: Path, on_ranks: Callable[..., None]) -> Path:
    path = _shelf / "ema"
    if not path.exists():
        on_ranks(leave, 2, case="fsdp2", path=path)
        manifest = verify_checkpoint(path)
        assert manifest.schedules["teacher"] == Cosine(0.5, 1.0, "20ba")
    return path


@pytest.mark.world_size(2)
def test_resumed_inside_a_window_by_dcp(rank: int) -> None:
    """state_dict() and load_state_dict() carry the clock too."""
    ema = _make("fsdp2")
    _train(ema, range(1, STOP + 1))
    state = copy.deepcopy(ema.state_dict())
    _train(ema, range(STOP + 1, STEPS + 1))
    expected = [ema.fingerprint(name) for name in AVERAGES]
    again = _make("fsdp2")
    _train(again, range(1, STOP + 1))
    again.reset()
    again.load_state_dict(state)
    _train(again, range(STOP + 1, STEPS + 1))
    assert [again.fingerprint(name) for name in AVERAGES] == expected
    dist.barrier()


@pytest.mark.parametrize(
    "schedule", [HalfLife("40sp", ramp=0.5), Cosine(0.5, 1.0, "400sp"), Linear(0.5, 1.0, "400sp")], ids=repr
)
def test_who_counts_samples_and_no_batches_has_an_average_too(schedule: Schedule) -> None:
    """One that stood still for ever, without a word, where a plain half life moves."""
    found = []
    for batches in (0, 1):
        model, ema = one_number(schedule=schedule, update_interval="10sp")
        for step in range(8):
            nn.init.constant_(model.weight, value(step))
            assert ema.update(batches=batches, samples=10)
        found.append(averaged(ema))
    assert found[0] == found[1] != value(0)
