"""DistributedDataParallel: every rank holds every weight."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_ema.engines.declared import Declaration, refuse_declared
from dist_ema.engines.names import Slot, kind_of
from dist_ema.engines.plain import PlainEngine
from dist_ema.geometry.spec import Replicas, TensorSpec

#: For each DDP wrapper that was asked, the ids of the parameters whose gradients it adds up. It keeps them alive.
_reduced: WeakKeyDictionary[DistributedDataParallel, frozenset[int]] = WeakKeyDictionary()


class DataParallelEngine(PlainEngine):
    """DistributedDataParallel: trained parameters are the same on all ranks of its group, and share their shadow."""

    def __init__(self, model: nn.Module, wrapper: DistributedDataParallel) -> None:
        super().__init__(model)
        group = wrapper.process_group
        self._wrapper = wrapper
        self._replicas = Replicas(group, dist.get_rank(group), dist.get_world_size(group))
        self._team = min(dist.get_process_group_ranks(group))
        self._left_out = set(wrapper.parameters_to_ignore)  # what the user told DDP to leave to each rank
        self._reduced = _reduced_by(wrapper)
        self._were_frozen: dict[int, Tensor] = {}

    def ranks(self) -> frozenset[int]:
        return frozenset(dist.get_process_group_ranks(self._replicas.group))

    def declared(self, slot: Slot, tensor: Tensor) -> Declaration | None:
        """Return what a tensor declares that DDP ignores. DDP makes all others the same on every rank, hence whole."""
        if self._left_out.intersection((slot.name, *slot.aliases)):
            return super().declared(slot, tensor)
        refuse_declared(slot.name, tensor, tensor.shape, "DistributedDataParallel")
        return None

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        """See :meth:`PlainEngine.spec`. Local.

        DDP adds up the gradients of those parameters that were trained when it was made. Of one that is unfrozen later
        each rank may have its own, so it is not split between ranks.
        """
        kind = kind_of(slot, tensor)
        if kind == "frozen":
            self._were_frozen[id(tensor)] = tensor  # kept alive, so that the number stays its own
        is_own = kind != "parameter" or id(tensor) in self._were_frozen or not self._is_reduced(tensor)
        if is_own or self._left_out.intersection((slot.name, *slot.aliases)):
            return super().spec(slot, tensor)
        return TensorSpec.unsharded(
            slot.name, tensor, replicas=self._replicas, lowest_mesh_rank=self._team, aliases=slot.aliases
        )

    def _is_reduced(self, tensor: Tensor) -> bool:
        """Returns whether DDP adds up the gradients of a parameter. Local."""
        return self._reduced is None or id(tensor) in self._reduced

    def rewritten_by_forward(self) -> frozenset[int]:
        """Buffers of modules in eval mode: DDP sends rank 0's at every forward pass. In training mode they change."""
        if not self._wrapper.broadcast_buffers:
            return frozenset()
        held = [slot for slot in self._slots if slot.get() is not None]
        return frozenset(number for number, slot in enumerate(held) if slot.is_buffer and not slot.owner.training)

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """See :meth:`Engine.own_buffers`: DDP would send rank 0's at every forward pass. Local."""
        before = self._wrapper.broadcast_buffers
        self._wrapper.broadcast_buffers = False
        try:
            yield
        finally:
            self._wrapper.broadcast_buffers = before


def _reduced_by(wrapper: DistributedDataParallel) -> frozenset[int] | None:
    """Returns the ids of the parameters whose gradients DDP adds up; None if these are all that are trained. Local.

    They are those that were trained when it was made. Only its reducer knows them, and tells them with memory for a
    gradient of each. So it is asked once, and only where a parameter is frozen now or was then.
    """
    reducer = getattr(wrapper, "reducer", None)  # private, as what follows; read in torch 2.13
    if reducer is None:  # all gradients are reduced elsewhere (_delay_all_reduce_named_params)
        return None
    ignored = wrapper.parameters_to_ignore
    parameters = [tensor for name, tensor in wrapper.module.named_parameters() if name not in ignored]
    delayed = frozenset(map(id, wrapper._delay_all_reduce_params))
    logged = wrapper._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    count = logged["num_parameter_tensors"]
    if all(tensor.requires_grad for tensor in parameters) and count + len(delayed) == len(parameters):
        return None
    if wrapper not in _reduced:
        buckets = reducer._get_zeros_like_grad_buckets()
        _reduced[wrapper] = delayed.union(id(tensor) for bucket in buckets for tensor in bucket.parameters())
    return _reduced[wrapper]
