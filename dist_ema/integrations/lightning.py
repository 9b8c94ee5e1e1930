"""Connects to Lightning: ``Trainer(callbacks=[EMACallback(half_life="1000ba")])``. Private names were read in 2.6.6."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from dist_ema.dcp.texts import write_state
from dist_ema.ema import ShardedEMA
from dist_ema.engines import RemovableHandle
from dist_ema.errors import CheckpointError, EMAConfigError, EMAEngineError
from dist_ema.integrations import lightning_checkpoints as checkpoints
from dist_ema.integrations.evaluation import BOTH, ShouldUpdate, check_choice, check_should_update, is_due, same_random
from dist_ema.integrations.lightning_trainer import unseen_evaluation
from dist_ema.options import Options
from dist_ema.schedules.clock import Progress
from dist_ema.schedules.state import EMAState

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl
    except ImportError as error:
        raise ImportError("EMACallback needs Lightning: pip install 'lightning>=2.6'") from error
if tuple(map(int, pl.__version__.split(".")[:2])) < (2, 6):
    raise ImportError(f"EMACallback needs Lightning 2.6 or later, not {pl.__version__}: pip install 'lightning>=2.6'")

logger = logging.getLogger(__name__)


class EMACallback(pl.Callback):
    """Averages a LightningModule during ``fit()``, and puts the average into it to validate, test and predict.

    The average follows each optimizer step. Batches that are only accumulated, and steps that a GradScaler skips, do
    not count. Under manual optimization with one optimizer each of its steps counts; with several, one ``ba`` is a
    batch in which any of them stepped. Names are those of ``LightningModule.state_dict()``. The module's hooks up to
    ``on_validation_epoch_end`` see the average; ``on_validation_end`` sees the live weights again.

    ``trainer.save_checkpoint`` and ModelCheckpoint write the live weights, at any moment, and beside them the average:
    into ``<path>/ema`` if the checkpoint is a directory (FSDP2, DeepSpeed), else into ``<file>.ema``. It is loaded with
    ``ckpt_path``, to fit, validate, test and predict, and removed with the checkpoint. If ranks hold replicas (DDP), an
    exception in an evaluation has to be raised on all of them, because they need each other to restore the live
    weights.

    After ``fit()`` the module has the live weights, and ``load_from_checkpoint()`` returns the live weights of the
    file. (With Lightning's own WeightAveraging both are the average.) ``average_at_end=True`` writes the average into
    the module at the end of ``fit()``, after the last checkpoint. Or use ``callback.ema``: ``copy_to()`` writes the
    average into the module, ``export()`` into files for ``load_state_dict`` and ``from_pretrained``.

    A checkpoint of Lightning's WeightAveraging or EMAWeightAveraging is resumed from its live weights
    (``current_model_state``), and its average (``state_dict``) becomes the average of this callback.

    Args:
        evaluate: True evaluates on the average, False on the live weights; the name of one of several averages
            evaluates on that one. ``"both"`` validates and tests twice: metrics of the live weights have the module's
            names, metrics of the average have the prefix ``ema_`` (``ema_val_loss``). Use it to see in one run what the
            average gains. ModelCheckpoint and EarlyStopping follow the average with ``monitor="ema_val_loss"``.
            Callbacks see the evaluation of the live weights only. Predictions use the average.
        should_update: decides which steps are averaged, in place of ``update_interval`` and ``ema_start``. It is called
            on every rank after each optimizer step with the training clock (``clock.batches``, ``clock.epochs``), such
            as ``lambda clock: clock.batches >= 100 and clock.batches % 10 == 0``. Use it for rules that an interval
            cannot express.
        missing: what to do with a checkpoint without an average: ``"error"``, or ``"start"`` a new one from its
            weights.
        average_at_end: write the average into the module at the end of ``fit()``; True, or the name of one of several
            averages. ``trainer.save_checkpoint()`` afterwards writes the average as the module's weights, so a run that
            is resumed from that file would train the average.
        log: log ``ema.metrics()`` every ``log_every_n_steps``. Collective, one pass over the average.
        options: the options of :class:`ShardedEMA`, in batches and epochs; ``max_duration`` is the trainer's.

    Attributes:
        ema: the ShardedEMA, once fitting has begun or a checkpoint was loaded. It is used again when the module is
            fitted again. Under ddp_spawn and ddp_notebook it ends with the processes of ``fit()``: evaluate and export
            from a checkpoint then.

    Raises:
        EMAConfigError: on every rank: an option is wrong or contradicts the trainer, or there are two averaging
            callbacks.
        EMAEngineError: on every rank: the strategy is not supported.
        CheckpointError: on every rank: a checkpoint has no average, or one of another moment.
    """

    state_key = "dist_ema.EMACallback"  # others have an EMACallback too

    def __init__(
        self,
        *,
        evaluate: bool | str = True,
        missing: str = "error",
        log: bool = True,
        should_update: ShouldUpdate | None = None,
        average_at_end: bool | str = False,
        **options: Any,
    ) -> None:
        inspect.signature(ShardedEMA).bind(None, **options)  # TypeError for a name that it does not have
        self._options = options
        parsed = self._parse("1ep")
        names = list(parsed.schedules)
        others = sorted(parsed.units() - {"ba", "ep"})
        if others:
            raise EMAConfigError(f"the options count in {', '.join(others)}, Lightning in ba and ep only: use those")
        check_choice("evaluate", evaluate, names, both=True)
        check_choice("average_at_end", average_at_end, names)
        check_should_update(should_update, options.get("update_interval"), options.get("ema_start"))
        if missing not in ("error", "start"):
            raise EMAConfigError(f"missing={missing!r}: allowed are 'error' and 'start'")
        self._missing = missing
        self._log = log
        self._both = evaluate == BOTH and BOTH not in names
        self._evaluate: bool | str = True if self._both else evaluate
        self._should_update = should_update
        self._average_at_end = average_at_end
        self._on_live = False  # whether the evaluation under way is that of the live weights
        self._averaged: dict[str, torch.Tensor] = {}  # the metrics of the average, for the evaluation under way
        self.ema: ShardedEMA | None = None
        # The module whose average it is, what the strategy has made of the module, and its parameters.
        self._bound: list[Any] = []
        # Holds the average in the model; None while the model has its own weights.
        self._held: ExitStack | None = None
        self._handles: list[RemovableHandle] = []
        self._ready = False  # whether this run has made or taken over its average
        self._fitting = False  # whether this run is fit()
        self._at_once = False  # whether an update comes right after the step, and not at the end of the batch
        self._stepped = False  # whether an optimizer stepped in this batch
        self._due = False  # whether a step has not been averaged yet
        self._epochs = 0.0  # trained since the last update
        # This callback's state in the checkpoint; None where the checkpoint has no states of callbacks.
        self._saved: dict[str, Any] | None = None
        # A checkpoint with the average of Lightning's own WeightAveraging.
        self._builtin: Mapping[str, Any] | None = None

    def _parse(self, duration: str | None) -> Options:
        """Checks the options. Raises EMAConfigError."""
        return Options.check(**{"max_duration": duration} | self._options)

    def __getstate__(self) -> dict[str, Any]:
        # Of the process, which no copy shares; Lightning itself has set log and log_dict.
        return vars(self) | dict.fromkeys(("ema", "_held", "log", "log_dict")) | {"_bound": [], "_handles": []}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks the trainer, and wraps its methods that save, remove and evaluate. Local."""
        kinds = (EMACallback, pl.callbacks.WeightAveraging)
        names = [type(one).__name__ for one in trainer.callbacks if isinstance(one, kinds)]
        if len(names) > 1:
            raise EMAConfigError(f"{' and '.join(names)}: use one EMACallback, which has averages= for several")
        if "XLA" in type(trainer.strategy).__name__:
            raise EMAEngineError(f"{type(trainer.strategy).__name__} is not supported; use DDP, FSDP or DeepSpeed")
        self._stop()
        self._ready = False
        self._fitting = stage == "fit"
        self._saved = None
        self._builtin = None
        if trainer.is_global_zero and stage == "fit":
            folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
            checkpoints.clean(str(folder) for folder in [trainer.default_root_dir, *folders] if folder)
        # No hook knows the path of a checkpoint, and none comes when one is removed.
        _wrap(trainer, "save_checkpoint", partial(self._save_checkpoint, trainer))
        _wrap(trainer.strategy, "remove_checkpoint", partial(self._remove_checkpoint, trainer))
        if self._both:
            for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
                _wrap(loop, "run", partial(self._evaluate_both, trainer, loop))

    def _average_of(self, module: object) -> ShardedEMA | None:
        """Returns the average if it belongs to ``module``, else None.

        Also returns None while finders of learning rates and batch sizes train and restore the module before ``fit()``.
        """
        begun = self._ready or not self._fitting
        return self.ema if begun and self._bound and self._bound[0] is module else None

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Makes the average or takes it over, once per run. Collective.

        Called when the model is wrapped and restored, and nothing has been computed yet.
        """
        # With evaluate=False too an average goes with its weights, where a checkpoint has replaced these.
        replaced = trainer.ckpt_path is not None and self._average_of(module) is not None
        if self._ready or not (self._fitting or self._evaluate or replaced):
            return
        self._ready = True
        target = trainer.strategy.model
        path = trainer.ckpt_path
        ema = self._average_of(module)
        objects = [module, target, *target.parameters()]
        if ema is None and path is None and not self._fitting:
            logger.warning("There is no average of this model yet: its own weights are evaluated.")
            return
        if ema is None:
            duration = self._duration(trainer) if self._fitting else "1ep"
            ema = self.ema = ShardedEMA(target, **{"max_duration": duration} | self._options)
        else:
            # Skip the module. To evaluate, Lightning leaves DDP away: then skip the wrapped model too, since the
            # average of the same parameters serves as it is.
            skipped = 1 if self._fitting else 2
            pairs = zip(self._bound[skipped:], objects[skipped:], strict=False)
            if not all(known is now for known, now in pairs):
                ema.rebind(target)
        self._bound = objects
        # A finder's checkpoint before a fit says that it has no average.
        if path is not None and not (self._fitting and self._saved == {"average": None}):
            self._load(trainer, ema, str(path))

    def _duration(self, trainer: pl.Trainer) -> str | None:
        """Returns the length of the training. Raises EMAConfigError if the options contradict it."""
        duration = f"{trainer.max_epochs}ep" if (trainer.max_epochs or -1) > 0 else None
        duration = f"{trainer.estimated_stepping_batches}ba" if trainer.max_steps > 0 else duration
        given = self._options.get("max_duration")
        if duration and given and str(given) != duration:
            raise EMAConfigError(f"max_duration={given!r}: the Trainer says {duration!r}; leave it out")
        return duration

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Makes the average, and counts the steps of every optimizer from now on. Collective."""
        self._begin(trainer, pl_module)
        optimizers = trainer.strategy.optimizers
        self._epochs = 0.0
        self._stepped = False
        self._due = False
        # With manual optimization a batch may step several times. Each step of a single optimizer is one update.
        self._at_once = not pl_module.automatic_optimization and len(optimizers) == 1
        ema = self._average_of(pl_module)
        if ema is None:
            return
        if "ep" in ema.units and trainer.num_training_batches == float("inf"):
            raise EMAConfigError("the options count in ep, but the loader's length is unknown: use ba")
        steps = trainer.estimated_stepping_batches
        epochs = trainer.max_epochs or 0
        is_known = pl_module.automatic_optimization and steps != float("inf")
        ema.expect(batches=int(steps) if is_known else None, epochs=epochs if epochs > 0 else None)
        self._handles = [ema.attach(one, call=partial(self._on_step, ema)) for one in optimizers]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Records this batch's part of the epoch. Local."""
        self._epochs += 1 / trainer.num_training_batches

    def _on_step(self, ema: ShardedEMA) -> None:
        """Records a real step of an optimizer, and averages at once if necessary. Local."""
        self._stepped = self._due = True
        if self._at_once:
            self._update(ema)

    def _update(self, ema: ShardedEMA) -> None:
        """Updates the average if an update is due. Local."""
        self._due = False
        before = ema.clock
        due = is_due(self._should_update, before.advance(batches=1, epochs=self._epochs))
        ema.update(epochs=self._epochs, due=due)
        # The clock stands still on a micro-step of DeepSpeed, and on a step that DeepSpeed skipped.
        if ema.clock is not before:
            self._epochs = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Averages a step of this batch, and logs the metrics. Collective if it logs."""
        stepped = self._stepped
        self._stepped = False
        ema = self._average_of(pl_module)
        if not stepped or ema is None:
            return
        # Here, and not in the step's own hook: callbacks and the module may change the weights after the step.
        if self._due:
            self._update(ema)
        # Private, and asked by Lightning's own callbacks for monitoring: whether what is logged now is written.
        if self._log and trainer.loggers and trainer._logger_connector.should_update_logs:
            pl_module.log_dict(ema.metrics(), on_step=True, on_epoch=False)

    def _enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Puts the average into the model for an evaluation. Collective."""
        # Lightning evaluates in inference mode. Tensors made in it can never be averaged or trained.
        with torch.inference_mode(False), torch.no_grad():
            self._leave()
            self._begin(trainer, pl_module)
            ema = self._average_of(pl_module)
            if self._evaluate and not self._on_live and ema is not None:
                self._held = ExitStack()
                name = None if self._evaluate is True else self._evaluate
                self._held.enter_context(ema.average_parameters(name, held_by=f"Lightning's {trainer.state.stage}"))

    def _leave(self, *_: Any) -> None:
        """Restores the live weights, if the average is in the model. Collective."""
        held, self._held = self._held or ExitStack(), None
        with torch.inference_mode(False):
            held.close()

    def _stop(self, *_: Any) -> None:
        """Stops counting steps, and restores the live weights."""
        while self._handles:
            self._handles.pop().remove()
        self._leave()

    def _evaluate_both(self, trainer: pl.Trainer, loop: Any, run: Callable[[], Any]) -> Any:
        """Runs an evaluation on the average, which nothing else sees, and then the evaluation on the live weights."""
        self._averaged = {}
        try:
            if not trainer.sanity_checking:
                with same_random(), unseen_evaluation(trainer, loop, [self]) as metrics:
                    run()
                if self._average_of(trainer.lightning_module) is not None:
                    self._averaged = {f"ema_{name}": value for name, value in metrics.items()}
            self._on_live = True
            return run()
        finally:
            self._on_live = False

    def _log_averaged(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the metrics of the average beside those of the live weights. Every rank has both."""
        averaged = self._averaged
        self._averaged = {}  # the next evaluation must not log these again
        if averaged:
            # The names have the number of the dataloader already.
            pl_module.log_dict(averaged, on_step=False, on_epoch=True, add_dataloader_idx=False)

    on_validation_epoch_end = on_test_epoch_end = _log_averaged
    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave
    on_exception = _stop

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops counting steps, and warns if there was no update: ``fit()`` may have ended early."""
        self._stop()
        ema = self._average_of(pl_module)
        if ema is not None and not ema.num_updates:
            ema.expect(batches=ema.clock.batches, epochs=ema.clock.epochs)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the average into the module if ``average_at_end`` asks for it. Collective."""
        ema = self._average_of(pl_module)
        if self._average_at_end and ema is not None:
            ema.copy_to(None if self._average_at_end is True else self._average_at_end)

    def state_dict(self) -> dict[str, Any]:
        """Returns the moment of the average beside a checkpoint, by which the two are matched."""
        ema = self._average_of(self._bound[0]) if self._bound else None
        return {"average": None if ema is None else checkpoints.describe(ema.clock, ema.num_updates)}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Records what the checkpoint says of its average, which is loaded when the model is wrapped."""
        self._saved = checkpoint["callbacks"].get(self.state_key, {})
        if {"current_model_state", "averaging_state"} <= checkpoint.keys():
            # Lightning has loaded state_dict, which is the average. The run goes on from the live weights.
            self._builtin = checkpoint
            live = {"state_dict": checkpoint["current_model_state"]}
            trainer.strategy.load_model_state_dict(live, strict=pl_module.strict_loading)

    def _save_checkpoint(self, trainer: Any, save: Callable[..., None], filepath: Any, *args: Any, **how: Any) -> None:
        """Saves a checkpoint with live weights, and the average beside it. Collective."""
        inside = self._held is not None
        ema = self._average_of(trainer.lightning_module)
        self._leave()  # a checkpoint has the live weights
        if ema is None:
            save(filepath, *args, **how)
        else:
            if self._due and trainer.lightning_module.automatic_optimization:
                # A callback that runs before this one saves: the step is made, but not averaged yet.
                self._update(ema)
            path = str(trainer.strategy.broadcast(f"{filepath}"))
            self._save_with(trainer, ema, path, partial(save, filepath, *args, **how))
        if inside:
            self._enter(trainer, trainer.lightning_module)

    def _save_with(self, trainer: Any, ema: ShardedEMA, path: str, save: Callable[[], None]) -> None:
        """Writes a checkpoint and its average such that a kill at any moment leaves a matching pair. Collective."""
        # The order is explained in lightning_checkpoints.py: average under a first name, checkpoint, rename.
        first = checkpoints.first_place(path)
        if first is None:
            save()
            ema.save(trainer.strategy.broadcast(checkpoints.place(path)))
            return
        ema.save(first)
        save()
        # One rank renames, and every rank raises if that fails.
        failure = None
        if trainer.is_global_zero:
            try:
                checkpoints.settle(path)
            except CheckpointError as error:
                failure = str(error)
        failure = trainer.strategy.broadcast(failure)
        if failure:
            raise CheckpointError(failure)

    def _remove_checkpoint(self, trainer: pl.Trainer, remove: Callable[..., None], filepath: Any) -> None:
        """Removes a checkpoint and the average beside it. An average inside of a directory goes with the directory."""
        remove(filepath)
        if trainer.is_global_zero:
            checkpoints.remove(str(filepath))

    def _load(self, trainer: pl.Trainer, ema: ShardedEMA, path: str) -> None:
        """Loads the average beside a checkpoint. Collective. Raises CheckpointError."""
        if self._builtin is not None:
            self._take_builtin(trainer, ema, self._builtin, path)
            self._builtin = None
            return
        # The checkpoint states the moment of its average. One without any state of callbacks may still have an average
        # beside it.
        saved = (self._saved or {}).get("average")
        found = checkpoints.find(path, saved) if saved or self._saved is None else None
        found = trainer.strategy.broadcast(found)
        if found is None and self._missing == "error":
            raise CheckpointError(
                f"{path} has no average with it (looked for {path}.ema and {path}/ema). "
                "EMACallback(missing='start') begins a new average from the checkpoint's weights"
            )
        if found is None:
            logger.warning("%s has no average with it: a new one begins from its weights.", path)
            ema.reset()
            return
        ema.load(found)
        now = self.state_dict()["average"]
        if saved not in (None, now):
            raise CheckpointError(
                f"the average {found} is at {now}, and its checkpoint {path} at {saved}: a save was killed, or files "
                "of different runs were mixed"
            )

    def _take_builtin(self, trainer: pl.Trainer, ema: ShardedEMA, checkpoint: Mapping[str, Any], path: str) -> None:
        """Takes over the average of Lightning's own WeightAveraging. Collective. Raises CheckpointError."""
        if len(ema.names) > 1:
            raise CheckpointError(
                f"{path} has one average, of Lightning's WeightAveraging, and the options name several "
                f"({', '.join(ema.names)}): give one, with decay= or half_life="
            )
        steps = int(checkpoint["global_step"])
        updates = int(checkpoint["averaging_state"]["n_averaged"])
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        epochs = batches / max(1, trainer.num_training_batches)
        # The file does not give the interval: every step since the first copy counts as an update.
        first = Progress(batches=max(0, steps - updates + 1))
        training = Progress(batches=steps, epochs=epochs)
        averaged = training.since(first).advance(batches=0, updates=updates) if updates else Progress()
        # A state dict of this object is filled with Lightning's values, and then loaded like any other one.
        state = EMAState(updates > 0, training, first if updates else Progress(), averaged)
        filled = ema.state_dict()
        filled["progress"] = write_state(state)
        average = checkpoint["state_dict"]
        for parts in [*filled["averages"].values(), filled["buffers"]]:
            parts.update({name: average[name] for name in parts if name in average})
        ema.load_state_dict(filled)
        logger.warning(
            "%s was written by Lightning's WeightAveraging: training continues from its live weights "
            "(current_model_state), and the average from its state_dict (%d updates).",
            path,
            updates,
        )


def _wrap(owner: Any, name: str, method: partial[None]) -> None:
    """Routes calls of ``owner.name`` through ``method``, which gets the original method. A second request does
    nothing.
    """
    before = getattr(owner, name)
    if not (isinstance(before, partial) and before.func == method.func):
        setattr(owner, name, partial(method, before))
