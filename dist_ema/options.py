"""Checks the options of :class:`ShardedEMA`. All checks that need no model are here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from dist_ema.errors import EMAConfigError
from dist_ema.schedules import ConstantDecay, HalfLife, Schedule, Smoothing, check_registered
from dist_ema.schedules.checks import AVERAGE_NAME, number
from dist_ema.schedules.clock import CLOCK_UNITS, Time

#: The name of a single average.
ONLY = "ema"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_DTYPES_TEXT = "torch.float32, torch.float64 and torch.bfloat16 (stochastically rounded)"
#: What an update does with a buffer.
_BUFFER_MODES = ("copy", "average", "ignore")


@dataclass(frozen=True)
class Options:
    """Holds the checked options.

    Attributes:
        schedules: the schedule of each average, by its name. None of them counts in ``dur``.
        interval: time between updates.
        start: when averaging begins.
        dtype: dtype of the shadows; None means that of each parameter.
        shard_replicas: split the shadows of replicated parameters among the replicas.
        include: patterns, one of which a name must contain; empty for every name.
        exclude: patterns, none of which a name may contain.
        buffers: patterns with ``"copy"``, ``"average"`` or ``"ignore"`` for the buffers whose names contain them. The
            first match counts.
        skip_nonfinite: leave a shadow element unchanged if its source is NaN or Inf.
        offload: keep shadows in host memory, where a thread updates them.
        offload_threads: number of threads for that; None means a quarter of the caller's.
        seed: seed of stochastic rounding for bf16 shadows; None for other dtypes.
        into: whether a teacher holds the average. Then no shadow is split among replicas, unless it is gathered.
        rename: patterns and replacements, applied in order, that turn a name of the model into the teacher's.
        sync: None, or ``"gather"`` for a teacher to which each update sends the average.
        masters: whether the masters that an optimizer keeps are averaged in place of the parameters.
        duration: length of the training; None if ``max_duration`` was not given.

    >>> options = Options.parse(decay=0.999, exclude="bias$", ema_start="0.1dur", max_duration="3ep")
    >>> options.selects("layer.weight"), options.selects("layer.bias"), sorted(options.units())
    (True, False, ['ba', 'ep'])
    """

    schedules: Mapping[str, Schedule]
    interval: Time
    start: Time
    dtype: torch.dtype | None
    shard_replicas: bool
    include: tuple[re.Pattern[str], ...]
    exclude: tuple[re.Pattern[str], ...]
    buffers: tuple[tuple[re.Pattern[str], str], ...]
    skip_nonfinite: bool
    offload: bool
    offload_threads: int | None
    seed: int | None
    into: bool = False
    rename: tuple[tuple[re.Pattern[str], str], ...] = ()
    sync: str | None = None
    masters: bool = False
    duration: Time | None = None

    @classmethod
    def parse(
        cls,
        *,
        decay: object = None,
        half_life: object = None,
        smoothing: object = None,
        schedule: object = None,
        averages: object = None,
        update_interval: object = "1ba",
        ema_start: object = "0ba",
        max_duration: object = None,
        dtype: object = torch.float32,
        offload: object = None,
        offload_threads: object = None,
        shard_replicas: object = True,
        include: object = None,
        exclude: object = None,
        buffers: object = "copy",
        skip_nonfinite: object = True,
        seed: object = 0,
        into: object = None,
        rename: object = None,
        sync: object = None,
        masters: object = None,
    ) -> Options:
        """Checks every option. The defaults are those of ShardedEMA.

        Raises EMAConfigError, which names the first wrong option, its value and what is allowed.
        """
        # ``dur`` is a fraction of max_duration, so everything that counts in it is resolved with that.
        duration = None
        if max_duration is not None:
            duration = Time.parse(max_duration, option="max_duration", units=CLOCK_UNITS)
        if not (offload is None or (isinstance(offload, str) and offload == "cpu")):
            raise EMAConfigError(f"offload={offload!r}: allowed are None and 'cpu'")
        schedules = {
            name: given.resolve(duration)
            for name, given in _schedules(decay, half_life, smoothing, schedule, averages).items()
        }
        for name, resolved in schedules.items():
            check_registered("schedule" if averages is None else f"averages[{name!r}]", resolved)
        _check_into(into, offload, schedules, sync)
        if into is not None and masters is not None:
            raise EMAConfigError("masters= and into=: the masters of a model with a teacher cannot be averaged")
        interval = Time.parse(update_interval, option="update_interval")
        start = Time.parse(ema_start, option="ema_start", positive=False)
        # A teacher computes with the average, so each of its replicas has to average everything, unless every update
        # gathers the average.
        may_split = into is None or sync is not None
        return cls(
            schedules=schedules,
            interval=interval.resolve(duration, option="update_interval"),
            start=start.resolve(duration, option="ema_start"),
            dtype=_dtype(dtype),
            shard_replicas=_flag("shard_replicas", shard_replicas) and may_split,
            include=patterns("include", include),
            exclude=patterns("exclude", exclude),
            buffers=_buffer_modes(buffers),
            skip_nonfinite=_flag("skip_nonfinite", skip_nonfinite),
            offload=offload is not None,
            offload_threads=_threads(offload_threads, offload),
            seed=_seed(seed, dtype),
            into=into is not None,
            rename=renames(rename),
            sync=None if sync is None else str(sync),
            masters=masters is not None,
            duration=duration,
        )

    @classmethod
    def check(cls, group: object = None, **options: object) -> Options:
        """Validates options before a :class:`ShardedEMA` can be made. Raises what its constructor would."""
        return cls.parse(**options)

    def selects(self, name: str) -> bool:
        """Returns whether ``include`` and ``exclude`` admit ``name`` to the average."""
        included = not self.include or any(pattern.search(name) for pattern in self.include)
        return included and not any(pattern.search(name) for pattern in self.exclude)

    def buffer_mode(self, name: str) -> str:
        """Returns how the buffer ``name`` is treated: ``"copy"``, ``"average"`` or ``"ignore"``."""
        return next((mode for pattern, mode in self.buffers if pattern.search(name)), "copy")

    def renamed(self, name: str) -> str:
        """Returns the teacher's name of the tensor ``name``."""
        for pattern, replacement in self.rename:
            name = pattern.sub(replacement, name)
        return name

    def check_patterns(self, names: Iterable[str], buffers: Iterable[str]) -> None:
        """Raises EMAConfigError if a pattern matches none of ``names``: it is most likely misspelt.

        Patterns of ``buffers=`` have to match one of ``buffers``, the names of the model's buffers, if it has any.
        """
        known = list(names)
        rename = [pattern for pattern, _ in self.rename]
        for option, given in (("include", self.include), ("exclude", self.exclude), ("rename", rename)):
            for pattern in given:
                _check_matches(option, pattern, known, "name")
        of_buffers = list(buffers)
        for pattern, _ in self.buffers if of_buffers else ():
            _check_matches("buffers", pattern, of_buffers, "buffer")

    def facts(self) -> dict[str, str]:
        """Returns the options that have to be the same on every rank, as text. ``offload`` and its threads may
        differ.
        """
        return {
            "averages": repr({name: schedule.to_dict() for name, schedule in self.schedules.items()}),
            "update_interval": repr(str(self.interval)),
            "ema_start": repr(str(self.start)),
            "dtype": repr(self.dtype),
            "shard_replicas": repr(self.shard_replicas),
            "include": repr([pattern.pattern for pattern in self.include]),
            "exclude": repr([pattern.pattern for pattern in self.exclude]),
            "buffers": repr([(pattern.pattern, mode) for pattern, mode in self.buffers]),
            "skip_nonfinite": repr(self.skip_nonfinite),
            "seed": repr(self.seed),
            "into": repr(self.into),
            "rename": repr({pattern.pattern: replacement for pattern, replacement in self.rename}),
            "sync": repr(self.sync),
            "masters": repr(self.masters),
        }

    def units(self) -> set[str]:
        """Returns the units of the clock that the options depend on."""
        units = {self.interval.unit, self.start.unit if self.start.value else "ba"}
        return units.union(schedule.unit for schedule in self.schedules.values())


