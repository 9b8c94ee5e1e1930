"""Plain modules, which know no other rank, and DistributedDataParallel, where every rank holds every weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema.engines.base import Engine, Replicas, TensorSpec
from dist_ema.engines.walk import Binding, Slot, walk_slots


class PlainEngine(Engine):
    """A module whose parameters lie whole on this rank.

    Nothing says that another rank holds the same values, so the shadow is not split; full tensors are the lowest
    rank's. Base of the engines that keep parameters where ``nn.Module`` does.
    """

    def __init__(self, model: nn.Module) -> None:
        self.group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self._model = model
        self._slots: list[Slot] = []

    def modules(self) -> list[nn.Module]:
        return [self._model]

    def specs(self) -> list[TensorSpec]:
        self._slots = walk_slots(self._model)
        self._binding = Binding(self._slots)
        return [self.spec(slot, tensor) for slot in self._slots if (tensor := slot.get()) is not None]

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        """How this rank holds the tensor of one slot. Local."""
        return TensorSpec.unsharded(
            slot.name, tensor, kind=kind_of(slot, tensor), partitioned=False, aliases=slot.aliases
        )

    def sources(self) -> list[Tensor]:
        return self._binding.check()


class DataParallelEngine(PlainEngine):
    """DistributedDataParallel: trained parameters are the same on all ranks of its group, and share their shadow."""

    def __init__(self, model: nn.Module, wrapper: DistributedDataParallel) -> None:
        super().__init__(model)
        group = wrapper.process_group
        self._wrapper = wrapper
        self._replicas = Replicas(group, dist.get_rank(group), dist.get_world_size(group))
        self._team = min(dist.get_process_group_ranks(group))
        self._ignored = set(wrapper.parameters_to_ignore)  # what the user told DDP to leave to each rank

    def ranks(self) -> frozenset[int]:
        return frozenset(dist.get_process_group_ranks(self._replicas.group))

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        if kind_of(slot, tensor) != "parameter" or self._ignored.intersection((slot.name, *slot.aliases)):
            return super().spec(slot, tensor)
        return TensorSpec.unsharded(slot.name, tensor, replicas=self._replicas, team=self._team, aliases=slot.aliases)

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """See :meth:`Engine.own_buffers`: DDP would send rank 0's at every forward pass. Local."""
        before = self._wrapper.broadcast_buffers
        self._wrapper.broadcast_buffers = False
        try:
            yield
        finally:
            self._wrapper.broadcast_buffers = before


def kind_of(slot: Slot, tensor: Tensor) -> Literal["parameter", "frozen", "buffer"]:
    """The spec's kind of what a slot holds."""
    if slot.is_buffer:
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"
