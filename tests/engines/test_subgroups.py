"""A model on a part of the world: the other ranks train another one, or none, and must not be waited for."""

from __future__ import annotations

from pathlib import Path

from support.models import build

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import EMAConfigError, EMAEngineError


def role_model(kind: str, role: int, mesh: object) -> nn.Module:
    """The role's own model, on the two ranks of its mesh."""
    model = build(scalar=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(role)
    if kind == "fsdp2":
        return fully_shard(model, mesh=mesh)
    if kind == "fsdp1":
        return FSDP(model, mesh.get_group(), use_orig_params=True, device_id=torch.device("cpu"))
    return DDP(model, process_group=mesh.get_group()) if kind == "ddp" else model


@pytest.mark.world_size(4)
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "ddp", "plain"])
def test_two_roles_average_side_by_side_and_neither_waits_for_the_other(rank: int, kind: str, tmp_path: Path) -> None:
    role = rank // 2
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("role", "shard"))["shard"]
    model = role_model(kind, role, mesh)
    ema = ShardedEMA(model, decay=0.5, group=mesh.get_group())
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2.0)
    ema.update()
    if role == 1:  # goes another way, and makes no collective call
        return
    place = tmp_path / "actor"
    ema.save(place)
    full = ema.full_state_dict()
    assert bool(full) is (rank == 0)
    before = ema.fingerprint()
    with ema.average_parameters():
        pass
    ema.export(tmp_path / "out")
    ema.save(tmp_path / "background", block=False)
    ema.wait()
    ema.load(place)
    assert ema.fingerprint() == before
    assert ema.metrics()["ema/num_updates"] == 2
    state = ema.state_dict()
    ema.load_state_dict(state)
    ema.close()
    stored = dist_ema.read_checkpoint(place)
    trained = {name for name, parameter in build(scalar=False).named_parameters() if parameter.requires_grad}
    for name, before_training in build(scalar=False).state_dict().items():
        moved = 2.0 if name.startswith("frozen.") else 1.0 if name in trained | {"head.weight"} else 0.0
        torch.testing.assert_close(stored[name].double(), before_training.double() + moved)
        assert not full or torch.equal(stored[name], full[name])


@pytest.mark.world_size(4)
def test_a_group_that_cannot_be_meant_is_refused(rank: int) -> None:
    pair = dist.new_group([0, 1])
    if rank < 2:
        model = fully_shard(build(scalar=False), mesh=init_device_mesh("cpu", (4,)))
        with pytest.raises(EMAEngineError, match=r"ranks \[0, 1\], but the model is also spread over ranks \[2, 3\]"):
            ShardedEMA(model, group=pair)
    else:
        fully_shard(build(scalar=False), mesh=init_device_mesh("cpu", (4,)))
        with pytest.raises(EMAConfigError, match="this rank is not a member"):
            ShardedEMA(build(), group=pair)
    with pytest.raises(EMAConfigError, match=r"mesh\.get_group"):
        ShardedEMA(build(), group=[0, 1])
