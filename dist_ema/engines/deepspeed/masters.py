"""Finds this rank's fp32 master weights in DeepSpeed's optimizers, and writes them into the model.

The master of an element is the fp32 value that the optimizer steps. Two parameters, a of 5 elements and b of 7, on two
ranks. The digit is the rank that has the master of the element, ``p`` is padding::

    ZeRO-0      every rank has all masters    a [0 0 0 0 0]        b [0 0 0 0 0 0 0]       the same on rank 1

    ZeRO-1, 2   parameters are laid end to    a [0 0 0 0 0]        b [0 1 1 1 1 1 1]       rank 0: a, and one element
                end, the whole is cut                                                      of b; rank 1: the rest of b

    ZeRO-3      each parameter is cut by      a [0 0 0 1 1 p]      b [0 0 0 0 1 1 1 p]     each rank: a piece of a and
                itself, into equal pieces                                                  a piece of b

The masters of a rank lie in a few flat fp32 tensors, which ``flats()`` returns: one for each parameter group, or under
ZeRO-3 one for each sub-group. ``slices()`` tells where in them the piece of each parameter starts, and which elements
of the parameter it has::

    ZeRO-1, rank 0     flat [ a0 a1 a2 a3 a4 b0 ]           a: start 0, runs ((0, 5),)     b: start 5, runs ((0, 1),)
    ZeRO-1, rank 1     flat [ b1 b2 b3 b4 b5 b6 ]           a: runs ()                     b: start 0, runs ((1, 6),)
    ZeRO-3, rank 0     flat [ a0 a1 a2 | b0 b1 b2 b3 ]      a: start 0, runs ((0, 3),)     b: start 3, runs ((0, 4),)
    ZeRO-3, rank 1     flat [ a3 a4 p | b4 b5 b6 p ]        a: start 0, runs ((3, 2),)     b: start 3, runs ((4, 3),)

``publish()`` does what the end of DeepSpeed's own step does::

    ZeRO-0      cast masters into the live weights                                         local
    ZeRO-1, 2   cast into this rank's piece of the live buffer, all-gather the buffer      collective
    ZeRO-3      cast into the live pieces; DeepSpeed gathers the small (persistent)        collective
                parameters now, and each other one when a forward pass needs it

This file is the only one that touches private attributes of DeepSpeed's optimizers. They were read in deepspeed 0.19.8:
runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py, runtime/fp16/fused_optimizer.py and
runtime/fp16/unfused_optimizer.py. DeepSpeed is never imported here, so a run without it pays nothing.
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
        flat: index of the tensor in :meth:`Masters.flats` that holds it.
        start: index of its first element in that tensor.
        runs: which elements of the parameter these are; empty if other ranks have all of its masters.
        group: the ranks over which the parameter is partitioned; None if it is not partitioned.
    """

    flat: int
    start: int
    runs: Runs
    group: dist.ProcessGroup | None = None


class Masters(ABC):
    """The master weights of one DeepSpeed optimizer."""

    #: True if every rank has the masters of all elements.
    replicated = False
    #: True if DeepSpeed partitions frozen parameters too.
    shards_frozen = False

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    @abstractmethod
    def flats(self) -> Sequence[Tensor]:
        """Returns the tensors that hold this rank's master weights. Local."""

    @abstractmethod
    def slices(self) -> dict[int, MasterSlice]:
        """Returns the master slice of every parameter that the optimizer trains, by the parameter's ``id()``. Local."""

    @abstractmethod
    def publish(self) -> None:
        """Makes the model compute with what the masters hold. Collective unless ``replicated``."""

    def partition_groups(self) -> Sequence[dist.ProcessGroup | None]:
        """Returns every group over which parameters are partitioned; None is the world. Local."""
        return ()

    def stepped(self) -> frozenset[int] | None:
        """Returns the ``id()`` of each parameter that the optimizer steps directly, without a master. Local.

        None if there is no optimizer. Then only ``requires_grad`` tells which parameters are trained.
        """
        return frozenset()

    def check_resident(self) -> None:
        """Raises EMAStateError while ``engine.offload_states()`` keeps the weights elsewhere. Local."""
        # The states are members of an enum: masters are hp_params, live weights lp_params (high and low precision).
        offloaded = {getattr(state, "value", str(state)) for state in getattr(self._optimizer, "offloaded_states", ())}
        if offloaded & {"hp_params", "lp_params"}:
            raise EMAStateError(
                f"DeepSpeed has offloaded {sorted(offloaded)}: call engine.reload_states() before the average reads or "
                "writes the weights"
            )


