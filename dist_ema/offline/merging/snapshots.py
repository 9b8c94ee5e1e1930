"""Describes saved averages as snapshots with profiles, and reads wanted averages from words."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dist_ema.checkpoints.versions import reread
from dist_ema.errors import CheckpointError, EMAConfigError, EMAError
from dist_ema.formats.manifest import NAME, Manifest
from dist_ema.offline.merging.sources import Source, open_average
from dist_ema.offline.synthesis import trailing
from dist_ema.schedules import ConstantDecay, HalfLife, PowerFunction, Schedule
from dist_ema.schedules.clock import CLOCK_UNITS, Time
from dist_ema.schedules.profile import Profile
from dist_ema.storage.paths import StrPath, check_path, is_remote, local_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Curve: TypeAlias = Callable[[NDArray[np.float64]], NDArray[np.float64]]

#: A target: a schedule, its words, or a function that gives the weight of each of an array of steps.
Wanted: TypeAlias = "Schedule | str | Curve"
#: Values of all profiles together, 8 bytes each: longer trainings are looked at in coarser steps.
_VALUES = 1 << 26
#: Two intervals between updates that differ by less are one: they come from clocks that add up fractions.
_SLACK = 1e-6
_WORDS = "sigma_rel=.05, gamma=6.94, half_life=1000ba, decay=.999, window=5000ba, and wsm:sqrt@20000ba"


@dataclass(frozen=True)
class Snapshot:
    """Describes a saved average.

    Attributes:
        source: its checkpoint.
        schedule: the schedule by which it was averaged.
        unit: the unit in which its profile counts.
        moment: the moment of the last update, since the first copy, in that unit.
        first: the training clock at the first copy, in that unit.
        every: the time between two updates, in that unit.
    """

    source: Source
    schedule: Schedule
    unit: str
    moment: float
    first: float
    every: float


@contextmanager
def open_snapshots(paths: Sequence[StrPath], name: str | None) -> Iterator[list[Snapshot]]:
    """Opens every average of every checkpoint, the oldest first. A folder stands for the checkpoints in it.

    Args:
        paths: directories or URLs that :meth:`ShardedEMA.save` wrote, or a folder of such directories.
        name: only the averages of this name; None means all.

    Raises:
        EMAConfigError: no paths, or there is no such average.
        CheckpointError: there is no checkpoint, or one of them has no average yet.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    with ExitStack() as stack:
        found = []
        for path in itertools.chain(*map(_inside, paths)):
            # A save may replace the checkpoint between the manifest and the files.
            found += reread(path, lambda manifest, path=path: _opened(path, manifest, name, stack))  # type: ignore[misc]
        if not found:
            raise EMAConfigError(f"snapshots={paths!r}: there is no checkpoint")
        yield sorted(found, key=lambda snapshot: snapshot.moment)


def _opened(path: StrPath, manifest: Manifest, name: str | None, stack: ExitStack) -> list[Snapshot]:
    if not manifest.started:
        raise CheckpointError(f"{path} was saved before the first update: it is no snapshot of an average")
    averages = list(manifest.averages) if name is None else [name]
    return [_snapshot(open_average(path, manifest, average, stack)) for average in averages]


def paths_of(paths: Sequence[StrPath]) -> list[StrPath]:
    """Returns the checkpoints that the paths stand for. A path that cannot be listed stands for itself."""
    found: list[StrPath] = []
    for path in paths:
        try:
            found += _inside(path)
        except (EMAError, OSError, TypeError):
            found.append(path)
    return found


def _inside(path: StrPath) -> list[StrPath]:
    check_path(path)
    if is_remote(path) or (local_path(path) / NAME).exists():
        return [path]
    # A name that begins with a dot is of a snapshot that is being removed.
    found = [found.parent for found in sorted(local_path(path).glob(f"*/{NAME}")) if found.parent.name[0] != "."]
    return [str(directory) for directory in found] or [path]


