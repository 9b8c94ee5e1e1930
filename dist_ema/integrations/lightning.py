"""Lightning: ``Trainer(callbacks=[EMACallback(half_life="1000ba")])``. Private names were read in lightning 2.6.6."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from weakref import ref

import fsspec
import torch

from dist_ema.ema import ShardedEMA
from dist_ema.engines import RemovableHandle
from dist_ema.errors import CheckpointError, EMAConfigError, EMAEngineError
from dist_ema.options import Options
from dist_ema.timing import Time

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
#: Belongs to a process and a run, and is not copied or pickled with a callback. Lightning itself sets ``log``.
_OF_A_RUN = ("ema", "_module", "_bound", "_held", "log", "log_dict")


class EMACallback(pl.Callback):
    """Averages a LightningModule while it is fitted, and puts the average into it to validate, test and predict.

    The average follows each optimizer step: accumulated batches and steps that a GradScaler skips do not count. Under
    manual optimization a single optimizer is followed at each of its steps; of several, one ``ba`` is a batch in which
    any of them stepped. Names are those of ``LightningModule.state_dict()``.

    Hooks from ``on_validation_start`` to ``on_validation_epoch_end`` see the average, the module's ``on_validation_end``
    the live weights again; a sanity check the live ones, since averaging has not begun.

    ``trainer.save_checkpoint`` and every ModelCheckpoint write the live weights, at any moment, and beside them the
    average: ``<path>/ema`` in a directory (FSDP2, DeepSpeed), else ``<file>.ema``. It is loaded with ``ckpt_path``, to
    fit, validate, test and predict, and removed with the checkpoint. Where ranks hold replicas (DDP), what is raised in
    an evaluation has to be raised on all of them, since they need each other to get their live weights back.

    Args:
        evaluate: on the average; its name where there are several. False evaluates the live weights.
        missing: a checkpoint without an average is an ``"error"``, or a new average is to ``"start"`` from its weights.
        log: ``ema.metrics()`` to the trainer's loggers, every ``log_every_n_steps``. Collective, one pass.
        options: of :class:`ShardedEMA`, in batches and epochs; ``max_duration`` is the trainer's.

    Attributes:
        ema: the ShardedEMA, once fitting has begun or a checkpoint was loaded. It outlives ``fit()``, and goes on when
            the same module is fitted again. None in copies of the callback, and in the parent of spawned processes.

    Raises:
        EMAConfigError: an option is wrong or contradicts the trainer, or there are two averaging callbacks.
        EMAEngineError: the strategy is not supported.
        CheckpointError: on every rank: the average of a checkpoint is missing or of another moment.
    """

    def __init__(
        self, *, evaluate: bool | str = True, missing: str = "error", log: bool = True, **options: Any
    ) -> None:
        inspect.signature(ShardedEMA).bind(None, **options)  # TypeError for a name that it does not have
        self._options = options
        parsed = self._parse("1ep")
        names = list(parsed.schedules)
        if others := sorted(parsed.units() - {"ba", "ep"}):
            raise EMAConfigError(f"the options count in {', '.join(others)}, Lightning in ba and ep only: use those")
        if (isinstance(evaluate, str) and evaluate not in names) or (evaluate is True and len(names) > 1):
            raise EMAConfigError(f"evaluate={evaluate!r}: allowed are False and the names of averages, {names}")
        if missing not in ("error", "start"):
            raise EMAConfigError(f"missing={missing!r}: allowed are 'error' and 'start'")
        self._evaluate, self._missing, self._log = evaluate, missing, log
        self.ema: ShardedEMA | None = None
        self._module: ref[Any] | None = None  # whose average it is
        self._bound: list[ref[Any]] | None = None  # what the strategy made of that, and the parameters
        self._held: ExitStack | None = None  # while the average is in the model
        self._handles: list[RemovableHandle] = []
        self._ready = self._fitting = self._at_once = self._stepped = False
        self._epochs = 0.0  # trained since the last update
        self._saved: dict[str, Any] | None = None  # our state in the checkpoint; None where it has none of callbacks

    def _parse(self, duration: str | None) -> Options:
        parameters = inspect.signature(ShardedEMA).parameters.values()
        options = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        options.update({"max_duration": duration} | self._options)
        del options["group"]
        return Options.parse(**options)

    @property
    def state_key(self) -> str:
        """Not the class's name, which other libraries have used too."""
        return "dist_ema.EMACallback"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | dict.fromkeys(_OF_A_RUN) | {"_handles": []}

    # The beginning of a run.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Checks what can be, and has the trainer tell of its checkpoints."""
        found = [one for one in trainer.callbacks if isinstance(one, (EMACallback, pl.callbacks.WeightAveraging))]
        if len(found) > 1:
            both = " and ".join(type(one).__name__ for one in found)
            raise EMAConfigError(f"{both}: use one EMACallback; it keeps several averages with averages={{...}}")
        if "XLA" in type(trainer.strategy).__name__:
            raise EMAEngineError(f"{type(trainer.strategy).__name__} is not supported; use DDP, FSDP or DeepSpeed")
        self._stop()
        self._ready, self._fitting, self._saved = False, stage == "fit", None
        # No hook knows the path of a checkpoint, and none comes when one is removed.
        _wrap(trainer, "save_checkpoint", partial(self._save_checkpoint, trainer))
        _wrap(trainer.strategy, "remove_checkpoint", partial(self._remove_checkpoint, trainer))

    def _average_of(self, module: object) -> ShardedEMA | None:
        return self.ema if self._module is not None and self._module() is module else None

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Once a run, when all is wrapped and restored, and nothing has been computed yet. Collective."""
        if self._ready or not (self._fitting or self._evaluate):
            return
        self._ready = True
        target, path, ema = trainer.strategy.model, trainer.ckpt_path, self._average_of(module)
        objects = [target, *target.parameters()]
        if ema is None and path is None and not self._fitting:
            logger.warning("There is no average of this model yet: its own weights are evaluated.")
            return
        if ema is None:
            duration = self._duration(trainer) if self._fitting else "1ep"
            ema = self.ema = ShardedEMA(target, **{"max_duration": duration} | self._options)
        else:
            # To evaluate, DDP is left away; the one that there was does for the same weights.
            first = 0 if self._fitting else 1
            if [one() for one in self._bound or ()][first:] != objects[first:]:
                ema.rebind(target)
        self._module, self._bound = ref(module), [ref(one) for one in objects]
        if path is not None:
            self._load(trainer, ema, str(path))

    def _duration(self, trainer: pl.Trainer) -> str | None:
        """How long the trainer trains. Raises EMAConfigError if the options do not go with it."""
        epochs, given = trainer.max_epochs, self._options.get("max_duration")
        duration = f"{epochs}ep" if epochs is not None and epochs > 0 else None
        if trainer.max_steps > 0:
            duration = f"{trainer.estimated_stepping_batches}ba"
        if given is not None and duration is not None:
            own, said = Time.parse(duration, option="max_duration"), Time.parse(given, option="max_duration")
            if own.unit == said.unit and own.value != said.value:
                raise EMAConfigError(f"max_duration={given!r}: the Trainer says {duration!r}; leave it out")
        if "ep" in self._parse(duration).units() and trainer.num_training_batches == float("inf"):
            raise EMAConfigError("the options count in ep, but the loader's length is unknown: use ba")
        return duration

    # Training.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follows the optimizers, which are made anew for each fit."""
        self._begin(trainer, pl_module)
        optimizers = trainer.strategy.optimizers
        self._at_once = not pl_module.automatic_optimization and len(optimizers) == 1
        self._epochs, self._stepped = 0.0, False
        if self.ema is not None:
            self._handles = [self.ema.attach(optimizer, call=self._on_step) for optimizer in optimizers]

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The time of a batch has passed when it steps."""
        self._epochs += 1 / trainer.num_training_batches

    def _on_step(self) -> None:
        self._stepped = True
        if self._at_once:
            self._update()

    def _update(self) -> None:
        if self.ema is not None:
            before = self.ema._track.clock
            self.ema.update(epochs=self._epochs)
            if self.ema._track.clock is not before:  # else a micro-step of DeepSpeed, or one that it skipped
                self._epochs = 0.0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Updates after whatever else a step did to the weights; ModelCheckpoint comes later."""
        if self._stepped and not self._at_once:
            self._update()
        # Private, and asked by Lightning's own callbacks for monitoring: whether what is logged now is written.
        wanted = self._log and trainer.loggers and trainer._logger_connector.should_update_logs
        if self._stepped and wanted and self.ema is not None:
            pl_module.log_dict(self.ema.metrics(), on_step=True, on_epoch=False)
        self._stepped = False

    # Evaluation.

    def _enter(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning evaluates in inference mode. Tensors made in it can never be averaged or trained.
        with torch.inference_mode(False), torch.no_grad():
            self._leave()
            self._begin(trainer, pl_module)
            ema = self._average_of(pl_module)
            if self._evaluate and ema is not None:
                self._held = ExitStack()
                name = self._evaluate if isinstance(self._evaluate, str) else None
                self._held.enter_context(ema.average_parameters(name))

    def _leave(self, *_: Any) -> None:
        held, self._held = self._held, None
        if held is not None:
            with torch.inference_mode(False):
                held.close()

    def _stop(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._leave()

    on_validation_start = on_test_start = on_predict_start = _enter
    on_validation_end = on_test_end = on_predict_end = _leave
    on_train_end = on_exception = _stop

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """Tells whether the average beside a checkpoint is the one that was saved with it. Local."""
        return {"average": None if self.ema is None else f"{self.ema._track.clock}, {self.ema.num_updates} updates"}

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Comes before anything is wrapped, or after."""
        self._saved = checkpoint["callbacks"].get(self.state_key, {})

    def _save_checkpoint(self, trainer: pl.Trainer, save: Callable[..., None], filepath: Any, *args: Any) -> None:
        """``trainer.save_checkpoint()``, with the live weights in the model. Collective."""
        inside = self._held is not None
        self._leave()
        save(filepath, *args)
        if (ema := self._average_of(trainer.lightning_module)) is not None:
            path = f"{filepath}/ema" if _is_directory(f"{filepath}") else f"{filepath}.ema"
            ema.save(trainer.strategy.broadcast(path))
        if inside:
            self._enter(trainer, trainer.lightning_module)

    def _remove_checkpoint(self, trainer: pl.Trainer, remove: Callable[..., None], filepath: Any) -> None:
        """``strategy.remove_checkpoint()``. A directory goes with what is in it."""
        remove(filepath)
        if trainer.is_global_zero and _is_directory(f"{filepath}.ema"):
            system, path = fsspec.url_to_fs(f"{filepath}.ema")
            system.rm(path, recursive=True)

    def _load(self, trainer: pl.Trainer, ema: ShardedEMA, path: str) -> None:
        saved = None if self._saved is None else self._saved.get("average", "none")
        if self._saved == {"average": None}:  # before averaging had begun: by a finder of learning rates
            return
        real = os.path.realpath(path) if os.path.islink(path) else path  # noqa: PTH114 - save_last="link"; or a URL
        found = next((one for one in (f"{real}/ema", f"{real}.ema") if _is_directory(one)), None)
        found = trainer.strategy.broadcast(None if saved == "none" else found)
        if found is not None:
            ema.load(found)
            if saved not in (None, (now := self.state_dict()["average"])):
                raise CheckpointError(
                    f"{found} does not belong to {path}: it is at {now}, and that was saved at {saved}. Either a save "
                    "was killed between the two, or files of two runs are mixed"
                )
        elif self._missing == "error":
            raise CheckpointError(f"{path} has no average with it: EMACallback(missing='start') begins a new one there")
        else:
            logger.warning("%s has no average with it: a new one begins from its weights.", path)
            ema.reset()


def _wrap(owner: Any, name: str, method: partial[None]) -> None:
    """Calls of ``owner.name`` go through ``method``, which is given what was there. Once, however often it is asked."""
    before = getattr(owner, name)
    if not (isinstance(before, partial) and before.func == method.func):
        setattr(owner, name, partial(method, before))


def _is_directory(path: str) -> bool:
    system, inner = fsspec.url_to_fs(path)
    return bool(system.isdir(inner))