def _check_matches(option: str, pattern: re.Pattern[str], names: Sequence[str], what: str) -> None:
    if not any(pattern.search(name) for name in names):
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise EMAConfigError(f"{option}={pattern.pattern!r} matches no {what}; {what}s are {shown}")


def _schedules(
    decay: object, half_life: object, smoothing: object, schedule: object, averages: object
) -> dict[str, Schedule]:
    given = {
        option: value
        for option, value in (
            ("decay", decay),
            ("half_life", half_life),
            ("smoothing", smoothing),
            ("schedule", schedule),
            ("averages", averages),
        )
        if value is not None
    }
    if len(given) > 1:
        shown = ", ".join(f"{option}={value!r}" for option, value in given.items())
        raise EMAConfigError(f"{shown}: give exactly one of decay, half_life, smoothing, schedule, averages")
    if averages is not None:
        return _named_schedules(averages)
    if decay is not None:
        return {ONLY: ConstantDecay(decay)}  # type: ignore[arg-type]
    if smoothing is not None:
        return {ONLY: Smoothing(smoothing)}  # type: ignore[arg-type]
    if schedule is not None:
        return {ONLY: _schedule("schedule", schedule)}
    return {ONLY: HalfLife("1000ba" if half_life is None else half_life)}  # type: ignore[arg-type]


