"""Provides ``EMACallback`` for the Trainer of transformers 5 and its subclasses: ``Seq2SeqTrainer``, those of trl.

A callback is told neither its trainer, nor that an evaluation is about to begin, nor what a run is resumed from. So
this module wraps methods of ``transformers.Trainer``, and ``train()`` wraps those that subclasses override. A wrapper
looks for an ``EMACallback`` among its trainer's callbacks, and calls the plain method if there is none. Read in 5.23.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_ema.comm.collectives import broadcast_object
from dist_ema.ema import ShardedEMA
from dist_ema.errors import CheckpointError, EMAConfigError, EMAEngineError, EMAStateError
from dist_ema.integrations.evaluation import BOTH, ShouldUpdate, check_choice, check_should_update, is_due, same_random
from dist_ema.integrations.transformers_trainer import (
    epochs_begun,
    evaluating_on,
    refuse_unwrapped,
    scale,
    with_prefix,
    without_callbacks,
)
from dist_ema.schedules.clock import Time

try:
    import transformers
    from transformers import Trainer, TrainerCallback, trainer_utils
    from transformers.utils.import_utils import is_sagemaker_mp_enabled

    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"here is {transformers.__version__}")
except ImportError as error:
    raise ImportError(f"EMACallback needs transformers 5: pip install 'dist_ema[transformers]' ({error})") from error

logger = logging.getLogger(__name__)
_Around = AbstractContextManager[None]


class EMACallback(TrainerCallback):
    """Averages the model of a Trainer, evaluates on the average, and saves it in ``checkpoint-N/ema``.

    Use ``Trainer(..., callbacks=[EMACallback(half_life="1ep")])``, or
    ``trainer.add_callback(EMACallback(trainer, ...))``. Each Trainer needs one of its own, on every rank.

    Every optimizer step that was not skipped counts: as one batch, as its part of the epoch and, with the Trainer's
    ``include_num_input_tokens_seen``, with its tokens. ``evaluate()`` and ``predict()`` use the average during and
    after training, and the live weights before it. ``ShardedEMA.metrics()`` are logged whenever the Trainer logs its
    loss. ``train()`` begins a new average, as it begins a new count of steps. With ``resume_from_checkpoint`` it
    continues the average of the checkpoint, at any world size. ``load_best_model_at_end`` also takes the best
    checkpoint's average. ``save_model()`` writes the live weights; with ``save_averaged`` the average; inside an
    evaluation what is evaluated. (With FSDP's ``SHARDED_STATE_DICT`` it writes none of these, but ``ema.export()``
    does.) The model of a checkpoint always has the live weights.

    Args:
        trainer: the Trainer of this callback; None means the one whose ``train()`` finds it.
        evaluate: True evaluates on the average, False on the live weights; the name of one of several ``averages``
            evaluates on that one. ``"both"`` evaluates twice: metrics of the average have the Trainer's names
            (``eval_loss``), so that ``metric_for_best_model`` and early stopping follow it as with True, and metrics of
            the live weights have the prefix ``live_`` (``live_eval_loss``). Use it to see in one run what the average
            gains. ``predict()`` uses the average.
        missing: what to do with a checkpoint without an average: ``"error"``, or ``"start"`` a new one from its
            weights, with its clock at zero.
        save_averaged: True, or the name of an average, for ``save_model()``.
        should_update: decides which steps are averaged, in place of ``update_interval`` and ``ema_start``. It is called
            on every rank after each optimizer step with the training clock (``clock.batches``, ``clock.epochs``), such
            as ``lambda clock: clock.batches >= 100 and clock.batches % 10 == 0``. Use it for rules that an interval
            cannot express.
        average_at_end: write the average into the model at the end of ``train()``, after the last checkpoint was saved;
            True, or the name of one of several averages. ``save_model()`` and ``evaluate()`` then use it without a
            callback.
        options: the options of :class:`dist_ema.ShardedEMA`. ``max_duration`` is the Trainer's own, so it may be left
            out.

    Attributes:
        ema: the :class:`dist_ema.ShardedEMA`, once training has begun.

    Raises:
        EMAConfigError: an option is wrong or contradicts the Trainer's, or this is a second EMACallback. ``train()``
            may raise it as well, and EMAEngineError, EMAStateError, and CheckpointError if ``ema/`` is missing.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        evaluate: bool | str = True,
        missing: str = "error",
        save_averaged: bool | str = False,
        should_update: ShouldUpdate | None = None,
        average_at_end: bool | str = False,
        **options: Any,
    ) -> None:
        if missing not in ("error", "start"):
            raise EMAConfigError(f"missing={missing!r}: allowed are 'error' and 'start'")
        if _callback_of(trainer) is not None:
            raise EMAConfigError(_TWICE)
        inspect.signature(ShardedEMA).bind(trainer, **options)  # TypeError for a misspelt one
        check_should_update(should_update, options.get("update_interval"), options.get("ema_start"))
        self.ema: ShardedEMA | None = None
        self._should_update = should_update
        self._average_at_end = average_at_end
        self._trainer: Any = trainer
        self._options = options
        self._missing = missing
        self._evaluate = evaluate
        self._save_averaged = save_averaged
        self._resume: Path | None = None  # the checkpoint that training continues from
        self._running: set[object] = set()  # the wrappers below that are running, so that inner calls stay plain
        self._metrics: dict[str, float] = {}  # waiting for the next log
        # The clock of the training and the fp16 loss scale at the last update.
        self._steps = 0
        self._epochs = 0.0
        self._tokens = 0
        self._scale = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Makes the average, or loads it if the run is resumed. Collective.

        The Trainer has wrapped the model by now, and has loaded it if the run is resumed.
        """
        trainer = self._trainer
        if trainer is None:
            raise EMAStateError("a Trainer with a train() of its own: trainer.add_callback(EMACallback(trainer, ...))")
        if trainer.is_fsdp_xla_enabled or is_sagemaker_mp_enabled():
            raise EMAEngineError("EMACallback averages under DDP, FSDP and DeepSpeed, not under XLA or SageMaker")
        refuse_unwrapped(trainer)
        # With auto_find_batch_size an earlier attempt, which ran out of memory, may have left an average.
        self.ema = None
        ema = ShardedEMA(trainer.model_wrapped, **self._options | {"max_duration": self._duration(args, state)})
        self._check(ema, trainer)
        ema.expect(batches=state.max_steps, epochs=args.num_train_epochs if args.max_steps <= 0 else None)
        if self._resume is not None:
            self._load(ema, self._resume)
        self.ema = ema
        self._metrics = {}
        self._epochs = epochs_begun(trainer)
        self._tokens = state.num_input_tokens_seen
        self._steps = state.global_step
        self._scale = scale(trainer)

    def _duration(self, args: Any, state: Any) -> str:
        """Returns the length of the training. Raises EMAConfigError if ``max_duration`` contradicts it."""
        own = [f"{state.max_steps}ba"]
        if args.max_steps <= 0:  # else the Trainer ends at a number of steps, wherever the epoch is
            own.append(f"{args.num_train_epochs:g}ep")
        given = str(Time.parse(self._options.get("max_duration", own[0]), option="max_duration"))
        if given not in own:
            raise EMAConfigError(f"max_duration={given!r}, and the Trainer's is {' or '.join(own)}: leave it out")
        return given

    def _check(self, ema: ShardedEMA, trainer: Any) -> None:
        """Raises EMAConfigError for options that can only be checked with the Trainer or the averages."""
        check_choice("evaluate", self._evaluate, ema.names, both=True)
        check_choice("save_averaged", self._save_averaged, ema.names)
        check_choice("average_at_end", self._average_at_end, ema.names)
        units = {"ba", "ep"}
        if trainer.args.include_num_input_tokens_seen != "no":
            units.add("tok")
        others = ", ".join(sorted(ema.units - units))
        if others:
            tok = "with TrainingArguments(include_num_input_tokens_seen='all') tok"
            raise EMAConfigError(f"the Trainer does not count {others}: allowed are ba, ep, and {tok}")
        stage = trainer.deepspeed.zero_optimization_stage() if trainer.is_deepspeed_enabled else 0
        if self._save_averaged and stage == 3 and not trainer.deepspeed.zero_gather_16bit_weights_on_model_save():
            raise EMAConfigError("save_averaged needs DeepSpeed's stage3_gather_16bit_weights_on_model_save: true")

    def _load(self, ema: ShardedEMA, checkpoint: Path) -> None:
        """Loads the average in a checkpoint of the Trainer. Collective."""
        path = checkpoint / "ema"
        if broadcast_object(path.is_dir(), dist.group.WORLD if dist.is_initialized() else None):
            return ema.load(path)
        if self._missing == "error":
            raise CheckpointError(f"{checkpoint} has no ema/: EMACallback(missing='start') starts one from its weights")
        logger.warning("%s has no ema/: an average starts from its weights.", checkpoint)
        return ema.reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Updates the average, unless the step was skipped, as when fp16 gradients overflow."""
        if self.ema is None:
            raise EMAStateError("EMACallback was added while training was under way: add it before train()")
        self._count(self.ema, state)
        self.on_epoch_end(args, state, control)

    def _count(self, ema: ShardedEMA, state: Any) -> None:
        """Counts a step, once, and averages if an update is due. Local.

        An earlier callback may save a checkpoint of this step (``enable_jit_checkpoint``), which counts it first.
        """
        if state.global_step == self._steps:
            return
        before = self._scale
        self._scale = scale(self._trainer)
        self._steps = state.global_step
        # The loss scale falls when a step was skipped. Accelerate does not notice this for fused optimizers.
        if not self._trainer.accelerator.optimizer_step_was_skipped and self._scale >= before:
            epochs = state.epoch or 0.0
            tokens = state.num_input_tokens_seen
            trained = {"epochs": max(0.0, epochs - self._epochs), "tokens": tokens - self._tokens}
            due = is_due(self._should_update, ema.clock.advance(batches=1, **trained))
            ema.update(**trained, due=due)
            self._epochs = epochs
            self._tokens = tokens

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Computes the metrics for the next log. Collective.

        They are computed here because ``log()`` may be called on one rank alone. The Trainer's DefaultFlowCallback runs
        earlier, and has set ``should_log``.
        """
        if control.should_log and self.ema is not None:
            self._metrics = self.ema.metrics()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Loads the best checkpoint's average if the Trainer has loaded its weights. Collective.

        Then does what ``average_at_end`` says. Warns if there was no update in the whole training.
        """
        if self.ema is not None and not self.ema.num_updates:
            self.ema.expect(batches=self.ema.clock.batches, epochs=self.ema.clock.epochs)
        if self.ema is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(self.ema, Path(state.best_model_checkpoint))
        if self.ema is not None and self._average_at_end is not False:
            self.ema.copy_to(self._name(self.ema, self._average_at_end))

    def _averaged(self, which: bool | str) -> _Around:
        """Returns a context in which the model has the average; if ``which`` is False, one that does nothing."""
        if self.ema is None or which is False:
            return nullcontext()
        return self.ema.average_parameters(self._name(self.ema, which), held_by="the Trainer")

    @staticmethod
    def _name(ema: ShardedEMA, which: bool | str) -> str | None:
        """Returns the name of the average that an option selects; None means the only one."""
        return which if isinstance(which, str) and which in ema.names else None

    def _evaluates_both(self) -> bool:
        return self.ema is not None and self._evaluate == BOTH and BOTH not in self.ema.names


