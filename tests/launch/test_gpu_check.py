"""``launch/gpu_check.sh``, whose minutes on a GPU are dear: it must not end at a name that is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from support import ROOT

import pytest
import torch

SCRIPT = ROOT / "launch" / "gpu_check.sh"


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


@pytest.fixture
def fake_python(tmp_path: Path) -> Path:
    """Where there is no GPU: passes all but the benchmark of updates, and lacks deepspeed."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        '    *"benchmark.py update"*) echo "no memory left" >&2; exit 3 ;;\n'
        '    "-c import deepspeed") exit 1 ;;\n'
        '    *"benchmark.py device"*) echo "{}" ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    return python


def test_every_file_and_test_that_it_names_is_there() -> None:
    done = script("--dry-run")
    assert done.returncode == 0, done.stderr
    steps = [line.split("|") for line in done.stdout.splitlines()]
    assert [len(step) for step in steps] == [4] * len(steps)
    assert len(steps) == 15
    commands = [command for *_, command in steps]
    named = {path for command in commands for path in re.findall(r"(?:launch|tests|configs)/[\w./-]+", command)}
    assert len(named) >= 12
    assert not [path for path in named if not (ROOT / path).exists()]
    assert sum(int(limit) for name, limit, *_ in steps if not name.startswith("train")) < 900


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run the script itself")
def test_without_a_gpu_it_says_so() -> None:
    done = script()
    assert (done.returncode, done.stderr) == (2, "gpu_check.sh: this torch sees no GPU\n")


@pytest.mark.parametrize("arguments", [["--oops"], ["--out"]])
def test_wrong_usage_runs_nothing(arguments: list[str]) -> None:
    assert script(*arguments).returncode in (1, 2)


def test_a_failed_step_is_told_and_the_others_run(fake_python: Path, tmp_path: Path) -> None:
    done = script("--out", str(tmp_path / "out"), PYTHON=str(fake_python))
    assert done.returncode == 1, done.stderr
    results = {found["step"]: found["result"] for found in json.loads((tmp_path / "out" / "summary.json").read_text())}
    assert len(results) == 15
    assert results.pop("update") == "failed"
    assert "no memory left" in done.stdout
    assert {results.pop(f"train-zero{stage}") for stage in (1, 2, 3)} == {"left out, no deepspeed"}
    if shutil.which("compute-sanitizer") is None:
        assert {results.pop(f"{tool}check") for tool in ("mem", "race")} == {"left out, no compute-sanitizer"}
    assert set(results.values()) == {"passed"}
    assert json.loads((tmp_path / "out" / "device.json").read_text()) == {}


def test_steps_can_be_chosen(fake_python: Path, tmp_path: Path) -> None:
    done = script("--out", str(tmp_path), "tests", "train-ddp", PYTHON=str(fake_python))
    assert done.returncode == 0, done.stdout
    assert [found["step"] for found in json.loads((tmp_path / "summary.json").read_text())] == ["tests", "train-ddp"]
