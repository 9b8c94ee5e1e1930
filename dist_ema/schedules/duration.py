"""Whether a training of known length makes an average at all. Pure Python.

Options such as ``ema_start="10ep"`` in a run of two epochs are taken without an error, since a run may be prolonged.
But then nothing is averaged, and what is evaluated and exported as the average is the live model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from dist_ema.schedules.clock import Time

# Epochs are sums of fractions: what misses the end by less than this share of it has reached it.
_SLACK = 1e-9


def what_is_missed(
    start: Time, interval: Time, length: Mapping[str, float], *, copies_at_start: bool = False
) -> str | None:
    """Says what becomes of the average where the training ends too early for it; None if nothing is wrong.

    Args:
        start: when averaging begins, without ``dur``.
        interval: time between updates, without ``dur``; updates are due at its multiples.
        length: of the training, by unit of the clock, as far as it is known.
        copies_at_start: the first update is due at the start itself, and not at a multiple (Composer's way).

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
    # A batch is what moves the clock, so a multiple is noticed at the end of the batch that it lies in.
    batch = 1.0 if interval.unit == "ba" else _ratio(length, interval.unit, "ba")
    begin = _converted(start, interval.unit, length)
    if batch is None or begin is None or interval.unit not in length:
        return None
    end = length[interval.unit] * (1 + _SLACK)
    every = interval.value
    start_batch = max(math.ceil(begin / batch * (1 - _SLACK)), 1)
    last = math.floor(end / every)  # which multiple is the last one in the training
    given = f"ema_start={str(start)!r}, " if start.value else ""
    given += f"update_interval={str(interval)!r}, but the training ends at {_end(interval, length)}"
    if copies_at_start:
        is_still = last * every <= start_batch * batch * (1 + _SLACK)
        return f"{given}: the average will be the weights at its start and never move" if is_still else None
    first = math.floor((start_batch - 1) * batch / every * (1 + _SLACK)) + 1  # the first one that is noticed
    if first > last:
        return f"{given}: no average will be made"
    if math.ceil(first * every / batch * (1 - _SLACK)) == math.ceil(last * every / batch * (1 - _SLACK)):
        return f"{given}: the average will be the weights of {Time(last * every, interval.unit)} and never move"
    return None


def _ratio(length: Mapping[str, float], unit: str, per: str) -> float | None:
    """Returns how much of one unit lies in one of the other, if the whole training is known in both."""
    return length[unit] / length[per] if unit in length and length.get(per) else None


def _converted(time: Time, unit: str, length: Mapping[str, float]) -> float | None:
    """Returns a time in another unit, by the part of the training that it is; None if that is not known."""
    if time.unit == unit or not time.value:
        return time.value
    ratio = _ratio(length, unit, time.unit)
    return None if ratio is None else time.value * ratio


def _is_after(time: Time, length: Mapping[str, float]) -> bool:
    return time.unit in length and time.value > length[time.unit] * (1 + _SLACK)


def _end(time: Time, length: Mapping[str, float]) -> Time:
    """Returns the end of the training in the unit of ``time``."""
    return Time(length[time.unit], time.unit)
