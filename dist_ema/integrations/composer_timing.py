"""Decides when Composer's EMA updates, by the clock of a trainer that calls at its own events. Pure.

The first event at or after the start copies the weights, whether or not a multiple of the interval falls on it. From
then on each multiple decays by a full interval. :class:`ShardedEMA` alone copies at a multiple, and decays by the time
that has passed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_ema.errors import EMAConfigError
from dist_ema.options import Options
from dist_ema.schedules.clock import CLOCK_UNITS, Progress, Time, crossed, reached
from dist_ema.schedules.duration import what_is_missed

#: What Composer takes where nothing else is said.
HALF_LIFE = "1000ba"


@dataclass(frozen=True)
class ComposerTiming:
    """Decides when an update is due, for ``ShardedEMA.update(due=...)``, with the options that make it decay as above.

    Attributes:
        options: of :class:`ShardedEMA`.
        half_life: None where the options say something else.
        interval: between updates.
        start: when averaging begins.
        units: those of the clock that matter.
    """

    options: Mapping[str, Any]
    half_life: Time | None
    interval: Time
    start: Time
    units: frozenset[str]

    @classmethod
    def parse(
        cls,
        half_life: str | None,
        smoothing: float | None,
        ema_start: str,
        update_interval: str | None,
        options: Mapping[str, Any],
    ) -> ComposerTiming:
        """Composer's four, and further options of ShardedEMA. Raises EMAConfigError for what is wrong or contradicts.

        ``half_life`` in samples or tokens decays by what was trained since the last update: such events do not fall on
        multiples.

        >>> timing = ComposerTiming.parse("1000ba", None, "0ba", "10ba", {})
        >>> round(timing.options["smoothing"], 5), timing.due(Progress(batches=19), Progress(batches=20), True, None)
        (0.99309, True)
        """
        others = [smoothing, *map(options.get, ("decay", "schedule", "averages"))]
        if any(other is not None for other in others):
            half_life = None if half_life == HALF_LIFE else half_life
        elif half_life is None:
            raise EMAConfigError("half_life=None: give half_life, smoothing, decay, schedule or averages")
        options = {**options, "half_life": half_life, "smoothing": smoothing}
        units = Options.check(**options).units()
        life = None if half_life is None else Time.parse(half_life, option="half_life", units=CLOCK_UNITS)
        default = Time(1, "ba" if life is None else life.unit)
        wanted = default if update_interval is None else update_interval
        interval = Time.parse(wanted, option="update_interval", units=CLOCK_UNITS)
        if life is not None and life.unit != interval.unit:
            given = f"half_life={half_life!r}, update_interval={update_interval!r}"
            raise EMAConfigError(f"{given}: of one unit; schedule=HalfLife({half_life!r}) goes with any interval")
        if interval.value != int(interval.value):
            raise EMAConfigError(f"update_interval={update_interval!r}: the trainer counts whole epochs")
        if life is not None and life.unit in ("ba", "ep"):
            options |= {"half_life": None, "smoothing": 2 ** -(interval.value / life.value)}
        start = Time.parse(ema_start, option="ema_start", positive=False)
        return cls(options, life, interval, start, frozenset(units | {interval.unit, start.unit}))

    def due(self, before: Progress, now: Progress, started: bool, elapsed: float | None) -> bool:
        """Returns whether the event at ``now`` updates, the last one being at ``before``; ``elapsed`` is that part of
        ``dur``.

        Raises EMAConfigError if the options count samples or tokens, and the trainer has counted none.
        """
        for unit in self.units & {"sp", "tok"}:
            if not now.value(unit):
                raise EMAConfigError(f"the options count in {unit!r}, of which the trainer has counted none")
        if started:
            return crossed(before, now, self.interval)
        if self.start.unit == "dur":
            return elapsed is not None and elapsed >= self.start.value
        return reached(now, self.start)

    def what_is_missed(self, duration: str, batches_per_epoch: int | None) -> str | None:
        """Returns a text if a training of length ``duration`` is too short for the average; None if it is long
        enough.
        """
        end = Time.parse(duration, option="max_duration", units=CLOCK_UNITS)
        length = {end.unit: end.value}
        if batches_per_epoch and end.unit == "ep":
            length["ba"] = end.value * batches_per_epoch
        if batches_per_epoch and end.unit == "ba":
            length["ep"] = end.value / batches_per_epoch
        start = self.start.resolve(end, option="ema_start")
        return what_is_missed(start, self.interval, length, copies_at_start=True)

    def check_duration(self, own: str) -> None:
        """Raises EMAConfigError if ``max_duration`` is not ``own``, the trainer's."""
        given = self.options.get("max_duration")
        if given is not None and str(Time.parse(given, option="max_duration")) != own:
            raise EMAConfigError(f"max_duration={given!r}: the trainer's is {own!r}; leave it out")
