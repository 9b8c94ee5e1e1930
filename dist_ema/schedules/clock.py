"""Defines the training clock (``Progress``) and time strings (``Time``). Pure Python.

Units are Composer's: ``ba`` batches (one per optimizer step), ``sp`` samples, ``tok`` tokens, ``ep`` epochs, and
``dur``, a fraction of ``max_duration``. Epochs and ``dur`` may be fractional; the other units are whole numbers.
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
#: Units that the clock counts. A time in ``dur`` has to be resolved to one of these.
CLOCK_UNITS = ("ba", "sp", "tok", "ep")

_FRACTIONAL = ("ep", "dur")
_DIGITS = r"\d+(?:_\d+)*"
# A number, then a unit. The exponent needs digits, so the "e" of "2ep" belongs to the unit. It has at most six digits,
# because Decimal does not take exponents of any size.
_TIME = re.compile(
    rf"([+-]?(?:{_DIGITS}\.?(?:{_DIGITS})?|\.{_DIGITS})(?:e[+-]?\d{{1,6}})?)([a-z]+)", re.IGNORECASE | re.ASCII
)
# Epochs are sums of fractions such as 1/3, so they may miss a boundary by a rounding error. A reading that misses it by
# less than this part of it has reached it.
_SLACK = 1e-9


@dataclass(frozen=True)
class Progress:
    """Holds a reading of the training clock.

    :meth:`since` gives the clock of an average. At its first copy the four units are zero, and ``updates`` is one,
    because that copy is the first set of weights in the average.

    Attributes:
        batches: number of optimizer steps.
        samples: number of samples.
        tokens: number of tokens.
        epochs: number of epochs; may be fractional.
        updates: number of updates of the average, its first copy included.

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
        """Returns, for example, ``"12ba 480sp"``: batches, and each other unit that is not zero."""
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
    """Holds a span of training, such as ``1000ba``.

    Attributes:
        value: the number of units; an int except in ``ep`` and ``dur``.
        unit: one of :data:`UNITS`.

    >>> Time.parse("1_000ba", option="half_life"), str(Time.parse(10, option="update_interval"))
    (Time(value=1000, unit='ba'), '10ba')
    """

    value: int | float
    unit: str

    @classmethod
    def parse(cls, text: object, *, option: str, units: Sequence[str] = UNITS, positive: bool = True) -> Time:
        """Parses a time string, or an int number of batches.

        As in Composer, ``1_000ba``, ``1e3ba``, capital letters and spaces around the string are allowed.

        Args:
            text: the value of the option: ``"1000ba"``, ``1000`` or a :class:`Time`.
            option: the option's name, for errors.
            units: the units that this option allows.
            positive: whether zero is refused.

        Raises:
            EMAConfigError: the value is not allowed. The error names the option, the value and what is allowed.
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
        # adjusted() is the exponent of the first digit. It is checked before any conversion, because
        # int(Decimal("1e999999")) would compute a million digits.
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
        return cls(abs(value), unit)  # abs() turns -0.0 into 0.0

    def resolve(self, max_duration: Time | None, *, option: str = "time") -> Time:
        """Returns this time in a unit of the clock: ``dur`` becomes a part of ``max_duration``, other units stay.

        In units of whole numbers it is rounded up to the first count at which that part of the training is done.

        Raises:
            EMAConfigError: the unit is ``dur``, and ``max_duration`` is None or in ``dur`` itself.

        >>> Time.parse("0.1dur", option="ema_start").resolve(Time(3000, "ba"))
        Time(value=300, unit='ba')
        """
        if self.unit != "dur":
            return self
        if max_duration is None:
            raise EMAConfigError(f"{option}={str(self)!r} needs max_duration, such as '10000ba' or '3ep'")
        if max_duration.unit == "dur":
            raise EMAConfigError(f"max_duration={str(max_duration)!r}: allowed units are {', '.join(CLOCK_UNITS)}")
        # Computed from the decimal digits that the user wrote. In binary .7 * 10 may exceed 7, and be rounded up to 8.
        part = Fraction(repr(self.value)) * Fraction(repr(max_duration.value))
        return Time(float(part) if max_duration.unit in _FRACTIONAL else math.ceil(part), max_duration.unit)

    def __str__(self) -> str:
        """Returns the time string, which :meth:`parse` reads back."""
        value = int(self.value) if self.value == int(self.value) else self.value
        return f"{value}{self.unit}"


def crossed(before: Progress, after: Progress, interval: Time) -> bool:
    """Returns whether a multiple of ``interval`` lies after ``before``, and not after ``after``.

    If every call counts one batch, and the interval is in batches, this is Composer's ``batch % interval == 0``. Both
    readings must be of the same clock. Raises EMAConfigError for an unresolved ``dur``.

    >>> crossed(Progress(batches=9), Progress(batches=10), Time(10, "ba"))
    True
    """
    return _multiples(after, interval) > _multiples(before, interval)


def reached(now: Progress, moment: Time) -> bool:
    """Returns whether ``now`` is at ``moment`` or later. Raises EMAConfigError for an unresolved ``dur``.

    >>> reached(Progress(epochs=1.5), Time(2.0, "ep"))
    False
    """
    slack = _SLACK if moment.unit in _FRACTIONAL else 0
    return now.value(moment.unit) >= moment.value * (1 - slack)


def _multiples(progress: Progress, interval: Time) -> int:
    """Returns how many multiples of ``interval`` the clock has reached, zero not counted."""
    value = progress.value(interval.unit)
    if isinstance(value, int) and isinstance(interval.value, int):
        return value // interval.value
    ratio = value / interval.value
    return math.floor(ratio + _SLACK * max(1.0, ratio))


def _count(name: str, value: object) -> int:
    """Returns a count as an int. Raises EMAConfigError for a negative one, or a value that is not an int."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is an int, 0 or more")
    return int(value)


def _amount(name: str, value: object) -> float:
    """Returns an amount as a float. Raises EMAConfigError for a negative, infinite or not numeric one."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is a finite number, 0 or more")
    return float(value)
