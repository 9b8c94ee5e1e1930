"""Keeps the clocks of one ``ShardedEMA``: when an update is due, and how much of each average it keeps. Pure Python.

Two clocks run. ``training`` counts from construction; ``ema_start``, ``update_interval`` and windows are times on it.
``averaged`` counts from the first copy; schedules are functions of it::

    training     0ba         100ba                 104ba             108ba     109ba
                 |-------------|---------------------|-----------------|---------|
                 construction  first copy            update            update    now
    averaged                   0ba, 1 update         4ba, 2 updates    8ba, 3 updates
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_ema.options import Options
from dist_ema.schedules import Schedule
from dist_ema.schedules.clock import Progress, crossed, reached
from dist_ema.schedules.state import EMAState


class Track:
    """Holds the clocks of one :class:`ShardedEMA`.

    Attributes:
        training: the training clock. It counts from construction.
        first_copy: the reading of the training clock at the first copy.
        averaged: training from the first copy to the last update. ``averaged.updates`` includes the first copy.
        decays: the fraction of each average that the last update kept, by name; 0 before the second update.

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
        """Records that the first copy was made at ``now``."""
        self.first_copy = now
        self.averaged = Progress(updates=1)

    def after(self, now: Progress) -> Progress:
        """Returns what ``averaged`` will be after an update at ``now``."""
        return now.since(self.first_copy).advance(batches=0, updates=self.averaged.updates + 1)

    def log_retained(self, after: Progress) -> dict[str, float]:
        """Returns the logarithm of each average's decay in the update from ``averaged`` to ``after``, by name."""
        return {name: schedule.log_retain(self.averaged, after) for name, schedule in self._begun().items()}

    def unmoved(self, after: Progress) -> set[str]:
        """Returns the units of schedules in which nothing was counted between the last update and ``after``."""
        units = {schedule.unit for schedule in self.schedules.values()}
        return {unit for unit in units if after.value(unit) == self.averaged.value(unit)}

    def step(self, after: Progress, log_retained: Mapping[str, float]) -> None:
        """Records that the update from ``averaged`` to ``after`` was made, with these logarithms of the decays."""
        self.decays = {name: math.exp(logarithm) for name, logarithm in log_retained.items()}
        self.averaged = after

    def _begun(self) -> dict[str, Schedule]:
        """Returns the schedules, told of the first copy: windows need it, since they lie on the training clock."""
        interval = self._options.interval
        return {name: schedule.begun(self.first_copy, interval) for name, schedule in self.schedules.items()}

    def state(self, started: bool, skipped: int, seed: int | None) -> EMAState:
        """Returns the clocks, and the facts that the arguments state, as a checkpoint stores them."""
        return EMAState(started, self.training, self.first_copy, self.averaged, skipped, seed)

    def forget(self) -> None:
        """Returns to the state before the first copy. The training clock keeps its reading."""
        self.decays = dict.fromkeys(self.decays, 0.0)
        self.first_copy = self.averaged = Progress()

    def restore(self, state: EMAState) -> None:
        """Sets the clocks to those of a checkpoint."""
        self.decays = dict.fromkeys(self.decays, 0.0)  # checkpoints do not store the decays of the last update
        self.training = state.training
        self.first_copy = state.first_copy
        self.averaged = state.averaged

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Returns the schedule of each average."""
        return self._options.schedules

    @property
    def progress(self) -> Progress:
        """Returns the training from the first copy until now; zero before the first copy."""
        if not self.averaged.updates:
            return Progress()
        return self.training.since(self.first_copy).advance(batches=0, updates=self.averaged.updates)
