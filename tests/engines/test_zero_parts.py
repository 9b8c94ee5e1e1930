"""DeepSpeed engines of which no rank holds the whole model: pipeline stages, and experts of MoE layers.

Read by DeepSpeed's own means, every rank's master weights are put together under the names of DeepSpeed's checkpoints
and averaged in float64; that is what every call has to give.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.oracle import DenseAverage
from support.zero_models import DTYPES, make_engine, reset_deepspeed

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import EMAEngineError


def masters(engine: Any, rename: dict[str, str]) -> dict[str, Tensor]:
    """Full weights of all ranks' modules: fp32 masters as DeepSpeed finds them, or live ones where it has none."""
    from deepspeed.utils import safe_get_full_fp32_param

    mine = {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        full = safe_get_full_fp32_param(tensor) if hasattr(tensor, "_hp_mapping") else unfused(engine, tensor)
        mine[rename.get(name, name)] = tensor.detach().clone() if full is None else full.detach().clone()
    together: dict[str, Tensor] = {}
    for found in reversed(gathered(mine)):  # of what several ranks hold, such as buffers, the lowest one's is written
        together.update(found)
    return together


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


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
        super().__init__(
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.0, affine=False), nn.Linear(5, 4)
        )
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
        layers = [TiedLayerSpec("ends", nn.Linear, 4, 4), *layers, TiedLayerSpec("ends", nn.Linear, 4, 4)]
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
        yield tuple(torch.randn(4, 4, generator=generator).to(DTYPES[dtype]) for _ in range(2))  # type: ignore[misc]


#: Every pair of stage, dtype and layout.
PIPELINES = [
    (0, "fp32", 2, False),
    (0, "bf16", 4, False),
    (0, "fp32", 4, True),
    (1, "bf16", 2, False),
    (1, "fp32", 4, False),
    (1, "bf16", 4, True),
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
    rename = {"tied_modules.ends.bias": "6.bias"} if untouched.stage_id == 1 else {}  # only the weight is tied
    expected = masters(untouched, rename)

    engine = make_pipeline(stage, dtype, tied=tied)
    ema = ShardedEMA(engine, decay=0.6)
    ema.attach(engine)
    trained = {rename.get(name, name) for name, p in engine.module.named_parameters() if p.requires_grad}
    oracle = DenseAverage(set().union(*gathered(trained)), 0.6)
    for step in range(4):
        engine.train_batch(batches(engine, dtype, step))
        oracle.update(masters(engine, rename))
        if step == 2:
            with ema.average_parameters():
                loss = engine.eval_batch(batches(engine, dtype, 99))
            torch.testing.assert_close(
                loss.float().view(()),
                reference_loss(engine, oracle, dtype, tied),
                rtol=0.03 if dtype == "bf16" else 1e-5,
                atol=0,
            )
    assert ema.num_updates == 4
    found = masters(engine, rename)
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
    oracle.check(masters(engine, rename))
    assert ShardedEMA(engine, include=r"^4\.", decay=0.6).names == ("ema",)  # of the last stage alone


def reference_loss(engine: Any, oracle: DenseAverage, dtype: str, tied: bool) -> Tensor:
    """The loss of the averaged weights in a plain model, over the batches that ``eval_batch`` takes."""
    weights = {name: value.float() for name, value in oracle.average.items()}
    model, own = Layers().eval(), {}
    for name, value in weights.items():
        number, _, key = name.partition(".")
        if number.isdigit() and name != "6.bias":
            own[f"{int(number) - tied}.{key}"] = value
    model.load_state_dict(own)
    total, data = torch.zeros(()), batches(engine, dtype, 99)
    for _ in range(2):
        outputs, labels = (tensor.float() for tensor in next(data))
        if tied:
            first, last = weights["tied_modules.ends.bias"], weights["6.bias"]
            weight = weights["tied_modules.ends.weight"]
            outputs = nn.functional.linear(model(nn.functional.linear(outputs, weight, first)), weight, last)
        else:
            outputs = model(outputs)
        total += nn.functional.mse_loss(outputs, labels).detach() / 2
    dist.all_reduce(total)
    return total / dist.get_world_size()


EXPERTS, PARALLEL = 4, 2


class Mixture(nn.Module):
    """A layer of four experts, two of which each rank holds, between layers that all ranks hold."""

    def __init__(self, residual: bool = False) -> None:
        from deepspeed.moe.layer import MoE

        super().__init__()
        self.up = nn.Linear(5, 8)
        expert = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 8, bias=False))
        expert[0].bias.requires_grad_(False)
        self.moe = MoE(8, expert, EXPERTS, ep_size=PARALLEL, use_residual=residual, min_capacity=0)
        self.down = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self.moe(self.up(inputs))[0])


