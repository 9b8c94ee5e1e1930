"""Buffers that each rank has for itself: which an average computes with, and BatchNorm's statistics under it."""

from __future__ import annotations

import copy
from pathlib import Path

from support.models import CASES
from support.zero_models import make_engine

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import update_bn as torch_update_bn

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import EMAConfigError, EMAStateError

# Inside average_parameters().


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    found = {name.replace("_fsdp_wrapped_module.", ""): value.clone() for name, value in module.named_buffers()}
    return {name.removeprefix("module.") if name.startswith("module.norm") else name: v for name, v in found.items()}


def _differ(module: nn.Module, by: float) -> None:
    for buffer in module.buffers():
        if buffer.dtype != torch.bool:
            buffer.add_(int(by) if not buffer.is_floating_point() else by)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("case", ["ddp", "fsdp2", "fsdp1-full", "zero2"])
def test_every_rank_evaluates_with_the_buffers_that_export_writes(
    case: str, buffers: str, rank: int, tmp_path: Path
) -> None:
    """The validation loss of a rank was that of a model that nobody exports: each had its own running statistics."""
    if case == "zero2":
        target = make_engine(2)
        model: nn.Module = target.module
    else:
        target = model = CASES[case].model()
    ema = ShardedEMA(target, decay=0.5, buffers=buffers)
    ema._average.engine.stepped = lambda: True
    for _ in range(2):
        _differ(model, 1.0 + rank)
        ema.update()
    _differ(model, 10.0 + rank)
    live = _buffers(model)
    shadow = [None if tensor is None else tensor.clone() for tensor in ema._average.shadow.tensors("ema")]
    ema.export(tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    with ema.average_parameters():
        inside = {name: value for name, value in _buffers(model).items() if name in exported}
    assert "norm.running_mean" in inside
    for name, value in inside.items():
        assert torch.equal(value, exported[name]), name
    after = _buffers(model)
    assert all(torch.equal(value, live[name]) for name, value in after.items())
    for before, now in zip(shadow, ema._average.shadow.tensors("ema"), strict=True):
        assert now is None if before is None else torch.equal(before, now)


# update_bn().


class Conv(nn.Module):
    """Two layers of BatchNorm: what the second sees depends on how the first normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8, momentum=0.3)
        self.second = nn.Linear(8, 4)
        self.last = nn.BatchNorm1d(4)
        self.last.eval()  # as somebody froze it

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(torch.relu(self.norm(self.first(x)))))


def _batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(7 + index, 6, generator=generator) * (index + 1) + index for index in range(count)]


def _make(case: str, buffers: str) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(11)
    model: nn.Module = Conv()
    if case == "ddp":
        model = DDP(model)
    elif case == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    ema = ShardedEMA(model, decay=0.5, buffers=buffers)
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.mul_(1.0 + 0.1 * step)
        ema.update()
    return model, ema


def _dense(ema: ShardedEMA) -> Conv:
    """The average as a plain model, on every rank."""
    state = [ema.full_state_dict()]
    if dist.is_initialized():
        dist.broadcast_object_list(state, src=0)
    dense = Conv()
    dense.load_state_dict(state[0])
    return dense


def _check(case: str, buffers: str, rank: int, world_size: int, own: list[Tensor]) -> None:
    model, ema = _make(case, buffers)
    reference = _dense(ema)
    torch_update_bn(_batches(8), reference)
    live, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    dist_ema.update_bn(ema, own if case != "ddp" else [(batch, "label") for batch in own])
    found, expected = _dense(ema).state_dict(), reference.state_dict()
    for name, value in expected.items():
        if world_size == 1:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-6, msg=name)
    assert int(found["norm.num_batches_tracked"]) == 8
    assert [module.training for module in model.modules()] == modes
    assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm1d)] == [0.3, 0.1]
    for name, value in model.state_dict().items():
        local, before = ((v.to_local() if isinstance(v, DTensor) else v) for v in (value, live[name]))
        assert torch.equal(local, before), name
    with ema.average_parameters():
        inside = {name.removeprefix("module."): value.clone() for name, value in model.named_buffers()}
    assert all(torch.equal(value, found[name]) for name, value in inside.items())
    ema.update()
    after = _dense(ema).norm.running_mean
    live_mean = live["module.norm.running_mean" if case == "ddp" else "norm.running_mean"]
    expected_mean = live_mean if buffers == "copy" else torch.lerp(found["norm.running_mean"], live_mean, 0.5)
    torch.testing.assert_close(after, expected_mean)


@pytest.mark.world_size()
@pytest.mark.parametrize("buffers", ["copy", "average"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_update_bn_gives_what_torch_gives_for_one_process_with_all_batches(
    case: str, buffers: str, rank: int, world_size: int
) -> None:
    """Each rank's own statistics, rank 0's alone, or statistics that DDP overwrites at every forward pass."""
    _check(case, buffers, rank, world_size, _batches(8)[rank::world_size])


@pytest.mark.world_size(2)
def test_ranks_count_by_their_batches(rank: int) -> None:
    """A mean of the ranks' means is another than that of all batches where one rank has more; and a rank that has none
    was waited for, by DDP's own sending of buffers."""
    _check("ddp", "copy", rank, 2, _batches(8)[:7] if rank == 0 else _batches(8)[7:])
    _check("ddp", "copy", rank, 2, _batches(8) if rank == 0 else [])


def test_update_bn_needs_no_process_group() -> None:
    """One process, no group."""
    _check("plain", "copy", 0, 1, _batches(8))


def test_update_bn_says_what_is_missing() -> None:
    """Statistics that are written nowhere, or reset by no batch at all, would be wrong in silence."""
    _, ema = _make("plain", "ignore")
    with pytest.raises(EMAConfigError, match=r"norm.running_mean.*buffers="):
        dist_ema.update_bn(ema, _batches(2))
    _, ema = _make("plain", "copy")
    digest = ema.fingerprint()
    with pytest.raises(EMAConfigError, match="batches"):
        dist_ema.update_bn(ema, [])
    with pytest.raises(EMAConfigError, match="allowed are 'ema'"):
        dist_ema.update_bn(ema, _batches(1), name="slow")
    with ema.average_parameters(), pytest.raises(EMAStateError, match="inside"):
        dist_ema.update_bn(ema, _batches(1))
    assert ema.fingerprint() == digest
    ema.reset()
    with pytest.raises(EMAStateError, match="first update"):
        dist_ema.update_bn(ema, _batches(1))


@pytest.mark.world_size()
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_forward_that_raises_leaves_everything_as_it_was(rank: int, world_size: int) -> None:
    """Half of the batches would be in the average, momenta None, and the other rank in wait."""
    model, ema = _make("ddp", "copy")
    digest, live = ema.fingerprint(), copy.deepcopy(model.state_dict())

    def forward(batch: object) -> object:
        if rank == world_size - 1 and len(batch) > 8:  # type: ignore[arg-type]
            raise ValueError("no such label")
        return model(batch)

    with pytest.raises(ValueError if rank == world_size - 1 else EMAStateError, match="no such label"):
        dist_ema.update_bn(ema, _batches(4), forward=forward)
    assert ema.fingerprint() == digest
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    assert model.module.norm.momentum == 0.3
    assert model.training
    assert not model.module.last.training
    assert model.broadcast_buffers
