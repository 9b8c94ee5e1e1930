"""Time strings and the training clock."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.clock import CLOCK_UNITS, Progress, Time, crossed, reached

pytestmark = pytest.mark.core

settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1000ba", 1000, "ba"),
        ("10000000tok", 10_000_000, "tok"),
        ("123456789012345678tok", 123456789012345678, "tok"),
        ("50000sp", 50_000, "sp"),
        ("2ep", 2.0, "ep"),
        (".25ep", 0.25, "ep"),
        ("0.1dur", 0.1, "dur"),
        ("1dur", 1.0, "dur"),
        (7, 7, "ba"),
        ("  10ba\n", 10, "ba"),
        ("1_000ba", 1000, "ba"),
        ("1e3ba", 1000, "ba"),
        ("1.5e3ba", 1500, "ba"),
        ("10.0ba", 10, "ba"),
        ("+3BA", 3, "ba"),
        (Time(3, "sp"), 3, "sp"),
    ],
)
def test_parse(text: object, value: float, unit: str) -> None:
    time = Time.parse(text, option="half_life")
    assert (time.value, time.unit) == (value, unit)
    assert isinstance(time.value, float if unit in ("ep", "dur") else int)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "ba",
        "10",
        "-5ba",
        -5,
        "0ba",
        0,
        "0.0ep",
        "1e-400ep",
        "1.5ba",
        "1e-3tok",
        "nanba",
        "infba",
        "inf",
        "1e999ba",
        "5min",
        "10 ba",
        "1__0ba",
        "10ba 3ep",
        "1e99999999999ba",
        "1.2.3ep",
        "1.5dur",
        "\u0661ba",
        "10ba;",
        True,
        1.0,
        10.5,
        None,
        [],
        b"10ba",
        float("nan"),
        10**400,
        "9" * 19 + "tok",
    ],
)
def test_parse_names_the_option_the_value_and_what_is_allowed(text: object) -> None:
    with pytest.raises(EMAConfigError) as caught:
        Time.parse(text, option="update_interval")
    message = str(caught.value)
    assert message.startswith(f"update_interval={text!r}: ")
    assert "allowed is a positive number with a unit of ba, sp, tok, ep, dur" in message


@pytest.mark.parametrize("text", ["0ba", 0, "0.0dur", "0ep", "-0ba"])
def test_zero_where_it_is_allowed(text: object) -> None:
    assert Time.parse(text, option="ema_start", positive=False).value == 0


def test_negative_is_never_allowed() -> None:
    with pytest.raises(EMAConfigError, match="non-negative"):
        Time.parse("-1ba", option="ema_start", positive=False)


def test_units_of_an_option() -> None:
    with pytest.raises(EMAConfigError, match=r"half_life='0.1dur': unit 'dur' is not allowed here.*ba, sp, tok, ep"):
        Time.parse("0.1dur", option="half_life", units=CLOCK_UNITS)
    with pytest.raises(EMAConfigError, match="such as '1ep'"):
        Time.parse(3, option="every", units=("ep",))


@given(st.one_of(st.integers(1, 10**18 - 1), st.floats(1e-300, 1e17)), st.sampled_from(["ba", "sp", "tok", "ep"]))
def test_str_is_read_back(value: float, unit: str) -> None:
    time = Time(float(value) if unit == "ep" else int(value) or 1, unit)
    assert Time.parse(str(time), option="half_life") == time


@pytest.mark.parametrize(
    ("text", "duration", "expected"),
    [
        ("0.1dur", "10000ba", Time(1000, "ba")),
        ("0.7dur", "10ba", Time(7, "ba")),  # .7 * 10 > 7 in floating point
        ("0.1dur", "1005ba", Time(101, "ba")),
        ("0.0dur", "3ep", Time(0.0, "ep")),
        ("0.5dur", "3ep", Time(1.5, "ep")),
        ("1dur", "30tok", Time(30, "tok")),
        ("500ba", "3ep", Time(500, "ba")),
    ],
)
def test_resolve(text: str, duration: str, expected: Time) -> None:
    maximum = Time.parse(duration, option="max_duration", units=CLOCK_UNITS)
    assert Time.parse(text, option="ema_start", positive=False).resolve(maximum) == expected


def test_resolve_without_a_duration() -> None:
    with pytest.raises(EMAConfigError, match=r"ema_start='0.1dur' needs max_duration"):
        Time(0.1, "dur").resolve(None, option="ema_start")
    assert Time(3, "ba").resolve(None) == Time(3, "ba")


def test_resolve_against_a_fraction() -> None:
    with pytest.raises(EMAConfigError, match="max_duration='1dur'"):
        Time(0.1, "dur").resolve(Time(1.0, "dur"))


def test_advance_since_and_value() -> None:
    start = Progress().advance(batches=3, samples=30, tokens=300, epochs=0.5)
    now = start.advance(samples=10, tokens=100, epochs=0.25, updates=1).advance(batches=2, updates=1)
    assert now == Progress(6, 40, 400, 0.75, 2)
    assert now.since(start) == Progress(3, 10, 100, 0.25, 2)
    assert [now.value(unit) for unit in CLOCK_UNITS] == [6, 40, 400, 0.75]
    with pytest.raises(EMAConfigError, match="'dur'"):
        now.value("dur")


@pytest.mark.parametrize(
    "bad",
    [
        {"batches": -1},
        {"batches": 1.0},
        {"batches": True},
        {"samples": "3"},
        {"tokens": None},
        {"updates": -1},
        {"epochs": -0.1},
        {"epochs": float("nan")},
        {"epochs": float("inf")},
        {"epochs": "1"},
    ],
)
def test_advance_refuses(bad: dict[str, Any]) -> None:
    with pytest.raises(EMAConfigError, match=next(iter(bad))):
        Progress().advance(**bad)


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 20))
def test_crossed_counts_every_multiple_once_and_agrees_with_the_remainder(steps: list[int], interval: int) -> None:
    now, hits = Progress(), 0
    for batches in steps:
        after = now.advance(batches=batches)
        hit = crossed(now, after, Time(interval, "ba"))
        assert hit == any(n % interval == 0 for n in range(now.batches + 1, after.batches + 1))
        if batches == 1:
            assert hit == (after.batches % interval == 0)
        hits += hit
        now = after
    assert hits <= now.batches // interval


@given(st.integers(1, 300), st.integers(1, 6))
def test_crossed_sees_the_end_of_every_epoch_made_of_fractions(per_epoch: int, epochs: int) -> None:
    now, hits = Progress(), []
    for step in range(1, per_epoch * epochs + 1):
        after = now.advance(epochs=1 / per_epoch)
        if crossed(now, after, Time(1.0, "ep")):
            hits.append(step)
        now = after
    assert hits == [per_epoch * epoch for epoch in range(1, epochs + 1)]


def test_crossed_with_a_fractional_interval() -> None:
    now, hits = Progress(), 0
    for _ in range(100):
        after = now.advance(epochs=0.01)
        hits += crossed(now, after, Time(0.1, "ep"))
        now = after
    assert hits == 10


def test_crossed_needs_a_resolved_interval() -> None:
    with pytest.raises(EMAConfigError, match="'dur'"):
        crossed(Progress(), Progress(1), Time(0.1, "dur"))


def test_reached() -> None:
    assert reached(Progress(), Time(0, "ba"))
    assert not reached(Progress(499), Time(500, "ba"))
    assert reached(Progress(500), Time(500, "ba"))
    assert reached(Progress(epochs=sum([0.1] * 10)), Time(1.0, "ep"))
    assert not reached(Progress(epochs=0.999), Time(1.0, "ep"))
