"""Calls on files: ``save()``, ``load()``, ``export()`` and ``snapshot()``.

All four have the same form. Inside ``begin()`` each rank checks what it can check alone. When all ranks have succeeded,
they read or write, and communicate over a group on the CPU. ``save(block=False)`` leaves the second half to a thread of
the library::

    caller's thread     begin | make the files, write live weights | training continues
    library's thread                                               | read the shadow | sync, commit
    next due update                                                  waits until here ^

A snapshot is begun by ``update()``, which must not communicate, so all of it happens in that thread. ``checkpoints/``
decides who writes which bytes; ``runtime/background.py`` has the thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.contents import Contents
from dist_ema.checkpoints.export import export as write_export
from dist_ema.checkpoints.load import Load, report_schedules
from dist_ema.checkpoints.model_card import ModelCard
from dist_ema.checkpoints.save import Save
from dist_ema.checkpoints.versions import read_anew_if_replaced
from dist_ema.comm.agreement import agreed, named_operation
from dist_ema.comm.gather import check_readable
from dist_ema.comm.groups import Turn
from dist_ema.core.average import PATIENCE, Average, collective
from dist_ema.core.snapshots import Snapshots
from dist_ema.core.view import View
from dist_ema.engines.names import unwrapped
from dist_ema.formats.manifest import Manifest
from dist_ema.geometry.shares import Share, in_shapes_of, shares_to_load
from dist_ema.options import check_cast
from dist_ema.runtime.interrupts import Uninterrupted
from dist_ema.runtime.streams import Handover
from dist_ema.shadow.device import Shadow

#: What the library's thread runs. It enters the given context while it reads the shadow; updates wait for its exit.
Work = Callable[[AbstractContextManager[None]], None]


@collective("export()")
def export(
    average: Average,
    path: str | os.PathLike[str],
    *,
    name: str | None,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    config_from: object,
    gather: bool | None,
    include_untracked: bool,
    layout: str | None,
) -> None:
    """See :meth:`ShardedEMA.export`."""
    call = average.call(
        "export()",
        name=name,
        dtype=dtype,
        max_shard_size=max_shard_size,
        gather=gather,
        include_untracked=include_untracked,
        layout=layout,
    )
    with average.begin(call):
        check_cast(dtype)
        values = average.view(call.name).average(average.name(name))
    chosen = average.name(name)
    average.warn_if_not_started(call.name)
    modules = average.engine.modules()
    write_export(
        path,
        average.full_tensors,
        values.get,
        average.groups.files(call.name, PATIENCE, average.nbytes()),
        dtype=dtype,
        max_shard_size=max_shard_size,
        config_from=config_from,
        gather=gather,
        layout=layout,
        model=unwrapped(modules[0]) if len(modules) == 1 else None,
        include_untracked=include_untracked,
        card=ModelCard(chosen, average.options.schedules[chosen], average.state(skipped=0)),
    )


def save(
    average: Average, path: str | os.PathLike[str], *, block: bool, timeout: float, include_untracked: bool
) -> None:
    """See :meth:`ShardedEMA.save`."""
    operation = f"save to {path}"
    average.background.drain()
    with named_operation(operation, timeout), average.groups.turn("save()"):
        call = average.call("save()", operation, block=block, timeout=timeout, include_untracked=include_untracked)
        with average.begin(call, timeout=timeout):
            average.wait_for_save()
            view = average.view("save()")
            values = {name: view.average(name, include_untracked) for name in average.names}
            for tensors in values.values():
                check_readable(tensors.values())
        average.warn_if_not_started("save()")
        nbytes = average.nbytes()
        contents = Contents(
            average.state(average.skipped()),
            average.options.schedules,
            average.full_tensors,
            {name: tensors.get for name, tensors in values.items()},
            include_untracked,
        )
        writing = Save(path, contents, average.groups.files("save()", timeout, nbytes))
        if block:
            writing.run()
            return
        writing.start()
        # The thread communicates later. It takes its place in the line here, where all ranks are in the same call, so
        # that threads of different saves communicate in the same order on every rank.
        turn = average.groups.line_up("save()", timeout, nbytes)

    def finish(reading: AbstractContextManager[None]) -> None:
        with named_operation(operation, timeout):
            writing.finish(reading, turn)

    _in_background(average, finish, _handover(average), turn)


def _handover(average: Average) -> Handover:
    """Returns what lets the thread read the shadow after device work that is already queued on it. Local."""
    tensors = []
    if average.shadow.started:
        for name in average.names:
            tensors += [values for values in average.shadow.tensors(name) if values is not None]
    return Handover(tensors)


def _in_background(average: Average, work: Work, handover: Handover, turn: Turn) -> None:
    """Runs ``work`` in the library's thread. Its turn to communicate ends with it, even if it was not used. Local."""

    def run(reading: AbstractContextManager[None]) -> None:
        try:
            work(reading)
        finally:
            turn.leave()

    try:
        average.background.start(run, handover)
    except BaseException:
        turn.leave()
        raise


