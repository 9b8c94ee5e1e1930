"""MosaicML Composer: ``Trainer(..., algorithms=[EMA(half_life="1000ba")])``, in the place of Composer's own EMA.

Read in mosaicml 0.32.1, as everything below that speaks of Composer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any

from torch import Tensor, nn

from dist_ema import functional
from dist_ema.dcp.stateful import Moment
from dist_ema.ema import ShardedEMA
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.options import Options
from dist_ema.timing import CLOCK_UNITS, Progress, Time, crossed, reached

_INSTALL = "pip install 'dist_ema[composer]' && pip install --no-deps mosaicml==0.32.1"
try:
    import composer
    from composer.algorithms import EMA as ComposersEMA
    from composer.callbacks import CheckpointSaver
    from composer.core import Algorithm, Callback, Event, State, Timestamp
    from composer.loggers import Logger
    from composer.trainer import Trainer
    from composer.utils import checkpoint
except ImportError as error:
    raise ImportError(f"dist_ema.integrations.composer needs MosaicML Composer ({error}): {_INSTALL}") from error
if tuple(map(int, composer.__version__.split(".")[:2])) < (0, 32):
    raise ImportError(f"dist_ema.integrations.composer needs mosaicml 0.32, not {composer.__version__}: {_INSTALL}")

__all__ = ["EMA", "compute_ema"]
logger = logging.getLogger(__name__)
_DEFAULT = "1000ba"
_SAVES = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT)
_VISITS = {Event.EVAL_START: "evaluation", Event.PREDICT_START: "prediction"}
_ENDS = (*_VISITS, Event.EVAL_END, Event.PREDICT_END)
_EVENTS = {Event.INIT, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_END, Event.EPOCH_END, *_VISITS, *_SAVES}


class EMA(Algorithm):  # type: ignore[misc]
    """Composer's ``EMA``, argument for argument and event for event, of a model that may be sharded (FSDP2, DDP).

    The first update event (BATCH_END, or EPOCH_END for intervals in epochs) at or after ``ema_start`` copies the
    weights. From then on each multiple of ``update_interval`` on the trainer's clock averages, and decays by the full
    interval. Evaluation and prediction are on the average. Checkpoints that a ``CheckpointSaver`` writes hold it as
    ``state.model``, with the weights in training beside it; ``trainer.save_checkpoint()`` holds the latter as
    ``state.model``. Loading puts the weights in training into the model, at any world size. Also checkpoints of
    Composer's own EMA (0.9 and later) are read, so that a run can change over in the middle.

    Other than Composer's, which is at fault there:

    - shadows are fp32: one in bf16 stops moving; a NaN or Inf element is left out; integer buffers are copied;
    - ``EMA(smoothing=.9)`` and ``EMA(half_life=None, smoothing=.9)`` work, without ``update_interval`` too;
    - prediction is on the average, and so are checkpoints at ITERATION_CHECKPOINT;
    - the average leaves the model at the event after a checkpoint: it is not averaged into itself where updates are
      per epoch, does not stay after the last checkpoint, and not after an exception;
    - ``get_ema_model`` of the model in training keeps the training weights;
    - sharded FSDP2 checkpoints resume.

    Args:
        half_life: ``"1000ba"``, ``"2ep"``, and also ``"50000sp"`` or ``"10000000tok"``, which decay by what was really
            trained since the last update.
        smoothing: kept fraction per update, in [0, 1), in the place of ``half_life``.
        ema_start: in ``dur``, ``ba``, ``ep``, ``sp`` or ``tok``. ``dur`` moves as the trainer's ``max_duration`` does:
            by whole epochs if that is in epochs.
        update_interval: in the unit of ``half_life``, of which it is 1 by default; else ``"1ba"``.
        missing: what to do at a checkpoint without an average: ``"error"``, or ``"start"`` anew from its weights.
        options: of :class:`ShardedEMA`, ``buffers`` being ``"average"`` by default. Of several ``averages`` the first
            one is evaluated and saved as ``state.model``.

    Attributes:
        ema: the ShardedEMA, from the first event on that needs it (FIT_START, an evaluation, a load).

    Raises:
        EMAConfigError: an option is wrong, contradicts the trainer, or there are two EMAs.
        CheckpointError: a checkpoint has no average, or one that cannot be read.
    """

    def __init__(
        self,
        half_life: str | None = _DEFAULT,
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
        *,
        missing: str = "error",
        **options: Any,
    ) -> None:
        others = any(options.get(option) is not None for option in ("decay", "schedule", "averages"))
        if half_life == _DEFAULT and (smoothing is not None or others):
            half_life = None
        if half_life is None and smoothing is None and not others:
            raise EMAConfigError("half_life=None: give half_life, smoothing, decay, schedule or averages")
        if missing not in ("error", "start"):
            raise EMAConfigError(f"missing={missing!r}: allowed are 'error' and 'start'")
        options = {"buffers": "average", **options}
        parsed = _parse(options | {"half_life": half_life, "smoothing": smoothing})
        life = None if half_life is None else Time.parse(half_life, option="half_life", units=CLOCK_UNITS)
        default = Time(1, "ba" if life is None else life.unit)
        interval = Time.parse(update_interval or default, option="update_interval", units=CLOCK_UNITS)
        if life is not None and life.unit != interval.unit:
            raise EMAConfigError(
                f"half_life={half_life!r}, update_interval={update_interval!r}: Composer takes both in one unit; "
                f"schedule=HalfLife({half_life!r}) in the place of half_life goes with any"
            )
        if interval.value != int(interval.value):
            raise EMAConfigError(f"update_interval={update_interval!r}: Composer's trainer counts whole epochs")
        if life is not None and life.unit in ("ba", "ep"):
            half_life, smoothing = None, 2 ** -(interval.value / life.value)
        self.half_life, self.smoothing, self.update_interval = life, smoothing, interval
        self.ema_start = Time.parse(ema_start, option="ema_start", positive=False)
        self.update_event = Event.EPOCH_END if interval.unit == "ep" else Event.BATCH_END
        self.ema: ShardedEMA | None = None
        self._options = options | {"half_life": half_life, "smoothing": smoothing}
        self._units = parsed.units() | {interval.unit, self.ema_start.unit}
        self._missing = missing
        self._state: State | None = None
        self._target: nn.Module | None = None
        self._visit, self._inside = ExitStack(), ""  # what holds the average in the model, in words
        self._found, self._foreign = False, None  # in the checkpoint: an average, Composer's own

    @property
    def ema_started(self) -> bool:
        """Whether there is an average."""
        return self.ema is not None and self.ema.num_updates > 0

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds it."""
        return self._inside != "" and self.ema_started

    def match(self, event: Event, state: State) -> bool:
        """Composer's question whether ``apply`` is to be called."""
        return event in _EVENTS or not self._stays(event)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Called by Composer at each event, on every rank."""
        self._state = state
        if not self._stays(event):
            self._leave()
        if event is Event.INIT:
            self._begin(state)
        elif event is Event.AFTER_LOAD:
            self._loaded(state)
        elif event is Event.FIT_START:
            self._check_duration(state)
            self._average()
        elif event in (Event.BATCH_END, Event.EPOCH_END):
            self._update(event, state)
        elif event in _VISITS:
            self._enter(_VISITS[event])
        elif event in _SAVES and _saves(event, state):
            self._enter("checkpoint")

    def _begin(self, state: State) -> None:
        rivals = [type(other).__module__ for other in state.algorithms if isinstance(other, (EMA, ComposersEMA))]
        if len(rivals) > 1:
            raise EMAConfigError(
                f"algorithms has EMA {len(rivals)} times (of {', '.join(rivals)}), and one model can hold one average "
                "at a time: leave one, and give it averages={...} for several"
            )
        self.ema, self._target, self._found, self._foreign = None, None, False, None
        if state.fsdp_config is not None and state.fsdp_config.state_dict_type == "sharded":
            # Composer lets the first replica alone save: of HSDP each has to hold the whole average.
            self._options["shard_replicas"] = False
            state.callbacks.append(ShardedEMAState(self))

    def _average(self) -> ShardedEMA:
        """The ShardedEMA of the model as it is wrapped now: Composer wraps DDP after a load. Collective."""
        model = self._model()
        if self.ema is None:
            self.ema = ShardedEMA(model, **self._options)
        elif self._target is not model:
            self.ema.rebind(model)
        self._target = model
        return self.ema

    def _model(self) -> nn.Module:
        if self._state is None:
            raise EMAConfigError("this EMA has no trainer yet: pass it as Trainer(algorithms=[...])")
        model: nn.Module = self._state.model
        return model

    def _update(self, event: Event, state: State) -> None:
        ema, now, before = self._average(), _progress(state.timestamp), _progress(state.previous_timestamp)
        for unit in self._units & {"sp", "tok"}:
            if not now.value(unit):
                raise EMAConfigError(
                    f"the options count in {unit!r}, and the trainer has counted none: give its DataSpec a "
                    f"get_num_{'tokens' if unit == 'tok' else 'samples'}_in_batch"
                )
        due = False
        if event is self.update_event:
            due = crossed(before, now, self.update_interval) if self.ema_started else self._starts(now, state)
        new = now.since(before)
        ema.update(batches=new.batches, samples=new.samples, tokens=new.tokens, epochs=new.epochs, due=due)

    def _starts(self, now: Progress, state: State) -> bool:
        if self.ema_start.unit != "dur":
            return reached(now, self.ema_start)
        elapsed = state.get_elapsed_duration()
        return elapsed is not None and elapsed.value >= self.ema_start.value

    def _check_duration(self, state: State) -> None:
        given = self._options.get("max_duration")
        if given is not None and str(Time.parse(given, option="max_duration")) != str(state.max_duration):
            raise EMAConfigError(f"max_duration={given!r}: the trainer's is {str(state.max_duration)!r}; leave it out")

    # The average in the model. Collective where ShardedEMA.average_parameters() is.

    def _enter(self, inside: str) -> None:
        ema = self._average()
        self._leave()
        self._visit.enter_context(ema.average_parameters(ema.names[0], held_by=f"Composer's {inside}"))
        self._inside = inside

    def _leave(self) -> None:
        self._inside = ""
        self._visit.close()

    def _stays(self, event: Event) -> bool:
        """Whether the average may stay in the model, if it is there, when this event comes."""
        going_on = {"": True, "evaluation": event.is_eval, "prediction": event.is_predict}
        return going_on.get(self._inside, False) and not (self._inside and event in _ENDS)

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Puts the average into ``model`` and returns it. Collective as ``ShardedEMA.average_parameters``.

        Into the model in training until the trainer's next event, or until ``get_training_model``: the training weights
        are kept. Another one is overwritten, and has to be sharded alike (EMAConfigError if not).
        """
        ema = self._average()
        if not self._inside and self._trains(model):
            self._enter("get_ema_model()")
        elif not self._trains(model):
            with nullcontext() if self._inside else ema.average_parameters(ema.names[0]):
                functional.compute_ema(self._model(), model, smoothing=0.0)
        return model

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Puts the weights in training into ``model``, as ``get_ema_model`` does the average, and returns it."""
        inside = self._inside
        self._leave()
        if not self._trains(model):
            functional.compute_ema(self._model(), model, smoothing=0.0)
            if inside:
                self._enter(inside)
        return model

    def _trains(self, model: nn.Module) -> bool:
        """Whether it is the trainer's, or a part of that."""
        own = self._model()
        return any(module is model for module in own.modules()) or any(module is own for module in model.modules())

    # Checkpoints: collective.

    def state_dict(self) -> dict[str, Any]:
        """The average, and where it is in the model the training weights: whole CPU tensors on rank 0. Collective.

        Where Composer saves by shards, ``ShardedEMAState`` carries them.
        """
        state: dict[str, Any] = super().state_dict()
        if self._state is not None and not self._state.fsdp_sharded_state_dict_enabled:
            state["dist_ema"] = self._average().state_dict(full=True, live=self.ema_weights_active)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what ``state_dict`` gave, or that of Composer's own EMA at the next AFTER_LOAD. Collective."""
        if "dist_ema" in state:
            self._load(state["dist_ema"])
        elif "ema_model" in state:
            self._foreign = state

    def _load(self, state: Mapping[str, Any]) -> None:
        self._average().load_state_dict(state)
        self._found = True

    def _loaded(self, state: State) -> None:
        if self._foreign is not None:
            self._change_over(self._foreign, _progress(state.timestamp))
            self._foreign = None
        elif state.load_path is not None and state.timestamp.batch > 0 and not self._found:
            if self._missing == "error":
                raise CheckpointError(
                    f"{state.load_path} holds no average: give EMA(missing='start') to begin one from its weights, or "
                    "the trainer load_weights_only=True"
                )
            logger.info("%s holds no average: one begins from its weights.", state.load_path)

    def _change_over(self, saved: Mapping[str, Any], clock: Progress) -> None:
        """Goes on from Composer's own EMA: what it kept has changed places with the model where that is "active"."""
        self._found = True
        if not saved.get("ema_started", True):
            return
        active = saved.get("ema_weights_active", False)
        kept = saved["training_model"] if active and "training_model" in saved else saved["ema_model"]
        if "parameters" in kept:
            raise CheckpointError("an average of Composer before 0.9 has no names: use dist-ema import")
        if "named_parameters_dict" in kept:
            kept = {**kept["named_parameters_dict"], **kept["named_buffers_dict"]}
        parts = self._average().state_dict()  # of what the model holds now
        averages, buffers = parts["averages"], parts["buffers"]
        if active:
            parts["live"] = _pick(kept, {**next(iter(averages.values())), **buffers})
        else:
            parts["averages"] = {name: _pick(kept, tensors) for name, tensors in averages.items()}
            parts["buffers"] = _pick(kept, buffers)
        seen = replace(clock, updates=max(1, clock.batches))
        self._load(parts | {"progress": Moment(True, clock, Progress(), seen, 0).to_tensor()})


