"""Imports from diffusers' ``EMAModel``: the directory of ``save_pretrained``, or its state dict, whose tensors have no
names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ema.errors import CheckpointCorruptError, EMAConfigError
from dist_ema.formats.strict_json import shown
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.importers.foreign import BATCH_NORM, Foreign, Model, integer, name_by_position, search, ties
from dist_ema.options import ONLY
from dist_ema.schedules import NumUpdatesWarmup, Schedule, Warmup
from dist_ema.schedules.clock import Progress

_KEYS = {"decay", "optimization_step", "update_after_step", "use_ema_warmup"}


def matches(content: Content) -> bool:
    """Returns whether this is such a file or directory."""
    keys = _KEYS | ({"shadow_params"} if content.kind == "file" else set())
    return content.kind != "dcp" and search(content.values, keys) is not None


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the average of the parameters. Raises CheckpointError, for example if names are needed and missing."""
    values = search(content.values, _KEYS) or {}
    schedule, notes = _schedule(values)
    # save_pretrained builds a new model for the average, whose buffers are not those of the trained model.
    fresh = [name for name in content.tensors if BATCH_NORM.search(name)]
    given = set(fresh) & (model.tensors.keys() if model is not None else set())
    average = {name: tensor for name, tensor in content.tensors.items() if name not in given}
    if set(fresh) - given:
        notes.append(f"{fresh[0]!r} and the like are those of a new model: --model supplies those that were trained")
    if content.kind == "file":
        if not isinstance(values["shadow_params"], list):
            raise CheckpointCorruptError("'shadow_params' is not a list")
        shadows = [LazyTensor.of(f"shadow_params[{i}]", value) for i, value in enumerate(values["shadow_params"])]
        average = name_by_position(shadows, model, "'shadow_params'")
    # diffusers copies the weights at every step up to the first one past update_after_step.
    steps = integer(values["optimization_step"], "optimization_step")
    first = min(steps, integer(values["update_after_step"], "update_after_step") + 1)
    return Foreign(
        averages={ONLY: average},
        tied=ties(average),
        schedule=schedule,
        usual=NumUpdatesWarmup(0.9999),
        clock=Progress(batches=steps),
        start=Progress(batches=first),
        updates=steps - first + 1 if steps else 0,
        notes=notes,
    )


def _schedule(values: Mapping[str, Any]) -> tuple[Schedule | None, list[str]]:
    if values.get("min_decay"):
        return None, [
            f"the file's schedule cannot be used: no schedule here has a min_decay={shown(values['min_decay'])}"
        ]
    numbers = [values.get(key, 1) for key in ("decay", "inv_gamma", "power")]
    if not all(isinstance(number, (int, float)) for number in numbers):
        return None, ["the file's schedule cannot be used: its decay is not a number"]
    try:
        if values["use_ema_warmup"]:
            return Warmup(values["decay"], inv_gamma=values["inv_gamma"], power=values["power"]), []
        return NumUpdatesWarmup(values["decay"]), []
    except (EMAConfigError, KeyError) as error:
        return None, [f"the file's schedule cannot be used: {error}"]
