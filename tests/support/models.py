"""Models that break averages, and the ways to shard them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

WIDTH = 15


class Block(nn.Module):
    """15 -> 7 -> 15: rows that no world size divides. (Tensor parallelism itself wants a width that it can divide.)"""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, hidden)
        self.down = nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Uneven(nn.Module):
    """Rows of 1, 5, 7 and 15, a tied pair, a frozen part, BatchNorm and other buffers, a 0-d parameter if wanted.

    On two ranks and more, the tensors of one row leave a rank with an empty shard.
    """

    def __init__(self, scalar: bool = True, frozen: bool = True, hidden: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, WIDTH)
        self.module = nn.ModuleList([Block(hidden), Block(hidden)])  # a user's own attribute called "module"
        self.norm = nn.BatchNorm1d(WIDTH)
        self.one = nn.Linear(WIDTH, 1, bias=False)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(not frozen)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5)) if scalar else None
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("steps", torch.tensor(3, dtype=torch.int64))
        self.register_buffer("cache", torch.ones(4), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.module:
            x = block(x)
        x = self.frozen(self.norm(x))
        y = self.head(x) + self.one(x)
        return y * self.scale if self.scale is not None else y


def build(scalar: bool = True, frozen: bool = True, hidden: int = 7) -> Uneven:
    """The same weights on every rank and in every run."""
    generator = torch.Generator().manual_seed(7)
    model = Uneven(scalar, frozen, hidden)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def batch(step: int) -> Tensor:
    """The same tokens on every rank, so that every world size sees the same gradients up to rounding."""
    return torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(step))


@dataclass
class Case:
    """A way to shard the uneven model."""

    wrap: Callable[[nn.Module], nn.Module]
    scalar: bool = True
    hidden: int = 7
    group_sizes: Iterable[int] = (1, 2, 3, 4)

    def plain(self) -> Uneven:
        """The unwrapped model."""
        return build(self.scalar, hidden=self.hidden)

    def model(self) -> nn.Module:
        """The wrapped one."""
        return self.wrap(self.plain())


def _fsdp1(strategy: ShardingStrategy, use_orig_params: bool, mixed: bool = False) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        options: dict = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
        if mixed:
            model.norm = FSDP(model.norm, sharding_strategy=strategy, **options)  # its buffers are fp32
            model.norm.register_forward_hook(lambda _module, _inputs, output: output.bfloat16())
            model.norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
            options["mixed_precision"] = MixedPrecision(torch.bfloat16, torch.float32)
        if strategy is ShardingStrategy.HYBRID_SHARD:
            options["device_mesh"] = init_device_mesh("cpu", _replicate_by_shard(), mesh_dim_names=("rep", "shard"))
        for index, block in enumerate(model.module):
            model.module[index] = FSDP(block, sharding_strategy=strategy, **options)
        if not use_orig_params:  # a flat parameter is trained or frozen as one
            model.frozen = FSDP(model.frozen, sharding_strategy=strategy, **options)
        return FSDP(model, sharding_strategy=strategy, **options)

    return wrap


def _replicate_by_shard() -> tuple[int, int]:
    size = dist.get_world_size()
    return (2, size // 2) if size % 2 == 0 else (size, 1)


def _fsdp2(mixed: bool = False, **options: object) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if mixed:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            exact = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.bfloat16)
            fully_shard(model.norm, mesh=mesh, mp_policy=exact)  # its buffers are fp32
        for block in model.module:
            fully_shard(block, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    return wrap


def _hsdp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", _replicate_by_shard(), mesh_dim_names=("replicate", "shard"))
    for block in model.module:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _tensor_parallel(model: nn.Module, tp: int, with_fsdp: bool) -> nn.Module:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // tp, tp), mesh_dim_names=("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.module:
        parallelize_module(block, mesh["tp"], plan)
        if with_fsdp:
            fully_shard(block, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"]) if with_fsdp else model


def _compiled(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """Compiled twice: a block in place of the block, and the wrapped whole."""

    def compiled(model: nn.Module) -> nn.Module:
        wrapped = wrap(model)
        inner = wrapped.module if isinstance(wrapped, (DDP, FSDP)) else wrapped
        inner.module[0] = torch.compile(inner.module[0], backend="eager")
        return torch.compile(wrapped, backend="eager")

    return compiled


def _checkpointed(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    """With activation checkpointing inside of the wrapper."""

    def checkpointed(model: nn.Module) -> nn.Module:
        model.module[1] = checkpoint_wrapper(model.module[1])
        return wrap(model)

    return checkpointed


CASES: dict[str, Case] = {
    "plain": Case(lambda model: model),
    "plain-compiled": Case(_compiled(lambda model: model), group_sizes=(1,)),
    "ddp": Case(DDP),
    "ddp-compiled": Case(_compiled(DDP), group_sizes=(2,)),
    "ddp-checkpointed": Case(_checkpointed(DDP), group_sizes=(2,)),
    "fsdp1-full": Case(_fsdp1(ShardingStrategy.FULL_SHARD, False), scalar=False),
    "fsdp1-full-orig": Case(_fsdp1(ShardingStrategy.FULL_SHARD, True), scalar=False),
    "fsdp1-full-mixed": Case(_fsdp1(ShardingStrategy.FULL_SHARD, False, True), scalar=False, group_sizes=(1, 2)),
    "fsdp1-grad-op-orig-mixed": Case(
        _fsdp1(ShardingStrategy.SHARD_GRAD_OP, True, True), scalar=False, group_sizes=(2, 3)
    ),
    "fsdp1-grad-op": Case(_fsdp1(ShardingStrategy.SHARD_GRAD_OP, False), scalar=False),
    "fsdp1-grad-op-orig": Case(_fsdp1(ShardingStrategy.SHARD_GRAD_OP, True), scalar=False),
    "fsdp1-hybrid": Case(_fsdp1(ShardingStrategy.HYBRID_SHARD, False), scalar=False, group_sizes=(2, 4)),
    "fsdp1-hybrid-orig": Case(_fsdp1(ShardingStrategy.HYBRID_SHARD, True), scalar=False, group_sizes=(2, 4)),
    "fsdp1-no-shard-orig": Case(_fsdp1(ShardingStrategy.NO_SHARD, True), scalar=False, group_sizes=(1, 2)),
    "fsdp1-full-orig-compiled": Case(
        _compiled(_fsdp1(ShardingStrategy.FULL_SHARD, True)), scalar=False, group_sizes=(2,)
    ),
    "fsdp1-full-checkpointed": Case(
        _checkpointed(_fsdp1(ShardingStrategy.FULL_SHARD, False)), scalar=False, group_sizes=(2,)
    ),
    "fsdp2": Case(_fsdp2(), scalar=False),
    "fsdp2-compiled": Case(_compiled(_fsdp2()), scalar=False, group_sizes=(2,)),
    "fsdp2-checkpointed": Case(_checkpointed(_fsdp2()), scalar=False, group_sizes=(2,)),
    "fsdp2-offloaded": Case(
        _fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False)), scalar=False, group_sizes=(2, 3)
    ),
    "fsdp2-keep": Case(_fsdp2(reshard_after_forward=False), scalar=False),
    "fsdp2-mixed": Case(_fsdp2(mixed=True), scalar=False),
    "hsdp": Case(_hsdp, scalar=False),
    "tp": Case(lambda model: _tensor_parallel(model, dist.get_world_size(), False), hidden=12),
    "fsdp2-tp": Case(lambda model: _tensor_parallel(model, 2, True), scalar=False, hidden=12, group_sizes=(2, 4)),
}


def live_weights(model: nn.Module) -> dict[str, Tensor]:
    """Full live weights by another way than the library's: FSDP1's summoned ones, else torch's full state dict.

    The latter gives them to rank 0 and nothing to the others.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
            state = {_plain_name(name): value.detach().clone() for name, value in tensors}
        return {name: state[name] for name in build(scalar=False).state_dict()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return {_plain_name(name): value.clone() for name, value in get_model_state_dict(model, options=options).items()}


def _plain_name(name: str) -> str:
    for token in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        name = name.replace(token, "")
    return name
