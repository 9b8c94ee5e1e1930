"""The Trainer of transformers: what ``EMACallback`` reads from it, and what it does to a model that is evaluated.

Read in transformers 5.23 and trl 1.16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dist_ema.errors import EMAStateError


def scale(trainer: Any) -> float:
    """Of the loss in fp16; it falls when a step is skipped, which accelerate 1.15 does not see of fused optimizers."""
    return 0.0 if trainer.accelerator.scaler is None else float(trainer.accelerator.scaler.get_scale())


def epochs_begun(trainer: Any) -> float:
    """The epoch at which training begins, as the Trainer will count it.

    ``state.epoch`` of a checkpoint may be another one: the run may have had other batches to an epoch, or its epoch is
    begun again (``ignore_data_skip``).
    """
    args, batches = trainer.args, trainer.callback_handler.train_dataloader
    _, steps_in_epoch, _, _, _, batches_in_epoch, _ = trainer.set_initial_training_values(args, batches)
    done, steps = divmod(trainer.state.global_step, steps_in_epoch)
    begun = 0.0 if args.ignore_data_skip else steps * args.gradient_accumulation_steps / batches_in_epoch
    return float(done + begun)


def refuse_unwrapped(trainer: Any) -> None:
    """Raises EMAStateError where accelerate 1.15 takes a model for prepared that was only evaluated, and wraps none."""
    whole = not any(hasattr(parameter, "device_mesh") for parameter in trainer.model.parameters())
    if trainer.model_wrapped is trainer.model and whole and "MULTI_" in trainer.accelerator.distributed_type.value:
        raise EMAStateError("evaluate() before train() keeps the Trainer from DDP: every rank would train alone")


@contextmanager
def evaluating_on(average: AbstractContextManager[None], trainer: Any) -> Iterator[None]:
    """Enters it after what an evaluation does to the weights: with the average inside, that would be done to it."""
    half = torch.float16 if trainer.args.fp16_full_eval else torch.bfloat16 if trainer.args.bf16_full_eval else None
    if half is not None and not trainer.is_in_train:
        trainer.model.to(half)  # for good
    getattr(trainer.optimizer, "eval", bool)()  # a schedule-free one moves them, and the next step moves them back
    # trl's mark of the step whose weights vLLM has: the average is to go there, and not to be what training goes on to
    # generate with.
    mark = {"_last_loaded_step": -1} if hasattr(trainer, "_last_loaded_step") else {}
    vars(trainer).update(mark)
    try:
        with average:
            yield
    finally:
        vars(trainer).update(mark)
