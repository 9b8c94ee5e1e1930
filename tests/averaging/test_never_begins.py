"""An average that never begins, or begins with NaN, is logged. Its users evaluate the live model and do not know it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_ema import ShardedEMA
from dist_ema.core.track import Track
from dist_ema.integrations.composer_timing import ComposerTiming
from dist_ema.options import Options
from dist_ema.schedules.clock import Progress, Time
from dist_ema.schedules.duration import what_is_missed


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def updates_of(start: str, interval: str, batches: int, per_epoch: int) -> int:
    """Counts them with the clock itself, batch by batch."""
    track = Track(Options.parse(decay=0.5, ema_start=start, update_interval=interval))
    updates = 0
    for batch in range(1, batches + 1):
        now = Progress(batches=batch, epochs=batch / per_epoch)
        updates += track.is_due(now)
        track.training = now
    return updates


@pytest.mark.parametrize("start", ["0ba", "3ba", "5ba", "6ba", "7ba", "0.5ep", "1ep", "2ep", "3ep"])
@pytest.mark.parametrize("interval", ["1ba", "2ba", "4ba", "6ba", "7ba", "0.5ep", "1ep", "2ep", "3ep"])
def test_what_is_said_is_what_the_clock_does(start: str, interval: str) -> None:
    """Six batches of two epochs."""
    updates = updates_of(start, interval, 6, 3)
    said = what_is_missed(
        Time.parse(start, option="x", positive=False), Time.parse(interval, option="x"), {"ba": 6, "ep": 2}
    )
    if updates > 1:
        assert said is None
    else:
        assert said is not None and ("no average" in said) == (updates == 0), said


@pytest.mark.parametrize(
    ("start", "interval", "said"),
    [
        ("0ba", "1ba", None),
        ("0ba", "5ba", None),
        ("0ba", "7ba", "never move"),
        ("5ba", "1ba", None),
        ("6ba", "1ba", "never move"),
        ("7ba", "1ba", "no average"),
        ("0.5dur", "1ba", None),
        ("1dur", "1ba", "never move"),
        ("3ep", "1ba", "no average"),
    ],
)
def test_composers_way_of_timing_copies_at_the_start(start: str, interval: str, said: str | None) -> None:
    pace = ComposerTiming.parse(None, 0.5, start, interval, {})
    found = pace.what_is_missed("6ba", 3)
    assert (found is None) if said is None else said in str(found)


@pytest.mark.parametrize(
    "options",
    [
        {"ema_start": "10ep", "max_duration": "4ep"},
        {"update_interval": "10ep", "max_duration": "4ep"},
        {"ema_start": "5ba", "update_interval": "4ba", "max_duration": "6ba"},
        {"ema_start": "200tok", "max_duration": "100tok"},
        {"ema_start": "0.9dur", "update_interval": "0.4dur", "max_duration": "10ba"},
    ],
)
def test_the_constructor_says_it_where_the_duration_is_known(
    options: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), half_life="1ep", **options)
    (said,) = warnings_of(caplog)
    assert "no average will be made" in said
    ema.expect(batches=1)
    assert not warnings_of(caplog), "once"


@pytest.mark.parametrize(
    "options", [{}, {"ema_start": "10ep"}, {"ema_start": "0.1dur", "max_duration": "10ba"}, {"max_duration": "1ep"}]
)
def test_nothing_is_said_where_nothing_is_wrong(options: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    ema = ShardedEMA(nn.Linear(2, 2), half_life="1ep", **options)
    ema.expect(samples=100)
    assert not warnings_of(caplog)


def test_save_and_export_say_that_they_write_live_weights(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Once each: a run saves many times before a late start."""
    ema = ShardedEMA(nn.Linear(2, 2), decay=0.5, ema_start="3ba")
    ema.update()
    for number in range(2):
        ema.save(tmp_path / "c", block=bool(number))
        ema.wait()
        ema.export(tmp_path / f"{number}")
    saved, exported = warnings_of(caplog)
    assert "save()" in saved and "ema_start='3ba'" in saved and "trained so far: 1ba" in saved
    assert "export()" in exported
    ema.update()
    ema.update()
    ema.save(tmp_path / "c")
    ema.export(tmp_path / "2")
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    "options", [{}, {"offload": "cpu"}, {"skip_nonfinite": False}, {"dtype": torch.bfloat16}], ids=str
)
def test_nan_weights_at_the_first_copy_are_logged_once(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Without it the first sign is an evaluation of NaN, long after what has caused it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
        model[1].bias[1] = math.inf
    ema = ShardedEMA(model, decay=0.5, **options)
    for _ in range(3):
        ema.update()
    ema.wait()
    ema.metrics()
    (said,) = warnings_of(caplog)
    assert "2 elements" in said and "'0.weight' and 1 more" in said
    assert ("stay NaN or Inf" in said) == ("skip_nonfinite" in options)
    ema.reset()
    ema.update()
    ema.wait()
    assert len(warnings_of(caplog)) == 1, "a new average begins"


def test_good_weights_and_nan_later_are_not_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        model.weight.fill_(math.nan)
    ema.update()
    ema.save(tmp_path / "c")
    other = ShardedEMA(model, decay=0.5)
    other.load(tmp_path / "c")
    assert other.metrics()["ema/skipped_elements"] == 9
    assert not warnings_of(caplog)


def test_counts_on_an_accelerator_are_read_with_other_numbers_of_it(caplog: pytest.LogCaptureFixture) -> None:
    """An update must not wait for the device, so ``metrics()`` and ``save()`` tell it. The CPU plays it."""
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight[1, 1] = math.nan
    ema = ShardedEMA(model, decay=0.5)
    shadow = ema._average.shadow
    report, shadow.report_nonfinite = shadow.report_nonfinite, lambda wait: report(wait) if wait else None  # type: ignore[method-assign]
    ema.update()
    ema.update()
    assert not warnings_of(caplog)
    ema.metrics()
    ema.metrics()
    (said,) = warnings_of(caplog)
    assert "1 elements" in said
