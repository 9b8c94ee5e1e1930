"""Training on a stream of its own: a thread of ours on the default stream would read and write out of turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA, read_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def side_stream() -> Iterator[None]:
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def keep_busy() -> Tensor:
    """Some hundred milliseconds of kernels, queued."""
    values = torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        values = values @ values * 1e-3
    return values


def fill(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def test_a_background_save_reads_what_was_queued_before_it(side_stream: None, tmp_path: Path) -> None:
    model = nn.Linear(2048, 2048, device="cuda")
    fill(model, 0.0)
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.update()
    for step in range(3):
        busy = keep_busy()
        fill(model, float(step + 1))
        ema.update()
        ema.save(tmp_path / f"{step}", block=False)
        fill(model, -50.0)
        ema.update()
        ema.wait()
        expected = {0: 0.5, 1: -11.375, 2: -13.84375}[step]
        assert torch.equal(read_checkpoint(tmp_path / f"{step}")["weight"], torch.full((2048, 2048), expected)), step
        del busy


def test_a_load_is_not_overwritten_by_what_was_queued_before_it(side_stream: None, tmp_path: Path) -> None:
    model = nn.Linear(2048, 2048, device="cuda")
    fill(model, 1.0)
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.update()
    ema.save(tmp_path / "one")
    for _ in range(3):
        busy = keep_busy()
        ema.reset()
        fill(model, 2.0)
        ema.update()  # queued, into memory that a load may be given
        ema.load(tmp_path / "one")
        assert torch.equal(ema.full_state_dict()["weight"], torch.ones(2048, 2048))
        del busy
