"""The clocks of one average: when an update is due, and how much of the average it keeps. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_ema.options import Options
from dist_ema.schedules import Schedule
from dist_ema.schedules.clock import Progress, crossed, reached
from dist_ema.schedules.state import EMAState


class Track:
    """The clocks of one :class:`ShardedEMA`.

    Attributes:
        training: the training clock, since construction.
        first_copy: the training clock at the first copy.
        averaged: training from the first copy to the last update; ``averaged.updates`` counts the first copy too.
        decays: the fraction of each average that the last update kept; 0 where there was none.

    >>> track = Track(Options.parse(decay=0.9, update_interval="2ba"))
    >>> track.is_due(Progress(batches=1)), track.is_due(Progress(batches=2))
    (False, True)
    """

    def __init__(self, options: Options, training: Progress = Progress()) -> None:  # noqa: B008 - frozen
        self._options = options
        self.training = training
        self.first_copy = Progress()
        self.averaged = Progress()
        self.decays: Mapping[str, float] = dict.fromkeys(options.schedules, 0.0)

    def is_due(self, now: Progress) -> bool:
        """Returns whether the clock passes a multiple of the interval on its way to ``now``, at or after the start."""
        return crossed(self.training, now, self._options.interval) and reached(now, self._options.start)

    def begin(self, now: Progress) -> None:
        """The first copy."""
        self.first_copy, self.averaged = now, Progress(updates=1)

    def after(self, now: Progress) -> Progress:
        """``averaged`` as it will be once the weights of ``now`` have been taken in."""
        return now.since(self.first_copy).advance(batches=0, updates=self.averaged.updates + 1)

    def log_retained(self, after: Progress) -> dict[str, float]:
        """Logarithm of the fraction that each average keeps in the update that leads to ``after``, by name."""
        return {name: schedule.log_retain(self.averaged, after) for name, schedule in self._begun().items()}

    def unmoved(self, after: Progress) -> set[str]:
        """Units in which a schedule counts and in which nothing was counted since the last update, up to ``after``."""
        units = {schedule.unit for schedule in self.schedules.values()}
        return {unit for unit in units if after.value(unit) == self.averaged.value(unit)}

    def step(self, after: Progress, log_retained: Mapping[str, float]) -> None:
        """The update that leads to ``after`` has been made, in which the averages kept as much."""
        self.decays = {name: math.exp(logarithm) for name, logarithm in log_retained.items()}
        self.averaged = after

    def _begun(self) -> dict[str, Schedule]:
        """Schedules that know where the first copy was: windows lie on the training clock."""
        interval = self._options.interval
        return {name: schedule.begun(self.first_copy, interval) for name, schedule in self.schedules.items()}

    def state(self, started: bool, skipped: int, seed: int | None) -> EMAState:
        """Returns the clocks with what others count, for a checkpoint."""
        return EMAState(started, self.training, self.first_copy, self.averaged, skipped, seed)

    def forget(self) -> None:
        """Forgets the average; the training clock goes on."""
        self.decays = dict.fromkeys(self.decays, 0.0)
        self.first_copy = self.averaged = Progress()

    def restore(self, state: EMAState) -> None:
        """Goes on where another run stopped."""
        self.decays = dict.fromkeys(self.decays, 0.0)  # what that run's last update kept is in no file
        self.training, self.first_copy, self.averaged = state.training, state.first_copy, state.averaged

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Returns the schedule of each average."""
        return self._options.schedules

    @property
    def progress(self) -> Progress:
        """Training since the first copy."""
        if not self.averaged.updates:
            return Progress()
        return self.training.since(self.first_copy).advance(batches=0, updates=self.averaged.updates)
