"""Chooses the engine of a target. Only this package knows wrappers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import chain

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema.engines.base import Attached, Engine, RemovableHandle
from dist_ema.engines.ddp import DataParallelEngine
from dist_ema.engines.pipeline import CompositeEngine
from dist_ema.engines.plain import PlainEngine
from dist_ema.engines.wrappers import loaded, stage_module, unwrap_module
from dist_ema.errors import EMAConfigError, EMAEngineError

__all__ = ["Attached", "Engine", "RemovableHandle", "detect", "detect_in"]

_KNOWN = (
    "an nn.Module (plain, DDP, FSDP, fully_shard, tensor parallel), a DeepSpeed engine, a pipeline stage, or a list of "
    "modules or stages"
)


def detect(target: object) -> Engine:
    """Returns the engine for what the user trains. Local. Raises EMAEngineError for anything that cannot be
    averaged.
    """
    if isinstance(target, Sequence) and not isinstance(target, (str, bytes)):
        if len(target) == 0:
            raise EMAEngineError(f"the list of modules is empty; pass {_KNOWN}")
        return CompositeEngine([detect(module) for module in target])
    stage = stage_module(target)
    if stage is not None:
        return CompositeEngine([detect(stage)])  # one of several, as a list of one is
    target = unwrap_module(target)
    if isinstance(target, loaded("deepspeed", "DeepSpeedEngine")):
        from dist_ema.engines.deepspeed.zero import ZeroEngine

        return ZeroEngine(target)
    if not isinstance(target, nn.Module):
        hint = ": pass the model itself" if hasattr(target, "parameters") or callable(target) else ""
        raise EMAEngineError(f"cannot average a {type(target).__name__}{hint}; pass {_KNOWN}")
    return _detect_module(target)


def detect_in(target: object, group: object, *, trains: bool = True) -> Engine:
    """Returns the engine for a model that the ranks of ``group`` hold; None means all ranks. Local.

    One that is not to be trained (``trains=False``) may be a DeepSpeed engine of ZeRO-3 without an optimizer.

    Raises EMAConfigError for what is no group of this rank's, and EMAEngineError for a model that is spread over ranks
    outside of it.
    """
    engine = detect(target) if trains else _detect_untrained(target)
    if group is None:
        return engine
    if not isinstance(group, dist.ProcessGroup):
        allowed = (
            "allowed are None and a torch.distributed.ProcessGroup, such as dist.new_group(...) or mesh.get_group()"
        )
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            allowed = "this rank is not a member of it, and has no part in an average of its model"
        raise EMAConfigError(f"group={group!r}: {allowed}")
    members = dist.get_process_group_ranks(group)
    if others := sorted(engine.ranks() - set(members)):
        raise EMAEngineError(
            f"group= has the ranks {members}, but the model is spread over ranks {others[:8]} too: pass a group of all "
            "ranks that hold a part of the model"
        )
    engine.group = group
    return engine


def _detect_untrained(target: object) -> Engine:
    target = unwrap_module(target)
    if isinstance(target, loaded("deepspeed", "DeepSpeedEngine")):
        from dist_ema.engines.deepspeed.untrained import UntrainedZeroEngine, is_untrained

        if is_untrained(target):
            return UntrainedZeroEngine(target)
    return detect(target)


def _detect_module(model: nn.Module) -> Engine:
    modules = list(model.modules())
    wrapper = next((module for module in modules if isinstance(module, DistributedDataParallel)), None)
    flat = any(isinstance(module, loaded("torch.distributed.fsdp", "FullyShardedDataParallel")) for module in modules)
    dtensor = loaded("torch.distributed.tensor", "DTensor")
    sharded = any(isinstance(tensor, dtensor) for tensor in chain(model.parameters(), model.buffers()))
    if not sharded and "torch.distributed.fsdp" in sys.modules:
        from dist_ema.engines.dtensor import units_of

        sharded = bool(units_of(model))  # whose weights may be whole at the moment
    found = [
        name
        for name, present in (
            ("DistributedDataParallel", wrapper is not None),
            ("FullyShardedDataParallel", flat),
            ("DTensor parameters (fully_shard, parallelize_module)", sharded and not flat),
        )
        if present
    ]
    if len(found) > 1:
        raise EMAEngineError(f"the model mixes {' and '.join(found)}: use one of them, or pass the parts as a list")
    if wrapper is not None:
        if not any(module is wrapper for module in _outer(model)):
            raise EMAEngineError("DistributedDataParallel wraps only a part of the model: wrap all of it")
        return DataParallelEngine(model, wrapper)
    # Their files import torch.distributed.fsdp and torch.distributed.tensor, which takes longer than the rest of the
    # library, and are of no use to who has not done so.
    if flat:
        from dist_ema.engines.fsdp1 import FlatParamEngine

        return FlatParamEngine(model)
    if sharded:
        from dist_ema.engines.dtensor import DTensorEngine

        return DTensorEngine(model)
    return PlainEngine(model)


def _outer(model: nn.Module) -> list[nn.Module]:
    """Returns the model and what it wraps, as long as each holds nothing but the next (torch.compile around DDP)."""
    chain = [model]
    while len(children := list(unwrap_module(chain[-1]).children())) == 1:
        chain.append(unwrap_module(children[0]))
    return chain
