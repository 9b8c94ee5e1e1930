"""Calls that return the average or numbers about it: full tensors, fingerprints and metrics. Collective.

All have the same form: ``begin()`` with the checks of this rank, then one or more exchanges between ranks.
``comm/gather.py`` assembles full tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dist_ema.checkpoints.arrangement import Arrangement
from dist_ema.checkpoints.export import arranged
from dist_ema.checkpoints.hub import check_layout
from dist_ema.checkpoints.hub_tensors import HubTensors
from dist_ema.comm.agreement import Call
from dist_ema.comm.catalogue import is_writer
from dist_ema.comm.collectives import rank_in, sum_floats, sum_integers
from dist_ema.comm.gather import check_readable, everywhere, full_tensors, in_windows
from dist_ema.core.average import Average, collective
from dist_ema.engines.names import unwrapped
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.kernels.fingerprint import Part, partial_digests
from dist_ema.options import check_cast


@collective("full_state_dict()")
def full_state_dict(
    average: Average, name: str | None, dtype: torch.dtype | None, include_untracked: bool
) -> dict[str, Tensor]:
    """See :meth:`ShardedEMA.full_state_dict`."""
    call = average.call("full_state_dict()", name=name, dtype=dtype, include_untracked=include_untracked)
    with average.begin(call):
        check_cast(dtype)
        held = average.view(call.name).average(average.name(name), include_untracked)
        check_readable(held.values())
    return full_tensors(average.wanted(include_untracked), held.get, dtype, average.engine.group, call.name)


def iter_full_tensors(
    average: Average,
    name: str | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    layout: str | None,
) -> Iterator[tuple[str, Tensor]]:
    """See :meth:`ShardedEMA.iter_full_tensors`.

    A generator function would run its checks only when the first tensor is asked for. This function checks at once, and
    returns a generator.
    """
    call = average.call("iter_full_tensors()", name=name, dtype=dtype, layout=layout)
    modules = average.engine.modules()
    model = unwrapped(modules[0]) if len(modules) == 1 else None
    with average.turn(call.name):
        with average.begin(call):
            check_cast(dtype)
            if layout not in (None, "transformers"):
                raise EMAConfigError(f"layout={layout!r}: allowed are None and 'transformers'")
            check_layout(layout, model)
            check_readable(average.view(call.name).average(average.name(name)).values())
        entries = average.full_tensors
        dtypes = {entry.name: entry.cast(dtype) for entry in entries}
        arrangement = None
        if layout is not None:
            arrangement = arranged(model, layout, entries, dtypes, average.engine.group, call.name)
    return _one_by_one(average, call, average.name(name), dtypes, torch.device(device or "cpu"), arrangement)


def _one_by_one(
    average: Average,
    call: Call,
    name: str,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    arrangement: Arrangement | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the full tensors. It gathers as many at a time as one window of memory holds. Collective.

    Args:
        average: holds the values; must not change during the iteration.
        call: describes this call. The other ranks have to make the same one.
        name: the name of the average.
        dtypes: the dtypes of the tensors that are returned, by name.
        device: the device of the tensors that are returned.
        arrangement: converts the module's tensors to the Hub's; None returns the module's own.

    Raises:
        EMAStateError: the average was updated, loaded or reset since the first tensor.
    """
    moment = (average.num_updates, average.changes)
    entries = average.full_tensors
    group = average.engine.group
    hub = None if arrangement is None else HubTensors(arrangement, device)
    for batch in in_windows(entries, dtypes):
        with average.turn(call.name):
            # The caller's code runs between two batches. If a rank has left its loop and makes another call, begin()
            # raises on all ranks; without it they would wait for each other.
            with average.begin(call):
                if (average.num_updates, average.changes) != moment:
                    raise EMAStateError(
                        f"{call.name}: the average was updated, loaded or reset since the first tensor. Call it again"
                    )
                held = average.view(call.name).average(name)
            if hub is not None:
                # A Hub tensor may consist of several tensors of the module, so a batch may complete none of them.
                found = hub.gather(batch, held.get, dtypes, group, call.name)
            else:
                found = everywhere(batch, held.get, dtypes, group, device, call.name)
        # Outside of turn(), so that the caller may make other calls in its loop.
        yield from found


@collective("fingerprint()")
def fingerprint(average: Average, name: str | None, include_untracked: bool) -> dict[str, int]:
    """See :meth:`ShardedEMA.fingerprint`.

    The digest of a tensor is a sum over its elements modulo 2**64, so it does not depend on the sharding: each rank
    digests the elements that it writes, and the sums of all ranks are added.
    """
    call = average.call("fingerprint()", name=name, include_untracked=include_untracked)
    with average.begin(call):
        held = average.view(call.name).average(average.name(name), include_untracked)
        check_readable(held.values())
    entries = average.wanted(include_untracked)
    group = average.engine.group
    # Of replicas only the writer counts its elements.
    parts = {}
    for entry in entries:
        mine = held.get(entry.name)
        if mine is not None and is_writer(entry, mine.share, rank_in(group)):
            parts[entry.name] = Part(mine.values, mine.runs, entry.dtype, mine.start)
    sums = dict.fromkeys([entry.name for entry in entries], 0)
    sums.update(zip(parts, partial_digests(list(parts.values())), strict=True))
    return dict(zip(sums, sum_integers(list(sums.values()), group), strict=True))


@collective("metrics()")
def metrics(average: Average) -> dict[str, float]:
    """See :meth:`ShardedEMA.metrics`."""
    call = average.call("metrics()")
    with average.begin(call):
        view = average.view(call.name, inside=False)
    # One exchange for all numbers. Squares add up over ranks; the root is taken at the end.
    writes = average.writes()
    squares = [view.squared_distance(name, writes) for name in average.names]
    *squares, skipped = sum_floats([*squares, average.skipped()], average.engine.group)
    values = {"ema/num_updates": float(average.num_updates), "ema/skipped_elements": skipped}
    for name, square in zip(average.names, squares, strict=True):
        prefix = "ema" if len(squares) == 1 else f"ema/{name}"
        values[f"{prefix}/decay"] = average.track.decays[name]
        values[f"{prefix}/distance"] = square**0.5
    return values