class ShardedEMAState(Callback):  # type: ignore[misc]
    """Carries an average into sharded checkpoints: of an Algorithm's state Composer saves rank 0's, as a pickle."""

    def __init__(self, algorithm: EMA) -> None:
        self._algorithm = algorithm

    def state_dict(self) -> dict[str, Any]:
        """This rank's parts of the average and of the training weights. Collective."""
        state = self._algorithm._state
        if state is None or not state.fsdp_sharded_state_dict_enabled:
            return {}
        return self._algorithm._average().state_dict(live=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them over. Collective."""
        if state:
            self._algorithm._load(state)


def compute_ema(model: nn.Module, ema_model: nn.Module, smoothing: float = 0.99) -> None:
    """``composer.functional.compute_ema``: see :func:`dist_ema.compute_ema`. A smoothing of 1 changes nothing."""
    if smoothing != 1:
        functional.compute_ema(model, ema_model, smoothing)


def _parse(options: Mapping[str, Any]) -> Options:
    """Raises what ShardedEMA would, without a model."""
    given = signature(ShardedEMA).bind(None, **options)
    given.apply_defaults()
    known = signature(Options.parse).parameters
    return Options.parse(**{option: value for option, value in given.arguments.items() if option in known})


def _progress(time: Timestamp) -> Progress:
    return Progress(int(time.batch), int(time.sample), int(time.token), float(int(time.epoch)))


def _saves(event: Event, state: State) -> bool:
    """Whether a CheckpointSaver will save at this event: it does so once a batch."""
    savers = [callback for callback in state.callbacks if isinstance(callback, CheckpointSaver)]
    return any(
        saver.save_interval(state, event) and saver.last_checkpoint_batch != state.timestamp.batch for saver in savers
    )


def _pick(kept: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Those of ``names``, which Composer's own EMA kept with DDP's ``module.`` before them."""
    return {name: kept[key] for name in names for key in [name if name in kept else f"module.{name}"] if key in kept}


def _leaving(method: Callable[..., Any]) -> Callable[..., Any]:
    """No event follows an exception, and the model would keep the average."""

    @wraps(method)
    def call(trainer: Trainer, *args: Any, **options: Any) -> Any:
        try:
            return method(trainer, *args, **options)
        except BaseException:
            for algorithm in trainer.state.algorithms:
                if isinstance(algorithm, EMA):
                    algorithm._leave()
            raise

    return call


for _name in ("fit", "eval", "predict"):
    setattr(Trainer, _name, _leaving(getattr(Trainer, _name)))


def _without_ours(state_dict: dict[str, Any], reader: Any, *args: Any, **options: Any) -> None:
    """torch.distributed.checkpoint refuses a load that asks for keys which are not there, whatever ``missing`` is."""
    callbacks, name = state_dict.get("state", {}).get("callbacks", {}), ShardedEMAState.__qualname__
    if not any(key.startswith(f"state.callbacks.{name}.") for key in reader.read_metadata().state_dict_metadata):
        callbacks.pop(name, None)
    _dist_cp_load(state_dict, reader, *args, **options)


_dist_cp_load, checkpoint.dist_cp_load = checkpoint.dist_cp_load, _without_ours
