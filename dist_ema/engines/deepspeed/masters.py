"""Finds this rank's fp32 master weights in DeepSpeed's optimizers, and writes them into the model.

Every private attribute of DeepSpeed's optimizers that the library touches is touched here. Read in deepspeed 0.19.8:
runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py, runtime/fp16/fused_optimizer.py and
runtime/fp16/unfused_optimizer.py. DeepSpeed is never imported, so a run without it pays nothing.

Two parameters, a of 5 elements and b of 7, on two ranks. The digit is the rank that masters the element, ``p`` is
padding::

    ZeRO-0      every rank masters all       a [0 0 0 0 0]         b [0 0 0 0 0 0 0]        and the same on rank 1

    ZeRO-1, 2   laid end to end, then cut    a [0 0 0 0 0]         b [0 1 1 1 1 1 1]        one piece a rank
                                                                         ^ rank 0: a, and the first element of b

    ZeRO-3      each parameter is cut        a [0 0 0 1 1 p]       b [0 0 0 0 1 1 1 p]      one piece a rank and
                                                                                            parameter

A rank's masters lie in a few flat fp32 tensors (``flats()``), one a parameter group, or under ZeRO-3 one a sub-group.
``slices()`` says where in them each parameter's piece starts, and which elements of the parameter it is::

    ZeRO-3, rank 1     flat [ a3 a4 p | b4 b5 b6 p ]        a: start 0, runs ((3, 2),)     b: start 3, runs ((4, 3),)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.geometry.runs import Runs, count, whole


@dataclass(frozen=True)
class MasterSlice:
    """This rank's part of one parameter's master weights.

    Attributes:
        flat: which of :meth:`Masters.flats` holds it.
        start: first element there.
        runs: which elements of the parameter they are; empty if this rank masters none of it.
        group: the ranks over which the parameter is partitioned; None if it is not.
    """

    flat: int
    start: int
    runs: Runs
    group: dist.ProcessGroup | None = None


class Masters(ABC):
    """The master weights of one DeepSpeed optimizer."""

    #: True if every rank masters the whole of every parameter.
    replicated = False
    #: True if frozen parameters are partitioned too.
    shards_frozen = False

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @abstractmethod
    def flats(self) -> Sequence[Tensor]:
        """Returns the tensors that hold this rank's master weights. Local."""

    @abstractmethod
    def slices(self) -> dict[int, MasterSlice]:
        """By ``id()`` of the parameter: its master slice, for every parameter that the optimizer trains. Local."""

    @abstractmethod
    def publish(self) -> None:
        """Makes the model compute with what the masters hold. Collective unless ``replicated``."""

    def partition_groups(self) -> Sequence[dist.ProcessGroup | None]:
        """Returns every group over which parameters are partitioned; None is the world. Local."""
        return ()

    def stepped(self) -> frozenset[int] | None:
        """``id()`` of each parameter that the optimizer steps itself, and not a master of it. Local.

        None where there is no optimizer, so that only flags say what is trained.
        """
        return frozenset()

    def check_resident(self) -> None:
        """Raises EMAStateError while ``engine.offload_states()`` keeps the weights elsewhere. Local."""
        away = {getattr(state, "value", str(state)) for state in getattr(self._optimizer, "offloaded_states", ())}
        if away & {"hp_params", "lp_params"}:
            raise EMAStateError(
                f"DeepSpeed has offloaded {sorted(away)}: call engine.reload_states() before the average reads or "
                "writes the weights"
            )


