"""Moves an average to another wrapping of its model: from where its elements are to where they have to be."""

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
    """Raises EMAEngineError, listing all differences, unless all averaged tensors are in the new model. Local.

    Returns:
        Names of tensors that are averaged in the new model and have no average yet: new parameters, parameters that
            were
        frozen until now, and buffers that have another shape.
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
    """Fills new 1D tensors from what the ranks hold. Collective.

    Elements that a rank has already are copied. Tensors of which some rank lacks elements are sent to all ranks through
    one window at a time, which is the only memory that is needed.

    Args:
        entries: every full tensor in its present layout; the same on every rank.
        held: returns what this rank has of the tensor of a name.
        shares: what this rank should have.
        tensors: the tensor to fill for each share; None for a share without a shadow.
        group: the ranks.
        operation: names the operation in errors.
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
    """Copies the wanted elements that this rank has. Local. Returns whether these are all of them."""
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