def _named_schedules(averages: object) -> dict[str, Schedule]:
    if not isinstance(averages, Mapping) or not averages:
        raise EMAConfigError(f"averages={averages!r}: allowed is a dict of names to schedules or decays, not empty")
    schedules: dict[str, Schedule] = {}
    for name, value in averages.items():
        if not isinstance(name, str) or not AVERAGE_NAME.fullmatch(name):
            raise EMAConfigError(f"averages: the name {name!r} must consist of letters, digits, '_', '-' and '.'")
        option = f"averages[{name!r}]"
        if isinstance(value, Real):
            try:
                schedules[name] = ConstantDecay(value)  # type: ignore[arg-type]
            except EMAConfigError as error:
                raise EMAConfigError(f"{option}: {error}") from error
        else:
            schedules[name] = _schedule(option, value)
    return schedules


def _schedule(option: str, value: object) -> Schedule:
    if not isinstance(value, Schedule):
        raise EMAConfigError(
            f"{option}={value!r}: allowed is an object of dist_ema.schedules, such as HalfLife('1000ba')"
            + ("" if option == "schedule" else ", or a decay in [0, 1)")
        )
    return value


def _dtype(dtype: object) -> torch.dtype | None:
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EMAConfigError(f"dtype={dtype!r}: allowed are None and {_DTYPES_TEXT}")
    if dtype not in _DTYPES:
        raise EMAConfigError(
            f"dtype={dtype}: a shadow of this precision stops moving, since each step of a slow average is smaller "
            f"than its last bit; allowed are {_DTYPES_TEXT}, and None for each parameter's own"
        )
    return dtype


def _seed(value: object, dtype: object) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise EMAConfigError(f"seed={value!r}: allowed are whole numbers from 0 to 2**63 - 1")
    return value if dtype == torch.bfloat16 else None


