"""Recognises modules that DeepSpeed trains and that the user gave without their DeepSpeed engine.

``accelerator.unwrap_model()`` and ``engine.module`` return such modules. To average their weights would be wrong:

- Under ZeRO-3 the weights are empty between uses.
- Under ZeRO-1 and 2 they are copies of masters, which the next step overwrites.
- In bf16 and fp16 at stage 0 they are rounded copies of fp32 masters.
- Experts, and pieces of AutoTP, have the same names on different ranks, but are different tensors.

The private attributes and hooks were read in deepspeed 0.19.8: runtime/engine.py, runtime/zero/partition_parameters.py,
utils/mixed_precision_linkage.py, utils/debug.py, moe/experts.py and module_inject/layers.py. DeepSpeed is never
imported here, so a run without it pays nothing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dist_ema.engines.deepspeed.masters import find_masters
from dist_ema.engines.names import Slot
from dist_ema.errors import EMAEngineError, EMAStateError

logger = logging.getLogger(__name__)

#: Attributes of a parameter that DeepSpeed partitions: ``ds_id`` is set by ZeRO-3 and ``zero.Init``, ``_hp_mapping`` by
#: ZeRO-1, ZeRO-2 and BF16_Optimizer.
_PARTITIONED = frozenset({"ds_id", "_hp_mapping"})
#: The attribute that AutoTP sets on a parameter of which this rank holds a piece.
_TENSOR_PARALLEL = "ds_autotp_universal_checkpoint_meta"
_ADVICE = (
    "pass the engine that deepspeed.initialize() or accelerator.prepare() returned, and not its module (which is what "
    "unwrap_model() gives)"
)


class Unwrapped:
    """Finds out whether DeepSpeed trains a module, a part of it, or a module around it.

    Args:
        model: the module.
        slots: its parameters and buffers.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot]) -> None:
        self._modules = list(model.modules())
        self._named = [
            (slot.name, tensor) for slot in slots if not slot.is_buffer and (tensor := slot.get()) is not None
        ]
        self._parameters = [tensor for _, tensor in self._named]
        self._trained = next((tensor for tensor in self._parameters if tensor.requires_grad), None)

    def refuse(self) -> None:
        """Raises EMAEngineError if the module's own weights are not what DeepSpeed trains. Local.

        Logs a warning if they are (fp32 at stage 0) but the module has an engine.
        """
        if "deepspeed" not in sys.modules:
            return
        reason = self._why_kept_elsewhere() or self._why_different_on_ranks()
        if reason is not None:
            raise EMAEngineError(f"{reason}: {_ADVICE}")
        has_engine = any(True for _ in self._engines())
        if has_engine:
            logger.warning(
                "The module belongs to a DeepSpeed engine, which trains the module's own weights. Its average is whole "
                "on every rank, and update() counts every call as a step: to share the average between ranks, and to "
                "count real steps only, %s.",
                _ADVICE,
            )

    def check(self) -> None:
        """Raises EMAStateError if DeepSpeed has taken the module since. Local; called at every update."""
        if "deepspeed" in sys.modules:
            reason = self._why_kept_elsewhere()
            if reason is not None:
                raise EMAStateError(f"{reason}, to which the module was given after the average was made: {_ADVICE}")

    def _why_kept_elsewhere(self) -> str | None:
        """Returns why the module's own weights are not those that DeepSpeed trains; None if they are. Local.

        Called at every update, so that it has no Python loop over parameters or modules unless something is found.
        """
        if not all(map(_PARTITIONED.isdisjoint, map(vars, self._parameters))):
            name = next(name for name, tensor in self._named if not _PARTITIONED.isdisjoint(vars(tensor)))
            return f"the weights of parameter {name!r} are kept by DeepSpeed's ZeRO"
        engines = list(self._engines())
        if any(map(_has_masters, engines)):
            return "the module's weights are copies of masters that a DeepSpeed engine keeps"
        if not engines and self._is_part_of_last_engine():
            return "the module is part of a model whose weights are copies of masters that a DeepSpeed engine keeps"
        return None

    def _engines(self) -> Iterator[Any]:
        """Yields the DeepSpeed engines that were made of this module or of a module inside of it. Local."""
        kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
        if kind is None:
            return
        for module in filter(attrgetter("_forward_pre_hooks"), self._modules):
            for hook in module._forward_pre_hooks.values():
                # Every engine registers a hook on its module, which is a closure over the engine.
                if getattr(hook, "__module__", None) == "deepspeed.runtime.engine":
                    for cell in getattr(hook, "__closure__", None) or ():
                        engine = cell.cell_contents
                        # A deep copy of the module also has the hook, but its weights are not the engine's.
                        if isinstance(engine, kind) and engine.module is module:
                            yield engine

    def _is_part_of_last_engine(self) -> bool:
        """Returns whether the module has a bf16 or fp16 parameter of the DeepSpeed engine that was made last. Local.

        At stage 0 parameters have no mark. But ``deepspeed.utils.debug`` keeps a map from the last engine's parameters
        to their names.
        """
        last_parameters = getattr(sys.modules.get("deepspeed.utils.debug"), "param_names", ())
        trained = self._trained
        if trained is None or trained.dtype not in (torch.bfloat16, torch.float16):
            return False
        return trained in last_parameters

    def _why_different_on_ranks(self) -> str | None:
        """Returns why other ranks hold other tensors under the same names; None if no mark says so. Local."""
        for name, tensor in self._named:
            if is_expert(tensor):
                return f"parameter {name!r} belongs to an expert, and other ranks have other experts under that name"
            if _TENSOR_PARALLEL in vars(tensor):
                return f"parameter {name!r} is only this rank's piece of a weight that DeepSpeed's AutoTP has cut"
        return None


def is_expert(parameter: Tensor) -> bool:
    """Returns whether a parameter belongs to an expert of DeepSpeed's MoE layers. Local.

    Does the same as ``deepspeed.moe.utils.is_moe_param``, without its import.
    """
    return not getattr(parameter, "allreduce", True) and hasattr(parameter, "group_name")


def _has_masters(engine: Any) -> bool:
    """Returns whether the optimizer of a DeepSpeed engine steps masters instead of the module's weights. Local."""
    stage = int(engine.zero_optimization_stage())
    return stage > 0 or len(find_masters(engine.optimizer, stage).flats()) > 0
