"""Converts an average that another library saved into a checkpoint: one process, no model, one tensor after the
other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_ema.checkpoints.contents import Contents
from dist_ema.checkpoints.file_values import Advance, FileValues, no_advance
from dist_ema.checkpoints.save import Save
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.gather import LocalValues
from dist_ema.errors import EMAConfigError
from dist_ema.formats.tensors import LazyTensor, Tensors
from dist_ema.geometry.shares import Mode
from dist_ema.importers import AUTO, FORMATS, generic, recognise
from dist_ema.importers.assembly import Assembly
from dist_ema.importers.files import open_foreign, open_model
from dist_ema.importers.foreign import Foreign, Model
from dist_ema.options import check_cast
from dist_ema.schedules import ConstantDecay, HalfLife, Schedule
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState
from dist_ema.storage.paths import check_path


@dataclass(frozen=True)
class Imported:
    """Describes what was imported.

    Attributes:
        format: the format of the file.
        notes: what the file did not say, and what was assumed instead.
    """

    format: str
    notes: tuple[str, ...]


def import_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = AUTO,
    key: str | None = None,
    model: str | os.PathLike[str] | None = None,
    frozen: str | None = None,
    prefix: str | None = None,
    decay: float | None = None,
    half_life: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    begin: Callable[[int], Advance] | None = None,
) -> Imported:
    """Writes a checkpoint that :meth:`ShardedEMA.load` reads, from a file of another library. One process.

    The tensors of the average, including buffers, are bit for bit those of the file. No code in the file is run.
    Memory: files of torch.save and safetensors are mapped; of a ``torch.distributed.checkpoint``, one tensor at a time
    is read.

    Args:
        source: the file, or the directory.
        target: the checkpoint to make. Missing parents are created.
        format: one of :data:`dist_ema.importers.FORMATS`, or ``"auto"``, which recognizes the format by the contents.
            ``"state-dict"`` takes any dict of tensors, also one that nothing marks as an average.
        key: the dict of tensors inside the file, such as ``"callbacks.EMA.ema_state_dict"``; in a folder of safetensors
            files, the file or index to take. For ``"state-dict"``.
        model: a state dict of the same model, by torch.save or safetensors. It names the tensors of a list without
            names (torch.save only: safetensors files do not keep the order), and supplies buffers that the file lacks.
        frozen: regular expression on the names of parameters that are not trained; few files say which these are.
        prefix: takes one module out of a larger one, such as ``"net"`` of a LightningModule: its names lose ``net.``,
            and all other tensors are left out. A ``model`` of the larger module is cut in the same way.
        decay: fraction kept per batch, if the file does not say.
        half_life: replaces ``decay``, such as ``"1000ba"``.
        dtype: dtype of the floating-point tensors of the average; None means that of the file.
        overwrite: replace a checkpoint that exists at ``target``, in one step.
        begin: called with the number of bytes to write; returns the function that is called with the progress.

    Raises:
        EMAConfigError: an option has a value that is not allowed.
        CheckpointError: the file has no known format, holds more than data, or lacks names that ``model`` would supply;
            or ``target`` is something else than a checkpoint.
        CheckpointMismatchError: the file is not of that model. Lists the differences.
        CheckpointCorruptError: the file is damaged.
    """
    # Check the options that can be checked without the file.
    pattern = _pattern(frozen)
    given = _schedule(decay, half_life)
    check_cast(dtype)
    for path in (source, target, *([] if model is None else [model])):
        check_path(path)
    content = open_foreign(Path(source), key)
    name = recognise(content, format, str(source), key)
    state = open_model(Path(model), pattern) if model is not None else None
    start = None if prefix is None else prefix.removesuffix(".") + "."
    # A known format knows where its average is. In a dict of tensors it has to be chosen, by key and prefix.
    read = FORMATS[name].read
    if read is not None:
        foreign = read(content, state)
        if start is not None:
            foreign, state = _cut(foreign, state, start)
    else:
        only = format == AUTO and key is None
        # In a folder of safetensors files the key has named the file, which is open now.
        inner = None if content.chosen else key
        foreign = generic.read(content, str(source), key=inner, prefix=prefix, model=state, average_only=only)
        if state is not None and start is not None:
            state = _cut_model(state, start)
    whole_model = Assembly(foreign, state, pattern)
    schedule = given or foreign.schedule or foreign.usual
    _save(target, foreign, whole_model, schedule, dtype, overwrite, begin)
    return Imported(name, (*content.notes, *_notes(name, foreign, given, schedule)))


def _pattern(frozen: str | None) -> re.Pattern[str] | None:
    """Compiles ``frozen=``. Raises EMAConfigError if it is not a regular expression."""
    try:
        return re.compile(frozen) if frozen is not None else None
    except re.error as error:
        raise EMAConfigError(f"frozen={frozen!r} is not a regular expression: {error}") from error


def _cut(foreign: Foreign, model: Model | None, prefix: str) -> tuple[Foreign, Model | None]:
    """Selects the tensors whose names have this prefix, and removes it."""

    def inside(tensors: Tensors) -> dict[str, LazyTensor]:
        return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    averages = {average: dict(tensors) for average, tensors in foreign.averages.items()}
    live = dict(foreign.live)
    # The averaged name of a tied tensor may be outside of the prefix, and another of its names inside. So it is given
    # all of its names first.
    for group in foreign.tied:
        for tensors in averages.values():
            if (held := next((tensors[name] for name in group if name in tensors), None)) is not None:
                tensors.update(dict.fromkeys(group, held))
                live = {name: tensor for name, tensor in live.items() if name not in group}
    found = {average: inside(tensors) for average, tensors in averages.items()}
    if not all(found.values()):
        names = next(iter(foreign.averages.values()))
        raise EMAConfigError(f"prefix={prefix!r} begins no name; names are {', '.join(names)[:200]}")
    groups = [tuple(name.removeprefix(prefix) for name in group if name.startswith(prefix)) for group in foreign.tied]
    tied = [group for group in groups if len(group) > 1]
    return replace(foreign, averages=found, live=inside(live), tied=tied), model and _cut_model(model, prefix)


def _cut_model(model: Model, prefix: str) -> Model:
    """Selects the model's tensors under the prefix. A model that has none is the smaller one: returns it unchanged."""
    known = {name.removeprefix(prefix): held for name, held in model.tensors.items() if name.startswith(prefix)}
    return replace(model, tensors=known) if known else model


