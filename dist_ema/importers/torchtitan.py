"""torchtitan's EMA in a checkpoint of its trainer: ``ema.state.<name>.ema_params``, one for each trained parameter.

``ema_params.<key>`` are several averages. The file does not say how they decay.
"""

from __future__ import annotations

import re

from dist_ema.importers.dcp import read_value
from dist_ema.importers.foreign import Content, Foreign, LazyTensor, Model, integer
from dist_ema.options import ONLY
from dist_ema.schedules import HalfLifeFraction
from dist_ema.timing import Progress

_NAME = re.compile(r"(?:[^.]+\.)?state\.(?P<name>.+)\.ema_params(?:\.(?P<key>.+))?")


def matches(content: Content) -> bool:
    """Whether this is such a directory."""
    return content.kind == "dcp" and any(_NAME.fullmatch(name) for name in content.tensors)


def read(content: Content, model: Model | None) -> Foreign:
    """The averages of trained parameters."""
    averages: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in content.tensors.items():
        if found := _NAME.fullmatch(name):
            averages.setdefault(found["key"] or ONLY, {})[found["name"]] = tensor
    step = read_value(content, "train_state.step")
    steps = integer(step, "train_state.step") if step is not None else 0
    return Foreign(averages, usual=HalfLifeFraction(0.05), clock=Progress(batches=steps), updates=steps + 1)
