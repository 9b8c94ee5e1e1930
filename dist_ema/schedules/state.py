"""Holds the position of an average on the training clock, as checkpoints carry it. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ema.schedules.clock import Progress


@dataclass(frozen=True)
class EMAState:
    """All that an average is besides its tensors and schedules: what every checkpoint carries. The same on every rank.

    Attributes:
        started: whether there is an average yet; before the first copy the live model is the average.
        training: the training clock.
        first_copy: the training clock at the first copy.
        averaged: training from the first copy to the last update; ``averaged.updates`` counts the first copy too.
        skipped: NaN and Inf elements left out so far, over all ranks.
        seed: of the stochastic rounding of bf16 averages; None where values are rounded to nearest.

    >>> state = EMAState(True, Progress(batches=12), Progress(batches=10), Progress(batches=2, updates=3))
    >>> str(state.training), state.averaged.updates
    ('12ba', 3)
    """

    started: bool
    training: Progress
    first_copy: Progress
    averaged: Progress
    skipped: int = 0
    seed: int | None = None