def _schedule(decay: float | None, half_life: str | None) -> Schedule | None:
    """Returns the schedule that the caller gave, or None. Raises EMAConfigError if both options are given."""
    if decay is not None and half_life is not None:
        raise EMAConfigError(f"decay={decay!r}, half_life={half_life!r}: give one of the two")
    if decay is not None:
        return ConstantDecay(decay)
    return HalfLife(half_life) if half_life is not None else None


def _notes(name: str, foreign: Foreign, given: Schedule | None, schedule: Schedule) -> Iterable[str]:
    yield from foreign.notes
    if given is None and foreign.schedule is None:
        yield f"the file does not say how the average decays: assumed is {schedule}, {name}'s default; or give --decay"
    if given is not None and foreign.schedule not in (None, given):
        yield f"the file's schedule is {foreign.schedule}; used is {given}"
    if not foreign.updates:
        yield "averaging had not started when the file was written: these are the weights of that moment"
    elif not foreign.clock.batches:
        yield "the file does not say how many steps were trained: the clock starts at 0"


def _save(
    target: str | os.PathLike[str],
    foreign: Foreign,
    assembly: Assembly,
    schedule: Schedule,
    dtype: torch.dtype | None,
    overwrite: bool,
    begin: Callable[[int], Advance] | None,
) -> None:
    # All averages have the same tensors, so the first one describes them.
    first = next(iter(assembly.averages.values()))
    tracked = [_entry(name, tensor, assembly, dtype) for name, tensor in first.items()]
    live = [_entry(name, tensor, assembly, None, "live") for name, tensor in assembly.live.items()]
    count = {entry.name: len(assembly.averages) for entry in tracked}
    entries = [*tracked, *live]
    total = sum(entry.numel * entry.dtype.itemsize * count.get(entry.name, 1) for entry in entries)
    advance = begin(total) if begin else no_advance
    views: dict[str, Callable[[str], LocalValues | None]] = {}
    for average, tensors in assembly.averages.items():
        everything = {**assembly.live, **tensors}
        views[average] = {entry.name: FileValues.of(entry, everything[entry.name], advance) for entry in entries}.get
    schedules = dict.fromkeys(assembly.averages, schedule)
    Save(target, Contents(_state(foreign), schedules, entries, views), None, overwrite).run()


def _entry(
    name: str, tensor: LazyTensor, assembly: Assembly, dtype: torch.dtype | None, mode: Mode | None = None
) -> FullTensor:
    floating = tensor.dtype.is_floating_point
    kept = dtype if dtype is not None and floating else tensor.dtype
    mode = mode or ("average" if floating else "copy")
    aliases = assembly.aliases.get(name, ())
    return FullTensor(name, aliases, tensor.shape, kept, tensor.dtype, mode, partitioned=False)


def _state(foreign: Foreign) -> EMAState:
    """Returns the clocks of an imported average."""
    averaged = foreign.clock.since(foreign.start).advance(batches=0, updates=foreign.updates)
    started = foreign.updates > 0
    return EMAState(started, foreign.clock, foreign.start, averaged if started else Progress())
