"""Provides functions beside ``ShardedEMA``: ``compute_ema()``, Composer's functional form, and ``update_bn()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dist_ema import kernels
from dist_ema.core import batch_norm
from dist_ema.ema import ShardedEMA
from dist_ema.engines import detect
from dist_ema.errors import EMAConfigError
from dist_ema.schedules.checks import share


@torch.no_grad()
def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """``ema_model = smoothing * ema_model + (1 - smoothing) * model``, for two modules that are sharded alike.

    Parameters and floating-point buffers are averaged, others copied; tensors are paired by canonical name. Local: each
    rank averages its shards (under DeepSpeed with fp32 masters, the masters, which are then published).

    Args:
        model: the live model: anything that :class:`ShardedEMA` takes.
        ema_model: the average, changed in place. In bf16 or fp16 it stops moving for a smoothing close to one.
        smoothing: kept fraction, in [0, 1]. 1 changes nothing, as in Composer.

    Raises:
        EMAConfigError: ``smoothing`` is out of range, or the two differ in a name, a shape or a shard.

    >>> model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(average.weight)
    >>> compute_ema(model, average, smoothing=0.75)
    >>> average.weight.item()
    0.25
    """
    weight = 1 - share("smoothing", smoothing)
    live = detect(model)
    average = detect(ema_model)
    sides = []
    for engine in (live, average):
        specs = engine.specs()
        engine.reshard()
        sides.append({spec.name: (spec, source) for spec, source in zip(specs, engine.sources(), strict=True)})
    here, there = sides
    different = [name for name in here if name not in there] + [name for name in there if name not in here]
    different += [
        name
        for name, (spec, _) in here.items()
        if name in there and (spec.shape, spec.runs) != (there[name][0].shape, there[name][0].runs)
    ]
    if different:
        raise EMAConfigError(
            f"model and ema_model are not sharded alike: {', '.join(different[:5])} ({len(different)} in all) differ "
            "in name, shape or shard. Build both in the same way"
        )
    hidden = [name for side in sides for name, (spec, _) in side.items() if spec.hidden]
    if hidden:
        raise EMAConfigError(f"{hidden[0]!r} is a tensor subclass that does not hold its elements as they are")
    if weight == 0:  # a lerp with a weight of 0 would still turn Inf into NaN
        return
    for name, (spec, source) in here.items():
        _blend(there[name][1], source, spec.local_numel, weight)
    for cache in average.caches():
        cache.drop()
    average.publish()


def _blend(target: Tensor, source: Tensor, count: int, weight: float) -> None:
    """Through a chunk of scratch for each, since the two may differ in dtype and in memory format."""
    size = kernels.chunk_size(target.device)
    for low in range(0, count, size):
        high = min(low + size, count)
        old = torch.empty(high - low, dtype=target.dtype, device=target.device)
        new = torch.empty_like(old)
        kernels.read(target, low, high, old)
        kernels.read(source, low, high, new)
        kernels.write(target, low, high, old.lerp_(new, weight) if old.is_floating_point() or old.is_complex() else new)


def update_bn(
    ema: ShardedEMA,
    batches: Iterable[object],
    *,
    name: str | None = None,
    forward: Callable[[object], object] | None = None,
) -> None:
    """Computes BatchNorm's running statistics anew under the average, and writes them into the average. Collective.

    As ``torch.optim.swa_utils.update_bn`` does: one pass in training mode without gradients, in which each statistic
    becomes the plain mean of those of all batches. Batches of all ranks count, as if one process had seen them all.
    SyncBatchNorm takes its own statistics over several ranks, and a batch of all of them is one. Live weights and
    buffers, momenta and modes are afterwards what they were, also if ``forward`` raises.

    ``export`` writes these statistics, and ``average_parameters`` computes with them. With ``buffers="copy"`` they last
    until the next update that is due, which copies the live ones again, and all averages have them in common; with
    ``buffers="average"`` updates go on from them.

    Args:
        ema: the average.
        batches: this rank's. Of a tuple or list the first element is taken, as torch does.
        name: which average; None means the only one.
        forward: called with each batch; computes with ``ema``'s model. None means the model itself, called with the
            batch. Where the model's forward is collective (FSDP, ZeRO-3, tensor parallelism) ranks need equally many.

    Raises:
        EMAConfigError: the average does not have the statistics (``buffers="ignore"``, ``exclude``), or there are no
            batches, or ``forward`` is needed since the model is a list.
        EMAStateError: on every rank, inside ``average_parameters()``, before the first update, or ``forward`` raised on
            another rank. On the rank where it raised, what it raised. The average is then what it was.
    """
    batch_norm.update_bn(ema._average, batches, name, forward)