def _snapshot(source: Source) -> Snapshot:
    manifest = source.manifest
    if manifest is None or source.average is None:
        raise CheckpointError(f"{source.path} is no checkpoint of an average")
    state = manifest.state
    schedule = manifest.schedules[source.average]
    unit = schedule.position_unit
    updates = state.averaged.updates
    moment = float(updates - 1) if unit == "updates" else state.averaged.value(unit)
    first = 0.0 if unit == "updates" else state.first_copy.value(unit)
    every = moment / (updates - 1) if updates > 1 else 0.0
    interval = Time(1, "ba") if unit == "updates" else Time(every or 1, unit)
    return Snapshot(source, schedule.begun(state.first_copy, interval), unit, moment, first, every)


def profiles(snapshots: Sequence[Snapshot]) -> tuple[list[Profile], float]:
    """Returns how much each step weighs in each snapshot, and the interval in which the steps are counted.

    Raises:
        EMAConfigError: they count in different units, were updated at different intervals or began at different
            moments, or one was saved before its second update.
    """
    newest = snapshots[-1]
    for one in snapshots:
        if one.unit != newest.unit:
            raise EMAConfigError(
                f"{one.source} counts in {one.unit} and {newest.source} in {newest.unit}: their profiles cannot be "
                "compared. Give snapshots of one unit (name= chooses one average)"
            )
        if not one.every:
            raise EMAConfigError(f"{one.source} was saved before its second update: leave it out")
        if abs(one.every - newest.every) > _SLACK * newest.every:
            raise EMAConfigError(
                f"{one.source} was updated every {one.every:g}{one.unit} and {newest.source} every "
                f"{newest.every:g}{newest.unit} on the whole: these are snapshots of different runs, or a run whose "
                "interval changed"
            )
        if abs(one.first - newest.first) > _SLACK * max(newest.every, one.first):
            raise EMAConfigError(
                f"{one.source} began at {one.first:g}{one.unit} and {newest.source} at {newest.first:g}{newest.unit}: "
                "these are snapshots of different runs"
            )
    # All profiles together have at most _VALUES values: several updates of a long training are one step.
    steps = newest.moment / newest.every
    coarse = max(1, math.ceil(steps * (len(snapshots) + 1) / _VALUES))
    every = newest.every * coarse
    return [one.schedule.profile(one.moment, every=every) for one in snapshots], every


def wanted_profile(
    target: Wanted, newest: Snapshot, at: str | None, every: float
) -> tuple[Profile | Curve, Schedule | None]:
    """Returns the profile of a target, as of ``at`` on the training clock; None means the moment of the newest
    snapshot.

    Returns:
        The profile, and the schedule that it belongs to; None instead of the schedule for a curve.

    Raises EMAConfigError for words or a moment that are not allowed.
    """
    moment = newest.moment
    if at is not None:
        time = Time.parse(at, option="at", units=CLOCK_UNITS)
        if time.unit != newest.unit:
            raise EMAConfigError(f"at={at!r}: the snapshots count in {newest.unit}")
        moment = time.value - newest.first
        if not 0 < moment <= newest.moment * (1 + _SLACK):
            begin = newest.first
            end = newest.first + newest.moment
            raise EMAConfigError(f"at={at!r}: the snapshots reach from {begin:g} to {end:g}{newest.unit}")
    found = _parsed(target, newest, moment, every) if isinstance(target, str) else target
    if isinstance(found, Schedule):
        return found.profile(moment, every=every), found
    return found, None


def _parsed(target: str, newest: Snapshot, moment: float, every: float) -> Schedule | Curve:
    word, equals, value = target.partition("=")
    if equals and word in ("sigma_rel", "gamma"):
        return PowerFunction(**{word: _number(target, value)})
    if equals and word == "decay":
        return ConstantDecay(_number(target, value))
    if equals and word == "half_life":
        return HalfLife(value)
    length = None
    shape = "uniform"
    end = moment
    if equals and word == "window":
        length = value
    elif target.startswith("wsm:"):
        shape, _, begin = target.removeprefix("wsm:").partition("@")
        start = Time.parse(begin, option="target", units=(newest.unit,)).value - newest.first
        return trailing(end - start, end, every=every, shape=shape)
    if length is None:
        raise EMAConfigError(f"target={target!r}: allowed are such as {_WORDS}")
    return trailing(Time.parse(length, option="target", units=(newest.unit,)).value, end, every=every, shape=shape)


def _number(target: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise EMAConfigError(f"target={target!r}: {value!r} is no number; allowed are such as {_WORDS}") from None
