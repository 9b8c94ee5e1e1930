"""How much of an average survives between two moments of training. Pure Python, double precision.

A schedule is a retained fraction: ``retain(before, after)``. Fractions compose, ``retain(a, c) == retain(a, b) *
retain(b, c)``, so one update after k batches decays an average exactly as much as k updates after one batch each.
(:class:`Uniform` and :class:`Smoothing` count updates instead of training, so there k updates are not one;
:class:`Window` takes in no weights from outside its windows.)

An update is ``shadow.lerp_(live, weight(before, after))``. The weight is ``-expm1(log_retain)`` and not ``1 - retain``,
which has lost ten digits at a decay of .999999.

Moments are :class:`~dist_ema.clock.Progress` readings since the first copy, or plain numbers in the schedule's own
unit: batches, except where a class says otherwise. Both count from zero at the first copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.constant import ConstantDecay, Smoothing, Uniform
from dist_ema.schedules.half_life import HalfLife, HalfLifeFraction
from dist_ema.schedules.power import PowerFunction, sigma_rel_to_gamma
from dist_ema.schedules.profile import Profile
from dist_ema.schedules.ramps import Cosine, Linear
from dist_ema.schedules.schedule import Position, Schedule
from dist_ema.schedules.warmup import NumUpdatesWarmup, Warmup
from dist_ema.schedules.window import Window

__all__ = [
    "KINDS",
    "ConstantDecay",
    "Cosine",
    "HalfLife",
    "HalfLifeFraction",
    "Linear",
    "NumUpdatesWarmup",
    "Position",
    "PowerFunction",
    "Profile",
    "Schedule",
    "Smoothing",
    "Uniform",
    "Warmup",
    "Window",
    "from_dict",
    "sigma_rel_to_gamma",
]

KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (
        ConstantDecay,
        Cosine,
        HalfLife,
        HalfLifeFraction,
        Linear,
        NumUpdatesWarmup,
        PowerFunction,
        Smoothing,
        Uniform,
        Warmup,
        Window,
    )
}


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """The schedule that :meth:`Schedule.to_dict` described.

    Raises:
        EMAConfigError: not such a dict, an unknown kind, an unknown or missing option, or a value that is not allowed.
    """
    if not isinstance(data, Mapping):
        raise EMAConfigError(f"schedule={data!r}: allowed is a dict with 'kind' and its options")
    options = dict(data)
    kind = KINDS.get(str(options.pop("kind", None)))
    if kind is None:
        raise EMAConfigError(f"kind={data.get('kind')!r}: allowed is one of {', '.join(KINDS)}")
    known = [entry.name for entry in fields(kind) if entry.init]  # type: ignore[arg-type]
    if unknown := sorted(str(name) for name in options.keys() - set(known)):
        raise EMAConfigError(
            f"{kind.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
        )
    try:
        return kind(**options)
    except TypeError as error:  # what is missing, in Python's words
        raise EMAConfigError(f"schedule={data!r}: {error}; options: {', '.join(known)}") from error
