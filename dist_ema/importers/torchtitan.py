"""Imports torchtitan's EMA from a checkpoint of its trainer.

The names are ``ema.state.<name>.ema_params``, one for each trained parameter. If there are several averages, their keys
follow: ``ema_params.<key>``. The file does not say how they decay.
"""

from __future__ import annotations

import re
from typing import Any

from dist_ema.errors import EMAConfigError
from dist_ema.formats.dcp_directory import read_value
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.importers.foreign import Foreign, Model, integer
from dist_ema.options import ONLY
from dist_ema.schedules import HalfLifeFraction
from dist_ema.schedules.clock import Progress

_NAME = re.compile(r"(?:[^.]+\.)?state\.(?P<name>.+)\.ema_params(?:\.(?P<key>.+))?")


def matches(content: Content) -> bool:
    """Returns whether this is such a directory."""
    return content.kind == "dcp" and any(_NAME.fullmatch(name) for name in content.tensors)


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the averages, which hold trained parameters only."""
    averages: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in content.tensors.items():
        if found := _NAME.fullmatch(name):
            averages.setdefault(found["key"] or ONLY, {})[found["name"]] = tensor
    # Written by dcp.save() of the trainer's own Stateful: a tensor of one element, or a plain number.
    step = read_value(content, "train_state.step")
    steps = integer(step, "train_state.step") if step is not None else 0
    return Foreign(averages, usual=HalfLifeFraction(0.05), clock=Progress(batches=steps), updates=steps + 1)


def options_of(config: Any) -> dict[str, Any]:
    """Returns options of :class:`ShardedEMA` for the config of torchtitan's own EMA. Local; imports nothing of
    torchtitan.

    The config is ``EMAOptimizersContainer.Config`` of its main branch (``components/ema.py``; release 0.3.0 has no
    EMA).
    Differences: the first update here copies the weights, theirs blends them into the initial ones. Updates here are at
    multiples of the interval, even if ``start_step`` is not one. A growing half life is per batch here, and counts from
    the first update; with ``start_step=0`` it is one batch behind. The average here is fp32 unless ``dtype`` says
    otherwise; theirs has the dtype of the weights.

    Args:
        config: with ``decay``, ``half_life_fraction``, ``start_step``, ``step_bias``, ``update_every_n_steps`` and
            ``offload_to_cpu``. The caller checks ``enable``.

    Raises:
        EMAConfigError: one of these is missing, or ``step_bias`` is not 0.
    """
    names = ("decay", "half_life_fraction", "start_step", "step_bias", "update_every_n_steps", "offload_to_cpu")
    lacking = [name for name in names if not hasattr(config, name)]
    if lacking:
        raise EMAConfigError(
            f"config={type(config).__name__}: it has no {', '.join(lacking)}; pass the config of torchtitan's "
            "EMAOptimizersContainer"
        )
    if config.step_bias != 0:
        raise EMAConfigError(
            f"step_bias={config.step_bias!r}: allowed is 0. An average goes on from a checkpoint with its own count"
        )
    decay = config.decay
    options: dict[str, Any] = (
        {"schedule": HalfLifeFraction(config.half_life_fraction)} if decay is None else {"smoothing": decay}
    )
    options |= {"update_interval": f"{config.update_every_n_steps}ba", "ema_start": f"{config.start_step}ba"}
    return options | ({"offload": "cpu"} if config.offload_to_cpu else {})
