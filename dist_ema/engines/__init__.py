"""Chooses the engine for the user's model. Only this package knows the wrappers of torch, DeepSpeed and trainers.

========================  ===================  ===================================================================
model                     engine               a rank averages
========================  ===================  ===================================================================
plain ``nn.Module``       ``plain.py``         every tensor whole
DDP                       ``ddp.py``           a share of every trained parameter, which all ranks hold whole
FSDP1                     ``fsdp1.py``         its piece of each flat parameter
FSDP2, HSDP, TP, mixed    ``dtensor.py``       the local part of each DTensor; under HSDP a share of it
DeepSpeed                 ``deepspeed/``       its part of the fp32 masters (ZeRO-1 to 3), a share of them (ZeRO-0)
list, pipeline stages     ``pipeline.py``      what the engines of the parts average
``masters=optimizer``     ``masters.py``       the optimizer's masters, in the layout of the parameters
========================  ===================  ===================================================================

``base.py`` has the interface of engines and the order of its calls. ``binding.py`` notices replaced parameters,
``names.py`` makes canonical names, and ``wrappers.py`` takes trainers' wrappers off.
"""

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
    """Returns the engine for the user's model, which may be wrapped. Local.

    Raises EMAEngineError if the model cannot be averaged.
    """
    if isinstance(target, Sequence) and not isinstance(target, (str, bytes)):
        if len(target) == 0:
            raise EMAEngineError(f"the list of modules is empty; pass {_KNOWN}")
        return CompositeEngine([detect(module) for module in target])
    stage = stage_module(target)
    if stage is not None:
        return CompositeEngine([detect(stage)])  # other ranks have other stages, as with a list of one module
    target = unwrap_module(target)
    if isinstance(target, loaded("deepspeed", "DeepSpeedEngine")):
        from dist_ema.engines.deepspeed.zero import ZeroEngine

        return ZeroEngine(target)
    if not isinstance(target, nn.Module):
        hint = ": pass the model itself" if hasattr(target, "parameters") or callable(target) else ""
        raise EMAEngineError(f"cannot average a {type(target).__name__}{hint}; pass {_KNOWN}")
    return _detect_module(target)


def detect_in(target: object, group: object, *, trains: bool = True) -> Engine:
    """Returns the engine for a model that the ranks of ``group`` hold. Local.

    Raises EMAConfigError if ``group`` is no process group with this rank, and EMAEngineError if the model is spread
    over ranks outside of it.

    Args:
        target: the model, as for :func:`detect`.
        group: a process group; None means all ranks.
        trains: False for a model that is not trained. It may then be a DeepSpeed engine of ZeRO-3 without an optimizer.
    """
    engine = detect(target) if trains else _detect_untrained(target)
    if group is None:
        return engine
    if not isinstance(group, dist.ProcessGroup):
        allowed = (
            "allowed are None and a torch.distributed.ProcessGroup, such as dist.new_group(...) or mesh.get_group()"
        )
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            allowed = "this rank is not a member of that group, so it must not make an average of its model"
        raise EMAConfigError(f"group={group!r}: {allowed}")
    members = dist.get_process_group_ranks(group)
    others = sorted(engine.ranks() - set(members))
    if others:
        raise EMAEngineError(
            f"group= has the ranks {members}, but the model is also spread over ranks {others[:8]}: pass a group of "
            "all ranks that hold a part of the model"
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
    """Returns the engine for a module. Raises EMAEngineError if it mixes wrappers. Local."""
    # Step 1: which wrappers are there?
    modules = list(model.modules())
    wrapper = next((module for module in modules if isinstance(module, DistributedDataParallel)), None)
    flat = any(isinstance(module, loaded("torch.distributed.fsdp", "FullyShardedDataParallel")) for module in modules)
    dtensor = loaded("torch.distributed.tensor", "DTensor")
    sharded = any(isinstance(tensor, dtensor) for tensor in chain(model.parameters(), model.buffers()))
    if not sharded and "torch.distributed.fsdp" in sys.modules:
        from dist_ema.engines.dtensor import units_of

        # After a forward pass FSDP2's parameters may be plain tensors, but its units are still there.
        sharded = bool(units_of(model))

    # Step 2: refuse a mixture. FSDP1 over DTensors has its own error in fsdp1.py, which tells what to use.
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

    # Step 3: make the engine.
    if wrapper is not None:
        if not any(module is wrapper for module in _wrapper_chain(model)):
            raise EMAEngineError("DistributedDataParallel wraps only a part of the model: wrap all of it")
        return DataParallelEngine(model, wrapper)
    # These files import torch.distributed.fsdp and torch.distributed.tensor, which takes longer than the rest of the
    # library. So they are imported only for models that use them.
    if flat:
        from dist_ema.engines.fsdp1 import FlatParamEngine

        return FlatParamEngine(model)
    if sharded:
        from dist_ema.engines.dtensor import DTensorEngine

        return DTensorEngine(model)
    return PlainEngine(model)


def _wrapper_chain(model: nn.Module) -> list[nn.Module]:
    """Returns the model and the modules that it wraps (torch.compile around DDP), from the outside to the inside.

    Ends at the first module that has several children or none.
    """
    wrapped = [model]
    children = list(unwrap_module(model).children())
    while len(children) == 1:
        wrapped.append(unwrap_module(children[0]))
        children = list(wrapped[-1].children())
    return wrapped
