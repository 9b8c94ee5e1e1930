"""Runs that are killed and started again end where the uninterrupted run ends: weights, optimizer and average."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "launch"))

from report import FINISHED  # noqa: E402
from stop import Stop  # noqa: E402
from test_launch import ENGINES, arguments  # noqa: E402
from train import main  # noqa: E402
from zero_models import reset_deepspeed  # noqa: E402

from dist_ema import read_checkpoint  # noqa: E402

STEPS = 6
RUN = {"batch": 12, "steps": STEPS, "eval_every": 100, "checkpoint_every": 3}


def checkpoint(out: Path, step: int = STEPS) -> Path:
    return out / "checkpoints" / f"step-{step:08}"


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path: found for key, part in items for path, found in tensors(part, f"{name}/{key}").items()}


def saved(out: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: averages, weights and optimizer states."""
    found: dict[str, Any] = {"ema": read_checkpoint(checkpoint(out) / "ema")}
    model = checkpoint(out) / "model"
    if (model / ".metadata").exists():
        scratch.mkdir()
        dcp_to_torch_save(model, scratch / "model.pt")
        found["model"] = torch.load(scratch / "model.pt")
    else:
        found |= {file.name: torch.load(file, weights_only=False) for file in sorted(model.glob("*.pt"))}
    return tensors(found)


def assert_same_end(interrupted: Path, uninterrupted: Path, scratch: Path, exactly: bool = True) -> None:
    """Exactly: all tensors of the last checkpoint. Else to rounding: the averages, and the validation losses."""
    if not exactly:
        ours, theirs = (read_checkpoint(checkpoint(out) / "ema") for out in (interrupted, uninterrupted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ends = [json.loads((out / FINISHED).read_text()) for out in (interrupted, uninterrupted)]
        assert ends[0]["live"] == pytest.approx(ends[1]["live"], abs=1e-5)
        return
    ours, theirs = saved(interrupted, scratch / "ours"), saved(uninterrupted, scratch / "theirs")
    assert list(ours) == list(theirs)
    assert len(ours) > 30
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def run(engine: str, out: Path, stop_after: int = 0, **options: object) -> None:
    """One run in the pool, ended with nothing but a checkpoint after ``stop_after`` steps. Collective."""
    if engine.startswith("zero"):
        reset_deepspeed()
    asked = count(1)
    summary = main(
        arguments(engine, **(RUN | options), out=out),
        world_size=dist.get_world_size(),
        stop=lambda: Stop.SAVE if next(asked) == stop_after else Stop.NO,
    )
    assert (summary is None) == bool(stop_after)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_resumes_bit_for_bit(engine: str, tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(run, 2, engine=engine, out=whole)
    on_ranks(run, 2, engine=engine, out=parts, stop_after=4)
    on_ranks(run, 2, engine=engine, out=parts)
    assert_same_end(parts, whole, tmp_path)


@pytest.mark.parametrize(("engine", "before", "now"), [(e, b, n) for e in ENGINES for b, n in ((2, 3), (3, 1),(4,2),(1,4))])
def test_world(engine: str, before: int, now: int, tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    on_ranks(run, before, engine=engine, out=whole)
    on_ranks(run, before, engine=engine, out=parts, stop_after=4)
    on_ranks(run, now, engine=engine, out=parts)
    assert_same_end(parts, whole, tmp_path, exactly=False)
