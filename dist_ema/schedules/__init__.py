"""Defines how much of an average survives between two moments of training. Pure Python, double precision.

A schedule is a retained fraction: ``retain(before, after)``. Fractions compose, ``retain(a, c) == retain(a, b) *
retain(b, c)``, so one update after k batches decays an average exactly as much as k updates after one batch each.
(:class:`Uniform` and :class:`Smoothing` count updates instead of training, so there k updates are not one;
:class:`Window` takes in no weights from outside its windows.)

An update is ``shadow.lerp_(live, weight(before, after))``. The weight is ``-expm1(log_retain)`` and not ``1 - retain``,
which has lost ten digits at a decay of .999999.

Moments are :class:`~dist_ema.schedules.clock.Progress` readings since the first copy, or plain numbers in the
schedule's own unit: batches, except where a class says otherwise. Both count from zero at the first copy.
"""

from __future__ import annotations

from dist_ema.schedules.constant import ConstantDecay, Smoothing, Uniform
from dist_ema.schedules.half_life import HalfLife, HalfLifeFraction
from dist_ema.schedules.power import PowerFunction, sigma_rel_to_gamma
from dist_ema.schedules.profile import Profile
from dist_ema.schedules.ramps import Cosine, Linear
from dist_ema.schedules.registry import KINDS, UnknownSchedule, check_registered, from_dict, from_file, register
from dist_ema.schedules.schedule import Position, Schedule
from dist_ema.schedules.warmup import Debiased, NumUpdatesWarmup, Ramp, Warmup
from dist_ema.schedules.window import Window

__all__ = [
    "KINDS",
    "ConstantDecay",
    "Cosine",
    "Debiased",
    "HalfLife",
    "HalfLifeFraction",
    "Linear",
    "NumUpdatesWarmup",
    "Position",
    "PowerFunction",
    "Profile",
    "Ramp",
    "Schedule",
    "Smoothing",
    "Uniform",
    "UnknownSchedule",
    "Warmup",
    "Window",
    "check_registered",
    "from_dict",
    "from_file",
    "register",
    "sigma_rel_to_gamma",
]
