"""Reads Composer's trainer and its own EMA, and provides the events that Composer lacks. Read in 0.32.1."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, Callback, Event, State
from composer.trainer import Trainer
from composer.utils import checkpoint
from torch import Tensor

from dist_ema.dcp.texts import write_state
from dist_ema.errors import CheckpointError
from dist_ema.integrations.evaluation import same_random
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState


def progress(time: Any) -> Progress:
    """Returns a timestamp of the trainer as a clock of this library."""
    return Progress(int(time.batch), int(time.sample), int(time.token), float(int(time.epoch)))


def will_save(event: Event, state: State) -> bool:
    """Returns whether a ``CheckpointSaver`` saves at this event: at its interval, and once per batch."""
    savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
    due = [saver for saver in savers if saver.save_interval(state, event)]
    return any(saver.last_checkpoint_batch != state.timestamp.batch for saver in due)


def after_exception(kind: type[Algorithm], call: Callable[[Any], None]) -> None:
    """Registers ``call`` for when ``fit``, ``eval`` or ``predict`` of a trainer raises. It gets the algorithms of a
    kind.

    Composer has no event for exceptions. Replaces the methods, for all trainers.
    """

    def calling(method: Any) -> Any:
        @wraps(method)
        def wrapped(trainer: Trainer, *args: Any, **options: Any) -> Any:
            try:
                return method(trainer, *args, **options)
            except BaseException:
                for algorithm in trainer.state.algorithms:
                    if isinstance(algorithm, kind):
                        call(algorithm)
                raise

        return wrapped

    for name in ("fit", "eval", "predict"):
        setattr(Trainer, name, calling(getattr(Trainer, name)))


def after_fit(kind: type[Algorithm], call: Callable[[Any], None]) -> None:
    """Registers ``call`` for when ``fit`` of a trainer has returned. It gets the algorithms of a kind.

    Evaluators run and checkpoints are saved after the event FIT_END. Replaces the method, for all trainers.
    """
    method = Trainer.fit

    @wraps(method)
    def fit(trainer: Trainer, *args: Any, **options: Any) -> None:
        method(trainer, *args, **options)
        for algorithm in trainer.state.algorithms:
            if isinstance(algorithm, kind):
                call(algorithm)

    Trainer.fit = fit


def evaluate_twice(kind: type[Algorithm]) -> None:
    """Runs each evaluator on the live weights and on the average, if an algorithm of a kind has ``evaluates_both``.

    The second evaluation is that of an evaluator whose label has the prefix ``ema_``, with metrics of its own. Replaces
    the method that runs an evaluator, for all trainers.
    """
    method = Trainer._eval_loop

    @wraps(method)
    def evaluate(trainer: Trainer, evaluator: Any, metrics: Any, subset_num_batches: int | None = None) -> None:
        algorithm: Any = next((one for one in trainer.state.algorithms if isinstance(one, kind)), None)
        if algorithm is None or not algorithm.evaluates_both:
            method(trainer, evaluator, metrics, subset_num_batches)
            return
        # First the live weights, under the evaluator's own label: while on_live is set, the average stays out.
        algorithm.on_live = True
        try:
            method(trainer, evaluator, metrics, subset_num_batches)
        finally:
            algorithm.on_live = False
        # Then the average, by an evaluator that differs in its label and has metrics of its own.
        twin = copy.copy(evaluator)
        twin.label = f"ema_{evaluator.label}"
        averaged = trainer.state.eval_metrics.setdefault(twin.label, copy.deepcopy(metrics))
        with same_random():
            method(trainer, twin, averaged, subset_num_batches)

    Trainer._eval_loop = evaluate


def allow_missing(callback: type[Callback]) -> None:
    """Allows loading a sharded checkpoint without the callback's state, for which Composer raises "Missing key".

    Replaces Composer's function, for all trainers.
    """
    load = checkpoint.dist_cp_load
    name = callback.__qualname__

    @wraps(load)
    def load_what_there_is(state_dict: dict[str, Any], storage_reader: Any, *args: Any, **options: Any) -> None:
        saved = storage_reader.read_metadata().state_dict_metadata
        # Composer loads exactly what the state dict asks for, so what was not saved is taken out of it.
        if not any(key.startswith(f"state.callbacks.{name}.") for key in saved):
            state_dict.get("state", {}).get("callbacks", {}).pop(name, None)
        load(state_dict, storage_reader, *args, **options)

    checkpoint.dist_cp_load = load_what_there_is


def change_over(saved: Mapping[str, Any], parts: Mapping[str, Any], clock: Progress) -> Mapping[str, Any]:
    """Converts the state of Composer's own EMA into what :meth:`ShardedEMA.load_state_dict` takes. Local.

    Args:
        saved: the state dict of that algorithm.
        parts: ``ShardedEMA.state_dict()`` before its first update: the weights that the model has after the load.
        clock: the training clock.
    """
    # Before its start that algorithm has no average, and the new one begins from the loaded weights.
    if not saved.get("ema_started", True):
        return parts

    # Find the dict of the tensors that the model does not hold.
    active = saved.get("ema_weights_active", False)
    kept = saved["training_model"] if active and "training_model" in saved else saved["ema_model"]
    if "parameters" in kept:
        raise CheckpointError("the averages of Composer before 0.9 have no names: use dist-ema import")
    if "named_parameters_dict" in kept:
        kept = {**kept["named_parameters_dict"], **kept["named_buffers_dict"]}

    averages = parts["averages"]
    buffers = parts["buffers"]
    if active:
        # Saved during an evaluation: the model was loaded with the average, and the dict has the live weights.
        changed = {"live": _pick(kept, {**next(iter(averages.values())), **buffers})}
    else:
        averages = {name: _pick(kept, tensors) for name, tensors in averages.items()}
        changed = {"averages": averages, "buffers": _pick(kept, buffers)}

    # Composer does not save how many updates it made. At least one: the average has begun.
    seen = replace(clock, updates=max(1, clock.batches))
    return {**parts, **changed, "progress": write_state(EMAState(True, clock, Progress(), seen))}


def _pick(kept: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Returns the tensors of ``names``. In Composer's dicts these have DDP's prefix ``module.``."""
    picked = {}
    for name in names:
        # A model without DDP has no prefix. A name that is under neither key is left out.
        for key in (f"module.{name}", name):
            if key in kept:
                picked[name] = kept[key]
    return picked
