"""Checks of the options of schedules. Each names the option, its value and what is allowed."""

from __future__ import annotations

import math
import re
from numbers import Real

from dist_ema.errors import EMAConfigError

#: Names of averages: they are names of folders, too.
AVERAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def number(name: str, value: object, allowed: str) -> float:
    """Returns a finite number as a float, or EMAConfigError."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of floats
        pass
    raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")


def fraction(name: str, value: object) -> float:
    """Returns a decay that forgets something."""
    allowed = "a number in [0, 1): the fraction of the average that is kept"
    checked = number(name, value, allowed)
    if not 0 <= checked < 1:
        raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")
    return abs(checked)  # no -0.0


def share(name: str, value: object) -> float:
    """Returns a decay that may forget nothing, as the last of DINO's teacher."""
    allowed = "a number in [0, 1]: the fraction of the average that is kept"
    checked = number(name, value, allowed)
    if not 0 <= checked <= 1:
        raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")
    return abs(checked)


def positive(name: str, value: object) -> float:
    """Returns a finite number above zero."""
    checked = number(name, value, "a finite number more than 0")
    if checked <= 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is a finite number more than 0")
    return checked


def set_fields(schedule: object, **values: object) -> None:
    """Stores checked values in a frozen dataclass while it is being built."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)
