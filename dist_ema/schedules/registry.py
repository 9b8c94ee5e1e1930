"""Registers the kinds of schedules, writes them to files and reads them again.

A file names the kind of a schedule and its options. Only kinds that are registered here can be read. A file may still
hold another kind, of a user or of a later version: its tensors are good, so it is read as an :class:`UnknownSchedule`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NoReturn

from dist_ema.errors import EMAConfigError
from dist_ema.schedules.constant import ConstantDecay, Smoothing, Uniform
from dist_ema.schedules.half_life import HalfLife, HalfLifeFraction
from dist_ema.schedules.power import PowerFunction
from dist_ema.schedules.ramps import Cosine, Linear
from dist_ema.schedules.schedule import KIND_OF, Position, Schedule
from dist_ema.schedules.warmup import Debiased, NumUpdatesWarmup, Ramp, Warmup
from dist_ema.schedules.window import Window

KINDS: dict[str, type[Schedule]] = {
    kind.__name__: kind
    for kind in (
        ConstantDecay,
        Cosine,
        Debiased,
        HalfLife,
        HalfLifeFraction,
        Linear,
        NumUpdatesWarmup,
        PowerFunction,
        Ramp,
        Smoothing,
        Uniform,
        Warmup,
        Window,
    )
}
_BUILT_IN = frozenset(KINDS)
_KIND = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")
#: Characters of a schedule as JSON, at most: a state dict has as much room for it.
_LONGEST = 2000


def register(kind: str, cls: type[Schedule]) -> None:
    """Makes a schedule of one's own one that can be saved, and read from a file.

    Call it before the average is constructed, in every program that trains with the class or that needs its numbers
    (``synthesize``). To load, export, merge or verify a file needs no registration. Repeating a call does no harm, so
    it may stand below the class::

        @dataclass(frozen=True)
        class Annealing(Schedule):
            gamma: float = 4.0

            def _log_retain(self, start: float, stop: float) -> float:
                return math.log(stop / (stop + self.gamma))

        schedules.register("Annealing", Annealing)

    Args:
        kind: the name in files: a letter, then letters, digits, ``_``, ``.`` and ``-``. It must never change.
        cls: a dataclass that derives from :class:`Schedule`. Its options are numbers, texts, bools or lists of them.

    Raises:
        EMAConfigError: an argument is something else, or the name or the class is registered otherwise.
    """
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise EMAConfigError(
            f"kind={kind!r}: allowed are names of up to 100 letters, digits, '_', '.' and '-' that begin with a letter"
        )
    if not (isinstance(cls, type) and issubclass(cls, Schedule)) or inspect.isabstract(cls):
        raise EMAConfigError(f"cls={cls!r}: allowed is a subclass of dist_ema.schedules.Schedule with _log_retain()")
    if not is_dataclass(cls):
        raise EMAConfigError(f"cls={cls!r}: put @dataclass(frozen=True) on it, since its fields are what is saved")
    if kind in _BUILT_IN:
        raise EMAConfigError(f"kind={kind!r} is a schedule of this library: register your class under another name")
    known = KINDS.get(kind)
    if known is not None and _path(known) != _path(cls):
        raise EMAConfigError(f"kind={kind!r} is registered for {_path(known)}: use another name for {_path(cls)}")
    if KIND_OF.get(cls, kind) != kind:
        raise EMAConfigError(f"{_path(cls)} is registered as {KIND_OF[cls]!r} already, so it cannot be {kind!r} too")
    KINDS[kind] = cls  # a class that a notebook defines again takes the place of the old one
    KIND_OF[cls] = kind


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """Returns the schedule that :meth:`Schedule.to_dict` described.

    Raises:
        EMAConfigError: not such a dict, an unknown kind, an unknown or missing option, or a value that is not allowed.
    """
    if not isinstance(data, Mapping):
        raise EMAConfigError(f"schedule={data!r}: allowed is a dict with 'kind' and its options")
    options = dict(data)
    kind = KINDS.get(str(options.pop("kind", None)))
    if kind is None:
        raise EMAConfigError(
            f"kind={data.get('kind')!r}: allowed is one of {', '.join(KINDS)}, and what "
            "dist_ema.schedules.register() has added"
        )
    known = [entry.name for entry in fields(kind) if entry.init]  # type: ignore[arg-type]
    if unknown := sorted(str(name) for name in options.keys() - set(known)):
        raise EMAConfigError(
            f"{kind.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
        )
    try:
        return kind(**options)
    except TypeError as error:  # what is missing, in Python's words
        raise EMAConfigError(f"schedule={data!r}: {error}; options: {', '.join(known)}") from error


def from_file(data: Mapping[str, Any]) -> Schedule:
    """Returns the schedule of a file; an :class:`UnknownSchedule` where this program does not know its kind.

    Raises:
        EMAConfigError: ``data`` is not a description of a schedule, or one of this library's kinds with options that
            it does not have: the file is damaged.
    """
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or not _KIND.fullmatch(kind) or kind in _BUILT_IN:
        return from_dict(data)
    options = {name: value for name, value in data.items() if name != "kind"}
    if kind not in KINDS:
        return UnknownSchedule(kind, options, "it is not registered in this program")
    try:
        return from_dict(data)
    except Exception as error:  # the class is the user's, and may have changed since the file was written
        return UnknownSchedule(kind, options, f"{_path(KINDS[kind])} does not take these options: {error}")


def check_registered(option: str, schedule: Schedule) -> None:
    """Raises EMAConfigError unless files can hold the schedule, so that no run finds out at its first save.

    Args:
        option: what the user gave it as.
        schedule: with every ``dur`` resolved.
    """
    cls = type(schedule)
    name = KIND_OF.get(cls, cls.__name__)
    if KINDS.get(name) is not cls:
        raise EMAConfigError(
            f"{option}={_shown(schedule)}: {_path(cls)} is not registered, so the average could not be saved. "
            f"Call dist_ema.schedules.register({_suggested(name)!r}, {cls.__name__}) first"
        )
    if name in _BUILT_IN:
        return
    try:
        text = json.dumps(schedule.to_dict(), allow_nan=False)
        again = json.dumps(from_dict(json.loads(text)).to_dict())
    except Exception as error:
        raise EMAConfigError(f"{option}={_shown(schedule)} cannot be saved and read again: {error}") from error
    if again != text:
        raise EMAConfigError(f"{option}={_shown(schedule)} would be read as another one: {text} is saved, {again} read")
    if len(text) > _LONGEST or any(_is_too_much(value) for value in schedule.to_dict().values()):
        raise EMAConfigError(
            f"{option}={_shown(schedule)}: the options of a schedule are numbers, texts, bools or lists of them, with "
            f"at most {_LONGEST} characters in all, and whole numbers below 2**63; they are {text[:200]}"
        )


@dataclass(frozen=True)
class UnknownSchedule(Schedule):
    """A schedule in a file whose kind this program does not know. It can be shown and written again, not computed.

    Attributes:
        kind: the name in the file.
        options: as in the file.
        why: the reason.
    """

    kind: str
    options: Mapping[str, Any]
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Returns what the file says."""
        return {"kind": self.kind, **self.options}

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{name}={value!r}' for name, value in self.options.items())})"

    def __hash__(self) -> int:
        return hash(self.kind)

    @property
    def unit(self) -> str:
        """Raises EMAConfigError."""
        self._refuse()

    def log_retain(self, before: Position, after: Position) -> float:
        """Raises EMAConfigError."""
        self._refuse()

    def _log_retain(self, start: float, stop: float) -> float:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise EMAConfigError(
            f"what the schedule {self!r} of a file keeps of an average cannot be computed: {self.why}. Call "
            f"dist_ema.schedules.register({self.kind!r}, ...) with its class before, in Python"
        )


def _is_too_much(value: object, in_list: bool = False) -> bool:
    """Returns whether the readers of files refuse a value: they limit nesting, and the digits of whole numbers."""
    if isinstance(value, (list, tuple)):
        return in_list or any(_is_too_much(item, in_list=True) for item in value)
    return isinstance(value, Mapping) or (isinstance(value, int) and abs(value) >= 1 << 63)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _suggested(name: str) -> str:
    """Returns a name that :func:`register` takes."""
    return f"My{name}" if name in KINDS else name


def _shown(schedule: Schedule) -> str:
    """Returns the ``repr()`` of an object, which is the user's and may raise."""
    try:
        return repr(schedule)[:200]
    except Exception:
        return f"<{type(schedule).__name__}>"
