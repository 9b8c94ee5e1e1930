"""Trainers save while they evaluate: inside ``average_parameters()`` the shadow holds the live weights, or nothing new.

What is written there has to be what is written outside, bit for bit, and the live weights have to come back unharmed.
"""

from __future__ import annotations

from pathlib import Path

from support.models import CASES, batch
from support.zero_models import make_engine, train

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import EMAStateError

AVERAGES = {"fast": 0.5, "slow": 0.9}


def read(folder: Path, step: str) -> dict[str, dict[str, Tensor]]:
    """Everything that a save, an export and a full state dict of ``step`` hold."""
    saved = {f"save {name}": dist_ema.read_checkpoint(folder / f"{step}.save", name) for name in AVERAGES}
    return saved | {"background": dist_ema.read_checkpoint(folder / f"{step}.background", "slow")}


def write(ema: ShardedEMA, folder: Path, step: str) -> dict[str, Tensor]:
    """By every way there is."""
    ema.save(folder / f"{step}.save")
    ema.export(folder / f"{step}.export", name="slow")
    dcp.save({"ema": ema}, checkpoint_id=folder / f"{step}.dcp")
    full = ema.full_state_dict("slow")
    ema.save(folder / f"{step}.background", block=False)  # and leaving has to wait for it
    return full


def same_inside(model: nn.Module, ema: ShardedEMA, folder: Path) -> None:
    live = [parameter.detach().clone() for parameter in model.parameters()]
    outside = write(ema, folder, "outside")
    ema.wait()
    digests = [ema.fingerprint(name) for name in AVERAGES]
    for name in AVERAGES:  # also of the average that is not in the model
        with ema.average_parameters(name):
            inside = write(ema, folder, name)
            assert [ema.fingerprint(name) for name in AVERAGES] == digests
        ema.wait()
        assert inside.keys() == outside.keys()
        assert all(torch.equal(inside[key], outside[key]) for key in outside)
        expected, found = read(folder, "outside"), read(folder, name)
        for part, tensors in expected.items():
            for key, value in tensors.items():
                assert torch.equal(found[part][key], value), (part, key)
        other = (folder / f"{name}.export/model.safetensors").read_bytes()
        assert other == (folder / "outside.export/model.safetensors").read_bytes()
        dcp.load({"ema": ema}, checkpoint_id=folder / f"{name}.dcp")
        assert [ema.fingerprint(name) for name in AVERAGES] == digests
    for before, after in zip(live, model.parameters(), strict=True):
        assert torch.equal(before, after.detach())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full", "fsdp2", "fsdp2-mixed", "hsdp", "tp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_inside_is_what_is_written_outside(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = CASES[case].model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, averages=AVERAGES, dtype=dtype)
    ema.attach(optimizer)
    for step in range(2):
        model(batch(step + 10 * dist.get_rank())).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    same_inside(model, ema, tmp_path)
    ema.close()


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_so_it_is_where_the_average_lies_in_master_weights(stage: int, dtype: str, tmp_path: Path) -> None:
    engine = make_engine(stage, dtype)
    ema = ShardedEMA(engine, averages=AVERAGES)
    ema.attach(engine)
    train(engine, range(2))
    same_inside(engine.module, ema, tmp_path)
    ema.close()


def test_another_objects_average_in_the_model_is_not_saved_as_live_weights(tmp_path: Path) -> None:
    model = CASES["plain"].model()
    first, second = ShardedEMA(model, decay=0.5), ShardedEMA(model, decay=0.9, include="embed")
    first.update()
    second.update()
    with first.average_parameters(), pytest.raises(EMAStateError, match="inside average_parameters"):
        second.save(tmp_path / "second")
    assert list(tmp_path.iterdir()) == []
