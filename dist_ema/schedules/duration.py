"""Finds out whether a training of known length is long enough for the options. Pure Python.

Options such as ``ema_start="10ep"`` in a run of two epochs are not an error, because a run may be prolonged. But if it
is not, nothing is averaged, and evaluation and export use the live model. So callers log a warning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_ema.schedules.clock import Time

# Epochs are sums of fractions, with rounding errors. A time that misses the end by less than this part has reached it.
_SLACK = 1e-9


def what_is_missed(
    start: Time, interval: Time, length: Mapping[str, float], *, copies_at_start: bool = False
) -> str | None:
    """Returns the text of a warning if the training ends too early for an average; None if nothing is wrong.

    Args:
        start: when averaging begins; not in ``dur``.
        interval: time between updates, which are due at its multiples; not in ``dur``.
        length: the length of the training in each unit of the clock, as far as it is known.
        copies_at_start: whether the first update is due at ``start`` itself, as in Composer, and not at a multiple.

    >>> what_is_missed(Time(10, "ep"), Time(1, "ba"), {"ep": 2})
    "ema_start='10ep', but the training ends at 2ep: no average will be made"
    >>> what_is_missed(Time(0, "ba"), Time(4, "ba"), {"ba": 6})
    "update_interval='4ba', but the training ends at 6ba: the average will be the weights of 4ba and never move"
    >>> what_is_missed(Time(0, "ba"), Time(3, "ba"), {"ba": 6}) is None
    True
    """
    if _is_after(start, length):
        return f"ema_start={str(start)!r}, but the training ends at {_end(start, length)}: no average will be made"
    if _is_after(interval, length) and not copies_at_start:
        ends = _end(interval, length)
        return f"update_interval={str(interval)!r}, but the training ends at {ends}: no average will be made"
    # The clock moves at the end of each batch, so a multiple inside a batch is noticed at the end of that batch. Below,
    # ``batch``, ``begin``, ``end`` and ``every`` are in the unit of the interval.
    batch = 1.0 if interval.unit == "ba" else _ratio(length, interval.unit, "ba")
    begin = _converted(start, interval.unit, length)
    if batch is None or begin is None or interval.unit not in length:
        return None
    end = length[interval.unit] * (1 + _SLACK)
    every = interval.value
    start_batch = max(math.ceil(begin / batch * (1 - _SLACK)), 1)  # the first batch that ends at the start or later
    last = math.floor(end / every)  # the number of the last multiple in the training
    given = f"ema_start={str(start)!r}, " if start.value else ""
    given += f"update_interval={str(interval)!r}, but the training ends at {_end(interval, length)}"
    if copies_at_start:
        is_still = last * every <= start_batch * batch * (1 + _SLACK)
        return f"{given}: the average will be the weights at its start and never move" if is_still else None
    # The first multiple that is noticed at ``start_batch`` or later.
    first = math.floor((start_batch - 1) * batch / every * (1 + _SLACK)) + 1
    if first > last:
        return f"{given}: no average will be made"
    # If the first and the last one are noticed at the same batch, there is only one update: the first copy.
    batch_of_first = math.ceil(first * every / batch * (1 - _SLACK))
    batch_of_last = math.ceil(last * every / batch * (1 - _SLACK))
    if batch_of_first == batch_of_last:
        return f"{given}: the average will be the weights of {Time(last * every, interval.unit)} and never move"
    return None


def _ratio(length: Mapping[str, float], unit: str, per: str) -> float | None:
    """Returns how many of ``unit`` one of ``per`` has in this training; None if its length is not known in both."""
    return length[unit] / length[per] if unit in length and length.get(per) else None


def _converted(time: Time, unit: str, length: Mapping[str, float]) -> float | None:
    """Returns a time in another unit, as the same part of the training; None if the length is not known in both."""
    if time.unit == unit or not time.value:
        return time.value
    ratio = _ratio(length, unit, time.unit)
    return None if ratio is None else time.value * ratio


def _is_after(time: Time, length: Mapping[str, float]) -> bool:
    """Returns whether a time is after the end of the training; False if that is not known in its unit."""
    return time.unit in length and time.value > length[time.unit] * (1 + _SLACK)


def _end(time: Time, length: Mapping[str, float]) -> Time:
    """Returns the end of the training in the unit of ``time``."""
    return Time(length[time.unit], time.unit)