class ReplicatedMasters(Masters):
    """ZeRO stage 0: FP16_Optimizer, FP16_UnfusedOptimizer (which bf16 uses as well), and plain fp32 without masters."""

    replicated = True

    def stepped(self) -> frozenset[int] | None:
        optimizer = self._optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            return None if optimizer is None else frozenset()
        return frozenset(id(param) for group in optimizer.param_groups for param in group["params"])

    def flats(self) -> Sequence[Tensor]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups_flat"):
            flats: Sequence[Tensor] = optimizer.fp32_groups_flat
            return flats
        return [master for group in getattr(optimizer, "fp32_groups", ()) for master in group]

    def slices(self) -> dict[int, MasterSlice]:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups_flat"):
            return {
                id(param): MasterSlice(index, _offset(param, flat), whole(param.numel()))
                for index, (params, flat) in enumerate(
                    zip(optimizer.fp16_groups, optimizer.fp16_groups_flat, strict=True)
                )
                for param in params
            }
        params = [param for group in getattr(optimizer, "fp16_groups", ()) for param in group]
        return {id(param): MasterSlice(index, 0, whole(param.numel())) for index, param in enumerate(params)}

    @torch.no_grad()
    def publish(self) -> None:
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_groups_flat"):
            for live, master in zip(optimizer.fp16_groups_flat, optimizer.fp32_groups_flat, strict=True):
                live.copy_(master)
            return
        params = [param for group in getattr(optimizer, "fp16_groups", ()) for param in group]
        for param, master in zip(params, self.flats(), strict=True):
            param.copy_(master)


class FlatMasters(Masters):
    """ZeRO stages 1 and 2, and BF16_Optimizer: parameters laid end to end, padded, cut into one piece per rank.

    The live weights are views into a full flat buffer on every rank.
    """

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        is_bf16 = hasattr(optimizer, "bf16_groups")
        self._live_name = "bf16_groups" if is_bf16 else "bit16_groups"
        self._master_name = "fp32_groups_flat_partition" if is_bf16 else "single_partition_of_fp32_groups"

    def partition_groups(self) -> Sequence[dist.ProcessGroup | None]:
        groups: Sequence[dist.ProcessGroup | None] = self._optimizer.real_dp_process_group
        return groups

    def flats(self) -> Sequence[Tensor]:
        flats: Sequence[Tensor] = getattr(self._optimizer, self._master_name)
        return flats

    def slices(self) -> dict[int, MasterSlice]:
        optimizer = self._optimizer
        groups = getattr(optimizer, self._live_name)  # lists of parameters, one a parameter group
        buffers = getattr(optimizer, f"{self._live_name}_flat")
        slices: dict[int, MasterSlice] = {}
        for index, (params, buffer) in enumerate(zip(groups, buffers, strict=True)):
            group = optimizer.real_dp_process_group[index]
            size = buffer.numel() // dist.get_world_size(group)  # padded, so that it divides
            low = dist.get_rank(group) * size  # this rank's piece of the buffer is [low, low + size)
            for param in params:
                # Not param._hp_mapping: DeepSpeed 0.19.8 computes it in the order of the param group, but with
                # round_robin_gradients the buffer is laid out in another.
                offset = _offset(param, buffer)
                start = max(offset, low)
                stop = min(offset + param.numel(), low + size)
                runs: Runs = ((start - offset, stop - start),) if start < stop else ()  # counted within the parameter
                slices[id(param)] = MasterSlice(index, start - low if runs else 0, runs, group or dist.group.WORLD)
        return slices

    def publish(self) -> None:
        # The end of the optimizers' own step(): cast into this rank's piece of the live buffer, then all-gather it.
        self._optimizer.update_lp_params()


class Stage3Masters(Masters):
    """ZeRO stage 3: every parameter cut into equal pieces, masters in flat sub-groups of pieces."""

    shards_frozen = True

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
            raise EMAEngineError(
                'offload to device "nvme" keeps the weights in files between steps, where an average cannot read '
                'them: use device "cpu" or "none" in offload_optimizer and offload_param'
            )

    def partition_groups(self) -> Sequence[dist.ProcessGroup | None]:
        return [self._optimizer.dp_process_group, *self._optimizer.sub_group_process_groups]

    def flats(self) -> Sequence[Tensor]:
        flats: Sequence[Tensor] = self._optimizer.fp32_partitioned_groups_flat
        return flats

    def slices(self) -> dict[int, MasterSlice]:
        slices: dict[int, MasterSlice] = {}
        for index, params in enumerate(self._optimizer.fp16_groups):
            start = 0
            # The pieces of a sub-group lie one after the other in its flat tensor.
            for param in params:
                slices[id(param)] = MasterSlice(index, start, stage3_runs(param), param.ds_process_group)
                start += param.ds_tensor.ds_numel  # with its padding, which the masters have as well
        return slices

    def publish(self) -> None:
        optimizer = self._optimizer
        # Parameters that a forward pass left gathered (the persistent ones always, others after a forward without
        # backward) would go on computing with their old full copies.
        optimizer.checkpoint_event_prologue()
        with torch.no_grad():
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        # Gathers the persistent parameters and drops the secondary shards of ZeRO++ hpZ, as _post_step() does, but
        # without clearing the gradients that may be accumulating.
        optimizer.checkpoint_event_epilogue()


