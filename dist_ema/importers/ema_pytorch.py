"""Imports from ema-pytorch: the state dict of the module ``EMA``, alone or in the dict of a training script."""

from __future__ import annotations

from dist_ema.formats.tensors import Content
from dist_ema.importers.foreign import Foreign, Model, integer, read_tensors, search, ties
from dist_ema.options import ONLY
from dist_ema.schedules import Warmup
from dist_ema.schedules.clock import Progress

_KEYS = {"initted", "step"}
_PREFIX = "ema_model."


def matches(content: Content) -> bool:
    """Returns whether this is such a file."""
    values = search(content.values, _KEYS) if content.kind == "file" else None
    return values is not None and any(str(name).startswith(_PREFIX) for name in values)


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the average. The file does not mark frozen parameters. Raises CheckpointCorruptError."""
    values = search(content.values, _KEYS) or {}
    found = {name.removeprefix(_PREFIX): value for name, value in values.items() if name.startswith(_PREFIX)}
    average = read_tensors(found, "'ema_model'")
    steps = integer(values["step"], "step")
    started = bool(values["initted"]) and steps > 0
    return Foreign(
        averages={ONLY: average},
        tied=ties(average),
        usual=Warmup(0.9999),
        clock=Progress(batches=steps),
        start=Progress(batches=1 if started else 0),
        updates=steps if started else 0,
    )
