"""Regular expressions that users give for canonical names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dist_ema.errors import EMAConfigError


def patterns(option: str, value: object) -> tuple[re.Pattern[str], ...]:
    """Those of an option, for which None or one of them is enough. Raises EMAConfigError."""
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
    """Patterns, and what replaces them, of the option ``rename``. Raises EMAConfigError."""
    if value is None:
        return ()
    well = isinstance(value, Mapping) and all(isinstance(key, (str, re.Pattern)) for key in value)
    if not isinstance(value, Mapping) or not well or not all(isinstance(found, str) for found in value.values()):
        raise EMAConfigError(f"rename={value!r}: allowed is a dict of regular expressions to what replaces them")
    pairs = []
    for pattern, replacement in value.items():
        (compiled,) = patterns("rename", pattern)
        try:
            compiled.sub(replacement, "")  # which reads the replacement, whether or not it matches
        except (re.error, IndexError) as error:
            raise EMAConfigError(f"rename={value!r}: {replacement!r} is no replacement: {error}") from error
        pairs.append((compiled, replacement))
    return tuple(pairs)
