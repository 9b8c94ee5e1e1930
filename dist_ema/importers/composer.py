"""Imports from MosaicML Composer's ``EMA`` algorithm, in a checkpoint of its trainer or as its state dict alone.

Composer has written ``ema_model`` in three ways:

- since 0.13 as dicts of parameters and buffers. If ``ema_weights_active`` is set, as in files of the trainer, they
  have exchanged places with the model's, and the average is ``state["model"]``;
- from 0.9 to 0.12 as a state dict, always of the average;
- before 0.9 as two lists without names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.tensors import Content, LazyTensor
from dist_ema.importers.foreign import Foreign, Model, check_shapes, integer, name_by_position, read_tensors, ties
from dist_ema.options import ONLY
from dist_ema.schedules import HalfLife
from dist_ema.schedules.clock import Progress

_CLOCK = {"batches": "batch", "samples": "sample", "tokens": "token", "epochs": "epoch"}


def matches(content: Content) -> bool:
    """Returns whether this is such a file."""
    return content.kind == "file" and _algorithm(content.values) is not None


def read(content: Content, model: Model | None) -> Foreign:
    """Returns the average.

    Raises CheckpointError if the average is not in this file, CheckpointCorruptError if it is damaged.
    """
    algorithm = _algorithm(content.values) or {}
    # A checkpoint of the trainer has the model, too: it gives buffers, frozen parameters and shapes to compare with.
    state = content.values.get("state")
    state = state if isinstance(state, Mapping) else {}
    whole = read_tensors(state["model"], "state['model']") if "model" in state else {}
    stored = algorithm["ema_model"]
    if not isinstance(stored, Mapping):
        raise CheckpointCorruptError("'ema_model' is not a dict")
    if "parameters" in stored:
        average = _listed(stored, model or (Model(whole, ordered=True) if whole else None), whole)
    elif "named_parameters_dict" in stored:
        average = _named(stored, bool(algorithm.get("ema_weights_active")), whole)
    else:
        average = read_tensors(stored, "'ema_model'")
    check_shapes(average, whole, "the average")
    tied = ties(average, whole)
    clock = _clock(state)
    return Foreign(
        averages={ONLY: average},
        live={name: tensor for name, tensor in whole.items() if name not in average},
        tied=tied,
        usual=HalfLife("1000ba"),
        clock=clock,
        updates=max(1, clock.batches) if algorithm.get("ema_started", True) else 0,
    )


def _algorithm(values: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Returns the state of the algorithm: of the file itself, or in the list or dict of the trainer's algorithms."""
    state = values.get("state")
    found = state.get("algorithms") if isinstance(state, Mapping) else None
    algorithms = list(found.items()) if isinstance(found, Mapping) else found if isinstance(found, list) else []
    # Composer writes (name, state) pairs, in a list or as the items of a dict.
    candidates = [entry[1] for entry in algorithms if isinstance(entry, tuple) and len(entry) == 2]
    for candidate in (*candidates, values):
        if isinstance(candidate, Mapping) and "ema_model" in candidate:
            return candidate
    return None


def _named(stored: Mapping[str, Any], swapped: bool, whole: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    kept = read_tensors({**stored["named_parameters_dict"], **(stored.get("named_buffers_dict") or {})}, "'ema_model'")
    if not swapped:
        # Non-persistent buffers are left out, as in the model's own state dict.
        return {name: tensor for name, tensor in kept.items() if not whole or name in whole}
    if not whole:
        raise CheckpointError(
            "'ema_weights_active' is set, so 'ema_model' holds the weights in training, and the average is in "
            "state['model'] of the trainer's checkpoint: import that file"
        )
    return {name: whole[name] for name in kept if name in whole}


def _listed(stored: Mapping[str, Any], model: Model | None, whole: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    parameters = [LazyTensor.of(f"parameter {i}", value) for i, value in enumerate(stored["parameters"])]
    named = name_by_position(parameters, model, "'ema_model'")
    aliases = {name for group in ties(whole) for name in group[1:]}
    names = [name for name in whole if name not in named and name not in aliases]
    buffers = [LazyTensor.of(f"buffer {i}", value) for i, value in enumerate(stored["buffers"])]
    if [whole[name].shape for name in names] != [buffer.shape for buffer in buffers]:
        raise CheckpointError("the buffers of the average have no names and are not those of the model in this file")
    return named | dict(zip(names, buffers, strict=True))


def _clock(state: Mapping[str, Any]) -> Progress:
    found = state.get("timestamp")
    times = found.get("Timestamp") if isinstance(found, Mapping) else None
    if not isinstance(times, Mapping):
        return Progress()
    return Progress().advance(**{unit: integer(times.get(key, 0), key) for unit, key in _CLOCK.items()})
