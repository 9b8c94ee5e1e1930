"""Imports from NeMo's ``EMA`` callback: ``state_dict`` in the ``-EMA.ckpt`` beside a checkpoint is the average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.importers.foreign import Foreign, Model, integer, read_tensors, ties
from dist_ema.options import ONLY
from dist_ema.schedules import ConstantDecay
from dist_ema.schedules.clock import Progress

_KEYS = {"opt", "ema", "decay", "current_step"}


def matches(content: Content) -> bool:
    """Returns whether this is such a file."""
    return content.kind == "file" and bool(_optimizers(content.values))


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the average, with buffers and frozen parameters as they are in the model.

    Raises CheckpointError if the average is a list without names, as in files that NeMo's own checkpoint callback did
    not write, and CheckpointCorruptError.
    """
    average = read_tensors(content.values.get("state_dict"), "'state_dict'")
    optimizers = _optimizers(content.values)
    # In the -EMA.ckpt the optimizer's list and the state dict are the same memory; elsewhere the state dict is live.
    places = {tensor.place for tensor in average.values()}
    for optimizer in optimizers:
        if not isinstance(optimizer["ema"], (list, tuple)):
            raise CheckpointCorruptError("'ema' is not a list")
        shadows = [LazyTensor.of(f"ema[{i}]", value) for i, value in enumerate(optimizer["ema"])]
        if any(shadow.place not in places for shadow in shadows if shadow.numel):
            raise CheckpointError(
                "the optimizer's averaged tensors have no names, and 'state_dict' holds the weights in training: "
                "import the -EMA.ckpt that NeMo writes beside its checkpoints"
            )
    first = optimizers[0]
    steps = integer(first["current_step"], "current_step")
    interval = max(1, integer(first.get("every_n_steps", 1), "every_n_steps"))
    decay = first["decay"]
    usable = isinstance(decay, float) and 0 <= decay < 1
    return Foreign(
        averages={ONLY: average},
        tied=ties(average),
        # NeMo's decay is per update; ours is per batch.
        schedule=ConstantDecay(decay ** (1 / interval)) if usable else None,
        usual=ConstantDecay(0.9999),
        clock=Progress(batches=steps),
        updates=1 + -(-steps // interval),
    )


def _optimizers(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = values.get("optimizer_states")
    states = found if isinstance(found, list) else []
    return [state for state in states if isinstance(state, Mapping) and state.keys() >= _KEYS]
