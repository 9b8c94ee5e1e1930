"""Full tensors one after the other on every rank, for who pushes weights to an inference server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import agreed
from dist_ema.comm.gather import LocalValues, gather_each
from dist_ema.comm.windows import WINDOW_BYTES


def in_windows(entries: Sequence[FullTensor], dtypes: Mapping[str, torch.dtype]) -> Iterator[list[FullTensor]]:
    """The tensors in order, as many at a time as one window holds, or a larger one by itself. Pure."""
    batch: list[FullTensor] = []
    used = 0
    for entry in entries:
        nbytes = -(-entry.numel * dtypes[entry.name].itemsize // 8) * 8
        if batch and used + nbytes > WINDOW_BYTES:
            yield batch
            batch, used = [], 0
        batch.append(entry)
        used += nbytes
    if batch:
        yield batch


def everywhere(
    entries: Sequence[FullTensor],
    held: Callable[[str], LocalValues | None],
    dtypes: Mapping[str, torch.dtype],
    group: dist.ProcessGroup | None,
    device: torch.device,
    operation: str,
) -> list[tuple[str, Tensor]]:
    """These tensors whole on every rank, with their names; tied names share one. Collective."""
    with agreed(group, operation):  # memory may be short on one rank
        full = {entry.name: torch.empty(entry.shape, dtype=dtypes[entry.name], device=device) for entry in entries}

    def take(entry: FullTensor, start: int, values: Tensor) -> None:
        full[entry.name].view(-1)[start : start + values.numel()].copy_(values)

    gather_each(entries, held, dtypes, group, take, operation, everywhere=True)
    return [(name, full[entry.name]) for entry in entries for name in entry.names]
