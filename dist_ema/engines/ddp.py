"""DistributedDataParallel: every rank of its process group holds every weight.

DDP makes trained parameters the same on all these ranks, so the ranks are replicas and share one shadow::

    four ranks, a weight of 8 elements     each rank holds      0 1 2 3 4 5 6 7
                                           rank 0 averages      0 1
                                           rank 1 averages          2 3
                                           rank 2 averages              4 5
                                           rank 3 averages                  6 7

Frozen parameters, buffers and parameters that DDP ignores may differ between ranks. Each rank averages the whole of
these, as in ``plain.py``.
"""

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

#: The result of _reduced_by() for each DDP wrapper. The ids stay valid because the wrapper keeps the parameters alive.
_reduced: WeakKeyDictionary[DistributedDataParallel, frozenset[int]] = WeakKeyDictionary()


class DataParallelEngine(PlainEngine):
    """Averages a model under DistributedDataParallel, with one shadow for all ranks of its process group."""

    def __init__(self, model: nn.Module, wrapper: DistributedDataParallel) -> None:
        super().__init__(model)
        group = wrapper.process_group
        self._wrapper = wrapper
        self._replicas = Replicas(group, dist.get_rank(group), dist.get_world_size(group))
        self._lowest_rank = min(dist.get_process_group_ranks(group))
        # Names of the parameters and buffers that the user told DDP to ignore.
        self._left_out = set(wrapper.parameters_to_ignore)
        self._reduced = _reduced_by(wrapper)
        # Parameters that have been frozen at some time, by id. To keep them here keeps their ids from being reused.
        self._were_frozen: dict[int, Tensor] = {}

    def ranks(self) -> frozenset[int]:
        return frozenset(dist.get_process_group_ranks(self._replicas.group))

    def declared(self, slot: Slot, tensor: Tensor) -> Declaration | None:
        """Return the declaration of a tensor that DDP ignores; None for others. Local.

        DDP makes all others the same on every rank, so that they are whole. Raises EMAEngineError if one of them
        declares to be a part.
        """
        if self._left_out.intersection((slot.name, *slot.aliases)):
            return super().declared(slot, tensor)
        refuse_declared(slot.name, tensor, tensor.shape, "DistributedDataParallel")
        return None

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        """See :meth:`PlainEngine.spec`. Local.

        DDP adds up the gradients of the parameters that were trained when it was made. A parameter that is unfrozen
        later may become different on each rank, so its shadow is not shared.
        """
        kind = kind_of(slot, tensor)
        if kind == "frozen":
            self._were_frozen[id(tensor)] = tensor
        is_same_on_all_ranks = (
            kind == "parameter"
            and id(tensor) not in self._were_frozen
            and self._is_reduced(tensor)
            and self._left_out.isdisjoint((slot.name, *slot.aliases))
        )
        if not is_same_on_all_ranks:
            return super().spec(slot, tensor)
        return TensorSpec.unsharded(
            slot.name, tensor, replicas=self._replicas, lowest_mesh_rank=self._lowest_rank, aliases=slot.aliases
        )

    def _is_reduced(self, tensor: Tensor) -> bool:
        """Returns whether DDP adds up the gradients of a parameter. Local."""
        return self._reduced is None or id(tensor) in self._reduced

    def rewritten_by_forward(self) -> frozenset[int]:
        """Returns the numbers of the buffers of modules in eval mode. Local.

        DDP sends rank 0's buffers to all ranks at every forward pass. Buffers of modules in training mode are left out,
        because the forward pass itself changes them.
        """
        if not self._wrapper.broadcast_buffers:
            return frozenset()
        held = [slot for slot in self._slots if slot.get() is not None]  # in the order of the specs
        return frozenset(number for number, slot in enumerate(held) if slot.is_buffer and not slot.owner.training)

    @contextmanager
    def own_buffers(self) -> Iterator[None]:
        """Keeps DDP from sending rank 0's buffers to all ranks at each forward pass in the block. Local."""
        before = self._wrapper.broadcast_buffers
        self._wrapper.broadcast_buffers = False
        try:
            yield
        finally:
            self._wrapper.broadcast_buffers = before


def _reduced_by(wrapper: DistributedDataParallel) -> frozenset[int] | None:
    """Returns the ids of the parameters whose gradients DDP adds up; None if these are all trained parameters. Local.

    They are the parameters that were trained when DDP was made, and only DDP's reducer knows them. Its only function
    that tells them also allocates a gradient for each. So it is called at most once for a wrapper, and only if some
    parameter is frozen now or was frozen when DDP was made.
    """
    # The reducer and the underscored names below are private. They were read in torch 2.13,
    # torch/nn/parallel/distributed.py.
    reducer = getattr(wrapper, "reducer", None)
    if reducer is None:  # other code reduces all gradients (_delay_all_reduce_named_params)
        return None
    ignored = wrapper.parameters_to_ignore
    parameters = [tensor for name, tensor in wrapper.module.named_parameters() if name not in ignored]
    delayed = frozenset(map(id, wrapper._delay_all_reduce_params))
    logged = wrapper._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    count = logged["num_parameter_tensors"]  # of parameters that the reducer has
    all_trained_now = all(tensor.requires_grad for tensor in parameters)
    all_trained_then = count + len(delayed) == len(parameters)
    if all_trained_now and all_trained_then:
        return None
    if wrapper not in _reduced:
        buckets = reducer._get_zeros_like_grad_buckets()
        _reduced[wrapper] = delayed.union(id(tensor) for bucket in buckets for tensor in bucket.parameters())
    return _reduced[wrapper]
