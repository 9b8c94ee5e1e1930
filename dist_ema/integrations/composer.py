"""Connects to MosaicML Composer: ``Trainer(algorithms=[EMA()])`` replaces its own EMA. Read in Composer 0.32.1."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from torch import nn

from dist_ema import functional
from dist_ema.ema import ShardedEMA
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.integrations.composer_timing import HALF_LIFE, ComposerTiming
from dist_ema.integrations.evaluation import BOTH, ShouldUpdate, check_choice, check_should_update
from dist_ema.options import Options

_INSTALL = "pip install 'dist_ema[composer]' torchvision mosaicml-cli && pip install --no-deps mosaicml==0.32.1"
try:
    import composer
    from composer.algorithms import EMA as ComposersEMA
    from composer.core import Algorithm, Callback, Event, State
    from composer.utils import dist

    from dist_ema.integrations.composer_trainer import (
        after_exception,
        after_fit,
        allow_missing,
        change_over,
        evaluate_twice,
        progress,
        will_save,
    )
except ImportError as error:
    raise ImportError(f"dist_ema.integrations.composer needs MosaicML Composer ({error}): {_INSTALL}") from error
if tuple(map(int, composer.__version__.split(".")[:2])) < (0, 32):
    raise ImportError(f"dist_ema.integrations.composer needs mosaicml 0.32, not {composer.__version__}: {_INSTALL}")

__all__ = ["EMA", "compute_ema"]
_log = logging.getLogger(__name__)
_SAVES = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT)
_VISITS = {Event.EVAL_START: "evaluation", Event.PREDICT_START: "prediction"}
_ENDS = (*_VISITS, Event.EVAL_END, Event.PREDICT_END)
_EVENTS = (Event.INIT, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_END, Event.EPOCH_END, *_VISITS, *_SAVES)


class EMA(Algorithm):
    """Implements Composer's ``EMA``, with the same arguments and events, for models that may be sharded.

    The first update event at or after ``ema_start`` copies the weights. From then on each multiple of
    ``update_interval`` decays the average by a full interval. Evaluation and prediction use the average. In checkpoints
    of a ``CheckpointSaver`` the average is ``state.model``, and the training weights are beside it; loading puts both
    back, at any world size. In ``trainer.save_checkpoint()`` the training weights are ``state.model``. A run that
    Composer's own EMA (0.9 and later) has saved can be continued with this one.

    Differences from Composer's EMA, which are faults there:

    - its bf16 averages stop moving (here averages are fp32), it truncates averages of integer buffers (copied here),
      and it keeps NaN (skipped here);
    - ``EMA(smoothing=.9)`` raises, with and without ``half_life=None``;
    - it predicts on the live weights, and ITERATION_CHECKPOINT saves them;
    - after a checkpoint it leaves the average in the model, so that an update per epoch averages the average; after
      the last checkpoint or an exception the average stays there;
    - ``get_ema_model`` of the model in training loses the training weights;
    - sharded FSDP2 runs cannot resume.

    Args:
        half_life: ``"1000ba"``, ``"2ep"``. ``"50000sp"`` and ``"10000000tok"`` decay by what was trained in between.
        smoothing: fraction kept per update, in [0, 1), in place of ``half_life``.
        ema_start: when averaging begins, in ``dur``, ``ba``, ``ep``, ``sp`` or ``tok``. ``dur`` follows the trainer's
            ``max_duration`` if that changes.
        update_interval: time between updates; by default 1 in the unit of ``half_life``, else ``"1ba"``.
        missing: what to do with a checkpoint without an average: ``"error"``, or ``"start"`` a new one from its
            weights.
        evaluate: True evaluates on the average, False on the live weights; the name of one of several averages
            evaluates on that one (True: on the first). ``"both"`` runs each evaluator twice: metrics of the live
            weights have its label (``metrics/eval/...``), metrics of the average have the prefix ``ema_``
            (``metrics/ema_eval/...``). Use it to see in one run what the average gains.
            ``EarlyStopper(dataloader_label="ema_eval")`` follows the average. Predictions use the average.
        should_update: decides which batches are averaged, in place of ``update_interval`` and ``ema_start``. It is
            called on every rank after each batch with the training clock (``clock.batches``, ``clock.epochs``), such as
            ``lambda clock: clock.batches >= 100 and clock.batches % 10 == 0``. Use it for rules that an interval cannot
            express. Each update then decays by what was trained since the last one.
        average_at_end: write the average into the model at the end of ``fit()``, after its last checkpoint and
            evaluation; True, or the name of one of several averages.
        options: the options of :class:`ShardedEMA`; ``buffers`` is ``"average"`` by default. The first of several
            ``averages`` is saved as ``state.model``.

    Attributes:
        ema: the ShardedEMA, from the first event on that needs it.

    Raises:
        EMAConfigError: on every rank: an option is wrong or contradicts the trainer.
        CheckpointError: on every rank: a checkpoint has no average.
    """

    def __init__(
        self,
        half_life: str | None = HALF_LIFE,
        smoothing: float | None = None,
        ema_start: str = "0.0dur",
        update_interval: str | None = None,
        *,
        missing: str = "error",
        evaluate: bool | str = True,
        should_update: ShouldUpdate | None = None,
        average_at_end: bool | str = False,
        **options: Any,
    ) -> None:
        start = None if ema_start == "0.0dur" else ema_start
        check_should_update(should_update, update_interval, start)
        if missing not in ("error", "start"):
            raise EMAConfigError(f"missing={missing!r}: allowed are 'error' and 'start'")
        self._timing = ComposerTiming.parse(
            half_life, smoothing, ema_start, update_interval, {"buffers": "average", **options}
        )
        self.half_life = self._timing.half_life
        self.smoothing = self._timing.options["smoothing"]
        self.ema_start = self._timing.start
        self.update_interval = self._timing.interval
        self.update_event = Event.EPOCH_END if self.update_interval.unit == "ep" else Event.BATCH_END
        self._missing = missing
        # Holds the average in the model, and says for which purpose; "" while the model has its own weights.
        self._visit = ExitStack()
        self._inside = ""
        if should_update is not None and self.half_life is not None:
            # Composer's timing decays by a full interval for each update. An irregular rule has no interval, so that
            # each update decays by what was trained since the last one.
            options = {**self._timing.options, "half_life": str(self.half_life), "smoothing": None}
            self._timing = replace(self._timing, options=options)
        names = list(Options.check(**self._timing.options).schedules)
        check_choice("evaluate", names[0] if evaluate is True else evaluate, names, both=True)
        check_choice("average_at_end", average_at_end, names)
        self.evaluates_both = evaluate == BOTH and BOTH not in names
        # True while a second evaluation, of the live weights, is under way.
        self.on_live = False
        # The name of the average to evaluate on; False for the live weights.
        self._evaluated = names[0] if evaluate is True or self.evaluates_both else evaluate
        self._should_update = should_update
        self._average_at_end = average_at_end
        self._begin(None)

    def _begin(self, state: State | None) -> None:
        """Resets this algorithm for a new trainer. It may have belonged to another one before."""
        self.ema: ShardedEMA | None = None
        self._state = state
        self._model = nn.Module()  # the model as the trainer had wrapped it when the average was made or rebound
        self._foreign: Mapping[str, Any] = {}  # the state that Composer's own EMA has saved
        self._found = False  # whether the loaded checkpoint had an average
        self._options = dict(self._timing.options)
        if state is None:
            return
        twins = [type(other).__module__ for other in state.algorithms if isinstance(other, (EMA, ComposersEMA))]
        if len(twins) > 1:
            raise EMAConfigError(f"algorithms has EMA {len(twins)} times: of {', '.join(twins)}. Leave one of them")
        if state.fsdp_config is not None and state.fsdp_config.state_dict_type == "sharded":
            # Composer lets the first replica alone save: of HSDP each has to hold the whole average.
            self._options["shard_replicas"] = False
            state.callbacks.append(ShardedEMAState(self))

    @property
    def ema_started(self) -> bool:
        """Returns whether there is an average."""
        return self.ema is not None and self.ema.num_updates > 0

    @property
    def ema_weights_active(self) -> bool:
        """Returns whether the average is in the model."""
        return self.ema_started and self._inside != ""

    def match(self, event: Event, state: State) -> bool:
        """Returns whether Composer should call ``apply`` at this event."""
        return event in _EVENTS or not self._stays(event)

    def apply(self, event: Event, state: State, logger: object) -> None:
        """Handles an event; Composer calls it. Collective."""
        if event is not Event.INIT and state is not self._state:
            raise EMAConfigError("this EMA belongs to a trainer that was made later: make one EMA for each trainer")
        if not self._stays(event):
            self._turn("")  # the evaluation or checkpoint for which the average came in is over
        if event is Event.INIT:
            self._begin(state)
        elif event is Event.AFTER_LOAD:
            self._after_load(state)
        elif event is Event.FIT_START:
            self._timing.check_duration(str(state.max_duration))
            self._warn_of_length(state)
            self._average()
        elif event in (Event.BATCH_END, Event.EPOCH_END):
            self._update(event, state)
        elif event in _VISITS and not self.on_live and self._evaluated is not False:
            self._turn(_VISITS[event])
        elif event in _SAVES and will_save(event, state):
            self._turn("checkpoint")

    def _warn_of_length(self, state: State) -> None:
        """Logs, on the first rank, that the training is too short for the options."""
        per_epoch = None if state.dataloader_len is None else int(state.dataloader_len)
        missed = self._timing.what_is_missed(str(state.max_duration), per_epoch)
        if missed is not None and dist.get_global_rank() == 0:
            _log.warning("%s.", missed)

    def _average(self) -> ShardedEMA:
        """Returns the average of the model as it is wrapped now, because Composer wraps DDP after a load.
        Collective.
        """
        if self._state is None:
            raise EMAConfigError("this EMA has no trainer: give it to one, in algorithms=[...]")
        if self.ema is None:
            self.ema = ShardedEMA(self._state.model, **self._options)
        elif self._model is not self._state.model:
            self.ema.rebind(self._state.model)
        self._model = self._state.model
        return self.ema

    def _update(self, event: Event, state: State) -> None:
        """Counts what was trained since the trainer's last event, and averages if an update is due. Local."""
        ema = self._average()
        # Composer counts before it calls events, so the difference is what this event has to count.
        now = progress(state.timestamp)
        before = progress(state.previous_timestamp)
        new = now.since(before)
        elapsed = state.get_elapsed_duration().value
        if self._should_update is not None:
            due = event is Event.BATCH_END and bool(self._should_update(now))
        else:
            due = self._timing.due(before, now, self.ema_started, elapsed) and event is self.update_event
        ema.update(batches=new.batches, samples=new.samples, tokens=new.tokens, epochs=new.epochs, due=due)

    # The average in the model: collective where ShardedEMA.average_parameters() is.

    def _turn(self, inside: str) -> None:
        """Puts the average into the model for a purpose, or takes it out if ``inside`` is empty."""
        # _inside is reset first, so that it is right if close() fails.
        self._inside = ""
        self._visit.close()
        if inside:
            ema = self._average()
            name = ema.names[0]
            if inside in _VISITS.values() and isinstance(self._evaluated, str):
                name = self._evaluated
            self._visit.enter_context(ema.average_parameters(name, held_by=f"Composer's {inside}"))
            self._inside = inside

    def _stays(self, event: Event) -> bool:
        """Returns whether the average may stay in the model at this event, because the evaluation continues."""
        going_on = {"evaluation": event.is_eval, "prediction": event.is_predict}.get(self._inside, False)
        return not self._inside or (going_on and event not in _ENDS)

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Puts the average into ``model``, and returns it.

        In the model in training the average stays until ``get_training_model``, or the trainer's next event. Another
        model is written; it has to be sharded in the same way (EMAConfigError).
        """
        return self._put("get_ema_model()", model)

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Puts the training weights into ``model``, as ``get_ema_model`` does with the average, and returns it."""
        return self._put("", model)

    def _put(self, inside: str, model: nn.Module) -> nn.Module:
        """Puts the requested weights into the model in training, and copies them from there if ``model`` is another
        one.
        """
        self._average()
        before = self._inside
        if bool(inside) != bool(before):
            self._turn(inside)
        if {*model.modules()}.isdisjoint(self._model.modules()):
            # Another model: it gets a copy, and the model in training goes back to what it had.
            try:
                functional.compute_ema(self._model, model, smoothing=0.0)
            finally:
                if self._inside != before:
                    self._turn(before)
        return model

    def end_fit(self) -> None:
        """Writes the average into the model if ``average_at_end`` asks for it. Collective.

        Called when the trainer's ``fit()`` has ended, after its last checkpoint and evaluation.
        """
        if self._average_at_end is not False and self.ema is not None:
            self._turn("")
            self.ema.copy_to(None if self._average_at_end is True else self._average_at_end)

    # Checkpoints: collective.

    def state_dict(self) -> dict[str, Any]:
        """Returns the average, and the training weights while the average is in the model: full CPU tensors, on rank 0.

        Composer saves the state of rank 0's algorithms. If it saves sharded checkpoints, a callback has the tensors.
        """
        state: dict[str, Any] = super().state_dict()
        if self._state is not None and not self._state.fsdp_sharded_state_dict_enabled:
            state["dist_ema"] = self._average().state_dict(full=True, live=self.ema_weights_active)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over such a state or, at the event AFTER_LOAD, the state of Composer's own EMA."""
        if "dist_ema" in state:
            self._load(state["dist_ema"])
        elif "ema_model" in state:
            self._foreign = state

    def _load(self, state: Mapping[str, Any]) -> None:
        self._average().load_state_dict(state)
        self._found = True

    def _after_load(self, state: State) -> None:
        """Takes over an average that Composer's own EMA has saved. Raises CheckpointError if the checkpoint has no
        average.
        """
        if self._foreign:
            self._load(change_over(self._foreign, self._average().state_dict(), progress(state.timestamp)))
            self._foreign = {}
        elif state.load_path is not None and state.timestamp.batch > 0 and not self._found:
            if self._missing == "error":
                raise CheckpointError(f"{state.load_path} has no average: EMA(missing='start') begins one")
            _log.info("%s has no average: one begins from its weights.", state.load_path)


class ShardedEMAState(Callback):
    """Puts an average into sharded checkpoints. Under HSDP one replica saves it, and the others read what that one
    wrote.
    """

    def __init__(self, algorithm: EMA) -> None:
        self._algorithm = algorithm

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's parts of the average and of the training weights. Collective."""
        return self._algorithm._average().state_dict(live=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them over. Collective."""
        self._algorithm._load(state)


compute_ema = functional.compute_ema  # also composer.functional.compute_ema's name and arguments

after_exception(EMA, lambda algorithm: algorithm._turn(""))
after_fit(EMA, EMA.end_fit)
evaluate_twice(EMA)
allow_missing(ShardedEMAState)
