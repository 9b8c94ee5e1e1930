"""Defines how much of an average survives between two moments of training. Pure Python, double precision.

A schedule is a function ``retain(before, after)``: the fraction of the average at ``before`` that is left at ``after``.
Fractions compose::

    retain(a, c) == retain(a, b) * retain(b, c)

So one update after k batches decays an average exactly as much as k updates after one batch each. Two kinds are
different: :class:`Uniform` and :class:`Smoothing` count updates instead of training, and :class:`Window` ignores
weights from outside its windows.

An update is ``shadow.lerp_(live, weight(before, after))``. The weight is computed as ``-expm1(log_retain)``, because
``1 - retain`` may lose six of sixteen digits at a decay of .999999.

Moments are :class:`~dist_ema.schedules.clock.Progress` readings since the first copy, or plain numbers in the
schedule's own unit: batches, except where a class says otherwise. Both count from zero at the first copy.

===================  ==================================================================================
file                 subject
===================  ==================================================================================
``clock.py``         ``Progress`` and ``Time``: readings of the training clock, and time strings
``schedule.py``      ``Schedule`` and the base classes of schedules with one factor for each batch
``constant.py``      fixed decays, and the mean of all updates
``half_life.py``     averages with a given half life
``power.py``         EDM2's power functions
``warmup.py``        decays that rise to a final one
``ramps.py``         decays that move from one value to another over the training
``window.py``        means over a part of the training
``profile.py``       how much each past step weighs in an average
``registry.py``      writing schedules to files, and reading them
``state.py``         ``EMAState``: clocks and counts, as checkpoints store them
``duration.py``      whether a training is long enough for the options
``checks.py``        checks of options
===================  ==================================================================================
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