# Each of the following returns the context in which a method of a Trainer runs: its EMACallback and the Trainer come
# first, then the arguments of the method.


def _training(own: EMACallback, trainer: Any, resume_from_checkpoint: Any = None, *_: Any, **__: Any) -> _Around:
    """Prepares for ``train()``: records the Trainer and the checkpoint, and drops the average of an earlier
    training.
    """
    _wrap_methods(type(trainer))
    path = resume_from_checkpoint or None
    if path is True:  # the newest checkpoint; where there is none, the Trainer raises
        path = trainer_utils.get_last_checkpoint(trainer.args.output_dir)  # type: ignore[no-untyped-call]
    own._trainer = trainer
    own._resume = None if path is None else Path(path)
    if own.ema is not None:
        own.ema.close()
    # Otherwise the old average and its model would stay in memory beside the new ones.
    own.ema = None
    return nullcontext()


def _evaluating(own: EMACallback, trainer: Any, *_: Any, **__: Any) -> _Around:
    """Evaluates on the average. Collective."""
    inside = own.ema is not None and own._evaluate is not False
    return evaluating_on(own._averaged(own._evaluate), trainer) if inside else nullcontext()


@contextmanager
def _saving(own: EMACallback, of: Any, output_dir: str | None = None, _internal_call: bool = False) -> Iterator[None]:
    """Saves a checkpoint with live weights and the average beside it; ``save_model()`` as ``save_averaged`` says."""
    inside = own.ema is not None and _evaluating in own._running and own._evaluate is not False
    # The Trainer's own checkpoints are internal calls with a folder. That of push_to_hub() names no folder.
    checkpoint = output_dir if _internal_call else None
    if checkpoint is not None and inside:
        raise EMAStateError("a checkpoint cannot be saved inside an evaluation: the model holds the average there")
    with own._averaged(False if inside or checkpoint is not None else own._save_averaged):
        yield
    # Not in on_save(): by then older checkpoints have been removed and this one has been uploaded.
    if checkpoint is not None and own.ema is not None:
        own._count(own.ema, of.state)
        own.ema.save(Path(checkpoint) / "ema")


