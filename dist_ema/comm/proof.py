"""A proof that the ranks hold every element of every tensor once. Made at the first collective call of an average.

A layout that the library reads wrongly would otherwise go unnoticed: every rank has the right number of elements, they
are averaged correctly, and only the full tensors have their rows in another order. So ranks check two things:

1. Together, the ranks that write a tensor hold each of its elements once. Each adds up the positions that it holds
   (:mod:`dist_ema.geometry.positions`), 16 bytes a tensor, and one sum over the ranks shows whether elements are
   missing, held twice, or at places where there are none. Of replicas the one that writes counts.
2. Each rank holds the elements that its engine would have given it (:meth:`Engine.check_layout`). Elements that two
   ranks have exchanged are seen here only.

No weight is read or sent, and ``update()`` takes no part in this. For 10,000 tensors the proof took .35 s on 2 ranks
and .45 s on 8 under DDP, and .26 s and .66 s under FSDP2 (gloo, all ranks on two busy CPU cores, beside the .2 to .5 s
of :func:`catalogue`). That is once after construction, ``reset()`` or ``rebind()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from dist_ema.comm.catalogue import FullTensor, catalogue, is_writer
from dist_ema.comm.collectives import agreed, gather_objects, rank_in, sum_tensor
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.positions import position_sums
from dist_ema.geometry.runs import Runs, whole
from dist_ema.geometry.shares import Share

#: Tensors in one message: 1 MiB.
BLOCK = 1 << 16


def proven_catalogue(
    shares: Sequence[Share],
    group: dist.ProcessGroup | None,
    check_layout: Callable[[], None],
    layout: Callable[[str], str],
) -> list[FullTensor]:
    """Return every full tensor of the model, as :func:`catalogue` does, after the proof. Collective.

    Args:
        shares: what this rank keeps of each tensor.
        group: the ranks that hold the model.
        check_layout: compares this rank's elements with what its engine would give it; raises EMAEngineError.
        layout: describes how this rank holds the tensor of a name, for errors.

    Raises:
        EMAEngineError: on every rank: names the first tensor that is not held once, or not as its engine shards.
    """
    entries = catalogue(shares, group)
    operation = "checking how the model is sharded"
    with agreed(group, operation):
        check_layout()
        sums = torch.from_numpy(position_sums(_written(entries, shares, rank_in(group))).view("int64"))
    found = torch.cat([sum_tensor(block, group) for block in sums.split(BLOCK)])  # type: ignore[no-untyped-call]
    expected = torch.from_numpy(position_sums([whole(entry.numel) for entry in entries]).view("int64"))
    wrong = (found != expected).any(dim=1).nonzero().flatten().tolist()
    if wrong:  # the same on every rank
        entry, held = entries[wrong[0]], int(found[wrong[0], 0])
        layouts = gather_objects(layout(entry.name), group)
        raise EMAEngineError(_complaint(entry, held, layouts, len(wrong) - 1))
    return entries


def _written(entries: Sequence[FullTensor], shares: Sequence[Share], rank: int) -> list[Runs]:
    """Return the elements of each tensor that this rank writes into what is collected; none of those it lacks."""
    by_name = {share.spec.name: share for share in shares}
    written: list[Runs] = []
    for entry in entries:
        share = by_name.get(entry.name)
        written.append(share.runs if share is not None and is_writer(entry, share, rank) else ())
    return written


def _complaint(entry: FullTensor, held: int, layouts: Sequence[str], others: int) -> str:
    """Say what is wrong with a tensor of which the ranks hold ``held`` elements."""
    if held == entry.numel:
        problem = "that is their number, but some of them are missing and others are held twice or lie outside of it"
    else:
        problem = "some are missing" if held < entry.numel else "some are held more than once"
    shown = [f"rank {rank}: {layout}" for rank, layout in enumerate(layouts) if layout]
    more = f" ({others} more tensors are wrong too)" if others else ""
    return (
        f"the ranks together hold {held} of the {entry.numel} elements of {entry.name!r}, and {problem}{more}. Nothing "
        "can be saved or exported from this layout. It is one that this library does not read correctly: please report "
        f"it, with {'; '.join(shown[:8])}"
    )
