"""Imports from Lightning's ``WeightAveraging``: ``state_dict`` is the average, ``current_model_state`` the live
weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from dist_ema.errors import CheckpointCorruptError
from dist_ema.formats.tensors import Content
from dist_ema.importers.foreign import Foreign, Model, integer, read_tensors, ties
from dist_ema.options import ONLY
from dist_ema.schedules import ConstantDecay
from dist_ema.schedules.clock import Progress


def matches(content: Content) -> bool:
    """Returns whether this is such a file."""
    return content.kind == "file" and {"averaging_state", "current_model_state", "state_dict"} <= content.values.keys()


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the average. The file does not mark frozen parameters. Raises CheckpointCorruptError."""
    average = read_tensors(content.values["state_dict"], "'state_dict'")
    averaging = content.values["averaging_state"]
    if not isinstance(averaging, Mapping):
        raise CheckpointCorruptError("'averaging_state' is not a dict")
    updates = integer(averaging.get("n_averaged"), "n_averaged")
    steps = integer(content.values.get("global_step", updates), "global_step")
    return Foreign(
        averages={ONLY: average},
        tied=ties(average),
        usual=ConstantDecay(0.999),
        clock=Progress(batches=steps),
        # The file does not give the interval, so every step since the first copy counts as an update.
        start=Progress(batches=max(0, steps - updates + 1) if updates else steps),
        updates=updates,
    )
