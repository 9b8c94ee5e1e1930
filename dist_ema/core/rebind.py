"""``rebind()``: moves an average to another wrapping of the same model. Collective.

The new wrapping may shard the model in another way, over other process groups. Steps::

    1  begin             every rank can take part; the new shares and an empty shadow of their size are made
    2  compare           the two wrappings are of the same model
    3  move              each average goes from the old shares to the new ones, one tensor after another
    4  switch            engine, shares, groups and shadow are replaced together

Until step 4 the old average is untouched, so an error in an earlier step loses nothing.
"""

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
    """Returns the average's process groups; new ones if the program has another default group since. Local."""
    initialized = dist.is_available() and dist.is_initialized()
    group = average.group or (dist.group.WORLD if initialized else None)
    if group is average.groups.group or group is None:
        return average.groups
    # The program has destroyed its default group and made another one since.
    if average.teacher is not None:
        # The teacher is not wrapped anew by rebind(). It computes with the old groups, so these must still exist.
        average.groups.check("rebind()")
    return OwnGroups(group, repr(average.options.facts()))


def _rebind(average: Average, target: object, groups: OwnGroups) -> None:
    """Carries out ``rebind()`` in the process groups of the new wrapping. Collective."""
    operation = "rebind()"
    group = groups.group
    if average.groups.group is None and group is not None:
        # The average was made without a process group. Its catalogue was not compared with that of other ranks.
        average.catalogue = None

    # 1. Begin. What a rank raises in this block is raised on every rank.
    with average.begin(average.call(operation), groups=groups):
        groups.check_same_place(average.groups, operation)
        average.wait_for_save()
        average.condition.refuse(operation)
        average.shadow.wait()
        engine = average.detect(target)
        specs = engine.specs()
        # What is averaged stays averaged, also if it is frozen by now.
        averaged = {name for entry in average.full_tensors if entry.mode == "average" for name in entry.names}
        shares = assign_shares(specs, average.options, averaged)
        shadow = average.new_shadow(average.shadow.seed, shares, target)
        engine.reshard()
        sources = engine.sources()

    # 2. Compare the model with that of the old wrapping.
    old = average.full_tensors
    new = average.proven(engine, shares, group)
    joining = check_same_model(old, new, operation)
    old = [entry for entry in old if entry.mode != "live" and entry.name not in joining]

    # 3. Move each average.
    if average.shadow.started:
        # Parameters that join begin with their current values. If none join, every element is received, so the live
        # weights need not be copied first.
        prepare = shadow.start if joining else shadow.allocate
        with agreed(group, operation):
            prepare(sources)
            shadow.wait()
        for name in average.names:
            held = {}
            for share, values in zip(average.shares, average.shadow.tensors(name), strict=True):
                if values is not None:
                    held[share.spec.name] = LocalValues(share, values, 0)
            move(old, held.get, shares, shadow.tensors(name), group, operation)
        shadow.loaded()

    # 4. Switch. Signals wait, because parts of the old and of the new wrapping do not fit together.
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
