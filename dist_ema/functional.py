"""Composer's functional form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dist_ema import kernels
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
    live, average = detect(model), detect(ema_model)
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
