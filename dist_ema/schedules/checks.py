"""Checks the options of schedules. Errors name the option, its value and what is allowed."""

from __future__ import annotations

import math
import re
from numbers import Real

from dist_ema.errors import EMAConfigError

#: Allowed names of averages. Checkpoints and exports use them as names of folders.
AVERAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def number(name: str, value: object, allowed: str) -> float:
    """Returns a finite number as a float. Raises EMAConfigError, which says what is ``allowed``, for anything else."""
    try:
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an int beyond the range of floats: the error below names it
        pass
    raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")


def fraction(name: str, value: object) -> float:
    """Returns a decay in [0, 1). An average with a decay of 1 would never move. Raises EMAConfigError."""
    allowed = "a number in [0, 1): the fraction of the average that is kept"
    checked = number(name, value, allowed)
    if not 0 <= checked < 1:
        raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")
    return abs(checked)  # no -0.0


def share(name: str, value: object) -> float:
    """Returns a decay in [0, 1]. It may be 1, as at the end of DINO's schedule. Raises EMAConfigError."""
    allowed = "a number in [0, 1]: the fraction of the average that is kept"
    checked = number(name, value, allowed)
    if not 0 <= checked <= 1:
        raise EMAConfigError(f"{name}={value!r}: allowed is {allowed}")
    return abs(checked)


def positive(name: str, value: object) -> float:
    """Returns a finite number above zero. Raises EMAConfigError for anything else."""
    checked = number(name, value, "a finite number more than 0")
    if checked <= 0:
        raise EMAConfigError(f"{name}={value!r}: allowed is a finite number more than 0")
    return checked


def set_fields(schedule: object, **values: object) -> None:
    """Stores checked values in a frozen dataclass while it is being built."""
    for name, value in values.items():
        object.__setattr__(schedule, name, value)
