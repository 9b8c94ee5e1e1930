"""The only place that knows engines: spreads the model, and says how a step is made under each."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from demo import state
from demo.extension_lock import warn_of_locks
from demo.gpt import GPT, Block
from demo.options import Options

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Wrapped:
    """A model under an engine.

    Attributes:
        model: the wrapper, or DeepSpeed's engine: what :class:`dist_ema.ShardedEMA` is given.
        forward: tokens ``[batch, time]`` to logits ``[batch, time, 256]``; collective.
        backward: takes the loss; collective.
        step: steps the optimizer and clears the gradients.
        save: writes weights and optimizer states into a folder that does not exist; collective.
        load: reads them back, into a model that was just made; collective.
        data_rank: which part of the data this process trains on; equal within a tensor-parallel group.
        data_size: how many parts there are.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], object]
    step: Callable[[], object]
    save: Callable[[Path], object]
    load: Callable[[Path], object]
    data_rank: int
    data_size: int


@contextmanager
def process_group() -> Iterator[torch.device]:
    """This process's device, within the process group: the caller's, torchrun's, or one of a single process.

    A GPU, if there is one; the CPU in a caller's group that has no backend for GPUs but gloo.
    """
    ours = not dist.is_initialized()
    cuda = torch.cuda.is_available() and (ours or "nccl" in str(dist.get_backend_config()))
    if ours and "RANK" not in os.environ:  # plain ``python launch/train.py``; port 0 is any free one
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.accelerator.set_device_index(device)
    if ours:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore(f"restart-{_restarts()}", store),
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=device if cuda else None,
        )
    yield device
    if ours:  # not after an error: other ranks may be inside a collective call, and this would wait for them
        dist.destroy_process_group()


def _restarts() -> str:
    """How often torchrun has started these processes again.

    All starts share one store, so that without it a process may find the addresses of processes that are gone. Agents
    of several nodes count differently: launch/multi_node.sh makes torchrun use a store for each start instead.
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"


def plain(options: Options, device: torch.device) -> GPT:
    """The unsharded model, with the same initial weights on every rank."""
    torch.manual_seed(options.seed)
    return GPT(options.layers, options.width, options.heads, options.context).to(device)


def wrap(options: Options, device: torch.device, universal: bool = False) -> Wrapped:
    """The model under ``options.engine``. Collective.

    Args:
        options: what to make.
        device: of this process.
        universal: ``load`` will be given DeepSpeed's universal checkpoint, which its engine has to know beforehand.
    """
    gpt = plain(options, device)
    if options.engine.startswith("zero"):
        return _deepspeed(gpt, options, universal, device)
    data_rank, data_size = dist.get_rank(), dist.get_world_size()
    model: nn.Module = gpt
    if options.engine == "ddp":
        model = nn.parallel.DistributedDataParallel(gpt)
    elif options.engine == "fsdp1":
        model = _fsdp1(gpt, options, device)
    else:
        mesh = _mesh(options, device)
        if options.engine == "tp":
            _parallelize(gpt, mesh["tensor"])
            mesh = mesh["data"]
            data_rank, data_size = mesh.get_local_rank(), mesh.size()
        _fsdp2(gpt, options, mesh)
    optimizer = adamw(model, options)

    def forward(tokens: Tensor) -> Tensor:
        # FSDP casts by its own mixed precision; DDP leaves that to autocast.
        with torch.autocast(
            device.type, torch.bfloat16, enabled=options.engine == "ddp" and options.precision == "bf16"
        ):
            logits: Tensor = model(tokens)
        return logits

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def save(path: Path) -> None:
        state.save(model, optimizer, path)

    def load(path: Path) -> None:
        state.load(model, optimizer, path)
        if options.engine == "ddp":
            # After its first backward DDP groups the gradients anew, and among three processes or more the groups
            # decide in which order is summed. The interrupted run had that behind it: a backward that counts nothing.
            nothing = forward(torch.zeros(1, options.context, dtype=torch.int64, device=device)).sum()
            torch.autograd.backward(nothing)
            optimizer.zero_grad()

    return Wrapped(model, forward, Tensor.backward, step, save, load, data_rank, data_size)


def adamw(model: nn.Module, options: Options) -> torch.optim.Optimizer:
    """The optimizer of every engine, over the parameters that this rank holds."""
    # A plain float: the type that checks options would go into the checkpoints.
    return torch.optim.AdamW(model.parameters(), lr=float(options.lr), betas=(0.9, 0.95), weight_decay=0.1)


def _fsdp1(model: nn.Module, options: Options, device: torch.device) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    bf16 = MixedPrecision(torch.bfloat16, torch.float32) if options.precision == "bf16" else None
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        mixed_precision=bf16,
        device_id=device,
        use_orig_params=True,
    )


def _mesh(options: Options, device: torch.device) -> DeviceMesh:
    """One dimension for fsdp2; two for hsdp (copies of the model, shards) and tp (shards, tensor parallel)."""
    size = dist.get_world_size()
    if options.engine == "hsdp":
        replicas = options.replica_count(size)
        return init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    if options.engine == "tp":
        tensor = options.tensor_parallel_size(size)
        return init_device_mesh(device.type, (size // tensor, tensor), mesh_dim_names=("data", "tensor"))
    return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))


def _fsdp2(model: GPT, options: Options, mesh: DeviceMesh) -> None:
    """Shards each block, then the rest, in place."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    policy = bf16 if options.precision == "bf16" else MixedPrecisionPolicy()
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)


def _parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Tensor parallelism with sequence parallel norms, in place: the plan of PyTorch's tutorial."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    gather = functools.partial(
        PrepareModuleInput, input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),), use_local_output=True
    )
    plan: dict[str, ParallelStyle] = {
        "token": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "position": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for index in range(len(model.blocks)):
        block = f"blocks.{index}"
        plan |= {f"{block}.{norm}": SequenceParallel() for norm in ("norm1", "norm2")}
        plan |= {f"{block}.{part}": gather() for part in ("attention", "mlp")}
        plan |= {f"{block}.attention.{part}": ColwiseParallel() for part in ("query", "key", "value")}
        plan |= {f"{block}.mlp.up": ColwiseParallel()}
        plan |= {f"{block}.{part}": RowwiseParallel(output_layouts=Shard(1)) for part in ("attention.out", "mlp.down")}
    parallelize_module(model, mesh, plan)
    # True of the last layer's output, and harmless: nothing writes into the logits in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


def _deepspeed(model: nn.Module, options: Options, universal: bool, device: torch.device) -> Wrapped:
    cpu = device.type == "cpu"
    if cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no other
    import deepspeed

    if cpu:  # a faster all-reduce within a node, which would first be compiled for two minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.logger.setLevel(logging.WARNING)
    # DeepSpeed calls them at every step; that torch renames them is not for users of this script to mend.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    config = options.deepspeed_config()
    config["train_micro_batch_size_per_gpu"] = options.batch // dist.get_world_size()
    config["checkpoint"] = config.get("checkpoint", {}) | {"load_universal": universal}
    if options.precision == "bf16":
        config["bf16"] = {"enabled": True}
    warn_of_locks()
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model, options), config=config)

    def save(path: Path) -> None:
        engine.save_checkpoint(str(path.parent), tag=path.name, save_latest=False)

    def load(path: Path) -> None:
        loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise FileNotFoundError(f"{path}: DeepSpeed finds no checkpoint there")

    return Wrapped(engine, engine, engine.backward, engine.step, save, load, dist.get_rank(), dist.get_world_size())
