"""How much each past step weighs: against averages of unit vectors, one per step, that were updated one by one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dist_ema.cli import main
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
)
from dist_ema.schedules.clock import Progress, Time

EXAMPLES = [
    ConstantDecay(0.0),
    ConstantDecay(0.9),
    Cosine(0.9, 1, "50ba"),
    Cosine(0.0, 1.0, "2ep"),
    Cosine(0.5, 1.0, "60ba").begun(Progress(), Time(1, "ba")),
    Debiased(0.9),
    HalfLife("10ba"),
    HalfLife("500sp", ramp=0.05),
    HalfLifeFraction(0.05),
    Linear(0.9, 1, 100),
    NumUpdatesWarmup(0.9),
    PowerFunction(sigma_rel=0.1),
    Ramp(0.9, 20),
    Smoothing(0.8),
    Uniform(),
    Warmup(0.95),
    Window(5),
    Window(5, 13),
    Window("5tok", "13tok", "cosine"),
    Window("0.3ep", "1ep", "sqrt"),
]


def one_by_one(schedule: Schedule, updates: int, every: float) -> NDArray[np.float64]:
    """The average of unit vectors."""
    average = np.eye(1, updates + 1)[0]
    for n in range(1, updates + 1):
        step = (n - 1) * every, n * every
        average = schedule.retain(*step) * average + schedule.weight(*step) * np.eye(1, updates + 1, n)[0]
    return average


def test_examples_cover_every_kind() -> None:
    assert {type(schedule).__name__ for schedule in EXAMPLES} == set(KINDS)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
@pytest.mark.parametrize("every", [1, 3, 0.1])
def test_profile_is_what_updates_one_by_one_give(schedule: Schedule, every: float) -> None:
    for updates in (0, 1, 5, 38, 39, 70, 77):
        profile = schedule.profile(updates * every, every=every)
        expected, steps = one_by_one(schedule, updates, every), np.arange(updates + 1) * every
        assert profile(steps) == pytest.approx(expected, rel=1e-11, abs=1e-300), updates
        assert profile.older == pytest.approx(np.cumsum(expected), rel=1e-11, abs=1e-300)
        assert [profile(float(step)) for step in steps] == profile(steps).tolist()
        assert profile(steps).sum() == pytest.approx(1, rel=1e-13)
        assert profile.mean_age == pytest.approx(float((expected * (steps[-1] - steps)).sum()), rel=1e-11, abs=1e-12)
        assert profile.effective_window == pytest.approx(every / float((expected**2).sum()), rel=1e-11)
        assert profile(-every) == profile((updates + 1) * every) == profile(every / 2) == 0


def test_profile_of_what_really_was_averaged() -> None:
    """The clock of a run, and a window that knows where averaging began."""
    window = Window("6ba", "10ba").begun(Progress(8), Time(2, "ba"))
    # Updates at 8, 10, ..., 30: the last window holds 26, 28 and 30. The first: 8, which stands for 7 and 8, and 10.
    assert window.profile(Progress(22, updates=12), every=2).weights[-4:].tolist() == pytest.approx(
        [0, 1 / 3, 1 / 3, 1 / 3]
    )
    assert window.profile(Progress(2, updates=2), every=2).weights.tolist() == pytest.approx([0.5, 0.5])
    assert Uniform().profile(Progress(90, updates=10)).weights.tolist() == pytest.approx([0.1] * 10)
    assert HalfLife("100tok").profile("500tok", every=100).weights.tolist() == pytest.approx(
        [1 / 32, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    )
    # What has been trained since the last update changes nothing.
    assert (
        ConstantDecay(0.9).profile(99, every=10).weights.tolist()
        == ConstantDecay(0.9).profile(90, every=10).weights.tolist()
    )


def test_summaries_are_those_of_the_formulas() -> None:
    half_life = HalfLife("1000ba").profile(100_000)
    assert half_life.half_life == pytest.approx(1000, rel=1e-12)
    kept = 2 ** (-1 / 1000)
    assert half_life.mean_age == pytest.approx(kept / (1 - kept), rel=1e-9)
    assert half_life.effective_window == pytest.approx((1 + kept) / (1 - kept), rel=1e-9)
    window = Window(500, 5000).profile(99_999)  # the first copy is after the first step, the last one after 100,000
    assert (window.half_life, window.mean_age) == (pytest.approx(250), pytest.approx(249.5))
    assert window.effective_window == pytest.approx(500)
    assert ConstantDecay(0.9999).profile(100).half_life == 100  # the first copy weighs more than half
    # Equation 123 of EDM2: sigma_rel is the profile's standard deviation over the length of the run.
    power = PowerFunction(sigma_rel=0.1).profile(19_999)
    time = power.steps + 1
    mean = float((power.weights * time).sum())
    deviation = math.sqrt(float((power.weights * (time - mean) ** 2).sum()))
    assert deviation / 20_000 == pytest.approx(0.1, rel=1e-4)
    gamma = PowerFunction(sigma_rel=0.1).exponent
    assert power.half_life == pytest.approx(20_000 * (1 - 2 ** (-1 / (gamma + 1))), rel=1e-3)


@pytest.mark.parametrize(
    ("schedule", "arguments", "says"),
    [
        (HalfLife("10ba"), {"progress": -1}, "progress=-1"),
        (HalfLife("10ba"), {"progress": math.nan}, "progress=nan"),
        (HalfLife("10ba"), {"progress": "10tok"}, "progress='10tok'"),
        (HalfLife("10ba"), {"progress": 10, "every": 0}, "every=0"),
        (HalfLife("10ba"), {"progress": 10, "every": "1ba"}, "every='1ba'"),
        (HalfLife("2ep"), {"progress": 10}, "every=None"),
        (Cosine(0.9, 1, "1dur"), {"progress": 10}, "over='1dur'"),
    ],
)
def test_profiles_that_cannot_be(schedule: Schedule, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(EMAConfigError) as caught:
        schedule.profile(**arguments)
    assert says in str(caught.value)


# The command.

ASKED = [
    "--half-life",
    "1000ba",
    "--decay",
    ".999",
    "--sigma-rel",
    ".05",
    "--window",
    "500ba",
    "--window",
    "500ba/5000ba",
]


def test_command_prints_a_table_and_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["profile", *ASKED, "--png", str(tmp_path / "weights.png")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = {line.split()[0]: line.split() for line in out.splitlines() if "=" in line}
    assert lines["half_life=1000ba"][1:] == ["1,000ba", "1,440.79ba", "2,877.46ba", "0.0006929"]
    assert lines["window=500ba/5000ba"][1:] == ["250ba", "249.5ba", "500ba", "0.002"]
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_command_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    asked = list(ASKED)
    for schedule in (Cosine(0.9, 1, "1dur"), Ramp(0.999, 50), Debiased(0.999)):
        asked += ["--schedule", json.dumps(schedule.to_dict())]
    assert main(["profile", *asked, "--at", "2000ba", "--json"]) == 0
    out, err = capsys.readouterr()
    found = {row["schedule"]: row for row in json.loads(out)["profiles"]}
    assert (err, len(found)) == ("", 8)
    assert found["Ramp(decay=0.999, tau=50.0)"]["half_life"] == Ramp(0.999, 50).profile(1999).half_life
    assert found["Debiased(decay=0.999)"]["half_life"] == Debiased(0.999).profile(1999).half_life
    assert found["decay=0.999"]["half_life"] == ConstantDecay(0.999).profile(1999).half_life
    assert found["window=500ba"] == {
        "schedule": "window=500ba",
        "unit": "ba",
        "half_life": pytest.approx(250),
        "mean_age": pytest.approx(249.5),
        "effective_window": pytest.approx(500),
        "last_step": pytest.approx(0.002),
    }


def test_command_in_other_units(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--half-life", "2ep", "--at", "10ep", "--update-interval", "0.01ep"]
    assert main(["profile", *asked, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["profiles"]
    assert (row["unit"], row["half_life"]) == ("ep", pytest.approx(2))
    updates = ["--schedule", '{"kind": "Uniform"}', "--at", "1000ba", "--update-interval", "10ba"]
    assert main(["profile", *updates, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["profiles"]
    assert (row["unit"], row["effective_window"]) == ("updates", pytest.approx(100))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "at least one of --half-life"),
        (["--half-life", "1000"], "--half-life '1000': not a time string"),
        (["--decay", "1"], "--decay 1.0: allowed is"),
        (["--sigma-rel", ".4"], "--sigma-rel 0.4: allowed is"),
        (["--window", "5ba/2ba"], "every='2ba'"),
        (["--schedule", "{"], "--schedule '{': not JSON"),
        (["--schedule", '{"kind": "Square"}'], "kind='Square'"),
        (["--half-life", "1000tok"], "--at '10000ba': --half-life 1000tok counts in tok"),
        (["--decay", ".9", "--at", "1dur"], "--at '1dur'"),
        (["--decay", ".9", "--at", "1000000000ba"], "updates; allowed are"),
        (["--decay", ".9", "--update-interval", "5tok"], "--update-interval '5tok'"),
        (["--half-life", "1ep", "--at", "10ep"], "needs update_interval"),
        (["--decay", ".9", "--png", "missing/weights.png"], "No such file or directory"),
    ],
)
def test_command_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["profile", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert err.count("\n") == 1


def test_command_without_matplotlib_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["profile", *ASKED, "--json"]) == 0
    capsys.readouterr()
    assert main(["profile", *ASKED, "--png", str(tmp_path / "weights.png")]) == 2
    assert "needs matplotlib: pip install" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_profiles_need_no_torch() -> None:
    code = "import sys; from dist_ema.cli import main; main(['profile', '--decay', '.9', '--at', '50ba'])\n"
    code += "print(sys.modules.keys() & {'torch', 'matplotlib'}, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "set()\n"
