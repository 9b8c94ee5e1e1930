"""Runs that are killed and started again end where the uninterrupted run ends: weights, optimizer and average."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "launch"))

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
    ours, theirs = saved(interrupted, scratch / "ours"), saved(uninterrupted, scratch / "theirs")
    assert list(ours) == list(theirs)
    assert len(ours) > 30
    for name, value in ours.items():
        if exactly:
            assert torch.equal(value, theirs[name]), name
        else:
            torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def after(steps: int) -> Callable[[], Stop]:
    """Asks for a checkpoint and the end after so many steps."""
    asked = iter(range(1, 1000))
    return lambda: Stop.SAVE if next(asked) == steps else Stop.NO


def run(engine: str, world_size: int, out: Path, stop: Callable[[], int] = lambda: False, **options: object) -> Any:
    """One run in the pool."""
    if engine.startswith("zero"):
        reset_deepspeed()
    return main(arguments(engine, **(RUN | options), out=out), world_size=world_size, stop=stop)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.world_size()
def test_every_engine_resumes_bit_for_bit(engine: str, world_size: int, tmp_path: Path, rank: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    summary = run(engine, world_size, whole)
    assert run(engine, world_size, parts, after(4)) is None
    resumed = run(engine, world_size, parts)
    assert (resumed.live, resumed.averaged) == (summary.live, summary.averaged)
    if rank == 0:
        assert_same_end(parts, whole, tmp_path)
    dist.barrier()
