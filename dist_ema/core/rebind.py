"""``rebind()``: the same average for another wrapping of the same model. Collective."""

from __future__ import annotations

import torch.distributed as dist

from dist_ema.comm.agreement import agreed, named_operation
from dist_ema.comm.gather import LocalValues
from dist_ema.comm.groups import OwnGroups
from dist_ema.comm.resharding import check_same_model, move
from dist_ema.core.average import Average
from dist_ema.core.condition import Condition
from dist_ema.geometry.shares import assign_shares
from dist_ema.runtime.interrupts import Uninterrupted


@named_operation("rebind()")
def rebind(average: Average, target: object) -> None:
    """See :meth:`ShardedEMA.rebind`."""
    average.background.drain()
    groups = _present_groups(average)
    with groups.turn("rebind()"):
        _rebind(average, target, groups)


def _present_groups(average: Average) -> OwnGroups:
    """Returns the average's process groups, or new ones where the program has made others since. Local."""
    initialized = dist.is_available() and dist.is_initialized()
    group = average.group or (dist.group.WORLD if initialized else None)
    if group is average.groups.group or group is None:
        return average.groups
    if average.teacher is not None:  # it is wrapped for the old groups, too
        average.groups.check("rebind()")
    return OwnGroups(group, repr(average.options.facts()))


def _rebind(average: Average, target: object, groups: OwnGroups) -> None:
    """Moves the average to where the new wrapping wants it, and then goes on with that. Collective."""
    operation = "rebind()"
    group = groups.group
    if average.groups.group is None and group is not None:
        average.catalogue = None  # only this process has agreed with itself so far
    with average.begin(average.call(operation), groups=groups):
        groups.check_same_place(average.groups, operation)
        average.wait_for_save()
        average.condition.refuse(operation)
        average.shadow.wait()
        engine = average.detect(target)
        specs = engine.specs()
        averaged = {name for entry in average.full_tensors if entry.mode == "average" for name in entry.names}
        shares = assign_shares(specs, average.options, averaged)
        shadow = average.new_shadow(average.shadow.seed, shares, target)
        engine.reshard()
        sources = engine.sources()
    old = average.full_tensors
    new = average.proven(engine, shares, group)
    joining = check_same_model(old, new, operation)
    old = [entry for entry in old if entry.mode != "live" and entry.name not in joining]
    if average.shadow.started:
        begin = shadow.start if joining else shadow.allocate  # what joins keeps its present value
        with agreed(group, operation):
            begin(sources)
            shadow.wait()
        for name in average.names:
            held = {}
            for share, values in zip(average.shares, average.shadow.tensors(name), strict=True):
                if values is not None:
                    held[share.spec.name] = LocalValues(share, values, 0)
            move(old, held.get, shares, shadow.tensors(name), group, operation)
        shadow.loaded()
    with Uninterrupted():
        average.skipped_before = average.skipped()
        average.engine = engine
        average.set_shares(shares)
        average.catalogue = new
        average.condition = Condition(engine)
        average.groups = groups
        if average.teacher is not None:
            average.teacher.target = target
        average.install(shadow)
