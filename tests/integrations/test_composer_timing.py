"""Composer's way of timing an average, without Composer."""

from __future__ import annotations

import pytest

from dist_ema.errors import EMAConfigError
from dist_ema.integrations.composer_timing import HALF_LIFE, ComposerTiming
from dist_ema.schedules.clock import Progress


def _events(pace: ComposerTiming, batches: int) -> list[int]:
    """The batches that update, of a run of so many."""
    due: list[int] = []
    for batch in range(1, batches + 1):
        before, now = Progress(batches=batch - 1), Progress(batches=batch)
        if pace.due(before, now, bool(due), batch / batches):
            due.append(batch)
    return due


@pytest.mark.parametrize("interval", [1, 3, 7])
@pytest.mark.parametrize("start", [0, 1, 6, 20])
def test_the_first_event_copies_off_the_interval_too(interval: int, start: int) -> None:
    pace = ComposerTiming.parse("10ba", None, f"{start}ba", f"{interval}ba", {})
    first = max(start, 1)
    expected = [first, *(batch for batch in range(first + 1, 31) if batch % interval == 0)]
    assert _events(pace, 30) == expected


def test_each_update_decays_by_the_full_interval() -> None:
    pace = ComposerTiming.parse("10ba", None, "3ba", "4ba", {})
    assert pace.options["smoothing"] == pytest.approx(0.5**0.4)
    assert ComposerTiming.parse("1ep", None, "0ba", None, {}).options["smoothing"] == 0.5
    assert ComposerTiming.parse("100sp", None, "0ba", None, {}).options["half_life"] == "100sp"


def test_the_start_in_dur_is_the_trainers() -> None:
    assert _events(ComposerTiming.parse(HALF_LIFE, None, "0.5dur", None, {}), 6) == [3, 4, 5, 6]


def test_the_default_half_life_gives_way() -> None:
    assert ComposerTiming.parse(HALF_LIFE, 0.9, "0ba", None, {}).options["smoothing"] == 0.9
    assert ComposerTiming.parse(HALF_LIFE, None, "0ba", None, {"decay": 0.9}).options["half_life"] is None
    with pytest.raises(EMAConfigError, match="give exactly one of"):
        ComposerTiming.parse("10ba", 0.9, "0ba", None, {})
