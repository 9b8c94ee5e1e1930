"""The recipe for Fabric: no integration is needed where the loop is one's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from support.models import batch, build

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA

pytest.importorskip("lightning", reason="is in the extra 'lightning'")


def fabric(strategy: str, size: int) -> Any:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy

    warnings.filterwarnings("ignore", module="lightning")
    made: Any = strategy
    if strategy == "fsdp2":
        made = ModelParallelStrategy(parallelize_fn=shard, data_parallel_size=size, tensor_parallel_size=1)
    made = Fabric(accelerator="cpu", devices=size, strategy=made)
    made.launch()
    return made


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for block in model.module:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


def train(fab: Any, folder: Path, start: int, stop: int, resume: bool = False) -> tuple[ShardedEMA, Any, float]:
    """The recipe."""
    model = fab.setup_module(build(scalar=False))
    optimizer = fab.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    ema = ShardedEMA(model, decay=0.5)
    if resume:  # the average last, since an optimizer may be stepped to have a state to load into
        fab.load(folder / "checkpoint", {"model": model, "optimizer": optimizer})
        ema.load(folder / "checkpoint.ema")
    ema.attach(optimizer)
    for step in range(start, stop):
        optimizer.zero_grad()
        fab.backward(model(batch(step)).square().mean())
        optimizer.step()
    model.eval()
    with ema.average_parameters(), torch.no_grad():
        loss = model(batch(0)).square().mean().item()
    model.train()
    fab.save(folder / "checkpoint", {"model": model, "optimizer": optimizer})  # outside: the live weights
    ema.save(folder / "checkpoint.ema")
    return ema, model, loss


@pytest.mark.world_size()
@pytest.mark.parametrize(("strategy", "world_size"), [("auto", 1), ("ddp", 2), ("fsdp2", 2)])
def test_resumed_in_the_middle_is_as_never_stopped(strategy: str, world_size: int, tmp_path: Path) -> None:
    fab = fabric(strategy, world_size)
    whole, _, loss = train(fab, tmp_path / "whole", 0, 4)
    train(fab, tmp_path / "half", 0, 2)
    resumed, model, again = train(fab, tmp_path / "half", 2, 4, resume=True)
    assert resumed.num_updates == 4
    assert resumed.fingerprint() == whole.fingerprint() and again == loss
    with torch.no_grad():
        assert model.eval()(batch(0)).square().mean().item() != loss  # the live weights are live
    other = ShardedEMA(build(scalar=False), decay=0.5)  # under any engine
    other.load(tmp_path / "whole" / "checkpoint.ema")
    assert other.fingerprint() == whole.fingerprint()
