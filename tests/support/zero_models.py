"""DeepSpeed engines for tests, on CPU, in worker processes that see many process groups one after the other."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from demo.extension_lock import warn_of_locks
from dist_ema.engines.base import Engine

os.environ["DS_ACCELERATOR"] = "cpu"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: In stage 3, parameters with at most so many elements stay gathered; Net has smaller and larger ones.
THRESHOLD = 20


class Net(nn.Module):
    """Rows 1, 5, 7, 15; a tied pair, a frozen layer, BatchNorm buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(15, 7)
        self.up = nn.Linear(7, 15)
        self.norm = nn.BatchNorm1d(15, affine=False)
        self.frozen = nn.Linear(15, 5)
        self.down = nn.Linear(5, 7, bias=False)
        self.one = nn.Linear(7, 1)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.head = nn.Linear(7, 15, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.down(torch.tanh(self.frozen(self.norm(torch.tanh(self.up(self.embed(tokens)))))))
        return self.head(hidden) * self.scale + self.one(hidden)


def reset_deepspeed() -> None:
    """Forgets the process groups of earlier tests, which deepspeed 0.19.8 keeps beyond destroy_process_group()."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm import comm
    from deepspeed.runtime import config
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # A shared-memory all-reduce that would be compiled for two minutes and only serves as a faster one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config.DeepSpeedConfig.print = lambda *_: None  # which formats all of it, whether or not anyone is shown it
    comm.cdb = None
    groups._release_process_group_references()
    groups.mesh_device = None
    # Ranks compare these running numbers, and not every rank takes part in every test.
    parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    partition_parameters.Init.param_id = 0
    parameter_offload.FWD_MODULE_STACK.clear()
    # Stage 3 puts another F.linear into torch for good. Where not all ranks have it, their gradients become ready in
    # different orders, and stage 2 adds up those of different parameters.
    inserted = partition_parameters.InsertPostInitMethodToModuleSubClasses
    torch.nn.functional.linear = getattr(inserted, "linear_bk", torch.nn.functional.linear)
    accelerator = get_accelerator()
    assert accelerator.device_name() == "cpu"
    # It says yes only where oneDNN has fp16 matrix products (AVX512-FP16, AMX). torch computes in fp16 on any CPU.
    accelerator.is_fp16_supported = lambda: True


def make_engine(
    stage: int,
    dtype: str = "fp32",
    *,
    model: nn.Module | None = None,
    offload: bool = False,
    gas: int = 1,
    optimizer: Any = "adam",
    zero: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A DeepSpeed engine around ``model`` (a seeded Net), the same on every rank."""
    import deepspeed

    reset_deepspeed()
    warn_of_locks()
    if model is None:
        torch.manual_seed(7)
        model = Net()
    optimization: dict[str, Any] = {"stage": stage, "stage3_param_persistence_threshold": THRESHOLD, **(zero or {})}
    if offload:
        optimization["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": gas,
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **options,
    }
    if dtype == "bf16":
        config.setdefault("bf16", {"enabled": True})
    if dtype == "fp16":
        config.setdefault("fp16", {"enabled": True, "initial_scale_power": 8})
    if optimizer == "adam":
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def adam_in_two_groups(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Matrices with weight decay and the rest without, as usual; frozen parameters are left in."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() <= 1]
    return torch.optim.AdamW([{"params": others, "weight_decay": 0.0}, {"params": matrices}], lr=0.02)


def plain_fused_adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Makes DeepSpeed choose FP16_Optimizer, as for its FusedAdam, without compiling that one's kernel."""
    from deepspeed.ops.adam import FusedAdam

    class Plain(FusedAdam):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            torch.optim.Optimizer.__init__(self, parameters, {"lr": 0.05})

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.sub_(parameter.grad, alpha=group["lr"])

        def zero_grad(self) -> None:
            torch.optim.Optimizer.zero_grad(self)

    return Plain([parameter for parameter in parameters if parameter.requires_grad])


def batch(step: int, rank: int) -> Tensor:
    """Four tokens that differ from rank to rank and step to step."""
    return torch.randint(0, 15, (4,), generator=torch.Generator().manual_seed(100 * step + rank))


def backward(engine: Any, step: int, factor: float = 1.0) -> None:
    """Forward and backward of one micro-batch."""
    output = engine(batch(step, dist.get_rank()))
    engine.backward(output.float().square().mean() * factor)


def train(engine: Any, steps: range) -> None:
    """Steps of training with a batch of their own each."""
    for step in steps:
        backward(engine, step)
        engine.step()


def assembled(engine: Engine) -> dict[str, Tensor]:
    """Full fp64 tensors put together from every rank's runs; checks that no element is missing or held twice."""
    full = {}
    for spec, source in zip(engine.specs(), engine.sources(), strict=True):
        held = source.reshape(-1).double()
        value, times = torch.zeros(spec.numel, dtype=torch.float64), torch.zeros(spec.numel)
        position = 0
        for start, length in spec.runs:
            value[start : start + length] = held[position : position + length]
            times[start : start + length] += 1
            position += length
        assert position == held.numel() == spec.local_numel, spec
        if spec.partitioned and (spec.replicas is None or spec.replicas.index == 0):
            dist.all_reduce(value)
            dist.all_reduce(times)
        elif spec.replicas is not None:
            dist.all_reduce(torch.zeros_like(value)), dist.all_reduce(torch.zeros_like(times))
            times.fill_(1)
        assert bool((times == 1).all()), (spec, times)
        full[spec.name] = value.view(spec.shape)
    return full