def in_moe_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As DeepSpeed asks for."""
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return torch.optim.Adam(split({"params": list(parameters), "name": "all"}), lr=0.05)


def make_mixture(stage: int, dtype: str, **options: Any) -> Any:
    reset_deepspeed()
    torch.manual_seed(5)
    options.setdefault("optimizer", in_moe_groups)
    return make_engine(stage, dtype, model=Mixture(options.pop("residual", False)), **options)


def train_mixture(engine: Any, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        inputs = torch.randn(16, 5, generator=generator).to(engine.module.up.weight.dtype)
        engine.backward(engine(inputs).float().square().mean())
        engine.step()


def global_names(engine: Any, by_blocks: bool) -> dict[str, str]:
    """DeepSpeed's checkpoints number the experts of all ranks; neighbouring ranks, or blocks of them, hold others."""
    rank, size = dist.get_rank(), dist.get_world_size()
    place = rank // (size // PARALLEL) if by_blocks else rank % PARALLEL
    names = {}
    for name in engine.module.state_dict():
        before, experts, after = name.partition(".deepspeed_experts.")
        if experts:
            number, _, rest = after.partition(".")
            names[name] = f"{before}{experts}{int(number) + place * EXPERTS // PARALLEL}.{rest}"
    return names


MIXTURES: dict[str, tuple[int, str, dict[str, Any]]] = {
    f"zero{stage}-{dtype}": (stage, dtype, {}) for stage in (0, 1, 2) for dtype in ("fp32", "bf16")
}
MIXTURES["zero1-bf16-optimizer"] = (1, "bf16", {"data_types": {"grad_accum_dtype": "fp32"}})
MIXTURES["zero2-offload"] = (2, "bf16", {"offload": True})
MIXTURES["zero2-residual"] = (2, "fp32", {"residual": True})
MIXTURES["zero2-blocks"] = (2, "bf16", {"use_data_before_expert_parallelism": True})
MIXTURES["zero0-blocks"] = (0, "fp32", {"use_data_before_expert_parallelism": True})


