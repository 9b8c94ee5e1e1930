"""Registers the kinds of schedules, and reads schedules from files.

A file names the kind of a schedule and its options. Only registered kinds can be computed. A checkpoint with another
kind, of a user or of a later version, still has good tensors, so its schedule is read as an :class:`UnknownSchedule`.
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
#: The largest number of characters of a schedule as JSON. State dicts store it in a tensor of fixed size.
_LONGEST = 2000


def register(kind: str, cls: type[Schedule]) -> None:
    """Registers a schedule class of your own, so that it can be saved to files and read from them.

    Call it before the average is constructed, in every program that trains with the class or computes it
    (``synthesize``). Loading, exporting, merging and verifying a file need no registration. Repeated calls are allowed,
    so the call can follow the class definition::

        @dataclass(frozen=True)
        class Annealing(Schedule):
            gamma: float = 4.0

            def _log_retain(self, start: float, stop: float) -> float:
                return math.log(stop / (stop + self.gamma))

        schedules.register("Annealing", Annealing)

    Args:
        kind: the name in files: a letter, then letters, digits, ``_``, ``.`` and ``-``. It must never change.
        cls: a dataclass that derives from :class:`Schedule`. Its options are numbers, strings, bools or lists of them.

    Raises:
        EMAConfigError: an argument is not allowed, the name is registered for another class, or the class under another
            name.
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
    KINDS[kind] = cls  # if a notebook defines a class again, the new class replaces the old one
    KIND_OF[cls] = kind


def from_dict(data: Mapping[str, Any]) -> Schedule:
    """Returns the schedule of a dict that :meth:`Schedule.to_dict` made.

    Raises:
        EMAConfigError: ``data`` is not such a dict, or has an unknown kind, an unknown or missing option, or a value
            that is not allowed.
    """
    if not isinstance(data, Mapping):
        raise EMAConfigError(f"schedule={data!r}: allowed is a dict with 'kind' and its options")
    options = dict(data)
    kind = KINDS.get(str(options.pop("kind", None)))
    if kind is None:
        raise EMAConfigError(
            f"kind={data.get('kind')!r}: allowed are {', '.join(KINDS)}. Register a class of your own with "
            "dist_ema.schedules.register()"
        )
    known = [entry.name for entry in fields(kind) if entry.init]  # type: ignore[arg-type]
    if unknown := sorted(str(name) for name in options.keys() - set(known)):
        raise EMAConfigError(
            f"{kind.__name__} has no option {', '.join(unknown)}; allowed: {', '.join(known) or 'none'}"
        )
    try:
        return kind(**options)
    except TypeError as error:  # Python's message names the missing options
        raise EMAConfigError(f"schedule={data!r}: {error}; options: {', '.join(known)}") from error


def from_file(data: Mapping[str, Any]) -> Schedule:
    """Returns the schedule of a file; an :class:`UnknownSchedule` if this program cannot make one of its kind.

    Raises:
        EMAConfigError: ``data`` does not describe a schedule, or describes one of this library's kinds with wrong
            options. Then the file is damaged.
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
    """Raises EMAConfigError unless the schedule can be saved and read again. A run learns it before its first save.

    Args:
        option: the option that has the schedule, for errors.
        schedule: the schedule, with every ``dur`` resolved.
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
    # The class is the user's. Try what a save and a load will do.
    try:
        text = json.dumps(schedule.to_dict(), allow_nan=False)
        again = json.dumps(from_dict(json.loads(text)).to_dict())
    except Exception as error:
        raise EMAConfigError(f"{option}={_shown(schedule)} cannot be saved and read again: {error}") from error
    if again != text:
        raise EMAConfigError(
            f"{option}={_shown(schedule)} would be changed by a save and a load: {text} is saved, and {again} is read. "
            "Its fields must be what its constructor takes"
        )
    if len(text) > _LONGEST or any(_is_too_much(value) for value in schedule.to_dict().values()):
        raise EMAConfigError(
            f"{option}={_shown(schedule)}: allowed options of a schedule are numbers, strings, bools or lists of them, "
            f"with at most {_LONGEST} characters in all, and whole numbers below 2**63; given is {text[:200]}"
        )


@dataclass(frozen=True)
class UnknownSchedule(Schedule):
    """Holds a schedule of a file whose kind this program cannot make. It can be shown and saved, but not computed.

    Attributes:
        kind: the kind in the file.
        options: the options in the file.
        why: why it cannot be computed, for errors.
    """

    kind: str
    options: Mapping[str, Any]
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Returns the dict of the file."""
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
            f"the schedule {self!r} of a file cannot be computed: {self.why}. Call "
            f"dist_ema.schedules.register({self.kind!r}, ...) with its class first"
        )


def _is_too_much(value: object, in_list: bool = False) -> bool:
    """Returns whether readers of files would refuse a value. They allow flat lists, and whole numbers of 64 bits."""
    if isinstance(value, (list, tuple)):
        return in_list or any(_is_too_much(item, in_list=True) for item in value)
    return isinstance(value, Mapping) or (isinstance(value, int) and abs(value) >= 1 << 63)


def _path(cls: type) -> str:
    """Returns the full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _suggested(name: str) -> str:
    """Returns a name that :func:`register` accepts."""
    return f"My{name}" if name in KINDS else name


def _shown(schedule: Schedule) -> str:
    """Returns the ``repr()`` of a schedule, shortened for errors."""
    try:
        return repr(schedule)[:200]
    except Exception:  # the method is the user's
        return f"<{type(schedule).__name__}>"
