"""Holds the clocks and counts of an average, as checkpoints store them. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass

from dist_ema.schedules.clock import Progress


@dataclass(frozen=True)
class EMAState:
    """Describes an average without its tensors and schedules. Every checkpoint stores it. Equal on all ranks.

    Attributes:
        started: whether the first copy was made. Before it the live model is the average.
        training: the reading of the training clock.
        first_copy: the reading of the training clock at the first copy.
        averaged: training from the first copy to the last update. ``averaged.updates`` includes the first copy.
        skipped: number of NaN and Inf elements that were left out so far, over all ranks.
        seed: the seed of stochastic rounding of bf16 averages; None if values are rounded to nearest.

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