def stage3_runs(param: Any) -> Runs:
    """Returns the elements of a ZeRO-3 parameter whose piece this rank holds, without the padding of the last pieces.
    Local.
    """
    size = param.ds_tensor.ds_numel  # the same on every rank: ceil(elements / ranks)
    start = dist.get_rank(param.ds_process_group) * size
    length = min(size, param.ds_numel - start)  # less than nothing on a rank behind the end
    return ((start, length),) if length > 0 else ()


def stage3_shard(name: str, param: Any) -> Tensor:
    """Returns the live piece of a ZeRO-3 parameter, for one that has no master because it is frozen. Local; no copy."""
    if hasattr(param.ds_tensor, "ds_quant_scale"):
        raise EMAEngineError(
            f"frozen parameter {name!r} is kept quantized: set zero_quantized_nontrainable_weights to false"
        )
    shard: Tensor = param.ds_tensor.detach()
    return shard.narrow(0, 0, count(stage3_runs(param)))


_KINDS: dict[str, type[Masters]] = {
    "FP16_Optimizer": ReplicatedMasters,
    "FP16_UnfusedOptimizer": ReplicatedMasters,
    "BF16_Optimizer": FlatMasters,
    "DeepSpeedZeroOptimizer": FlatMasters,
    "DeepSpeedZeroOptimizer_Stage3": Stage3Masters,
}


def find_masters(optimizer: Any, stage: int) -> Masters:
    """Returns the master weights of ``engine.optimizer``. Local. Raises EMAEngineError for one that it does not
    know.
    """
    kind = type(optimizer)
    ours = kind.__module__.startswith("deepspeed.runtime.")
    if stage == 0:
        # Without an optimizer DeepSpeed still makes a BF16_Optimizer, around a dummy, for a bf16 model.
        dummy = ours and (kind.__name__ == "DummyOptim" or not getattr(optimizer, "using_real_optimizer", True))
        if optimizer is None or dummy or (not ours and isinstance(optimizer, torch.optim.Optimizer)):
            return ReplicatedMasters(None if dummy else optimizer)
    if kind.__name__ == "DeepSpeedZeRoOffload" or optimizer is None:
        raise EMAEngineError(
            "the DeepSpeed engine has no optimizer, so there are no weights in training to average: pass an optimizer "
            "to deepspeed.initialize(), or use ZeRO stage 0"
        )
    # By the exact class: ZenFlow, SuperOffload and MiCS inherit from these and keep their masters elsewhere.
    if not ours or kind.__name__ not in _KINDS or getattr(optimizer, "zenflow", False):
        found = f"{kind.__module__}.{kind.__qualname__}" + (" with ZenFlow" if getattr(optimizer, "zenflow", 0) else "")
        raise EMAEngineError(
            f"unknown DeepSpeed optimizer {found} at ZeRO stage {stage}. Known are {', '.join(_KINDS)} and a plain "
            "torch.optim.Optimizer at stage 0: turn off the DeepSpeed feature that brings it in"
        )
    return _KINDS[kind.__name__](optimizer)


def _offset(param: Tensor, buffer: Tensor) -> int:
    """Returns where ``param`` begins in the flat ``buffer`` that it is a view of."""
    if param.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        raise EMAStateError(
            f"a parameter of shape {tuple(param.shape)} no longer lies in DeepSpeed's flat buffer: its data was "
            "replaced after deepspeed.initialize(), so training does not change it either"
        )
    return int(param.storage_offset() - buffer.storage_offset())