def _flag(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise EMAConfigError(f"{option}={value!r}: allowed are True and False")
    return value


def _threads(value: object, offload: object) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise EMAConfigError(f"offload_threads={value!r}: allowed are None and whole numbers from 1 on")
    if value is not None and offload is None:
        raise EMAConfigError(f"offload_threads={value!r}: it is for offload='cpu', and offload is None")
    return value


def _check_into(into: object, offload: object, schedules: Mapping[str, Schedule], sync: object) -> None:
    """Raises EMAConfigError for options that cannot be combined with a teacher."""
    if sync is not None and (sync != "gather" or into is None):
        raise EMAConfigError(f"sync={sync!r}: allowed are None and, with into=, 'gather'")
    if into is None:
        return
    if offload is not None:
        raise EMAConfigError(
            f"offload={offload!r}: with into= the average is the teacher's weights, so it cannot be moved to host "
            "memory. Give one of the two options, or keep the teacher itself in host memory"
        )
    if len(schedules) > 1:
        raise EMAConfigError(
            f"averages={sorted(schedules)}: into= takes one average, since a teacher has one set of weights. Make a "
            "ShardedEMA for each teacher"
        )


def check_cast(dtype: object) -> None:
    """Raises EMAConfigError unless floating-point tensors can be cast to ``dtype``; None casts none."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise EMAConfigError(f"dtype={dtype!r}: allowed is a floating-point torch.dtype, or None")


def patterns(option: str, value: object) -> tuple[re.Pattern[str], ...]:
    """Compiles the patterns of an option: None, one or several. Raises EMAConfigError."""
    if value is None:
        return ()
    values = [value] if isinstance(value, (str, bytes, re.Pattern)) else value
    if not isinstance(values, Iterable):
        raise EMAConfigError(f"{option}={value!r}: allowed is a regular expression or a list of them")
    found = []
    for item in values:
        if not isinstance(item, str) and not (isinstance(item, re.Pattern) and isinstance(item.pattern, str)):
            raise EMAConfigError(f"{option}={value!r}: {item!r} is not a regular expression (a str)")
        try:
            found.append(re.compile(item))
        except re.error as error:
            raise EMAConfigError(f"{option}={item!r} is not a regular expression: {error}") from error
    if not found:
        raise EMAConfigError(f"{option}={value!r}: the list is empty; leave the option out to take every name")
    return tuple(found)


def renames(value: object) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Returns the patterns and replacements of the option ``rename``. Raises EMAConfigError."""
    if value is None:
        return ()
    allowed = "allowed is a dict from regular expressions to their replacements"
    if not isinstance(value, Mapping):
        raise EMAConfigError(f"rename={value!r}: {allowed}")
    pairs = []
    for pattern, replacement in value.items():
        if not isinstance(pattern, (str, re.Pattern)) or not isinstance(replacement, str):
            raise EMAConfigError(f"rename={value!r}: {allowed}")
        (compiled,) = patterns("rename", pattern)
        try:
            compiled.sub(replacement, "")  # parses the replacement, whether or not the pattern matches
        except (re.error, IndexError) as error:
            raise EMAConfigError(f"rename={value!r}: {replacement!r} is no replacement: {error}") from error
        pairs.append((compiled, replacement))
    return tuple(pairs)


def _buffer_modes(value: object) -> tuple[tuple[re.Pattern[str], str], ...]:
    """Returns the patterns of the option ``buffers``, each with the mode of the buffers that it matches.

    One mode for all buffers becomes a pattern that every name matches. Raises EMAConfigError.
    """
    allowed = ", ".join(map(repr, _BUFFER_MODES))
    if isinstance(value, str) and value in _BUFFER_MODES:
        return ((re.compile(""), value),)
    if not isinstance(value, Mapping):
        raise EMAConfigError(
            f"buffers={value!r}: allowed are {allowed}, or a dict of regular expressions to these, such as "
            "{'expert_bias$': 'average'}"
        )
    if not value:
        raise EMAConfigError("buffers={}: the dict is empty; leave the option out to copy every buffer")
    pairs = []
    for pattern, mode in value.items():
        if not isinstance(mode, str) or mode not in _BUFFER_MODES:
            raise EMAConfigError(f"buffers={{{pattern!r}: {mode!r}}}: allowed are {allowed}")
        (compiled,) = patterns("buffers", pattern if isinstance(pattern, re.Pattern) else [pattern])
        pairs.append((compiled, mode))
    return tuple(pairs)


def check_fraction(fraction: object) -> float:
    """Returns ``copy_to(fraction=)`` as a float. Raises EMAConfigError unless it is in [0, 1]."""
    allowed = "a number from 0 to 1: how far the weights move toward the average"
    checked = number("fraction", fraction, allowed)
    if not 0 <= checked <= 1:
        raise EMAConfigError(f"fraction={fraction!r}: allowed is {allowed}")
    return checked
