"""An average that another library saved, as a checkpoint of ours: one process, no model, tensor after tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_ema.checkpoints.file_values import Advance, FileValues, no_advance
from dist_ema.checkpoints.manifest import is_tensor_name
from dist_ema.checkpoints.save import Save
from dist_ema.checkpoints.storage.paths import check_path
from dist_ema.clock import Progress
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, EMAConfigError
from dist_ema.importers import AUTO, FORMATS, recognise
from dist_ema.importers.files import open_foreign, open_model
from dist_ema.importers.foreign import Foreign, LazyTensor, Model, Tensors, check_shapes, ties
from dist_ema.schedules import ConstantDecay, HalfLife, Schedule
from dist_ema.sharding.gather import LocalValues
from dist_ema.sharding.shares import Mode
from dist_ema.sharding.writers import FullTensor
from dist_ema.state import EMAState

_AVERAGE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Attributes:
        format: of the file.
        notes: what the file did not say, and what was taken instead.
    """

    format: str
    notes: tuple[str, ...]


def import_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str = AUTO,
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

    The tensors of the average, buffers among them, are bit for bit those of the file. No code of the file is run.
    Memory: files of torch.save and safetensors are mapped; of a ``torch.distributed.checkpoint``, one tensor at a time.

    Args:
        source: the file, or the directory.
        target: of the checkpoint; missing parents are made.
        format: one of :data:`dist_ema.importers.FORMATS`, or ``"auto"``: the file's content tells.
        model: a state dict of the same model, by torch.save or safetensors. It gives names to a list of tensors that
            has none (torch.save only, since safetensors files sort), and supplies what the file lacks: buffers.
        frozen: regular expression on names: those are parameters that are not trained, which few files tell.
        prefix: the module that is wanted of a larger one, such as ``"net"`` of a LightningModule: its names lose
            ``net.``, and what has other names is left out. A ``model`` is cut likewise if it is the larger one too.
        decay: kept fraction per batch, where the file does not say.
        half_life: in its place, such as ``"1000ba"``.
        dtype: of the floating-point tensors of the average; None means the file's own.
        overwrite: replace a checkpoint that is there already, in one step.
        begin: called with the bytes to write; returns what is told of the progress.

    Raises:
        EMAConfigError: an option has a value that is not allowed.
        CheckpointError: the file has no known format, is more than data, or lacks names that ``model`` would give; or
            there is something else at ``target``.
        CheckpointMismatchError: the file is not of that model; lists the differences.
        CheckpointCorruptError: the file is damaged.
    """
    pattern, given = _pattern(frozen), _schedule(decay, half_life)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise EMAConfigError(f"dtype={dtype!r}: allowed is a floating-point torch.dtype, or None")
    for path in (source, target, *([] if model is None else [model])):
        check_path(path)
    content = open_foreign(Path(source))
    name = recognise(content, format, str(source))
    state = open_model(Path(model), pattern) if model is not None else None
    foreign = FORMATS[name].read(content, state)
    if prefix is not None:
        foreign, state = _part(foreign, state, prefix.removesuffix(".") + ".")
    whole_model = _Assembly(foreign, state, pattern)
    schedule = given or foreign.schedule or foreign.usual
    _save(target, foreign, whole_model, schedule, dtype, overwrite, begin)
    return Imported(name, tuple(_notes(name, foreign, given, schedule)))


def _pattern(frozen: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(frozen) if frozen is not None else None
    except re.error as error:
        raise EMAConfigError(f"frozen={frozen!r} is not a regular expression: {error}") from error


def _part(foreign: Foreign, model: Model | None, prefix: str) -> tuple[Foreign, Model | None]:
    """What stands under a prefix, without it."""

    def cut(tensors: Tensors) -> dict[str, LazyTensor]:
        return {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}

    averages = {average: dict(tensors) for average, tensors in foreign.averages.items()}
    live = dict(foreign.live)
    for group in foreign.tied:  # the name that is averaged may be one of those that are left out
        for tensors in averages.values():
            if (held := next((tensors[name] for name in group if name in tensors), None)) is not None:
                tensors.update(dict.fromkeys(group, held))
                live = {name: tensor for name, tensor in live.items() if name not in group}
    found = {average: cut(tensors) for average, tensors in averages.items()}
    if not all(found.values()):
        names = next(iter(foreign.averages.values()))
        raise EMAConfigError(f"prefix={prefix!r} begins no name; names are {', '.join(names)[:200]}")
    inside = [tuple(name.removeprefix(prefix) for name in group if name.startswith(prefix)) for group in foreign.tied]
    tied = [group for group in inside if len(group) > 1]
    if model is not None and (known := cut(model.tensors)):
        model = replace(model, tensors=known)
    return replace(foreign, averages=found, live=cut(live), tied=tied), model


def _schedule(decay: float | None, half_life: str | None) -> Schedule | None:
    if decay is not None and half_life is not None:
        raise EMAConfigError(f"decay={decay!r}, half_life={half_life!r}: give one of the two")
    if decay is not None:
        return ConstantDecay(decay)
    return HalfLife(half_life) if half_life is not None else None


def _notes(name: str, foreign: Foreign, given: Schedule | None, schedule: Schedule) -> Iterable[str]:
    yield from foreign.notes
    if given is None and foreign.schedule is None:
        yield f"the file does not say how the average decays: taken is {schedule}, {name}'s usual one; or give --decay"
    if given is not None and foreign.schedule not in (None, given):
        yield f"the file's schedule is {foreign.schedule}; taken is {given}"
    if not foreign.updates:
        yield "averaging had not started when the file was written: these are the weights of that moment"
    elif not foreign.clock.batches:
        yield "the file does not say how many steps were trained: the clock starts at 0"


class _Assembly:
    """All tensors of the model: which are averaged, which are live, and which names are one tensor.

    Attributes:
        averages: by the name of the average; all have the same names.
        live: what is not averaged.
        aliases: the other names of a tensor.
    """

    def __init__(self, foreign: Foreign, model: Model | None, frozen: re.Pattern[str] | None) -> None:
        self.averages = {name: dict(tensors) for name, tensors in foreign.averages.items()}
        self.live = dict(foreign.live)
        first = next(iter(self.averages.values()))
        groups = list(foreign.tied)
        if model is not None:
            _check_model(first, model.tensors)
            groups += ties(model.tensors)
            self._complete(model.tensors)
        self._set_apart(frozen)
        self._merge(groups)
        self._check()

    def _complete(self, model: Tensors) -> None:
        """Takes from the model what the file lacks; most of that is buffers, which an average holds as they are."""
        for tensors in self.averages.values():
            tensors.update({name: model[name] for name in model if name not in tensors and name not in self.live})

    def _set_apart(self, frozen: re.Pattern[str] | None) -> None:
        if frozen is None:
            return
        names = {name for name in (*self._first, *self.live) if frozen.search(name)}
        if not names:
            raise EMAConfigError(f"frozen={frozen.pattern!r} matches no name; names are {', '.join(self._first)[:200]}")
        for tensors in reversed(self.averages.values()):
            self.live |= {name: tensors.pop(name) for name in names & tensors.keys()}

    def _merge(self, groups: Iterable[tuple[str, ...]]) -> None:
        """Keeps one of the names of tied tensors, an averaged one where there is one."""
        self.aliases: dict[str, tuple[str, ...]] = {}
        for group in groups:
            known = [name for name in group if name in self._first] + [name for name in group if name in self.live]
            others = tuple(name for name in group if name != known[0]) if known else ()
            for name in others:
                self.live.pop(name, None)
                for tensors in self.averages.values():
                    tensors.pop(name, None)
            if known:
                self.aliases[known[0]] = tuple(dict.fromkeys((*self.aliases.get(known[0], ()), *others)))

    @property
    def _first(self) -> dict[str, LazyTensor]:
        return next(iter(self.averages.values()))

    def _check(self) -> None:
        if not self._first:
            raise CheckpointCorruptError("the file has no averaged tensors")
        described = {name: (tensor.shape, tensor.dtype) for name, tensor in self._first.items()}
        for average, tensors in self.averages.items():
            if not _AVERAGE.fullmatch(average):
                raise CheckpointCorruptError(f"{average!r} is no name of an average")
            if {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} != described:
                raise CheckpointCorruptError(f"average {average!r} has other tensors than the others")
        for name in (*self._first, *self.live, *(alias for names in self.aliases.values() for alias in names)):
            if not is_tensor_name(name):
                raise CheckpointCorruptError(f"{name!r} is no name of a tensor")


def _check_model(average: Tensors, model: Tensors) -> None:
    check_shapes(average, model, "the average")
    if missing := [name for name in average if name not in model]:
        raise CheckpointMismatchError(f"the model has no {', '.join(map(repr, missing[:8]))}; it has {list(model)[:8]}")


def _save(
    target: str | os.PathLike[str],
    foreign: Foreign,
    assembly: _Assembly,
    schedule: Schedule,
    dtype: torch.dtype | None,
    overwrite: bool,
    begin: Callable[[int], Advance] | None,
) -> None:
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
    Save(target, _state(foreign), schedules, entries, views, None, overwrite=overwrite).run()


def _entry(
    name: str, tensor: LazyTensor, assembly: _Assembly, dtype: torch.dtype | None, mode: Mode | None = None
) -> FullTensor:
    floating = tensor.dtype.is_floating_point
    kept = dtype if dtype is not None and floating else tensor.dtype
    mode = mode or ("average" if floating else "copy")
    aliases = assembly.aliases.get(name, ())
    return FullTensor(name, aliases, tensor.shape, kept, tensor.dtype, mode, partitioned=False)


def _state(foreign: Foreign) -> EMAState:
    """The clocks of a foreign average."""
    averaged = foreign.clock.since(foreign.start).advance(batches=0, updates=foreign.updates)
    started = foreign.updates > 0
    return EMAState(started, foreign.clock, foreign.start, averaged if started else Progress())
