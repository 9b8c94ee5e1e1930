"""Where an average stands on the training clock: when an update is due, and how much of the average it leaves. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from dist_ema.clock import Progress, crossed, reached
from dist_ema.options import Options
from dist_ema.schedules import Schedule


class Track:
    """The clocks of one :class:`ShardedEMA`.

    Attributes:
        clock: of the training, since construction.
        start: the clock at the first copy.
        seen: training since then, as of the last update; ``updates`` counts them, the copy included.
        decays: the fraction of each average that the last update left.
    """

    def __init__(self, options: Options, clock: Progress = Progress()) -> None:  # noqa: B008 - frozen
        self._options = options
        self.clock = clock
        self.start = Progress()
        self.seen = Progress()
        self.decays: Mapping[str, float] = dict.fromkeys(options.schedules, 0.0)

    def is_due(self, now: Progress) -> bool:
        """Whether the clock passes a multiple of the interval on its way to ``now``, at or after the start."""
        return crossed(self.clock, now, self._options.interval) and reached(now, self._options.start)

    def begin(self, now: Progress) -> None:
        """The first copy."""
        self.start, self.seen = now, Progress(updates=1)

    def after(self, now: Progress) -> Progress:
        """Training since the first copy, once the weights of ``now`` have been taken into the averages too."""
        return now.since(self.start).advance(batches=0, updates=self.seen.updates + 1)

    def weights(self, after: Progress) -> list[float]:
        """How much of each average the update at ``after`` makes new, in the order of the schedules."""
        return [schedule.weight(self.seen, after) for schedule in self._begun().values()]

    def unmoved(self, after: Progress) -> set[str]:
        """Units in which a schedule counts and in which nothing was counted since the last update, up to ``after``."""
        units = {schedule.unit for schedule in self.schedules.values()}
        return {unit for unit in units if after.value(unit) == self.seen.value(unit)}

    def step(self, after: Progress) -> None:
        """The update at ``after`` has been made."""
        self.decays = {name: schedule.retain(self.seen, after) for name, schedule in self._begun().items()}
        self.seen = after

    def _begun(self) -> dict[str, Schedule]:
        """Schedules that know where the first copy was: windows lie on the clock of the training."""
        interval = self._options.interval
        return {name: schedule.begun(self.start, interval) for name, schedule in self.schedules.items()}

    def restore(self, clock: Progress, start: Progress, seen: Progress) -> None:
        """Goes on where another run stopped."""
        self.clock, self.start, self.seen = clock, start, seen

    @property
    def schedules(self) -> Mapping[str, Schedule]:
        """Of each average."""
        return self._options.schedules

    @property
    def progress(self) -> Progress:
        """Training since the first copy."""
        if not self.seen.updates:
            return Progress()
        return self.clock.since(self.start).advance(batches=0, updates=self.seen.updates)
