"""``update()``: advances the clock, and averages if an update is due. Local.

An update has these steps. Only step 4 changes the average::

    1  advance the clock                        raises for a wrong count, before anything has changed
    2  ask whether the optimizer stepped,       under DeepSpeed not on a micro-step or after an overflow;
       and whether an update is due             update(batches=0, due=True) claims no step, so it does not ask
    3  follow the model                         parameters that are trained now join; resized buffers get new memory
    4  first update: copy the live tensors      later updates: shadow.lerp_(live, 1 - decay)
    5  advance the track                        number of updates, progress, decays
    6  begin a snapshot, if one is due          in the background

Ranks need no communication to decide alike: they make the same calls, with the same counts, on the same model. Only
step 4 may communicate, for a teacher that is sharded in another way (``teacher/gathered.py``). ``shadow/`` computes
step 4; ``schedules/`` gives the decay.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dist_ema.comm.collectives import rank_in
from dist_ema.core.average import Average
from dist_ema.core.files import take_snapshot
from dist_ema.engines import Attached, RemovableHandle
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.geometry.shares import as_live, assign_shares, averaged_names, may_join, was_resized
from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.duration import what_is_missed

logger = logging.getLogger(__name__)


@torch.no_grad()
def update(average: Average, batches: int, samples: int, tokens: int, epochs: float, due: bool | None) -> bool:
    """See :meth:`ShardedEMA.update`."""
    # An earlier failure is raised first: with offload="cpu" that of an update which a thread computed.
    average.condition.refuse("update()", reads=False)
    average.shadow.raise_failure()

    # ``now`` becomes the training clock only at the end. If a step between raises, the caller may repeat the call
    # and nothing is counted twice.
    track = average.track
    before = track.training
    now = before.advance(batches=batches, samples=samples, tokens=tokens, epochs=epochs)

    # update(batches=0, due=True) averages the weights as they are, and claims no step. A DeepSpeed engine that has
    # not stepped yet must not turn it down.
    claims_no_step = due is True and batches == 0
    if not claims_no_step and not average.engine.stepped():
        return False

    if due is None:
        due = track.is_due(now)
    if due:
        # A save in the background may still read the shadow, which is about to change.
        average.background.wait_until_read()
        sources = average.live_tensors()
        average.shadow.release_parts()
        # Average and clock change together: a signal between the two would count an update that was not made.
        with Uninterrupted():
            sources = _follow(average, sources)
            average.shadow.check(sources)
            _average(average, sources, now)
            track.training = now
            average.condition.broken = None
    else:
        track.training = now

    # A failed save is raised last: this update has been made and counted, so raising loses no update.
    average.background.raise_failure()
    for snapshots in average.snapshots:
        if average.shadow.started and snapshots.is_due(before, now):
            take_snapshot(average, snapshots)
    return due


def _average(average: Average, sources: Sequence[Tensor], now: Progress) -> None:
    """Updates the average with the live tensors. If this fails half way, ``condition.broken`` stays set. Local."""
    if average.shadow.started:
        _update_shadow(average, sources, now)
    else:
        _copy_first(average, sources, now)


def _copy_first(average: Average, sources: Sequence[Tensor], now: Progress) -> None:
    """Copies the live tensors into the average, as the first update does. Local.

    If this fails, for example for lack of memory, the average has not begun, and a later update() may try again.
    """
    average.condition.broken = "update()"
    try:
        average.shadow.first_copy(sources)
        average.track.begin(now)
    except BaseException:
        # This shadow may have allocated memory and filled a part of it. An empty one takes its place.
        average.install(average.new_shadow())
        average.track.forget()
        average.condition.broken = None
        raise


def _update_shadow(average: Average, sources: Sequence[Tensor], now: Progress) -> None:
    """Moves the average toward the live tensors: shadow = decay * shadow + (1 - decay) * live. Local."""
    track = average.track
    shadow = average.shadow
    after = track.after(now)
    log_retained = track.log_retained(after)
    # 1 - decay. expm1 keeps it exact where decay is so close to 1 that 1 - decay would lose digits.
    weights = [-math.expm1(logarithm) for logarithm in log_retained.values()]
    _warn_if_still(average, after)

    # The kernels set ``touched`` before they first write into the shadow. New memory has to be filled in any case.
    shadow.scratch.touched = shadow.has_new
    average.condition.broken = "update()"
    try:
        if any(weights):
            shadow.update(sources, weights, after.updates)
        elif shadow.has_new:
            # Between two windows every decay is 1: no average moves, and no buffer is copied. Tensors that have
            # joined still need their first values.
            shadow.fill_new(sources, after.updates)
    except BaseException:
        if not shadow.scratch.touched:
            average.condition.broken = None  # nothing was written, so the average is whole
        raise
    track.step(after, log_retained)


# Following a model whose requires_grad flags and buffers change. Local.


def _follow(average: Average, sources: list[Tensor]) -> list[Tensor]:
    """Adapts the shares to what has changed in the model since the last update. Returns the live tensors."""
    if not average.shadow.started:
        return _choose(average)
    # Most updates end here: nothing may have been resized, and no frozen parameter could join.
    if average.may_be_resized or (average.frozen and average.engine.trained(average.frozen)):
        _join(average, sources)
    return sources


def _choose(average: Average) -> list[Tensor]:
    """Decides by ``requires_grad`` at the first update what is averaged. Returns the live tensors.

    If no parameter requires a gradient now, as in a GAN between two steps, the flags say nothing. Then those
    parameters are averaged that were trained when the average was made.
    """
    shares = average.shares
    engine = average.engine
    options = average.options
    before = averaged_names(shares)
    # What the options select, whether it was trained at construction or not.
    selected = [number for number, share in enumerate(shares) if may_join(as_live(share), options)]
    trained = {shares[number].spec.name for number in engine.trained(selected)}
    frozen_since = before - trained
    if trained and frozen_since:
        logger.warning(
            "%r and %d more parameters were trained when the average was made, and are frozen at its first update: "
            "they are not averaged, unless they are trained at a later one.",
            min(frozen_since),
            len(frozen_since) - 1,
        )
    average.start_over(assign_shares(engine.specs(), options, trained or before))
    return engine.sources()


def _join(average: Average, sources: Sequence[Tensor]) -> None:
    """Adds parameters that are trained now to the average, and gives resized buffers new memory.

    Ranks do not communicate for this: each sees the same flags and shapes at the same update.
    """
    engine = average.engine
    options = average.options
    announced = engine.announced()
    shares = list(average.shares)
    update = average.num_updates + 1

    # Parameters that were frozen and require a gradient now. Each share records the update at which it joined.
    joining = engine.trained(average.frozen)
    names = [shares[number].spec.name for number in joining]
    specs = [engine.describe(number) for number in joining]
    for number, share in zip(joining, assign_shares(specs, options, names, update), strict=True):
        shares[number] = share

    # Buffers whose shape has changed. Elements of different shapes cannot be averaged, so these start anew.
    resized = [number for number, share in enumerate(shares) if was_resized(share, announced[number])]
    for number in resized:
        (shares[number],) = assign_shares([announced[number]], options, joined=update)

    if joining or resized:
        average.take_shares(shares, sources, [*joining, *resized])
    average.may_be_resized = False

    if joining:
        logger.warning(
            "%r and %d more parameters were frozen and are trained now: they join the average at update %d with "
            "their current values.",
            names[0],
            len(names) - 1,
            update,
        )
    averaged = [shares[number].spec.name for number in resized if shares[number].mode == "average"]
    if averaged and average.first_time("resized"):
        logger.warning(
            "The buffer %r was resized. Its average starts anew from its current value each time this happens.",
            averaged[0],
        )


# Calling update() after each optimizer step. Local.


def attach(
    average: Average,
    optimizer: object,
    update: Callable[[], object],
    call: Callable[[], object] | None,
    overlap: bool = False,
) -> RemovableHandle:
    """See :meth:`ShardedEMA.attach`. ``update`` is called after each step, unless ``call`` is given."""
    if average.teacher is not None:
        average.teacher.check_optimizer(optimizer)
    if overlap:
        _check_overlap(average, call)

    # With call= the user counts the steps, so the checks of counting below do not apply.
    if call is not None:
        return average.engine.attach(optimizer, call)

    # A hook knows that a step was made, but not how many samples or tokens it had.
    others = average.options.units() - {"ba"}
    if others:
        raise EMAConfigError(
            f"attach() can count batches only, but the options count in {', '.join(sorted(others))}. Call "
            "update(samples=..., tokens=..., epochs=...) after each step instead"
        )
    if average.attached is not None:
        raise EMAStateError(
            "attach(): an optimizer is attached already, so a step would be counted twice. If a step uses several "
            "optimizers, attach only the one that steps last. To attach another one, first remove() the handle of "
            "the earlier call. To count steps yourself, pass call= to each"
        )

    inner = average.engine.attach(optimizer, update)
    # Parameters that are averaged but that the optimizer does not have may belong to another optimizer.
    averaged: set[str] = set()
    known: set[str] = set()
    for share in average.shares:
        known.update(share.names)
        if share.mode == "average":
            averaged.update(share.names)
    average.engine.warn_of_lacking(optimizer, averaged, known)

    def detach() -> None:
        average.attached = None
        if average.overlap:
            average.overlap = False
            average.shadow.run_beside(False)

    if overlap:
        average.overlap = True
        average.shadow.run_beside()
    average.attached = Attached(inner, detach)
    return average.attached


def _check_overlap(average: Average, call: object) -> None:
    """Raises EMAConfigError if ``attach(overlap=True)`` cannot be combined with other options."""
    if average.teacher is not None:
        raise EMAConfigError(
            "overlap=True: the teacher of into= may compute at any time, so its weights cannot change during the next "
            "forward pass. Leave out overlap="
        )
    if average.options.offload:
        raise EMAConfigError(
            "overlap=True: with offload='cpu' updates run in parallel with training anyway. Leave out overlap="
        )
    if call is not None:
        raise EMAConfigError(
            "overlap=True: with call= it is not known whether update() is called right after the step. Pass only one "
            "of the two"
        )


def warn_of_length(average: Average, length: Mapping[str, float]) -> None:
    """Warns once, on rank 0, if a training of this length is too short for the options.

    Args:
        average: gives the options ``ema_start`` and ``update_interval``.
        length: length of the training in each unit, such as ``{"ba": 1000.0, "ep": 3.0}``.
    """
    missed = what_is_missed(average.options.start, average.options.interval, length)
    if missed is not None and average.first_time("length") and rank_in(average.engine.group) == 0:
        logger.warning("%s.", missed)


def _warn_if_still(average: Average, after: Progress) -> None:
    """Warns once if a schedule counts in a unit that the caller has not counted since the last update."""
    units = average.track.unmoved(after) - {"ba"}
    if units and average.first_time("still"):
        logger.warning(
            "An update did not move the average: its schedule counts in %s, but update() was given none since the "
            "last update. Pass samples=, tokens= or epochs= to update().",
            " and ".join(sorted(units)),
        )
