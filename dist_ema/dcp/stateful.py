"""Makes the state dict that ``torch.distributed.checkpoint`` saves and loads into.

::

    {"progress": <uint8>,                      the clocks, as JSON
     "schedules": {average: <uint8>},          as JSON
     "averages": {average: {name: <part>}},    the tensors that are averaged
     "buffers": {name: <part>},                buffers that are copied, which all averages share
     "live": {name: <part>}}                   the live weights of all these, only with live=True

A part is a :class:`~dist_ema.dcp.boxed.BoxedTensor`: what this rank holds of a full tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from dist_ema.dcp.boxed import BoxedTensor
from dist_ema.dcp.texts import write_schedule, write_state
from dist_ema.geometry.shares import Share
from dist_ema.schedules import Schedule
from dist_ema.schedules.state import EMAState
from dist_ema.shadow.lent import lend


def make_state_dict(
    ema_state: EMAState,
    schedules: Mapping[str, Schedule],
    averaged: Callable[[str], Sequence[Tensor | None]],
    shares: Sequence[Share],
    writes: Sequence[bool],
    spare: bool,
    count: int,
) -> dict[str, Any]:
    """Returns the state dict of one rank. Its tensors share the average's memory. Local.

    Args:
        ema_state: the clocks and counts of the average.
        schedules: the schedule of each average.
        averaged: returns an average's shadow for each share, 1D; None for a live share.
        shares: what this rank averages of each tensor.
        writes: for each share, whether this rank writes it.
        spare: whether a read may overwrite the tensors, because nothing else uses them.
        count: number of tensors of each average, on all ranks together.
    """
    state = make_head(ema_state, schedules, count)
    is_writer = {share.spec.name: is_writer for share, is_writer in zip(shares, writes, strict=True)}
    for path, share, held in parts_with_averages(averaged, shares, tuple(schedules)):
        place = state
        for key in path:
            place = place.setdefault(key, {})
        name = share.spec.name
        part = held if spare else lend(held)
        place[name] = BoxedTensor(
            share.spec.shape, part, share.boxes, is_writer=is_writer[name], spare=spare, joined=share.joined
        )
    return state


def make_head(ema_state: EMAState, schedules: Mapping[str, Schedule], count: int) -> dict[str, Any]:
    """Returns a state dict without tensors of the model, which is the same on every rank. Local.

    Args:
        ema_state: the clocks and counts of the average.
        schedules: the schedule of each average.
        count: number of tensors of each average, on all ranks together.
    """
    texts = {name: write_schedule(schedule) for name, schedule in schedules.items()}
    return {"progress": write_state(ema_state, count), "schedules": texts, "averages": {}, "buffers": {}}


def add_live(
    state: dict[str, Any], live: Sequence[Tensor | None], shares: Sequence[Share], writes: Sequence[bool]
) -> None:
    """Adds the live weights of averaged and copied tensors, given as a 1D tensor for each share. Local."""
    state["live"] = {
        share.spec.name: BoxedTensor(share.spec.shape, lend(values), share.boxes, is_writer=is_writer, spare=False)
        for share, values, is_writer in zip(shares, live, writes, strict=True)
        if values is not None and share.numel
    }


def wanted_parts(shares: Sequence[Share], names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Share]]:
    """Yields the parts that this rank has in a state dict: the keys that lead to the dict of each part, and its share.

    Tensors without an element on this rank are left out.
    """
    for share in shares:
        if share.numel and share.mode == "average":
            yield from ((("averages", name), share) for name in names)
        elif share.numel and share.mode == "copy":
            yield ("buffers",), share


def parts_with_averages(
    averaged: Callable[[str], Sequence[Tensor | None]], shares: Sequence[Share], names: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Share, Tensor]]:
    """Yields :func:`wanted_parts` with the 1D tensors of the average. Live shares are left out.

    Args:
        averaged: returns an average's shadow for each share, 1D; None for a live share.
        shares: what this rank averages of each tensor.
        names: the names of the averages.
    """
    held = {
        (name, share.spec.name): tensor for name in names for share, tensor in zip(shares, averaged(name), strict=True)
    }
    for path, share in wanted_parts(shares, names):
        average = path[1] if path[0] == "averages" else names[0]  # buffers are the first average's
        tensor = held[average, share.spec.name]
        if tensor is not None:
            yield path, share, tensor
