"""``state_dict()`` and ``load_state_dict()``: what ``torch.distributed.checkpoint`` saves, and loads into. Collective.

:mod:`dist_ema.dcp` makes and reads the dicts. It is imported inside the functions, because
``torch.distributed.checkpoint`` takes seconds to import, and imports ``torch.distributed.tensor``.

A state dict has the tensors of this rank under ``averages``, ``buffers`` and, with ``live=True``, ``live``, and the
clocks and schedules. With ``full=True`` rank 0 has all tensors whole, and the other ranks have none.
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
    with agreed(group, operation):  # _parts() allocates: what one rank raises is raised on all
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
        # Before the first update the live weights are the average. The dict gets copies, because the next step changes
        # them.
        spare = average.new_shadow()
        spare.start(view.sources)
        spare.wait()
        parts = make_state_dict(state, schedules, spare.tensors, shares, writes, spare=True, count=count)
        spare.discard()  # ends its thread, if it has one; its tensors are the dict's
    if live:
        flat = [None if values is None else values.flat() for values in view.live()]
        add_live(parts, flat, shares, writes)
    return parts


def _full_parts(average: Average, view: View, live: bool) -> dict[str, Any]:
    """Returns the full tensors of a state dict on rank 0, and no tensors on other ranks. Collective.

    Ranks gather one tensor after another, so only rank 0 needs memory for all.
    """
    averages = {name: view.average(name, include_untracked=False) for name in average.names}
    parts: dict[str, Any] = {
        "averages": {name: _gathered(average, held, ["average"]) for name, held in averages.items()},
        "buffers": _gathered(average, averages[average.names[0]], ["copy"]),
    }
    if live:
        held = {values.share.spec.name: values for values in view.live() if values is not None}
        # A resized buffer is left out: its live values do not fit the shape of its average. In a pipeline only the
        # ranks of one stage know of it.
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
    """Gathers full tensors to rank 0. A tied tensor is gathered once, under its first name. Collective.

    Args:
        average: has the list of full tensors.
        held: this rank's values, by name.
        modes: the modes of the tensors that are gathered, of ``"average"`` and ``"copy"``.
        live: whether they are live values, which have the dtype of the model.
        without: names that are left out.
    """
    wanted = []
    for entry in average.full_tensors:
        if entry.mode in modes and entry.name not in without:
            dtype = entry.live_dtype if live else entry.dtype
            wanted.append(replace(entry, aliases=(), dtype=dtype))
    return full_tensors(wanted, held.get, None, average.engine.group, "state_dict()")


def _count(average: Average) -> int:
    """Returns how many tensors each average has on all ranks together. Local; call it after ``begin()``."""
    return sum(entry.mode == "average" for entry in average.full_tensors)


@collective("load_state_dict()")
def load_state_dict(average: Average, state: Mapping[str, Any]) -> None:
    """See :meth:`ShardedEMA.load_state_dict`.

    Nothing changes before step 4, which begins when every rank has found that its part fits::

        1  begin          every rank can take part
        2  new shares     parameters join, and buffers are resized, as the part of any rank says
        3  check          each rank compares its part with its shares, and reads the live weights in it
        4  replace        shadow, seed and clocks
        5  live weights   are written into the model, if the dict has them
    """
    from dist_ema.dcp.loaded import LoadedStateDict, check_complete, unlike

    group = average.engine.group
    operation = "load_state_dict()"
    options = average.options

    # 1. Begin. An update that still runs is awaited, but its failure is ignored: the average is replaced.
    average.shadow.drain()
    average.background.drain()
    with average.begin(average.call(operation), replaces=True):
        average.wait_for_save()
        sources = average.live(operation)
    entries = average.full_tensors

    # 2. New shares. Each rank has parts of some tensors only, so ranks exchange what in them differs from the model.
    with agreed(group, operation) as round_:
        round_.send(unlike(state, entries, options.selects))
    joining: set[str] = set()
    shapes: dict[str, tuple[int, ...]] = {}
    joined: dict[str, int] = {}
    for found in round_.received:
        joining.update(found.joining)
        shapes.update(found.shapes)
        joined.update(found.joined)
    shares = shares_to_load(average.shares, joining, shapes, options, joined)

    # 3. Check.
    with agreed(group, operation) as round_:
        tracked = {entry.name for entry in entries if entry.mode != "live" or entry.name in joining}
        restore = LoadedStateDict(state, shares, average.names, tracked)
        check_complete(state, entries, joining)
        live = restore.live(sources)
        round_.send((live is None, restore.state.averaged.updates))
    without_live, updates = zip(*round_.received, strict=True)
    if len(set(without_live)) > 1:
        raise CheckpointMismatchError(
            f"{operation}: the state dicts of some ranks have 'live' and those of others do not. Pass the same live= "
            "to state_dict() on all ranks"
        )
    check_same_updates(updates)

    # Prepare to write the live weights into the model. Swap.copy() also sends them to replicas and publishes them.
    live_writer = None
    visit = Visit("", operation)
    if live is not None:
        wait = average.background.wait_until_read
        live_writer = Swap(average.engine, shares, live, average.shadow.scratch, visit, wait)
        live_writer.entries = average.full_tensors

    # The present shadow is filled in place if it fits. That needs no second set of averages in memory.
    shadow = average.shadow
    both_started = restore.state.started and shadow.started
    if shadow.failed or not both_started or shares is not average.shares:
        shadow = average.new_shadow(shares=shares)
    shadow.release_parts()

    with Uninterrupted():
        # 4. Replace. Values may be overwritten in place, so a failure from here on leaves no whole average.
        average.condition.broken = operation
        if restore.state.started:
            with agreed(group, operation):
                if not shadow.started:  # may differ between ranks, if an update failed on some of them
                    shadow.allocate(in_shapes_of(shares, sources))
                restore.fill(shadow)
                shadow.loaded()
        shadow.seed = average.seed(restore.state.seed)
        average.replace(shadow, shares, restore.state, operation)

        # 5. Live weights.
        if live_writer is not None:
            average.condition.begin(visit)
            try:
                wait_for_reads()
                live_writer.copy()
            finally:
                average.condition.end(visit)
    report_schedules(restore.schedules, options.schedules)
