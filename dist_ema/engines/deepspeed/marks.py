"""Recognises modules that DeepSpeed trains and that were given without their engine.

``accelerator.unwrap_model()`` and ``engine.module`` give such modules. Their own weights are empty (ZeRO-3), bf16 or
fp16 copies of fp32 masters, or overwritten by masters at the next step (ZeRO-1 and 2), and experts and tensor-parallel
pieces of different ranks have one name. Read in deepspeed 0.19.8: runtime/engine.py,
runtime/zero/partition_parameters.py, utils/mixed_precision_linkage.py, utils/debug.py, moe/experts.py and
module_inject/layers.py. DeepSpeed is never imported, so a run without it pays nothing.
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

#: Attributes that ZeRO-3 and ``zero.Init`` put on a parameter, and ZeRO-1, ZeRO-2 and BF16_Optimizer.
_PARTITIONED = frozenset({"ds_id", "_hp_mapping"})
#: One that AutoTP puts on a parameter of which this rank holds a piece.
_TENSOR_PARALLEL = "ds_autotp_universal_checkpoint_meta"
_ADVICE = (
    "pass the engine that deepspeed.initialize() or accelerator.prepare() returned, and not its module (which is what "
    "unwrap_model() gives)"
)


class Unwrapped:
    """Finds out whether DeepSpeed trains a module, or a part of it, or a module of which it is a part.

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

        Warns where they are, but the engine would know more of them.
        """
        if "deepspeed" not in sys.modules:
            return
        why = self._kept_elsewhere() or self._cut_by_rank()
        if why is not None:
            raise EMAEngineError(f"{why}: {_ADVICE}")
        if any(True for _ in self._engines()):
            logger.warning(
                "The module belongs to a DeepSpeed engine, which trains the module's own weights. Its average is whole "
                "on every rank, and update() counts every call as a step: to share the average between ranks, and to "
                "count real steps only, %s.",
                _ADVICE,
            )

    def check(self) -> None:
        """Raises EMAStateError if DeepSpeed has taken the module since. Local; called at every update."""
        if "deepspeed" in sys.modules:
            why = self._kept_elsewhere()
            if why is not None:
                raise EMAStateError(f"{why}, to which the module was given after the average was made: {_ADVICE}")

    def _kept_elsewhere(self) -> str | None:
        """Says why the weights are not the module's own, if so. No loop in Python over parameters or modules."""
        if not all(map(_PARTITIONED.isdisjoint, map(vars, self._parameters))):
            name = next(name for name, tensor in self._named if not _PARTITIONED.isdisjoint(vars(tensor)))
            return f"the weights of parameter {name!r} are kept by DeepSpeed's ZeRO"
        engines = list(self._engines())
        if any(map(_has_masters, engines)):
            return "the module's weights are copies of masters that a DeepSpeed engine keeps"
        if not engines and self._is_part_of_the_last_engine():
            return "the module is a part of one whose weights are copies of masters that a DeepSpeed engine keeps"
        return None

    def _engines(self) -> Iterator[Any]:
        """Yields the engines of which the module, or one inside of it, is the module."""
        kind = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
        if kind is None:
            return
        for module in filter(attrgetter("_forward_pre_hooks"), self._modules):
            for hook in module._forward_pre_hooks.values():
                # Every engine leaves one that is a closure over it.
                if getattr(hook, "__module__", None) == "deepspeed.runtime.engine":
                    for cell in getattr(hook, "__closure__", None) or ():
                        engine = cell.cell_contents
                        # A deep copy of the module has the hooks, but weights of its own.
                        if isinstance(engine, kind) and engine.module is module:
                            yield engine

    def _is_part_of_the_last_engine(self) -> bool:
        """At stage 0, parameters have no mark at all. DeepSpeed knows the names of those of the engine made last."""
        names = getattr(sys.modules.get("deepspeed.utils.debug"), "param_names", ())
        trained = self._trained
        return trained is not None and trained.dtype in (torch.bfloat16, torch.float16) and trained in names

    def _cut_by_rank(self) -> str | None:
        """Says why other ranks hold other tensors under the names of this rank, if they do."""
        for name, tensor in self._named:
            if is_expert(tensor):
                return f"parameter {name!r} is of an expert, and other ranks have other experts of that name"
            if _TENSOR_PARALLEL in vars(tensor):
                return f"parameter {name!r} is this rank's piece of one that DeepSpeed's AutoTP has cut"
        return None


def is_expert(parameter: Tensor) -> bool:
    """Returns whether a parameter belongs to an expert of DeepSpeed's MoE layers:
    ``deepspeed.moe.utils.is_moe_param``.
    """
    return not getattr(parameter, "allreduce", True) and hasattr(parameter, "group_name")


def _has_masters(engine: Any) -> bool:
    stage = int(engine.zero_optimization_stage())
    return stage > 0 or len(find_masters(engine.optimizer, stage).flats()) > 0
