"""Time strings and the training clock. Pure Python.

Units are Composer's: ``ba`` batches (one per optimizer step), ``sp`` samples, ``tok`` tokens, ``ep`` epochs, and
``dur``, a fraction of ``max_duration``. Epochs and ``dur`` may be fractional, the other units count whole things.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Real

from dist_ema.errors import EMAConfigError

UNITS = ("ba", "sp", "tok", "ep", "dur")
#: Units in which the clock itself runs.
CLOCK_UNITS = ("ba", "sp", "tok", "ep")

_FRACTIONAL = ("ep", "dur")
_DIGITS = r"\d+(?:_\d+)*"
# The exponent needs digits, so the "e" of "2ep" belongs to the unit; Decimal has a limit to exponents.
_TIME = re.compile(
    rf"([+-]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:e[+-]?\d{{1,6}})?)([a-z]+)", re.IGNORECASE | re.ASCII
)
# Epochs are sums of fractions: what misses a boundary by less than this share of it has reached it.
_SLACK = 1e-9


@dataclass(frozen=True)
class Progress:
    """A reading of the training clock.

    The clock of an average is read with :meth:`since`: at its first copy the four units are zero, while ``updates`` is
    one there, since that copy is the first set of weights in the average.

    Attributes:
        batches: optimizer steps.
        samples: samples.
        tokens: tokens.
        epochs: epochs, fractions allowed.
        updates: how many sets of weights the average has seen, its first copy among them.

    >>> now = Progress(batches=10).advance(samples=32)
    >>> str(now), now.since(Progress(batches=4)).batches
    ('11ba 32sp', 7)
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    epochs: float = 0.0
    updates: int = 0

    def advance(
        self, *, batches: int = 1, samples: int = 0, tokens: int = 0, epochs: float = 0.0, updates: int = 0
    ) -> Progress:
        """Returns the reading after that much more training.

        Raises:
            EMAConfigError: a count is negative, not finite, or not a number (a tensor, say).
        """
        return Progress(
            self.batches + _count("batches", batches),
            self.samples + _count("samples", samples),
            self.tokens + _count("tokens", tokens),
            self.epochs + _amount("epochs", epochs),
            self.updates + _count("updates", updates),
        )

    def __str__(self) -> str:
        """``"12ba 480sp"``: batches, and whatever else was counted."""
        counted = {"ba": self.batches, "sp": self.samples, "tok": self.tokens, "ep": self.epochs}
        return " ".join(
            f"{value:g}{unit}" if unit == "ep" else f"{value}{unit}"
            for unit, value in counted.items()
            if value or unit == "ba"
        )

    def since(self, start: Progress) -> Progress:
        """Returns this reading minus ``start``, in every field.

        ``start`` is the clock at the first copy, read before that copy was counted in ``updates``.
        """
        return Progress(
            self.batches - start.batches,
            self.samples - start.samples,
            self.tokens - start.tokens,
            self.epochs - start.epochs,
            self.updates - start.updates,
        )

    def value(self, unit: str) -> int | float:
        """Returns the reading in ``unit``, one of ``ba``, ``sp``, ``tok``, ``ep``. Raises EMAConfigError for any
        other.
        """
        if unit == "ba":
            return self.batches
        if unit == "sp":
            return self.samples
        if unit == "tok":
            return self.tokens
        if unit == "ep":
            return self.epochs
        raise EMAConfigError(f"unit={unit!r}: the clock runs in {', '.join(CLOCK_UNITS)}; resolve 'dur' first")


