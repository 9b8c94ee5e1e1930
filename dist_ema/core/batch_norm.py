"""BatchNorm's running statistics for an average: those of the live weights do not fit averaged ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from dist_ema.comm.collectives import gather_objects, size_of, sum_tensor
from dist_ema.core.average import Average, collective
from dist_ema.core.visit import average_parameters
from dist_ema.engines import Engine
from dist_ema.engines.names import Slot, walk_slots
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.runtime.interrupts import Uninterrupted

_STATISTICS = ("running_mean", "running_var")
_COUNT = "num_batches_tracked"


@collective("update_bn()")
@torch.no_grad()
def update_bn(
    average: Average,
    batches: Iterable[object],
    name: str | None,
    forward: Callable[[object], object] | None,
) -> None:
    """See :func:`dist_ema.update_bn`."""
    engine = average.engine
    group = average.engine.group
    shares = {share.spec.name: share for share in average.shares}
    with average.begin(average.call("update_bn()", name=name)):
        average.condition.refuse("update_bn()")
        name = average.name(name)
        if not average.shadow.started:
            raise EMAStateError("update_bn(): there is no average before the first update; call update() first")
        if forward is None and len(engine.modules()) != 1:
            raise EMAConfigError("forward=None: a list of modules has no forward pass of its own; give a function")
        slots = _slots(engine, shares)
    with average_parameters(average, name, held_by="update_bn()"):
        try:
            found = _run(engine, slots, batches, forward or engine.modules()[0], group)
        finally:
            if average.condition.swap is not None:
                average.condition.swap.accept_buffers()
    average.shadow.release_parts()
    shadows = dict(zip(shares, average.shadow.tensors(name), strict=True))
    with Uninterrupted():
        average.condition.broken = "update_bn()"
        for key, value in found.items():
            shadow = shadows[key]
            if shadow is not None:
                shadow.copy_(value.reshape(-1))
        average.shadow.write_teacher()
        average.condition.broken = None


def _slots(engine: Engine, shares: dict[str, Share]) -> list[Slot]:
    """Finds the statistics in the average. Raises EMAConfigError if they are not there. Local."""
    slots = [
        slot
        for module in engine.modules()
        for slot in walk_slots(module)
        if slot.is_buffer and isinstance(slot.owner, BatchNorm) and slot.key in (*_STATISTICS, _COUNT)
    ]
    missing = [slot.name for slot in slots if shares[slot.name].mode == "live"]
    if missing:
        raise EMAConfigError(
            f"update_bn(): {missing[0]!r} and {len(missing) - 1} more are not in the average, so there is nothing to "
            'write into: give buffers="copy" or buffers="average", and do not exclude them'
        )
    return slots


def _run(
    engine: Engine,
    slots: Sequence[Slot],
    batches: Iterable[object],
    forward: Callable[[object], object],
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """Returns the statistics of all ranks' batches by the names of their buffers, in float64. Collective."""
    failure: BaseException | None = None
    means: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    with engine.own_buffers(), _training(engine, [slot.owner for slot in slots if isinstance(slot.owner, BatchNorm)]):
        try:
            for batch in batches:
                forward(batch[0] if isinstance(batch, (list, tuple)) else batch)
            for slot in slots:
                _read(slot, means, counts)
        except BaseException as error:  # the others wait to be told
            failure = error
    ranks = gather_objects((None if failure is None else repr(failure), sum(map(int, counts.values())) > 0), group)
    told = gather_objects({name: mean.numel() for name, mean in means.items()}, group)
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(ranks) if text is not None]
    if failure is not None:
        raise failure
    if failures:
        raise EMAStateError(f"update_bn() failed: {'; '.join(failures)}")
    sizes = {name: size for found in told for name, size in found.items()}  # a pipeline's ranks have different ones
    if sizes and not any(saw for _, saw in ranks):
        raise EMAConfigError("batches: there are none on any rank, or none that reaches a BatchNorm")
    if size_of(group) > 1:
        _add_up(sizes, means, counts, group)
    return {slot.name: _value(slot, means, counts) for slot in slots}


def _read(slot: Slot, means: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
    """Copies one buffer, of which the average's own is put back in its place."""
    value = slot.get()
    count = slot.owner.num_batches_tracked
    if value is not None and slot.key in _STATISTICS:
        means[slot.name] = value.double().cpu()
    if value is not None:
        counts[slot.name] = count.double().cpu() if isinstance(count, Tensor) else torch.zeros((), dtype=torch.float64)


def _add_up(
    sizes: dict[str, int], means: dict[str, Tensor], counts: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Means of all ranks' batches, and how many these are. Collective."""
    names = sorted(sizes)
    zero = torch.zeros((), dtype=torch.float64)
    flat = [
        torch.cat([(means[name] * counts[name]).view(-1), counts[name].view(1)])
        if name in means
        else torch.zeros(sizes[name] + 1, dtype=torch.float64)
        for name in names
    ]
    total = sum_tensor(torch.cat(flat) if flat else zero.view(1), group)
    start = 0
    for name in names:
        stop = start + sizes[name]
        if name in means and total[stop] > 0:
            means[name] = (total[start:stop] / total[stop]).view(means[name].shape)
            counts[name] = total[stop].clone()
        start = stop + 1
    # A count belongs to the statistics beside it.
    beside = {name.rpartition(".")[0]: counts[name] for name in names if name in means}
    for name in counts:
        counts[name] = beside.get(name.rpartition(".")[0], counts[name])


def _value(slot: Slot, means: dict[str, Tensor], counts: dict[str, Tensor]) -> Tensor:
    if slot.key in _STATISTICS:
        return means[slot.name]
    if isinstance(slot.owner, nn.SyncBatchNorm) and dist.is_initialized():  # a batch of several ranks is one
        return counts[slot.name] // size_of(slot.owner.process_group or dist.group.WORLD)
    return counts[slot.name]


@contextmanager
def _training(engine: Engine, norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Training mode, and statistics that begin anew; modes, momenta and persistent buffers are put back."""
    modes = {module: module.training for root in engine.modules() for module in root.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    kept = [
        (tensor, tensor.clone())
        for root in engine.modules()
        for slot in walk_slots(root)
        if slot.is_buffer and (tensor := slot.get()) is not None
    ]
    try:
        for root in engine.modules():
            root.train()
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for tensor, value in kept:
            tensor.copy_(value)
