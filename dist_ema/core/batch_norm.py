"""``update_bn()``: computes BatchNorm's running statistics for an average. Collective.

The activations of averaged weights have other means and variances than those of the live weights, so the statistics
that training has collected do not fit the average. Steps::

    1  begin            every rank can take part, and the average has a place for the statistics
    2  forward passes   inside average_parameters(), in training mode, with statistics that start from zero
    3  add up           the mean over the batches of all ranks
    4  write            into the shadows of the buffers

Step 2 changes buffers, modes and momenta of the live model, and puts all of them back.
"""

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
            # The forward passes wrote buffers, and _training() has put them back. The visit must not report that.
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
    """Finds the buffers of all BatchNorm modules. Local.

    Raises:
        EMAConfigError: the average does not have one of them.
    """
    slots = []
    for module in engine.modules():
        for slot in walk_slots(module):
            is_statistic = slot.key in (*_STATISTICS, _COUNT)
            if slot.is_buffer and is_statistic and isinstance(slot.owner, BatchNorm):
                slots.append(slot)
    missing = [slot.name for slot in slots if shares[slot.name].mode == "live"]
    if missing:
        raise EMAConfigError(
            f"update_bn(): the average does not have {missing[0]!r} and {len(missing) - 1} more statistics. Use "
            'buffers="copy" or buffers="average", and do not exclude them'
        )
    return slots


def _run(
    engine: Engine,
    slots: Sequence[Slot],
    batches: Iterable[object],
    forward: Callable[[object], object],
    group: dist.ProcessGroup | None,
) -> dict[str, Tensor]:
    """Runs the forward passes, and returns the statistics of all ranks' batches by buffer name. Collective.

    The values are on the CPU, in float64.
    """
    failure: BaseException | None = None
    means: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    norms = [slot.owner for slot in slots if isinstance(slot.owner, BatchNorm)]
    with engine.own_buffers(), _training(engine, norms):
        try:
            for batch in batches:
                forward(batch[0] if isinstance(batch, (list, tuple)) else batch)
            for slot in slots:
                _read(slot, means, counts)
        except BaseException as error:
            # Raised below: the other ranks are in gather_objects(), and would wait for this rank.
            failure = error

    # Exchange failures, and whether a rank saw any batch.
    own_error = None if failure is None else repr(failure)
    saw_batches = sum(map(int, counts.values())) > 0
    ranks = gather_objects((own_error, saw_batches), group)
    sizes_of_ranks = gather_objects({name: mean.numel() for name, mean in means.items()}, group)
    if failure is not None:
        raise failure
    failures = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(ranks) if text is not None]
    if failures:
        raise EMAStateError(f"update_bn() failed: {'; '.join(failures)}")

    # In a pipeline each rank has the buffers of its own stage. All ranks need the sizes of all, to add up alike.
    sizes: dict[str, int] = {}
    for own in sizes_of_ranks:
        sizes.update(own)
    if sizes and not any(saw for _, saw in ranks):
        raise EMAConfigError(
            "batches: no rank ran a batch through a BatchNorm. Pass at least one batch, and a forward= that uses the "
            "model's BatchNorm layers"
        )
    if size_of(group) > 1:
        _add_up(sizes, means, counts, group)
    return {slot.name: _value(slot, means, counts) for slot in slots}


def _read(slot: Slot, means: dict[str, Tensor], counts: dict[str, Tensor]) -> None:
    """Copies one buffer, and the number of batches that its module has seen. Local.

    They have to be copied, because _training() writes the previous values back into the same memory.
    """
    value = slot.get()
    count = slot.owner.num_batches_tracked
    if value is not None and slot.key in _STATISTICS:
        means[slot.name] = value.double().cpu()
    if value is not None:
        counts[slot.name] = count.double().cpu() if isinstance(count, Tensor) else torch.zeros((), dtype=torch.float64)


def _add_up(
    sizes: dict[str, int], means: dict[str, Tensor], counts: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Replaces each rank's means and counts by those of the batches of all ranks. Collective.

    One sum over ranks carries everything, with names in the same order on every rank::

        [ mean_a * count_a | count_a | mean_b * count_b | count_b | ... ]     zeros for what this rank does not have
    """
    names = sorted(sizes)
    flat = []
    for name in names:
        if name in means:
            flat.append((means[name] * counts[name]).view(-1))
            flat.append(counts[name].view(1))
        else:
            flat.append(torch.zeros(sizes[name] + 1, dtype=torch.float64))
    nothing = torch.zeros(1, dtype=torch.float64)  # a model without BatchNorm still takes part in the collective
    total = sum_tensor(torch.cat(flat) if flat else nothing, group)

    start = 0
    for name in names:
        stop = start + sizes[name]
        if name in means and total[stop] > 0:
            means[name] = (total[start:stop] / total[stop]).view(means[name].shape)
            counts[name] = total[stop].clone()
        start = stop + 1

    # num_batches_tracked has no mean of its own. It gets the count of the statistics in the same module.
    by_module = {name.rpartition(".")[0]: counts[name] for name in names if name in means}
    for name in counts:
        counts[name] = by_module.get(name.rpartition(".")[0], counts[name])


def _value(slot: Slot, means: dict[str, Tensor], counts: dict[str, Tensor]) -> Tensor:
    """Returns the value that a buffer of a BatchNorm gets in the average. Local."""
    if slot.key in _STATISTICS:
        return means[slot.name]
    if isinstance(slot.owner, nn.SyncBatchNorm) and dist.is_initialized():
        # The ranks of its group share each batch, and each of them has counted it.
        return counts[slot.name] // size_of(slot.owner.process_group or dist.group.WORLD)
    return counts[slot.name]


@contextmanager
def _training(engine: Engine, norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Sets training mode and resets the statistics in the block. Restores modes, momenta and persistent buffers."""
    modes = {module: module.training for root in engine.modules() for module in root.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    kept: list[tuple[Tensor, Tensor]] = []
    for root in engine.modules():
        for slot in walk_slots(root):
            tensor = slot.get() if slot.is_buffer else None
            if tensor is not None:
                kept.append((tensor, tensor.clone()))
    try:
        for root in engine.modules():
            root.train()
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # torch then computes the plain mean over batches
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for tensor, value in kept:
            tensor.copy_(value)
