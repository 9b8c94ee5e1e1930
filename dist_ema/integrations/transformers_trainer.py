"""Reads the Trainer of transformers for ``EMACallback``, and handles what it does to a model that is evaluated.

Read in transformers 5.23 and trl 1.16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dist_ema.errors import EMAConfigError, EMAStateError


def scale(trainer: Any) -> float:
    """Returns the fp16 loss scale. It falls when a step is skipped, which accelerate 1.15 misses for fused
    optimizers.
    """
    return 0.0 if trainer.accelerator.scaler is None else float(trainer.accelerator.scaler.get_scale())


def epochs_begun(trainer: Any) -> float:
    """Returns the epoch at which training begins, as the Trainer will count it.

    ``state.epoch`` of a checkpoint may differ: that run may have had another number of batches per epoch, or its epoch
    is started again (``ignore_data_skip``).
    """
    args = trainer.args
    batches = trainer.callback_handler.train_dataloader
    _, steps_in_epoch, _, _, _, batches_in_epoch, _ = trainer.set_initial_training_values(args, batches)
    done, steps = divmod(trainer.state.global_step, steps_in_epoch)
    begun = 0.0 if args.ignore_data_skip else steps * args.gradient_accumulation_steps / batches_in_epoch
    return float(done + begun)


def refuse_unwrapped(trainer: Any) -> None:
    """Raises EMAStateError if the model was only evaluated: accelerate 1.15 then regards it as prepared, and wraps
    nothing.
    """
    whole = not any(hasattr(parameter, "device_mesh") for parameter in trainer.model.parameters())
    if trainer.model_wrapped is trainer.model and whole and "MULTI_" in trainer.accelerator.distributed_type.value:
        raise EMAStateError("evaluate() before train() keeps the Trainer from DDP: every rank would train alone")


@contextmanager
def evaluating_on(average: AbstractContextManager[None], trainer: Any) -> Iterator[None]:
    """Enters a context after the changes that an evaluation makes to the weights, so they are made to the live
    weights.
    """
    # For a half precision evaluation outside of training the Trainer casts the model, and does not cast it back. Cast
    # here already, so that the live weights are cast and not the average in their place.
    half = None
    if trainer.args.fp16_full_eval:
        half = torch.float16
    elif trainer.args.bf16_full_eval:
        half = torch.bfloat16
    if half is not None and not trainer.is_in_train:
        trainer.model.to(half)

    # The eval() of a schedule-free optimizer moves the weights; the train() before the next step moves them back.
    if hasattr(trainer.optimizer, "eval"):
        trainer.optimizer.eval()

    # trl sends weights to vLLM only if the step differs from this mark. Clear it before the block, so that the average
    # is sent, and after the block, so that training generates with the live weights again.
    marks_step = hasattr(trainer, "_last_loaded_step")
    if marks_step:
        trainer._last_loaded_step = -1
    try:
        with average:
            yield
    finally:
        if marks_step:
            trainer._last_loaded_step = -1


def with_prefix(
    evaluate: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], prefix: str
) -> inspect.BoundArguments:
    """Returns the arguments of a Trainer's ``evaluate()``, with ``prefix`` before the names of its metrics.

    Raises EMAConfigError if a subclass's method takes no ``metric_key_prefix``.
    """
    signature = inspect.signature(evaluate)
    if "metric_key_prefix" not in signature.parameters:
        raise EMAConfigError(
            f"evaluate='both' needs an evaluate() with metric_key_prefix=, which {evaluate.__qualname__} has not: give "
            "evaluate=True or False"
        )
    arguments = signature.bind(*args, **kwargs)
    arguments.apply_defaults()
    arguments.arguments["metric_key_prefix"] = prefix + arguments.arguments["metric_key_prefix"]
    return arguments


@contextmanager
def without_callbacks(trainer: Any) -> Iterator[None]:
    """Hides an evaluation in the block from all callbacks: early stopping would look for its metric there."""
    handler = trainer.callback_handler
    for event in ("on_evaluate", "on_prediction_step"):
        setattr(handler, event, _unchanged)  # in front of the class's method
    try:
        yield
    finally:
        del handler.on_evaluate, handler.on_prediction_step


def _unchanged(_args: object, _state: object, control: object, *_: object, **__: object) -> object:
    """Returns the control object unchanged, in place of an event that callbacks would see."""
    return control
