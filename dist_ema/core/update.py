"""``update()``: advances the clock, and averages if an update is due. Local.

An update goes through these steps; only step 4 changes the average::

    1  advance the clock                        a wrong count is refused here
    2  ask whether the optimizer stepped,       DeepSpeed: not on a micro-step or after an overflow;
       and whether an update is due             not asked by update(batches=0, due=True), which claims no step
    3  follow the model                         parameters that are trained now join; resized buffers get new memory
    4  copy the weights, or shadow.lerp_(live)
    5  advance the track                        counts, and how much was kept
    6  begin a snapshot, if one is due          in the background
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
    average.condition.refuse("update()", reads=False)
    average.shadow.raise_failure()
    track = average.track
    now = track.training.advance(batches=batches, samples=samples, tokens=tokens, epochs=epochs)
    # update(batches=0, due=True) takes the weights as they are, and claims no step: a DeepSpeed engine that has not
    # stepped yet must not turn it down.
    as_they_are = due is True and batches == 0
    if not as_they_are and not average.engine.stepped():
        return False
    if due is None:
        due = track.is_due(now)
    if due:
        average.background.wait_until_read()
        sources = average.live_tensors()
        average.shadow.release_parts()
        with Uninterrupted():
            sources = _follow(average, sources)
            average.shadow.check(sources)
            _average(average, sources, now)
            before, track.training = track.training, now
            average.condition.broken = None
    else:
        before, track.training = track.training, now
    average.background.raise_failure()  # last, so that no update is lost
    for snapshots in average.snapshots:
        if average.shadow.started and snapshots.is_due(before, now):
            take_snapshot(average, snapshots)
    return due


def _average(average: Average, sources: Sequence[Tensor], now: Progress) -> None:
    """Takes the live tensors into the average. If this fails half way, ``condition.broken`` stays set. Local."""
    if average.shadow.started:
        _update_shadow(average, sources, now)
    else:
        _copy_first(average, sources, now)


def _copy_first(average: Average, sources: Sequence[Tensor], now: Progress) -> None:
    """Copies the live tensors: the first update. Local."""
    average.condition.broken = "update()"
    try:
        average.shadow.first_copy(sources)
        average.track.begin(now)
    except BaseException:
        average.install(average.new_shadow())  # this one may have memory, but no average in it
        average.track.forget()
        average.condition.broken = None
        raise


def _update_shadow(average: Average, sources: Sequence[Tensor], now: Progress) -> None:
    """Moves the average towards the live tensors. Local."""
    track = average.track
    shadow = average.shadow
    after = track.after(now)
    log_retained = track.log_retained(after)
    weights = [-math.expm1(logarithm) for logarithm in log_retained.values()]
    _warn_if_still(average, after)
    shadow.scratch.touched = shadow.has_new
    average.condition.broken = "update()"
    try:
        if any(weights):  # between two windows an average stands still, and its buffers with it
            shadow.update(sources, weights, after.updates)
        elif shadow.has_new:
            shadow.fill_new(sources, after.updates)
    except BaseException:
        if not shadow.scratch.touched:  # nothing was written yet
            average.condition.broken = None
        raise
    track.step(after, log_retained)


# Following a model whose flags and buffers change. Local.


def _follow(average: Average, sources: list[Tensor]) -> list[Tensor]:
    """Takes in what has changed in the model since the last update; returns the live tensors."""
    if not average.shadow.started:
        return _choose(average)
    if average.may_be_resized or (average.frozen and average.engine.trained(average.frozen)):
        _join(average, sources)
    return sources


def _choose(average: Average) -> list[Tensor]:
    """Decides by the flags of this moment what is averaged from the first update on; returns the live tensors.

    Where nothing is trained now (in a GAN, between two steps), flags say nothing, and what was trained when the
    average was made is averaged.
    """
    shares = average.shares
    engine = average.engine
    options = average.options
    before = averaged_names(shares)
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
    """Takes parameters that are trained now into the average, and gives resized buffers new memory.

    Ranks make no call for that: each sees the same flags and shapes at the same update.
    """
    engine = average.engine
    options = average.options
    announced = engine.announced()
    shares = list(average.shares)
    update = average.num_updates + 1
    joining = engine.trained(average.frozen)
    names = [shares[number].spec.name for number in joining]
    specs = [engine.describe(number) for number in joining]
    for number, share in zip(joining, assign_shares(specs, options, names, update), strict=True):
        shares[number] = share
    grown = [number for number, share in enumerate(shares) if was_resized(share, announced[number])]
    for number in grown:
        (shares[number],) = assign_shares([announced[number]], options, joined=update)
    if joining or grown:
        average.take_shares(shares, sources, [*joining, *grown])
    average.may_be_resized = False
    if joining:
        logger.warning(
            "%r and %d more parameters were frozen and are trained now: they join the average at update %d, with "
            "their present values.",
            names[0],
            len(names) - 1,
            update,
        )
    averaged = [shares[number].spec.name for number in grown if shares[number].mode == "average"]
    if averaged and average.first_time("resized"):
        logger.warning(
            "The buffer %r was resized: its average starts anew with its present value, at each time.", averaged[0]
        )


# Who calls update(), and for how long. Local.


def attach(
    average: Average,
    optimizer: object,
    update: Callable[[], object],
    call: Callable[[], object] | None,
    overlap: bool = False,
) -> RemovableHandle:
    """See :meth:`ShardedEMA.attach`; ``update`` is its ``update()``."""
    if average.teacher is not None:
        average.teacher.check_optimizer(optimizer)
    if overlap:
        _check_overlap(average, call)
    if call is not None:
        return average.engine.attach(optimizer, call)
    others = average.options.units() - {"ba"}
    if others:
        raise EMAConfigError(
            f"attach() can count batches only, and the options count in {', '.join(sorted(others))}: call "
            "update(samples=..., tokens=..., epochs=...) after each step instead"
        )
    if average.attached is not None:
        raise EMAStateError(
            "attach(): an optimizer is attached already, and a step would be counted twice. Of several optimizers "
            "attach only the one that steps last. To attach another one, remove() the handle of the first call "
            "before. To count steps yourself, pass call= to each"
        )
    inner = average.engine.attach(optimizer, update)
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
    """Raises EMAConfigError for what ``attach(overlap=True)`` does not go with."""
    if average.teacher is not None:
        raise EMAConfigError(
            "overlap=True: the teacher of into= may compute at any time, so its weights cannot change beside the next "
            "forward pass. Attach without it"
        )
    if average.options.offload:
        raise EMAConfigError("overlap=True: with offload='cpu' updates run beside training anyway. Attach without it")
    if call is not None:
        raise EMAConfigError(
            "overlap=True: with call= it is not known that update() is called right after the step. Give one of the two"
        )


def warn_of_length(average: Average, length: Mapping[str, float]) -> None:
    """Logs once, on rank 0, that a training of this length, by unit, makes no average or one that never moves."""
    missed = what_is_missed(average.options.start, average.options.interval, length)
    if missed is not None and average.first_time("length") and rank_in(average.engine.group) == 0:
        logger.warning("%s.", missed)


def _warn_if_still(average: Average, after: Progress) -> None:
    units = average.track.unmoved(after) - {"ba"}
    if units and average.first_time("still"):
        logger.warning(
            "An update did not move the average: its schedule counts in %s, and update() was told of none since "
            "the last one. Pass samples=, tokens= or epochs= to update().",
            " and ".join(sorted(units)),
        )
