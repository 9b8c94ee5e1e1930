"""launch/distill.py and launch/sweep.py: short runs from beginning to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import ROOT

import pytest
import torch

from demo import distill, sweep  # isort: skip


@pytest.mark.world_size(2)
def test_distillation_trains_both_and_says_who_is_ahead(rank: int, tmp_path: Path) -> None:
    torch.manual_seed(rank)
    found = distill.Distillation(4, 2, 0.1, 0.5, "1ba", 4e-3).run(str(ROOT / "README.md"))
    assert [one.step for one in found] == [2, 4]
    first, last = found
    assert 0 < last.student < first.student
    assert 0 < last.teacher < first.teacher
    assert last.teacher != last.student
    assert "the teacher is" in distill.verdict(found)
    if rank == 0:
        distill.write(found, tmp_path / "out")
        assert len(json.loads((tmp_path / "out" / "distill.json").read_text())) == 2
        assert (tmp_path / "out" / "distill.png").stat().st_size > 5000


def test_a_sweep_draws_what_was_kept_made_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "WINDOWS": 8,
        "SIGMAS": (0.05, 0.08),
        "COUNTS": (2, 3),
        "MERGES": ("uniform", "wsm:sqrt"),
    }.items():
        monkeypatch.setattr(sweep, name, value)
    found = sweep.Sweep(tmp_path / "out", steps=12, every=3, lr=4e-3, data=str(ROOT / "README.md")).run()
    sweep.write(found, tmp_path / "out", every=3)
    said = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert set(said["online"]) == {"sigma_rel .05", "sigma_rel .10", "half life 10ba", "half life 100ba"}
    # What is made afterwards of the very average that was kept is that average.
    assert said["synthesized"]["0.05"]["loss"] == pytest.approx(said["online"]["sigma_rel .05"], rel=1e-4)
    assert {scheme: list(losses) for scheme, losses in said["merged"].items()} == {
        "uniform": ["2", "3"],
        "wsm:sqrt": ["2", "3"],
    }
    assert len(sweep.table(found)) == 1 + 4 + 2 + 4 + 1
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 5000
    assert sorted(path.name for path in (tmp_path / "out" / "snapshots").iterdir()) == ["12ba", "3ba", "6ba", "9ba"]


@pytest.mark.parametrize("program", ["distill.py", "sweep.py"])
def test_programs_write_over_nothing(program: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / program), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "exists already" in done.stderr
