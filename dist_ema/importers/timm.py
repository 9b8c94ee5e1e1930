"""Imports from timm: the checkpoint of its training script (``state_dict_ema``), or the state dict of a
``ModelEma``.
"""

from __future__ import annotations

from dist_ema.formats.tensors import Content
from dist_ema.importers.foreign import Foreign, Model, integer, read_tensors, ties
from dist_ema.options import ONLY
from dist_ema.schedules import ConstantDecay
from dist_ema.schedules.clock import Progress

_KEY = "state_dict_ema"


def matches(content: Content) -> bool:
    """Returns whether this is such a checkpoint. The state dict of a ModelEma looks like that of any model."""
    return content.kind == "file" and _KEY in content.values


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the average. The file does not mark frozen parameters. Raises CheckpointCorruptError."""
    average = read_tensors(content.values.get(_KEY, content.values), _KEY)
    epoch = content.values.get("epoch")
    return Foreign(
        averages={ONLY: average},
        tied=ties(average),
        usual=ConstantDecay(0.9999),
        # "epoch" is the number of the last epoch that was trained, from 0 on.
        clock=Progress(epochs=float(integer(epoch, "epoch") + 1) if epoch is not None else 0.0),
    )
