"""Parses schedules for ``dist-ema profile``, computes their profiles, and draws them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from dist_ema.errors import EMAConfigError
from dist_ema.schedules import ConstantDecay, HalfLife, PowerFunction, Schedule, Window, from_dict
from dist_ema.schedules.clock import CLOCK_UNITS, Progress, Time
from dist_ema.schedules.profile import Profile

#: So many updates are looked at one by one.
LIMIT = 2_000_000
_FIELDS = {"ba": "batches", "sp": "samples", "tok": "tokens", "ep": "epochs"}


def parse(
    half_life: Iterable[str] | None,
    decay: Iterable[float] | None,
    sigma_rel: Iterable[float] | None,
    window: Iterable[str] | None,
    schedule: Iterable[str] | None,
) -> dict[str, Schedule]:
    """Returns schedules by the words in which the user gave them. Raises EMAConfigError if there is none, or one is
    wrong.
    """
    found: dict[str, Schedule] = {}
    found |= {f"half_life={value}": HalfLife(value) for value in half_life or ()}
    found |= {f"decay={value}": ConstantDecay(value) for value in decay or ()}
    found |= {f"sigma_rel={value}": PowerFunction(sigma_rel=value) for value in sigma_rel or ()}
    for value in window or ():
        length, slash, every = value.partition("/")
        found[f"window={value}"] = Window(length, every if slash else None)
    for text in schedule or ():
        try:
            data = json.loads(text)
        except ValueError as error:
            raise EMAConfigError(f"schedule={text!r}: not JSON: {error}") from error
        one = from_dict(data)
        found[repr(one)] = one
    if not found:
        raise EMAConfigError("give at least one of --half-life, --decay, --sigma-rel, --window and --schedule")
    return found


def profile_at(schedule: Schedule, label: str, *, at: str, update_interval: str | None) -> Profile:
    """Returns the profile after ``at`` of training, averaged since the first update.

    Raises:
        EMAConfigError: times are wrong, in another unit than the schedule's, or there are too many updates.
    """
    end = Time.parse(at, option="at", units=CLOCK_UNITS)
    schedule = schedule.resolve(end)
    every = Time(1, end.unit)
    if update_interval is not None:
        every = Time.parse(update_interval, option="update_interval", units=(end.unit,))
    elif end.unit == "ep":
        raise EMAConfigError(f"at={at!r} needs update_interval in epochs, such as '0.001ep'")
    if schedule.unit != end.unit:
        raise EMAConfigError(f"at={at!r}: {label} counts in {schedule.unit}; allowed are times in {schedule.unit}")
    updates = round(end.value / every.value, 9)
    if not 1 <= updates <= LIMIT:
        raise EMAConfigError(
            f"at={at!r}, update_interval={str(every)!r}: {updates:,.6g} updates; allowed are 1 to {LIMIT:,}"
        )
    first = Progress(**{"batches": 1, _FIELDS[end.unit]: every.value})  # type: ignore[arg-type]
    step = 1 if schedule.position_unit == "updates" else every.value
    return schedule.begun(first, every).profile((int(updates) - 1) * step, every=step)


def draw(profiles: Mapping[str, Profile], path: Path) -> None:
    """Draws all of them over linear and over logarithmic time, as PNG.

    Raises:
        EMAConfigError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EMAConfigError(f"png={str(path)!r} needs matplotlib: pip install 'matplotlib>=3.7'") from error
    import numpy as np

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    for label, profile in profiles.items():
        steps = profile.steps
        weights = profile.weights / profile.every
        # As many points as a picture can show, the last ones among them.
        shown = np.unique(np.linspace(0, profile.updates, 4000).astype(np.int64))
        linear.plot(steps[shown] + profile.every, weights[shown], label=label, linewidth=1.2)
        ages = np.unique(np.geomspace(1, profile.updates + 1, 4000).astype(np.int64))
        held = weights[profile.updates + 1 - ages]
        logarithmic.plot(ages * profile.every, np.where(held > 0, held, np.nan), label=label, linewidth=1.2)
    unit = next(iter(profiles.values())).unit
    linear.set(xlabel=f"step ({unit})", ylabel=f"weight per {unit}")
    linear.legend(fontsize="small")
    logarithmic.set(xlabel=f"age ({unit}), the last step is 1", xscale="log", yscale="log")
    # Not that of the first copy, which may dwarf all others.
    peak = max(float(profile.weights[-profile.updates :].max()) / profile.every for profile in profiles.values())
    linear.set_ylim(0, 1.05 * peak)
    logarithmic.set_ylim(1e-6 * peak, 2 * peak)
    figure.savefig(path, format="png", dpi=130)