@dataclass(frozen=True)
class Time:
    """A span of training, such as ``1000ba``.

    Attributes:
        value: how much; an int except in ``ep`` and ``dur``.
        unit: one of :data:`UNITS`.

    >>> Time.parse("1_000ba", option="half_life"), str(Time.parse(10, option="update_interval"))
    (Time(value=1000, unit='ba'), '10ba')
    """

    value: int | float
    unit: str

    @classmethod
    def parse(cls, text: object, *, option: str, units: Sequence[str] = UNITS, positive: bool = True) -> Time:
        """Reads a time string, or an int number of batches.

        Blanks around it, ``1_000ba``, ``1e3ba`` and capital letters are fine, as in Composer.

        Args:
            text: what the user gave: ``"1000ba"``, ``1000``, a :class:`Time`.
            option: the option's name, for messages.
            units: the units that this option allows.
            positive: zero is not allowed.

        Raises:
            EMAConfigError: anything else; names the option, the value and what is allowed.
        """
        if isinstance(text, Time):
            return cls.parse(str(text), option=option, units=units, positive=positive)
        allowed = f"a {'positive' if positive else 'non-negative'} number with a unit of {', '.join(units)}"
        allowed += ", such as '10ba', or an int number of batches" if "ba" in units else f", such as '1{units[0]}'"

        def wrong(why: str) -> EMAConfigError:
            return EMAConfigError(f"{option}={text!r}: {why}; allowed is {allowed}")

        if isinstance(text, Integral) and not isinstance(text, bool):
            number = Decimal(int(text))
            unit = "ba"
        elif isinstance(text, str):
            match = _TIME.fullmatch(text.strip())
            if match is None:
                raise wrong("not a time string")
            number = Decimal(match[1].replace("_", ""))
            unit = match[2].lower()
        else:
            raise wrong(f"a {type(text).__name__} is not a time")
        if unit not in units:
            raise wrong(f"unit {unit!r} is not allowed here" if unit in UNITS else f"unknown unit {unit!r}")
        # Checked before any conversion: int(Decimal("1e999999")) would not come back.
        if number.adjusted() >= 18:
            raise wrong("too large")
        if unit not in _FRACTIONAL and number.adjusted() < 0 and number != 0:
            raise wrong(f"only {' and '.join(_FRACTIONAL)} may be fractional")
        value = float(number) if unit in _FRACTIONAL else int(number)
        if unit not in _FRACTIONAL and value != number:
            raise wrong(f"only {' and '.join(_FRACTIONAL)} may be fractional")
        if number < 0 or (positive and value == 0):
            raise wrong("not positive" if positive else "negative")
        if unit == "dur" and value > 1:
            raise wrong("a fraction of the duration is at most 1")
        return cls(abs(value), unit)

    def resolve(self, max_duration: Time | None, *, option: str = "time") -> Time:
        """Returns this time in a unit of the clock: ``dur`` becomes a part of ``max_duration``, anything else stays.

        In units that count whole things it is the first count at which that part of the training is done.

        Raises:
            EMAConfigError: the unit is ``dur`` and there is no ``max_duration``.

        >>> Time.parse("0.1dur", option="ema_start").resolve(Time(3000, "ba"))
        Time(value=300, unit='ba')
        """
        if self.unit != "dur":
            return self
        if max_duration is None:
            raise EMAConfigError(f"{option}={str(self)!r} needs max_duration, such as '10000ba' or '3ep'")
        if max_duration.unit == "dur":
            raise EMAConfigError(f"max_duration={str(max_duration)!r}: allowed units are {', '.join(CLOCK_UNITS)}")
        # Through the decimal form: .7 of 10 batches is 7 of them, not the 8th because .7 * 10 > 7 in floating point.
        part = Fraction(repr(self.value)) * Fraction(repr(max_duration.value))
        return Time(float(part) if max_duration.unit in _FRACTIONAL else math.ceil(part), max_duration.unit)

    def __str__(self) -> str:
        """Returns the time string, which :meth:`parse` reads back."""
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value}{self.unit}"


def crossed(before: Progress, after: Progress, interval: Time) -> bool:
    """Returns whether the clock passed or reached a multiple of ``interval`` after ``before``, up to and including
    ``after``.

    With one batch a call and an interval in batches that is Composer's ``batch % interval == 0``. Multiples count on
    the clock that the readings are of. Raises EMAConfigError for an unresolved ``dur``.

    >>> crossed(Progress(batches=9), Progress(batches=10), Time(10, "ba"))
    True
    """
    return _multiples(after, interval) > _multiples(before, interval)


def reached(now: Progress, moment: Time) -> bool:
    """Returns whether the clock stands at ``moment`` or past it. Raises EMAConfigError for an unresolved ``dur``.

    >>> reached(Progress(epochs=1.5), Time(2.0, "ep"))
    False
    """
    return now.value(moment.unit) >= moment.value * (1 - _SLACK if moment.unit in _FRACTIONAL else 1)


def _multiples(progress: Progress, interval: Time) -> int:
    value = progress.value(interval.unit)
    if isinstance(value, int) and isinstance(interval.value, int):
        return value // interval.value
    ratio = value / interval.value
    return math.floor(ratio + _SLACK * max(1.0, ratio))


def _count(name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is an int, 0 or more")
    return int(value)


def _amount(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is a finite number, 0 or more")
    return float(value)