@pytest.mark.parametrize(
    ("case", "world_size"),
    [(case, 4) for case in MIXTURES] + [(case, 2) for case in ("zero0-fp32", "zero1-bf16", "zero2-bf16")],
)
@pytest.mark.world_size()
def test_every_expert_is_averaged_under_its_own_name(case: str, world_size: int, rank: int, tmp_path: Path) -> None:
    """Every rank's experts have the same names in its module, so those of rank 0 would stand for all."""
    stage, dtype, options = MIXTURES[case]
    untouched = make_mixture(stage, dtype, **options)
    train_mixture(untouched, range(5))
    expected = masters(untouched, global_names(untouched, "blocks" in case))

    engine = make_mixture(stage, dtype, **options)
    rename = global_names(engine, "blocks" in case)
    trained = {rename.get(name, name) for name, p in engine.module.named_parameters() if p.requires_grad}
    oracle = DenseAverage(set().union(*gathered(trained)), 0.6)
    ema = ShardedEMA(engine, decay=0.6)
    for step in range(5):
        train_mixture(engine, range(step, step + 1))
        assert ema.update()
        weights = masters(engine, rename)
        oracle.update(weights)
        if step == 2:
            before = copy.deepcopy(engine.module.state_dict())
            with ema.average_parameters():
                for name, value in engine.module.state_dict().items():
                    averaged = oracle.average[rename.get(name, name)].to(value.dtype)
                    torch.testing.assert_close(value, averaged, rtol=0.01 if dtype == "bf16" else 1e-5, atol=1e-6)
            assert all(torch.equal(before[name], value) for name, value in engine.module.state_dict().items())
    experts = [f"moe.deepspeed_moe.experts.deepspeed_experts.{number}.2.weight" for number in range(EXPERTS)]
    assert len({weights[name].sum().item() for name in experts}) == EXPERTS, "all experts are alike"
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
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
    oracle.check(masters(engine, rename))
    train_mixture(engine, range(1))
    held = sum(share.numel for share in ema._average.shares if share.mode == "average")
    full = sum(value.numel() for name, value in oracle.average.items() if name in oracle.trained)
    assert held <= full / world_size + 40, "the average is not spread"


@pytest.mark.world_size(2)
def test_what_only_its_layers_know_is_refused() -> None:
    """Experts in a group that all ranks share, and modules without their engine: one rank's would stand for all."""
    engine = make_mixture(0, "fp32")
    for target in (engine.module, engine.module.moe):
        with pytest.raises(EMAEngineError, match=r"other experts under that name.*pass the engine"):
            ShardedEMA(target)
    parameter = next(iter(engine.module.moe.deepspeed_moe.experts.parameters()))
    for engine in (make_mixture(0, "fp32"), make_mixture(1, "bf16")):
        engine.module.up.weight.allreduce, engine.module.up.weight.group_name = False, parameter.group_name
        with pytest.raises(EMAEngineError, match="AutoEP"):
            ShardedEMA(engine)
    engine = make_mixture(1, "bf16")
    for group in range(len(engine.optimizer.real_dp_process_group)):
        engine.optimizer.real_dp_process_group[group] = engine.seq_data_parallel_group
    with pytest.raises(EMAEngineError, match="split_params_into_different_moe_groups"):
        ShardedEMA(engine)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.world_size(2)
def test_tensor_parallel_layers_of_deepspeed_are_refused(stage: int) -> None:
    """AutoTP keeps biases divided by the number of ranks, and every rank's pieces have one name."""
    import deepspeed
    from deepspeed.utils import groups

    reset_deepspeed()
    deepspeed.init_distributed("gloo", dist_init_required=False)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage},
        "tensor_parallel": {
            "autotp_size": 2,
            "partition_config": {
                "use_default_specs": False,
                "layer_specs": [
                    {"patterns": ["0\\.weight$"], "partition_type": "column"},
                    {"patterns": ["1\\.weight$"], "partition_type": "row"},
                ],
            },
        },
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
    try:
        assert engine.module[0].weight.shape == (4, 4), "nothing was cut"
        with pytest.raises(EMAEngineError, match=r"AutoTP.*autotp_size"):
            ShardedEMA(engine)
        with pytest.raises(EMAEngineError, match="AutoTP.*pass the engine" if stage == 0 else "pass the engine"):
            ShardedEMA(engine.module)
    finally:
        groups._release_process_group_references()


@pytest.mark.world_size(4)
def test_a_pipeline_whose_stages_are_cut_is_refused() -> None:
    """Which part of a layer a rank has only the layer knows."""
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    reset_deepspeed()
    deepspeed.init_distributed("gloo", dist_init_required=False)
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    model = PipelineModule(list(Layers()), topology=topology, loss_fn=nn.MSELoss(), partition_method="uniform")
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.3}}}
    engine = deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]
    with pytest.raises(EMAEngineError, match=r"axis 'model'.*'pipe' and 'data'"):
        ShardedEMA(engine)
