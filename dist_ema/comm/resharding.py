"""An average that goes on with another wrapping of its model: from where its elements lie to where they have to."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from dist_ema.comm.agreement import agreed
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.gather import LocalValues, gather_each
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.runs import count, overlap
from dist_ema.geometry.shares import Share


def check_same_model(old: Sequence[FullTensor], new: Sequence[FullTensor], operation: str) -> set[str]:
    """Raises EMAEngineError, listing all differences, unless all that is averaged is in the new model. Local.

    Returns:
        Names of what is averaged there and has no average yet: new parameters, parameters that were frozen until now,
        and buffers that have another shape.
    """
    before, after = ({name: entry for entry in entries for name in entry.names} for entries in (old, new))
    problems = [f"missing {entry.name!r}" for entry in old if _kept(entry) and not _kept(after.get(entry.name))]
    joining: set[str] = set()
    for entry in new:
        known = before.get(entry.name)
        is_resized = known is not None and known.shape != entry.shape
        if is_resized and known is not None and not entry.buffer:
            problems.append(f"shape mismatch for {entry.name!r}: {entry.shape}, before {known.shape}")
        elif _kept(entry) and (is_resized or not _kept(known)):
            joining.update(entry.names)
    if problems:
        problems += [f"unexpected {entry.name!r}" for entry in new if _kept(entry) and entry.name not in before]
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise EMAEngineError(f"{operation}: this is not the model that is averaged: {shown}")
    return joining


def _kept(entry: FullTensor | None) -> bool:
    return entry is not None and entry.mode != "live"


def move(
    entries: Sequence[FullTensor],
    held: Callable[[str], LocalValues | None],
    shares: Sequence[Share],
    tensors: Sequence[Tensor | None],
    group: dist.ProcessGroup | None,
    operation: str,
) -> None:
    """Fills flat new tensors from what the ranks hold. Collective.

    What a rank holds already it copies; tensors of which some rank lacks elements are sent to all ranks, through one
    window at a time, which is the only memory that is needed.

    Args:
        entries: every full tensor, as it is held; the same on every rank.
        held: what this rank holds of one, by its name there.
        shares: what this rank shall hold.
        tensors: where to, for each share; None for what is not kept.
        group: the ranks.
        operation: for errors.
    """
    names = [entry.name for entry in entries]
    wanted = {
        name: (share, tensor)
        for share, tensor in zip(shares, tensors, strict=True)
        if tensor is not None
        for name in (share.spec.name, *share.spec.aliases)
    }
    with agreed(group, operation) as round_:
        # What a rank has already is copied here; it tells the others the names of which it lacks elements.
        round_.send([name for name in names if name in wanted and not _copy(held(name), wanted[name])])
    lacking = {name for found in round_.received for name in found}
    dtypes = {entry.name: entry.dtype for entry in entries}

    def take(entry: FullTensor, start: int, values: Tensor) -> None:
        if entry.name in wanted:
            share, out = wanted[entry.name]
            for local, inside, length in overlap(share.runs, start, start + values.numel()):
                out[local : local + length].copy_(values[inside : inside + length])

    sent = [entry for entry in entries if entry.name in lacking]
    gather_each(sent, held, dtypes, group, take, operation, everywhere=True)


def _copy(held: LocalValues | None, wanted: tuple[Share, Tensor]) -> bool:
    """Copies the wanted elements that this rank holds. Local. Returns whether these are all of them."""
    share, out = wanted
    filled = 0
    if held is not None:
        position = 0  # in `out`, of the first element of this run
        for start, length in share.runs:
            for local, inside, size in overlap(held.runs, start, start + length):
                held.read(local, local + size, out[position + inside : position + inside + size])
                filled += size
            position += length
    return filled == count(share.runs)
