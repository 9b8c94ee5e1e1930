"""An :class:`EMAState` as JSON, in ``ema.json`` and in the state dict of DCP. What is read is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from math import isfinite
from typing import Any

from dist_ema.formats.strict_json import is_count, shown
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState

_UNITS = tuple(field.name for field in fields(Progress))


def state_to_json(state: EMAState) -> dict[str, Any]:
    """Returns the entries of a state, under their names on disk: ``clock``, ``start`` and ``seen`` are the three
    clocks.
    """
    return {
        "started": state.started,
        "clock": asdict(state.training),
        "start": asdict(state.first_copy),
        "seen": asdict(state.averaged),
        "skipped": state.skipped,
        "seed": state.seed,
    }


def state_from_json(body: Mapping[str, Any]) -> EMAState:
    """Reads what :func:`state_to_json` wrote, with or without a seed. Raises ValueError or KeyError otherwise."""
    if not isinstance(body["started"], bool):
        raise ValueError(f"invalid started={shown(body['started'])}; expected true or false")
    if not is_count(body["skipped"]):
        raise ValueError(f"invalid skipped={shown(body['skipped'])}; expected a count")
    seed = body.get("seed")
    if seed is not None and not is_count(seed, 63):
        raise ValueError(f"invalid seed={shown(seed)}; expected a whole number from 0 to 2**63 - 1")
    training, first_copy, averaged = (_read_progress(name, body[name]) for name in ("clock", "start", "seen"))
    _check_order(training, first_copy, averaged)
    return EMAState(body["started"], training, first_copy, averaged, body["skipped"], seed)


def _read_progress(clock: str, values: object) -> Progress:
    if not isinstance(values, Mapping) or values.keys() != set(_UNITS):
        raise ValueError(f"invalid {clock!r}; expected {', '.join(_UNITS)}")
    epochs = values["epochs"]
    if not (is_count(epochs) or (isinstance(epochs, float) and isfinite(epochs) and 0 <= epochs < 1 << 62)):
        raise ValueError(f"invalid {clock!r}: {shown(epochs)} epochs; expected a number of 0 or more")
    for unit in _UNITS:
        if unit != "epochs" and not is_count(values[unit]):
            raise ValueError(f"invalid {clock!r}: {shown(values[unit])} {unit}; expected a count")
    return Progress().advance(**values)


def _check_order(training: Progress, first_copy: Progress, averaged: Progress) -> None:
    """Raises ValueError unless the first copy and the last update lie before the save."""
    for unit in _UNITS:
        if unit == "updates":
            continue
        now, begun, passed = (getattr(clock, unit) for clock in (training, first_copy, averaged))
        slack = 1e-6 * now if unit == "epochs" else 0  # sums of fractions are rounded
        if begun + passed > now + slack:
            raise ValueError(f"the average began at {begun} {unit} and went on for {passed}, but {now} were trained")