def snapshot(
    average: Average, folder: str | os.PathLike[str], every: str | int, keep: int | None, dtype: torch.dtype | None
) -> Snapshots:
    """See :meth:`ShardedEMA.snapshot`."""
    call = average.call("snapshot()", every=every, keep=keep, dtype=dtype)
    with average.turn(call.name), average.begin(call):
        snapshots = Snapshots(folder, every, keep, dtype)
    snapshots.begin(average.track.training)
    average.snapshots.append(snapshots)
    return snapshots


def take_snapshot(average: Average, snapshots: Snapshots) -> None:
    """Starts a save of the averages in the library's thread. Local; waits for an offloaded update and earlier saves."""
    average.condition.refuse("snapshot")
    average.shadow.wait()
    # Everything is read here and passed to the thread, because the average may be another one when its turn comes.
    path = snapshots.path(average.track.training)
    engine = average.engine
    shares = average.shares
    catalogue = average.catalogue
    state = average.state(0)
    schedules = average.options.schedules
    view = View(shares, average.shadow, engine.sources(), average.condition)
    values = {name: view.average(name, include_untracked=False).get for name in average.names}
    handover = _handover(average)
    turn = average.groups.line_up("snapshot()", PATIENCE, average.nbytes())

    def contents(group: dist.ProcessGroup | None) -> Contents:
        # Without a collective call since construction or reset(), ranks have no catalogue. Making it communicates, so
        # it is made in the thread.
        entries = average.proven(engine, shares, group) if catalogue is None else catalogue
        with handover.taken():
            skipped = average.skipped()  # waits for the device, so not in update()
        return Contents(replace(state, skipped=skipped), schedules, entries, values, False, snapshots.dtype)

    def write(reading: AbstractContextManager[None]) -> None:
        with named_operation(f"snapshot {path}", PATIENCE), turn as group:
            snapshots.save(path, contents, reading, group)

    _in_background(average, write, handover, turn)


@collective("load()")
def load(average: Average, path: str | os.PathLike[str], strict: bool, verify: bool) -> None:
    """See :meth:`ShardedEMA.load`.

    The checkpoint is read into a new shadow. It replaces the old one when all ranks have read their parts, so an error
    loses nothing.
    """
    average.background.drain()
    call = average.call("load()", f"load from {path}", strict=strict, verify=verify)
    with average.begin(call, replaces=True):
        average.wait_for_save()
        sources = average.live("load()")
        unfrozen = average.engine.trained(average.frozen)
    options = average.options
    group = average.groups.files("load()", PATIENCE, average.nbytes())
    names = [average.shares[number].spec.name for number in unfrozen]

    def open_checkpoint() -> Load:
        return Load(path, average.full_tensors, average.names, group, options.selects, options.dtype, names)

    def read(reading: Load) -> tuple[Manifest, Shadow, list[Share]]:
        shadow, shares = _filled(average, reading, sources, unfrozen, strict, verify)
        return reading.manifest, shadow, shares

    # Another run may replace the checkpoint while it is read. Then both steps are repeated with the new one.
    manifest, shadow, shares = read_anew_if_replaced(open_checkpoint, read)
    with Uninterrupted():
        average.replace(shadow, shares, manifest.state, "load()")
    report_schedules(manifest.schedules, options.schedules)


def _filled(
    average: Average, reading: Load, sources: Sequence[Tensor], unfrozen: Sequence[int], strict: bool, verify: bool
) -> tuple[Shadow, list[Share]]:
    """Returns a new shadow with the values of a checkpoint, and its shares. Collective; raises on every rank.

    Args:
        average: the average that will be replaced. It stays as it is.
        reading: the opened checkpoint.
        sources: the live tensors.
        unfrozen: the numbers of parameters that were frozen and are trained now.
        strict: the checkpoint must have every tensor.
        verify: compare checksums.
    """
    found = reading.match(strict)

    # Parameters that the checkpoint averages join here, too, if they are trained by now.
    own = average.shares
    joining = [number for number in unfrozen if own[number].spec.name in reading.joining]
    if joining:
        own = list(own)
    for number in joining:
        # DDP does not synchronize a parameter that was frozen when it wrapped the model. The replicas of such a
        # parameter may differ once it is trained, so each rank averages all of its own. describe() knows that.
        own[number] = replace(own[number], spec=average.engine.describe(number))
    shares = shares_to_load(own, reading.joining, reading.shapes, average.options)

    shadow = average.new_shadow(reading.manifest.seed, shares)
    if reading.manifest.started:
        # With strict=False a checkpoint may lack tensors, which begin with their live values. Otherwise every element
        # is read from the checkpoint, so the live values need not be copied first.
        prepare = shadow.allocate if strict else shadow.start
        with agreed(average.engine.group, "load()"):
            prepare(in_shapes_of(shares, sources))
            shadow.wait()
        reading.fill(shadow, shares, found, verify)
        shadow.loaded()
    return shadow, shares
