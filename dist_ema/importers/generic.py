"""Imports any dict of tensors: from a training script's file, a safetensors file, or a directory of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ema.formats.strict_json import is_count
from dist_ema.formats.tensors import Content
from dist_ema.importers.foreign import Foreign, Model, ties
from dist_ema.importers.state_dicts import Choice, choose
from dist_ema.options import ONLY
from dist_ema.schedules import ConstantDecay, NumUpdatesWarmup, Schedule
from dist_ema.schedules.clock import Progress

NAME = "state-dict"
#: Entries of a training file with the number of optimizer steps.
_STEPS = ("global_step", "step")


def read(
    content: Content, where: str, *, key: str | None, prefix: str | None, model: Model | None, average_only: bool
) -> Foreign:
    """Returns the average, or the only weights. Arguments and errors as
    :func:`dist_ema.importers.state_dicts.choose`.
    """
    choice = choose(content, where, key=key, prefix=prefix, model=model, average_only=average_only)
    notes = choice.notes
    if not choice.is_average:
        notes += (f"nothing in {where} says that this is an average: taken are its {len(choice.tensors)} tensors",)
    steps = _steps(content.values)
    updates = choice.updates
    return Foreign(
        averages={ONLY: choice.tensors},
        live=choice.live,
        tied=ties(choice.tensors, choice.live),
        usual=ConstantDecay(0.9999),
        schedule=_schedule(choice),
        clock=Progress(batches=max(steps, updates or 0)),
        updates=1 if updates is None else updates,
        notes=notes,
    )


def _steps(values: Mapping[str, Any]) -> int:
    return next((values[name] for name in _STEPS if is_count(values.get(name))), 0)


def _schedule(choice: Choice) -> Schedule | None:
    """Returns the schedule of torch_ema, LitEma and score_sde, which store a decay and a count.

    They warm up by min(decay, (1 + n) / (10 + n)).
    """
    return None if choice.decay is None or choice.updates is None else NumUpdatesWarmup(choice.decay)
