"""Public functions that are not methods of ``ShardedEMA``.

``compute_ema()`` is Composer's functional form of one update, for two models. ``update_bn()`` computes BatchNorm's
statistics for an average; ``core/batch_norm.py`` implements it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dist_ema import kernels
from dist_ema.core import batch_norm
from dist_ema.ema import ShardedEMA
from dist_ema.engines import Engine, detect
from dist_ema.errors import EMAConfigError
from dist_ema.geometry.spec import TensorSpec
from dist_ema.schedules.checks import share


@torch.no_grad()
def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """Computes ``ema_model = smoothing * ema_model + (1 - smoothing) * model`` for two models that are sharded alike.

    Parameters and floating-point buffers are averaged. Other buffers are copied. Tensors are paired by canonical name.
    Local: each rank averages its own shards. Under DeepSpeed with fp32 masters the masters are averaged, and then
    published to the model.

    Args:
        model: the live model: anything that :class:`ShardedEMA` takes.
        ema_model: the average. It is changed in place. In bf16 or fp16 it stops moving if ``smoothing`` is close to 1.
        smoothing: the fraction of ``ema_model`` that is kept, in [0, 1]. 1 changes nothing, as in Composer.

    Raises:
        EMAConfigError: ``smoothing`` is out of range, or the two models differ in a name, a shape or a shard.

    >>> model, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(average.weight)
    >>> compute_ema(model, average, smoothing=0.75)
    >>> average.weight.item()
    0.25
    """
    weight = 1 - share("smoothing", smoothing)
    live = detect(model)
    average = detect(ema_model)
    live_tensors = _local_tensors(live)
    average_tensors = _local_tensors(average)

    # Both models must have the same tensors, and this rank the same elements of each.
    different = [name for name in live_tensors if name not in average_tensors]
    different += [name for name in average_tensors if name not in live_tensors]
    for name, (spec, _) in live_tensors.items():
        if name in average_tensors:
            other, _ = average_tensors[name]
            if (spec.shape, spec.runs) != (other.shape, other.runs):
                different.append(name)
    if different:
        raise EMAConfigError(
            f"model and ema_model are not sharded alike: {', '.join(different[:5])} ({len(different)} in all) differ "
            "in name, shape or shard. Build both in the same way"
        )
    for tensors in (live_tensors, average_tensors):
        for name, (spec, _) in tensors.items():
            if spec.hidden:
                raise EMAConfigError(
                    f"{name!r} is a tensor subclass that stores its elements in another form, so it cannot be averaged "
                    "in place. Use ShardedEMA"
                )

    if weight == 0:  # a lerp with a weight of 0 would still turn Inf into NaN
        return
    for name, (spec, source) in live_tensors.items():
        _, target = average_tensors[name]
        _blend(target, source, spec.local_numel, weight)
    # The average may hold values that were computed from its previous weights.
    for cache in average.caches():
        cache.drop()
    average.publish()


def _local_tensors(engine: Engine) -> dict[str, tuple[TensorSpec, Tensor]]:
    """Returns the spec of each tensor of a model, and this rank's elements, by canonical name. Local."""
    specs = engine.specs()
    engine.reshard()
    return {spec.name: (spec, source) for spec, source in zip(specs, engine.sources(), strict=True)}


def _blend(target: Tensor, source: Tensor, count: int, weight: float) -> None:
    """Computes ``target.lerp_(source, weight)``, or copies the source if the target has integers. Local.

    It works on one chunk at a time, because the two may differ in dtype and in memory format.
    """
    size = kernels.chunk_size(target.device)
    for low in range(0, count, size):
        high = min(low + size, count)
        old = torch.empty(high - low, dtype=target.dtype, device=target.device)
        new = torch.empty_like(old)
        kernels.read(target, low, high, old)
        kernels.read(source, low, high, new)
        can_average = old.is_floating_point() or old.is_complex()
        kernels.write(target, low, high, old.lerp_(new, weight) if can_average else new)


def update_bn(
    ema: ShardedEMA,
    batches: Iterable[object],
    *,
    name: str | None = None,
    forward: Callable[[object], object] | None = None,
) -> None:
    """Computes BatchNorm's running statistics with the averaged weights, and writes them into the average. Collective.

    It works as ``torch.optim.swa_utils.update_bn``: one pass over the batches in training mode, without gradients. Each
    statistic becomes the plain mean over all batches of all ranks, as if one process had seen them all. SyncBatchNorm
    computes its statistics over several ranks; their batches of one step count as one. Live weights and buffers,
    momenta and modes are restored afterwards, also if ``forward`` raises.

    ``export`` writes these statistics, and ``average_parameters`` computes with them. With ``buffers="copy"`` all
    averages share them, and the next due update overwrites them with the live ones. With ``buffers="average"`` later
    updates continue from them.

    Args:
        ema: the average.
        batches: the batches of this rank. If a batch is a tuple or list, its first element is used, as in torch.
        name: which average; None means the only one.
        forward: called with each batch. It must compute with ``ema``'s model. None means the model itself. If the
            model's forward is collective (FSDP, ZeRO-3, tensor parallelism), all ranks need equally many batches.

    Raises:
        EMAConfigError: the average does not have the statistics (``buffers="ignore"``, ``exclude``), there are no
            batches, or the model is a list and ``forward`` is missing.
        EMAStateError: on every rank, if called inside ``average_parameters()`` or before the first update. Also if
            ``forward`` raised on another rank; the rank where it raised gets that exception. The average is unchanged.
    """
    batch_norm.update_bn(ema._average, batches, name, forward)
