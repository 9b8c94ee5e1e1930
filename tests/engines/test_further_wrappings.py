"""Rows of the table of engines that no other test has: further ways to shard with FSDP2 and to train with DeepSpeed.

Each is a wrapping that users know by a name of its own. That nothing in the library mentions it is no reason to believe
that it is averaged rightly, so it is tried once against a dense average in float64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.oracle import DenseAverage
from support.scaled import check_average
from support.zero_models import Net, backward, make_engine, reset_deepspeed

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from dist_ema import ShardedEMA
from dist_ema.engines.deepspeed.zero import ZeroEngine


class _Experts(nn.Module):
    """Stacked weights of four experts, between two plain layers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.router = nn.Linear(6, 4)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.empty(4, 6, 8))
        self.experts.down = nn.Parameter(torch.empty(4, 8, 6))
        self.norm = nn.LayerNorm(6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 1)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _columns(model: nn.Module) -> None:
    """``shard_placement_fn``: the last dimension where it divides evenly, which FSDP2 demands, else the first."""

    def placement(parameter: nn.Parameter) -> Shard:
        divides = parameter.dim() > 1 and parameter.shape[-1] % dist.get_world_size() == 0
        return Shard(parameter.dim() - 1) if divides else Shard(0)

    fully_shard(model.experts, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def _replicate(model: nn.Module) -> None:
    """Data parallelism as FSDP2 does it: DTensors that are whole on every rank."""
    module = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp")
    module.replicate(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _composable_ddp(model: nn.Module) -> None:
    """DistributedDataParallel as a hook on the model, which keeps its class and its plain parameters."""
    from torch.distributed._composable import replicate

    replicate(model)


def _experts_beside(model: nn.Module) -> None:
    """Experts on a mesh of expert-parallel ranks and FSDP2 over it, everything else on FSDP2 over all ranks."""
    half = dist.get_world_size() // 2
    mesh = init_device_mesh("cpu", (half, 2), mesh_dim_names=("efsdp", "ep"))
    for name, parameter in list(model.experts.named_parameters()):
        shard = distribute_tensor(parameter.detach(), mesh["ep"], [Shard(0)])
        model.experts.register_parameter(name, nn.Parameter(shard))
    fully_shard(model.experts, mesh=mesh["efsdp"])
    fully_shard(model, mesh=init_device_mesh("cpu", (2 * half,)))


@pytest.mark.world_size()
@pytest.mark.parametrize(
    ("wrap", "world_size"),
    [("_columns", 2), ("_replicate", 2), ("_composable_ddp", 2), ("_experts_beside", 4), ("_experts_beside", 2)],
)
def test_further_ways_to_shard_average_as_a_plain_model(rank: int, world_size: int, wrap: str, tmp_path: Path) -> None:
    model = _Experts()
    full = _weights(model)
    globals()[wrap](model)
    check_average(model, full, tmp_path, rank)


ZERO: dict[str, tuple[int, dict[str, Any]]] = {
    "unmanaged accumulation": (2, {"managed_gradient_accumulation": False, "dtype": "bf16"}),
    "torch_autocast": (2, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "torch_autocast of stage 3": (3, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    "ulysses": (3, {"dtype": "bf16"}),
}


def _ulysses() -> Any:
    """An engine with sequences cut over two ranks, made as UlyssesSPAttentionHF.register_with_transformers() says."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    reset_deepspeed()
    deepspeed.init_distributed("gloo", verbose=False)
    parallel_state_sp.initialize_sequence_parallel(2)
    torch.manual_seed(7)
    model = Net()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=parallel_state_sp)[0]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ZERO)
def test_further_ways_to_train_with_deepspeed_average_the_masters(rank: int, case: str) -> None:
    """Three micro-batches to a step, or sequences cut over ranks: update() counts real steps and reads the masters."""
    stage, options = ZERO[case]
    engine = _ulysses() if case == "ulysses" else make_engine(stage, **options)
    reader = ZeroEngine(engine)
    ema = ShardedEMA(engine, decay=0.75)
    trained = {name for name, parameter in Net().named_parameters(remove_duplicate=False) if parameter.requires_grad}
    oracle = DenseAverage(trained, 0.75)
    micro = 3 if "managed_gradient_accumulation" in options else 1
    for step in range(4):
        for number in range(micro):
            backward(engine, 10 * step + number)
            if number < micro - 1:
                assert not ema.update(), "a micro-batch is no step"
        engine.step()
        assert ema.update(), step
        oracle.update(_full(reader))
    found = ema.full_state_dict(include_untracked=True)
    if rank == 0:
        oracle.check({name: tensor for name, tensor in found.items() if name in oracle.average})
        assert trained <= found.keys()
    moved = oracle.average["up.weight"] - _full(reader)["up.weight"].double()
    assert moved.abs().max() > 1e-4, "nothing was trained"


def _full(engine: ZeroEngine) -> dict[str, Tensor]:
    """Full tensors in float64 from each rank's runs, under every name; frozen ones and buffers left out. Collective."""
    full: dict[str, Tensor] = {}
    for spec, source in zip(engine.specs(), engine.sources(), strict=True):
        if spec.kind != "parameter":
            continue
        value, position = torch.zeros(spec.numel, dtype=torch.float64), 0
        for start, length in spec.runs:
            value[start : start + length] = source.reshape(-1)[position : position + length].double()
            position += length
        dist.all_reduce(value)
        full |= dict.fromkeys((spec.name, *spec.aliases), value.reshape(spec.shape))
    return full
