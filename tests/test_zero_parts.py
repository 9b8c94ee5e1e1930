"""DeepSpeed engines of which no rank holds the whole model: pipeline stages, and experts of MoE layers.

Read by DeepSpeed's own means, every rank's master weights are put together under the names of DeepSpeed's checkpoints
and averaged in float64; that is what every call has to give.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from oracle import DenseAverage
from torch import Tensor, nn
from zero_models import DTYPES, make_engine, plain_fused_adam, reset_deepspeed

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import EMAConfigError, EMAEngineError


def masters(engine: Any, rename: dict[str, str]) -> dict[str, Tensor]:
    """Full weights of all ranks' modules: fp32 masters as DeepSpeed finds them, or the live weights where it has none."""
    from deepspeed.utils import safe_get_full_fp32_param

    mine = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        full = safe_get_full_fp32_param(tensor) if hasattr(tensor, "_hp_mapping") else unfused(engine, tensor)
        mine[rename.get(name, name)] = tensor.detach().clone() if full is None else full.detach().clone()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    together: dict[str, Tensor] = {}
    for found in reversed(everyone):  # of what several ranks hold, such as buffers, the lowest one's is written
        together.update(found)
    return together


def unfused(engine: Any, tensor: Tensor) -> Tensor | None:
    """The master of a parameter at stage 0."""
    for live, fp32 in zip(*(getattr(engine.optimizer, f"{kind}_groups", ()) for kind in ("fp16", "fp32")), strict=True):
        for parameter, master in zip(live, fp32, strict=True):
            if parameter is tensor:
                return master
    return None


class Layers(nn.Sequential):
    """What the stages of :func:`make_pipeline` are cut from."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.0, affine=False), nn.Linear(5, 3))
        self[2].bias.requires_grad_(False)


def make_pipeline(stage: int, dtype: str, stages: int = 2, tied: bool = False) -> Any:
    """A pipeline engine of ``stages`` stages, seeded; the remaining ranks are data parallel."""
    import deepspeed
    from deepspeed.pipe import PipelineModule, TiedLayerSpec

    reset_deepspeed()
    deepspeed.init_distributed("gloo", dist_init_required=False)
    torch.manual_seed(3)
    layers: list[Any] = list(Layers())
    if tied:
        layers = [TiedLayerSpec("both", nn.Linear, 4, 4), nn.Tanh(), TiedLayerSpec("both", nn.Linear, 4, 4), *layers]
    model = PipelineModule(layers, num_stages=stages, loss_fn=nn.MSELoss(), partition_method="uniform")
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "SGD", "params": {"lr": 0.3}},
        "zero_allow_untested_optimizer": True,
        dtype: {"enabled": True},
    }
    return deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]


def batches(engine: Any, dtype: str, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(10 * seed + engine.grid.data_parallel_id)
    while True:
        yield tuple(torch.randn(4, size, generator=generator).to(DTYPES[dtype]) for size in (4, 3))  # type: ignore[misc]


PIPELINES = [
    (stage, dtype, world_size, tied)
    for stage in (0, 1)
    for dtype in ("fp32", "bf16")
    for world_size, tied in ((2, False), (4, False), (4, True))
]


@pytest.mark.parametrize(("stage", "dtype", "world_size", "tied"), PIPELINES)
@pytest.mark.world_size()
def test_a_pipeline_is_averaged_stage_by_stage(
    stage: int, dtype: str, world_size: int, tied: bool, rank: int, tmp_path: Path
) -> None:
    """The stages as a list of modules were averaged too, but from the bf16 copies of their weights."""
    untouched = make_pipeline(stage, dtype, tied=tied)
    for step in range(4):
        untouched.train_batch(batches(untouched, dtype, step))
    expected = masters(untouched, {})

    engine = make_pipeline(stage, dtype, tied=tied)
    frozen = next(name for name, parameter in named(engine).items() if not parameter)
    ema = ShardedEMA(engine, decay=0.6)
    ema.attach(engine)
    oracle = DenseAverage({name for name, trained in named(engine).items() if trained}, 0.6)
    for step in range(4):
        engine.train_batch(batches(engine, dtype, step))
        oracle.update(masters(engine, {}))
        if step == 2:
            with ema.average_parameters():
                loss = engine.eval_batch(batches(engine, dtype, 99))
            torch.testing.assert_close(
                loss.float().view(()), reference_loss(engine, oracle, dtype, tied), rtol=0.03 if dtype == "bf16" else 1e-5, atol=0
            )
            assert oracle.average[frozen].dtype == torch.float64
    assert ema.num_updates == 4
    found = masters(engine, {})
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    state = ema.full_state_dict()
    if rank == 0:
        oracle.check(state)
    ema.save(tmp_path / "checkpoint")
    if rank == 0:
        oracle.check(dist_ema.read_checkpoint(tmp_path / "checkpoint"))
    digests = ema.fingerprint()
    ema.reset()
    ema.load(tmp_path / "checkpoint")
    assert ema.fingerprint() == digests
    ema.copy_to()
    oracle.check({name: value for name, value in masters(engine, {}).items()})
    assert ShardedEMA(engine, include=r"^4\.", decay=0.6).names == ("ema",)  # of the last stage alone


def named(engine: Any) -> dict[str, bool]:
    """Whether each parameter of any rank is trained."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: p.requires_grad for name, p in engine.module.named_parameters()})
    return {name: trained for found in everyone for name, trained in found.items()}


def reference_loss(engine: Any, oracle: DenseAverage, dtype: str, tied: bool) -> Tensor:
    """The loss of the averaged weights in a plain model, over the batches that ``eval_batch`` takes."""
    weights = {name: value.float() for name, value in oracle.average.items()}
    offset = 3 if tied else 0
    model = Layers().eval()
    model.load_state_dict({f"{int(n.split('.')[0]) - offset}.{n.split('.')[1]}": v for n, v in weights.items() if n[0] != "t"})
    total = torch.zeros(())
    data = batches(engine, dtype, 99)
    for _ in range(2):
        inputs, labels = (tensor.float() for tensor in next(data))
        if tied:
            shared = weights["tied_modules.both.weight"], weights["tied_modules.both.bias"]
            inputs = nn.functional.linear(torch.tanh(nn.functional.linear(inputs, *shared)), *shared)
        total += nn.functional.mse_loss(model(inputs), labels).detach() / 2
    dist.all_reduce(total)
    return total / dist.get_world_size()
