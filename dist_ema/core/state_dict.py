"""``state_dict()`` and ``load_state_dict()``: what ``torch.distributed.checkpoint`` saves, and loads into. Collective.

:mod:`dist_ema.dcp` makes and reads the dicts. It is imported inside the functions, since
``torch.distributed.checkpoint`` takes seconds to import and brings ``torch.distributed.tensor``.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import Tensor

from dist_ema.checkpoints.load import report_schedules
from dist_ema.comm.agreement import agreed, check_same_updates
from dist_ema.comm.collectives import gather_objects, sum_integers
from dist_ema.comm.gather import LocalValues, full_tensors
from dist_ema.core.average import Average, collective
from dist_ema.core.swap import Swap, Visit
from dist_ema.core.view import View
from dist_ema.errors import CheckpointMismatchError
from dist_ema.geometry.shares import in_shapes_of, shares_to_load
from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.schedules.state import EMAState
from dist_ema.shadow.reading import wait_for_reads


@collective("state_dict()")
def state_dict(average: Average, full: bool, live: bool) -> dict[str, Any]:
    """See :meth:`ShardedEMA.state_dict`."""
    from dist_ema.dcp.stateful import make_head

    operation = "state_dict()"
    group = average.engine.group
    with average.begin(average.call(operation, full=full, live=live)):
        view = average.view(operation)
    (skipped,) = sum_integers([average.skipped()], group)
    state = average.state(skipped)
    if full:
        head = make_head(state, average.options.schedules, _count(average))
        return head | _full_parts(average, view, live)
    with agreed(group, operation):
        return _parts(average, view, state, live)


def _parts(average: Average, view: View, state: EMAState, live: bool) -> dict[str, Any]:
    """Returns this rank's part of the state dict. Local."""
    from dist_ema.dcp.stateful import add_live, make_state_dict

    shares = average.shares
    writes = average.writes()
    schedules = average.options.schedules
    count = _count(average)
    if average.shadow.started:
        parts = make_state_dict(state, schedules, view.flat, shares, writes, spare=False, count=count)
    else:
        # The live weights are the average. They are copied, as they change at the next step.
        spare = average.new_shadow()
        spare.start(view.sources)
        spare.wait()
        parts = make_state_dict(state, schedules, spare.tensors, shares, writes, spare=True, count=count)
        spare.discard()  # ends what keeps it up to date; its memory is the dict's
    if live:
        flat = [None if values is None else values.flat() for values in view.live()]
        add_live(parts, flat, shares, writes)
    return parts


def _full_parts(average: Average, view: View, live: bool) -> dict[str, Any]:
    """Returns the tensors of a state dict, whole, on rank 0; no tensors elsewhere. Collective; one at a time."""
    averages = {name: view.average(name, include_untracked=False) for name in average.names}
    parts: dict[str, Any] = {
        "averages": {name: _gathered(average, held, ["average"]) for name, held in averages.items()},
        "buffers": _gathered(average, averages[average.names[0]], ["copy"]),
    }
    if live:
        held = {values.share.spec.name: values for values in view.live() if values is not None}
        # No rank has live values of a resized buffer that fit. In a pipeline only one rank knows of it.
        resized = set(chain.from_iterable(gather_objects(view.resized(), average.engine.group)))
        parts["live"] = _gathered(average, held, ["average", "copy"], live=True, without=resized)
    return parts


def _gathered(
    average: Average,
    held: Mapping[str, LocalValues],
    modes: Sequence[str],
    live: bool = False,
    without: Container[str] = (),
) -> dict[str, Tensor]:
    """Gathers the full tensors of these modes to rank 0, each once. Collective.

    Args:
        average: names the tensors.
        held: this rank's values, by name.
        modes: ``"average"`` and ``"copy"``.
        live: gather live values, in their own dtype.
        without: names that are left out.
    """
    wanted = []
    for entry in average.full_tensors:
        if entry.mode in modes and entry.name not in without:
            wanted.append(replace(entry, aliases=(), dtype=entry.live_dtype if live else entry.dtype))
    return full_tensors(wanted, held.get, None, average.engine.group, "state_dict()")


def _count(average: Average) -> int:
    """Returns how many tensors each average has, on all ranks together. Local, in a call that has begun."""
    return sum(entry.mode == "average" for entry in average.full_tensors)


@collective("load_state_dict()")
def load_state_dict(average: Average, state: Mapping[str, Any]) -> None:
    """See :meth:`ShardedEMA.load_state_dict`.

    Nothing changes until every rank has found that its part fits::

        1  begin                    every rank can take part
        2  what joins               names and shapes that any rank's part has
        3  the part                 checked against the shares, and live weights read
        4  shadow, seed, clocks     replaced
        5  live weights             written into the model, if the dict has them
    """
    from dist_ema.dcp.loaded import LoadedStateDict, check_complete, unlike

    group = average.engine.group
    operation = "load_state_dict()"
    options = average.options
    average.shadow.drain()  # what fails in it does not matter any more
    average.background.drain()
    with average.begin(average.call(operation), replaces=True):
        average.wait_for_save()
        sources = average.live(operation)
    entries = average.full_tensors

    with agreed(group, operation) as round_:
        # Each rank has parts of some tensors only: all are told what any has.
        round_.send(unlike(state, entries, options.selects))
    joining: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    joined: dict[str, int] = {}
    for found in round_.received:
        joining.update(found.joining)
        shapes.update(found.shapes)
        joined.update(found.joined)
    shares = shares_to_load(average.shares, joining, shapes, options, joined)

    with agreed(group, operation) as round_:
        tracked = {entry.name for entry in entries if entry.mode != "live" or entry.name in joining}
        restore = LoadedStateDict(state, shares, average.names, tracked)
        check_complete(state, entries, joining)
        live = restore.live(sources)
        round_.send((live is None, restore.state.averaged.updates))
    without_live, updates = zip(*round_.received, strict=True)
    if len(set(without_live)) > 1:
        raise CheckpointMismatchError(f"{operation}: some ranks' state dicts have 'live' and others' have not")
    check_same_updates(updates)

    back = None
    visit = Visit("", operation)
    if live is not None:
        wait = average.background.wait_until_read
        back = Swap(average.engine, shares, live, average.shadow.scratch, visit, wait)
        back.entries = average.full_tensors
    shadow = average.shadow
    if shadow.failed or not (restore.state.started and shadow.started) or shares is not average.shares:
        shadow = average.new_shadow(shares=shares)
    shadow.release_parts()
    with Uninterrupted():
        average.condition.broken = operation
        if restore.state.started:
            with agreed(group, operation):
                if not shadow.started:  # where an update failed on some ranks, these alone need memory
                    shadow.allocate(in_shapes_of(shares, sources))
                restore.fill(shadow)
                shadow.loaded()
        shadow.seed = average.seed(restore.state.seed)
        average.replace(shadow, shares, restore.state, operation)
        if back is not None:
            average.condition.begin(visit)
            try:
                wait_for_reads()
                back.copy()
            finally:
                average.condition.end(visit)
    report_schedules(restore.schedules, options.schedules)
