"""``EMACallback`` for the Trainer of transformers 5 and for its subclasses: ``Seq2SeqTrainer``, those of trl.

A callback of this Trainer is told neither its trainer, nor that an evaluation is about to begin, nor what a run is
resumed from. So importing this module wraps methods of ``transformers.Trainer``, and a training with an ``EMACallback``
wraps what the classes in between override of them. Each wrapper looks for an ``EMACallback`` among the callbacks that
its trainer has at the moment, and is the plain method where there is none. Read in transformers 5.23.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_ema.collectives import broadcast_object
from dist_ema.ema import ShardedEMA
from dist_ema.errors import CheckpointError, EMAConfigError, EMAEngineError, EMAStateError
from dist_ema.timing import CLOCK_UNITS, Time

try:
    import transformers
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import is_sagemaker_mp_enabled
except ImportError as error:
    raise ImportError("dist_ema.integrations.transformers: pip install 'dist_ema[transformers]'") from error
if int(transformers.__version__.split(".")[0]) < 5:
    raise ImportError(f"transformers {transformers.__version__} is too old: pip install 'dist_ema[transformers]'")

logger = logging.getLogger(__name__)
_MISSING = ("error", "start")


class EMACallback(TrainerCallback):
    """Averages what a Trainer trains, evaluates on the average, and keeps it in ``checkpoint-N/ema``.

    ``Trainer(..., callbacks=[EMACallback(half_life="1000ba")])``, or for a trainer that there is already
    ``trainer.add_callback(EMACallback(trainer, half_life="1000ba"))``. One for each Trainer, on every rank.

    Every optimizer step that was not skipped is counted: as a batch, by its part of the epoch, and, with the Trainer's
    ``include_num_input_tokens_seen``, by its tokens. ``evaluate()``, ``predict()`` and ``evaluation_loop()`` of the
    trainer run on the average, during training and after it; before training there is none, and they run on the live
    weights. Training itself is bit for bit that without the callback.

    ``train()`` begins a new average, as it begins a new count of steps; with ``resume_from_checkpoint`` it goes on with
    the one of the checkpoint, at any world size. ``load_best_model_at_end`` takes the best checkpoint's average along
    with its weights. Wherever the Trainer logs its loss, ``ShardedEMA.metrics()`` are logged too, which reads all
    weights once.

    ``trainer.save_model()`` and ``push_to_hub()`` write the live weights, or with ``save_averaged`` the average. A
    checkpoint always holds the live weights as the model: training resumes from them. FSDP with a
    ``SHARDED_STATE_DICT`` writes no model in ``save_model()``: ``callback.ema.export()`` does.

    Args:
        trainer: whose callback it will be; None means the one whose ``train()`` finds it among its callbacks.
        evaluate: evaluate on the average. With several ``averages`` the name of the one to take.
        missing: what to do about a checkpoint without an average: ``"error"``, or ``"start"`` one from its weights,
            with a clock that stands at zero.
        save_averaged: as ``evaluate``, for ``save_model()``.
        options: of :class:`dist_ema.ShardedEMA`. ``max_duration`` is the Trainer's own, so it may be left out.

    Attributes:
        ema: the :class:`dist_ema.ShardedEMA`, once training has begun.

    Raises:
        EMAConfigError: an option is wrong, or the trainer has an EMACallback already; on ``train()`` also if options
            contradict the Trainer's arguments.
        EMAEngineError: on ``train()``: a strategy that is not supported (XLA, SageMaker's model parallelism).
        CheckpointError: on ``train()``: a checkpoint without an average.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        *,
        evaluate: bool | str = True,
        missing: str = "error",
        save_averaged: bool | str = False,
        **options: Any,
    ) -> None:
        if trainer is not None and not isinstance(trainer, Trainer):
            raise EMAConfigError(f"trainer={trainer!r}: allowed is a transformers.Trainer, or None")
        for option, value in (("evaluate", evaluate), ("save_averaged", save_averaged)):
            if not isinstance(value, bool | str):
                raise EMAConfigError(f"{option}={value!r}: allowed are True, False, and the name of an average")
        if missing not in _MISSING:
            raise EMAConfigError(f"missing={missing!r}: allowed are {', '.join(map(repr, _MISSING))}")
        inspect.signature(ShardedEMA).bind(trainer, **options)  # TypeError for a misspelt option
        self.ema: ShardedEMA | None = None
        self._evaluate, self._missing, self._save_averaged, self._options = evaluate, missing, save_averaged, options
        self._resume: Path | None = None  # the checkpoint that training goes on from
        self._running: set[str] = set()  # kinds of wrapped methods that are under way
        self._in_model = False  # whether the average is
        self._metrics: dict[str, float] = {}  # for the next log
        self._epochs, self._tokens = 0.0, 0  # of the training, at the last update
        self._trainer = trainer
        if trainer is not None and _callback_of(trainer) is not None:
            raise EMAConfigError(_TWICE)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Model and optimizer are wrapped, and loaded where a run is resumed. Collective."""
        trainer = self._trainer
        if trainer is None:
            raise EMAStateError(
                "a train() that does not call transformers.Trainer.train() has to be told: "
                "trainer.add_callback(EMACallback(trainer, ...))"
            )
        if trainer.is_fsdp_xla_enabled or is_sagemaker_mp_enabled():
            raise EMAEngineError(
                "EMACallback averages under DDP, FSDP and DeepSpeed, and a model that is not wrapped; not under XLA's "
                "FSDP or SageMaker's model parallelism. Train without them, or without the callback"
            )
        self.ema = None  # of an attempt that ran out of memory (auto_find_batch_size)
        ema = ShardedEMA(trainer.model_wrapped, **{**self._options, "max_duration": self._duration(args, state)})
        self._check(ema, args)
        self.ema, self._metrics = ema, {}
        self._epochs, self._tokens = state.epoch or 0.0, state.num_input_tokens_seen
        if self._resume is not None:
            self._load(self._resume)

    def _duration(self, args: TrainingArguments, state: TrainerState) -> str:
        """``max_duration``: the Trainer's, which the user's own has to equal."""
        given, steps = self._options.get("max_duration"), f"{state.max_steps}ba"
        if given is None:
            return steps
        epochs = args.num_train_epochs if args.max_steps <= 0 else None
        duration = Time.parse(given, option="max_duration", units=CLOCK_UNITS)
        if duration.value != {"ba": state.max_steps, "ep": epochs}.get(duration.unit):
            own = steps if epochs is None else f"{steps}, which are {epochs:g}ep"
            raise EMAConfigError(f"max_duration={given!r}, but the Trainer trains for {own}: leave max_duration out")
        return str(duration)

    def _check(self, ema: ShardedEMA, args: TrainingArguments) -> None:
        for option, value in (("evaluate", self._evaluate), ("save_averaged", self._save_averaged)):
            if value is not False and (value not in ema.names if isinstance(value, str) else len(ema.names) > 1):
                names = ", ".join(map(repr, ema.names))
                raise EMAConfigError(f"{option}={value!r}: allowed are False and the name of an average: {names}")
        units = ema._options.units()
        if "sp" in units:
            raise EMAConfigError(
                "the Trainer does not count samples (sp): give half_life and the like in ba, ep or tok"
            )
        if "tok" in units and args.include_num_input_tokens_seen == "no":
            raise EMAConfigError("tokens (tok) are counted with TrainingArguments(include_num_input_tokens_seen='all')")

    def _load(self, checkpoint: Path) -> None:
        """Goes on with the average in a checkpoint of the Trainer. Collective."""
        assert self.ema is not None
        path = checkpoint / "ema"
        if broadcast_object(path.is_dir(), dist.group.WORLD if dist.is_initialized() else None):
            self.ema.load(path)
        elif self._missing == "error":
            raise CheckpointError(
                f"{checkpoint} has no average: it was saved without EMACallback, or ema/ in it was removed. "
                "EMACallback(missing='start') starts one from its weights"
            )
        else:
            logger.warning("%s has no average: one starts from its weights.", checkpoint)
            self.ema.reset()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Takes the weights into the average, unless the step was skipped: gradients of fp16 had overflowed."""
        if self.ema is None or self._trainer is None:
            raise EMAStateError("EMACallback was added while training was under way: add it before train()")
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            epochs, tokens = state.epoch or 0.0, state.num_input_tokens_seen
            self.ema.update(epochs=epochs - self._epochs, tokens=tokens - self._tokens)
            self._epochs, self._tokens = epochs, tokens
        self._measure(control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """For ``logging_strategy="epoch"``."""
        self._measure(control)

    def _measure(self, control: TrainerControl) -> None:
        # Here, where every rank is: log() may be called on one rank only. DefaultFlowCallback has set the flag already.
        if control.should_log and self.ema is not None:
            self._metrics = self.ema.metrics()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer has loaded the best weights, if it was to. Collective."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))

    @contextmanager
    def _averaged(self, which: bool | str) -> Iterator[None]:
        """Inside, the model computes with that average, if there is one yet. Collective as ``average_parameters``."""
        if self.ema is None or which is False or self._in_model:
            yield
            return
        with self.ema.average_parameters(which if isinstance(which, str) else None):
            self._in_model = True
            try:
                yield
            finally:
                self._in_model = False


# What happens around a method of the Trainer that has an EMACallback. The arguments are those of the method.


@contextmanager
def _training(
    callback: EMACallback, trainer: Trainer, resume_from_checkpoint: str | bool | None = None, *_: Any, **__: Any
) -> Iterator[None]:
    _wrap_methods(type(trainer))
    if resume_from_checkpoint is True:
        resume_from_checkpoint = get_last_checkpoint(trainer.args.output_dir)  # where there is none, the Trainer raises
    callback._trainer, callback._resume = trainer, Path(resume_from_checkpoint) if resume_from_checkpoint else None
    if callback.ema is not None:  # else it and its model would be in memory beside the new ones
        callback.ema.close()
        callback.ema = None
    try:
        yield
    finally:
        callback._resume = None


@contextmanager
def _evaluating(callback: EMACallback, trainer: Trainer, *_: Any, **__: Any) -> Iterator[None]:
    with callback._averaged(callback._evaluate):
        yield


@contextmanager
def _saving(
    callback: EMACallback, trainer: Trainer, output_dir: str | None = None, _internal_call: bool = False
) -> Iterator[None]:
    if not _internal_call or output_dir is None:  # push_to_hub() is internal, but names no folder
        with callback._averaged(callback._save_averaged):
            yield
        return
    if callback._in_model:
        raise EMAStateError("a checkpoint cannot be saved inside an evaluation: the live weights are not in the model")
    yield
    # Before the Trainer removes older checkpoints and uploads this one, which on_save() comes after.
    if callback.ema is not None:
        callback.ema.save(Path(output_dir) / "ema")


@contextmanager
def _logging(callback: EMACallback, trainer: Trainer, logs: dict[str, float], *_: Any, **__: Any) -> Iterator[None]:
    logs.update(callback._metrics)
    callback._metrics = {}
    yield


_Around = Callable[..., AbstractContextManager[None]]
_WRAPPERS: dict[str, _Around] = {
    "evaluate": _evaluating,
    "predict": _evaluating,
    "evaluation_loop": _evaluating,
    "save_model": _saving,
    "log": _logging,
}
_TWICE = "the trainer has two EMACallbacks: give it one, with averages={...} if there are to be several averages"


def _callback_of(trainer: Trainer) -> EMACallback | None:
    """The EMACallback among the callbacks of a trainer, if it has one. Local."""
    handler = getattr(trainer, "callback_handler", None)  # not yet in its constructor
    found = [callback for callback in getattr(handler, "callbacks", []) if isinstance(callback, EMACallback)]
    if len(found) > 1:
        raise EMAConfigError(_TWICE)
    if found and found[0]._trainer not in (None, trainer):
        raise EMAConfigError("this EMACallback is that of another Trainer: make one for each")
    return found[0] if found else None


def _wrap(owner: type, name: str, around: _Around) -> None:
    """Puts ``around`` around a method of a class; a call of it from inside itself, by ``super()`` say, stays plain."""
    method = vars(owner)[name]

    @functools.wraps(method)
    def wrapped(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        callback, kind = _callback_of(self), around.__name__
        if callback is None or kind in callback._running:
            return method(self, *args, **kwargs)
        callback._running.add(kind)
        try:
            with around(callback, self, *args, **kwargs):
                return method(self, *args, **kwargs)
        finally:
            callback._running.discard(kind)

    wrapped._dist_ema = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _wrap_methods(kind: type) -> None:
    """A Trainer's own methods and those that its classes override, with or without ``super()``; each once."""
    for owner in kind.__mro__:
        for name, around in _WRAPPERS.items() if issubclass(owner, Trainer) else ():
            if name in vars(owner) and not hasattr(vars(owner)[name], "_dist_ema"):
                _wrap(owner, name, around)


_wrap_methods(Trainer)
if not hasattr(Trainer.train, "_dist_ema"):  # only here, where the path to resume from is known
    _wrap(Trainer, "train", _training)