class ReplicatedMasters(Masters):
    """Finds the masters of ZeRO stage 0, which every rank has whole.

    The optimizers differ in how they lay out masters:

    - FP16_Optimizer has one flat tensor for each parameter group (``fp32_groups_flat``).
    - FP16_UnfusedOptimizer, which bf16 uses as well, has one tensor for each parameter (``fp32_groups``).
    - A plain torch optimizer in fp32 has no masters: it steps the parameters themselves.
    """

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
            # A live parameter is a view of its group's flat live tensor. The masters have the same layout, so its place
            # there is its place among the masters.
            slices: dict[int, MasterSlice] = {}
            groups = zip(optimizer.fp16_groups, optimizer.fp16_groups_flat, strict=True)
            for index, (params, flat) in enumerate(groups):
                for param in params:
                    slices[id(param)] = MasterSlice(index, _offset(param, flat), whole(param.numel()))
            return slices
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
    """Finds the masters of ZeRO stages 1 and 2 and of BF16_Optimizer: a flat buffer cut into one piece for each rank.

    The live parameters of a group are views of a full flat buffer that every rank has, laid end to end and padded. The
    masters of a rank are an fp32 copy of its piece of that buffer.
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
        groups = getattr(optimizer, self._live_name)  # one list of parameters for each parameter group
        buffers = getattr(optimizer, f"{self._live_name}_flat")
        slices: dict[int, MasterSlice] = {}
        for index, (params, buffer) in enumerate(zip(groups, buffers, strict=True)):
            group = optimizer.real_dp_process_group[index]
            # This rank's piece of the buffer is [low, low + size). DeepSpeed pads the buffer so that it divides evenly.
            size = buffer.numel() // dist.get_world_size(group)
            low = dist.get_rank(group) * size
            for param in params:
                # The place in the buffer is taken from the live view, and not from param._hp_mapping: DeepSpeed 0.19.8
                # computes the mapping in the order of the parameter group, but round_robin_gradients lays out the
                # buffer in another order.
                offset = _offset(param, buffer)
                # The part of the parameter that lies in this rank's piece, in elements of the buffer.
                start = max(offset, low)
                stop = min(offset + param.numel(), low + size)
                # The same part, in elements of the parameter (runs) and of the masters (start).
                runs: Runs = ((start - offset, stop - start),) if start < stop else ()
                slices[id(param)] = MasterSlice(index, start - low if runs else 0, runs, group or dist.group.WORLD)
        return slices

    def publish(self) -> None:
        # The last part of the optimizers' own step(): casts into this rank's piece of the live buffer and all-gathers.
        self._optimizer.update_lp_params()


class Stage3Masters(Masters):
    """Finds the masters of ZeRO stage 3: each parameter is cut into equal pieces, and the masters of a sub-group of
    parameters lie piece after piece in one flat tensor.
    """

    shards_frozen = True

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
            raise EMAEngineError(
                'offload to device "nvme" keeps the weights in files between steps, and an average cannot read them '
                'there: use device "cpu" or "none" in offload_optimizer and offload_param'
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
            # The pieces of a sub-group lie one after the other in its flat tensor, each with its padding.
            for param in params:
                slices[id(param)] = MasterSlice(index, start, stage3_runs(param), param.ds_process_group)
                start += param.ds_tensor.ds_numel
        return slices

    def publish(self) -> None:
        optimizer = self._optimizer
        # Step 1: drop the full copies that forward passes left behind. The persistent parameters always have one, the
        # others after a forward without backward. The next forward would compute with these old copies.
        optimizer.checkpoint_event_prologue()
        # Step 2: cast the masters of each sub-group into the live pieces.
        with torch.no_grad():
            for index in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(index)
        # Step 3: gather the persistent parameters and drop the secondary shards of ZeRO++ hpZ. step() does both as
        # well, but it also clears gradients, and these may be accumulating.
        optimizer.checkpoint_event_epilogue()


def stage3_runs(param: Any) -> Runs:
    """Returns which elements of a ZeRO-3 parameter are in this rank's piece, without padding. Local.

    Five elements on four ranks. Pieces have ceil(5 / 4) elements, so that the last rank has only padding::

        rank 0  [0 1]   rank 1  [2 3]   rank 2  [4 p]   rank 3  [p p]
    """
    size = param.ds_tensor.ds_numel  # elements of a piece with padding, the same on every rank
    start = dist.get_rank(param.ds_process_group) * size
    length = min(size, param.ds_numel - start)  # negative or 0 on a rank that has only padding
    return ((start, length),) if length > 0 else ()


def stage3_shard(name: str, param: Any) -> Tensor:
    """Returns this rank's live piece of a ZeRO-3 parameter, without padding. Local; no copy.

    For frozen parameters, which have no master.
    """
    if hasattr(param.ds_tensor, "ds_quant_scale"):
        raise EMAEngineError(
            f"DeepSpeed keeps the frozen parameter {name!r} quantized, which cannot be read: set "
            "zero_quantized_nontrainable_weights to false"
        )
    shard: Tensor = param.ds_tensor.detach()
    return shard.narrow(0, 0, count(stage3_runs(param)))


#: By the exact name of the optimizer's class.
_KINDS: dict[str, type[Masters]] = {
    "FP16_Optimizer": ReplicatedMasters,
    "FP16_UnfusedOptimizer": ReplicatedMasters,
    "BF16_Optimizer": FlatMasters,
    "DeepSpeedZeroOptimizer": FlatMasters,
    "DeepSpeedZeroOptimizer_Stage3": Stage3Masters,
}


def find_masters(optimizer: Any, stage: int) -> Masters:
    """Returns the master weights of ``engine.optimizer``. Local.

    Raises EMAEngineError if there is no optimizer under ZeRO, or if its class is not known.
    """
    kind = type(optimizer)
    is_deepspeed = kind.__module__.startswith("deepspeed.runtime.")
    if stage == 0:
        # For a bf16 model without an optimizer DeepSpeed still makes a BF16_Optimizer, around a dummy optimizer.
        is_dummy = kind.__name__ == "DummyOptim" or not getattr(optimizer, "using_real_optimizer", True)
        if optimizer is None or (is_deepspeed and is_dummy):
            return ReplicatedMasters(None)
        if not is_deepspeed and isinstance(optimizer, torch.optim.Optimizer):
            return ReplicatedMasters(optimizer)
    if kind.__name__ == "DeepSpeedZeRoOffload" or optimizer is None:
        raise EMAEngineError(
            "the DeepSpeed engine has no optimizer, so there are no weights in training to average: pass an optimizer "
            "to deepspeed.initialize(), or use ZeRO stage 0"
        )
    # The class has to be one of these exactly: ZenFlow, SuperOffload and MiCS derive from them but keep their masters
    # elsewhere. ZenFlow may also be an option of a known class.
    has_zenflow = bool(getattr(optimizer, "zenflow", False))
    if not is_deepspeed or kind.__name__ not in _KINDS or has_zenflow:
        found = f"{kind.__module__}.{kind.__qualname__}" + (" with ZenFlow" if has_zenflow else "")
        raise EMAEngineError(
            f"unknown DeepSpeed optimizer {found} at ZeRO stage {stage}. Known are {', '.join(_KINDS)} and a plain "
            "torch.optim.Optimizer at stage 0: turn off the DeepSpeed feature that uses it"
        )
    return _KINDS[kind.__name__](optimizer)


def _offset(param: Tensor, buffer: Tensor) -> int:
    """Returns the index in the flat ``buffer`` at which ``param``, a view of the buffer, begins. Local.

    Raises EMAStateError if the parameter is no longer a view of it.
    """
    if param.untyped_storage().data_ptr() != buffer.untyped_storage().data_ptr():
        raise EMAStateError(
            f"a parameter of shape {tuple(param.shape)} no longer lies in DeepSpeed's flat buffer: its data was "
            "replaced after deepspeed.initialize(), so training does not change it either"
        )
    return int(param.storage_offset() - buffer.storage_offset())