def _evaluate_live(method: Callable[..., Any], trainer: Any, args: Any, kwargs: Any) -> dict[str, float]:
    """Returns the metrics of the live weights, logged with the prefix ``live_``. No callback sees this evaluation."""
    arguments = with_prefix(method, (trainer, *args), kwargs, "live_")
    with same_random(), without_callbacks(trainer):
        found: dict[str, float] = method(*arguments.args, **arguments.kwargs)
    return found


def _logging(own: EMACallback, trainer: Any, logs: dict[str, float], *_: Any, **__: Any) -> _Around:
    """Adds the metrics that ``on_epoch_end`` has computed. Local."""
    logs.update(own._metrics)
    own._metrics = {}
    return nullcontext()


_WRAPPERS: dict[str, Callable[..., Any]] = dict.fromkeys(("evaluate", "predict", "evaluation_loop"), _evaluating)
_WRAPPERS |= {"save_model": _saving, "log": _logging}
_TWICE = "this Trainer has two EMACallbacks: leave one out. For several averages give averages={...} to one callback"


def _callback_of(trainer: Trainer | None) -> EMACallback | None:
    """Returns the Trainer's EMACallback, or None. Raises EMAConfigError for a second one, or another Trainer's."""
    handler: Any = getattr(trainer, "callback_handler", None)
    found = []
    if handler is not None:  # a Trainer has none inside its constructor
        found = [each for each in handler.callbacks if isinstance(each, EMACallback)]
    if len(found) > 1:
        raise EMAConfigError(_TWICE)
    if found and found[0]._trainer not in (None, trainer):
        raise EMAConfigError(f"this EMACallback belongs to another Trainer, {found[0]._trainer!r}: make one for each")
    return found[0] if found else None


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Wraps a method of a class in the context ``around``. Nested calls, for example by ``super()``, are not
    wrapped.
    """
    method = vars(owner)[name]

    @functools.wraps(method)
    def wrapped(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        # Without a callback, and inside a wrapped call of the same kind, the plain method runs.
        own = _callback_of(self)
        if own is None or around in own._running:
            return method(self, *args, **kwargs)
        own._running.add(around)
        try:
            live = {}
            if name == "evaluate" and own._evaluates_both():
                live = _evaluate_live(method, self, args, kwargs)
            with around(own, self, *args, **kwargs):
                result = method(self, *args, **kwargs)
            return {**result, **live} if live else result
        finally:
            own._running.discard(around)

    # A class is wrapped once. functools.wraps copies attributes, so the mark has to name the wrapper itself.
    if getattr(method, "_dist_ema", None) is not method:
        wrapped._dist_ema = wrapped  # type: ignore[attr-defined]
        setattr(owner, name, wrapped)


def _wrap_methods(kind: type) -> None:
    """Wraps methods of a Trainer's class and of its bases, each once. Mixins may override them with or without
    ``super()``.
    """
    for owner in kind.__mro__[: kind.__mro__.index(Trainer) + 1]:
        for name in _WRAPPERS.keys() & vars(owner).keys():
            _wrap(owner, name, _WRAPPERS[name])


_wrap_methods(Trainer)
_wrap(Trainer, "train", _training)  # that of a subclass may have been given another checkpoint
