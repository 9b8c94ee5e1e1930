"""Connects to Accelerate: an average of a prepared model that ``save_state()`` writes and ``load_state()`` reads.

Needs ``pip install 'dist_ema[accelerate]'``. Private attributes of ``accelerate.Accelerator`` that are used here were
read in version 1.15: ``_models``, ``_optimizers`` and ``_custom_objects`` (lists of what was prepared and registered),
and ``_is_accelerate_prepared`` (set on what ``prepare()`` returns).
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dist_ema.ema import ShardedEMA
from dist_ema.engines.names import unwrapped
from dist_ema.errors import CheckpointError, EMAConfigError, EMAEngineError, EMAStateError
from dist_ema.integrations.evaluation import ShouldUpdate, check_should_update, is_due

try:
    import accelerate
    from accelerate.utils import DistributedType, broadcast_object_list
except ImportError as error:
    raise ImportError(f"dist_ema.integrations.accelerate: pip install 'dist_ema[accelerate]' ({error})") from error

__all__ = ["prepare_ema"]

logger = logging.getLogger(__name__)
#: The first version with FSDP2.
_OLDEST = (1, 6)
_MISSING = ("error", "start")
_ATTRIBUTE = "_dist_ema_averages"


def prepare_ema(
    accelerator: accelerate.Accelerator,
    model: Any,
    optimizer: Any = None,
    *,
    name: str = "ema",
    missing: str = "error",
    should_update: ShouldUpdate | None = None,
    **options: Any,
) -> ShardedEMA:
    """Returns an average of a model that ``accelerator.prepare()`` returned. Local; every rank calls it.

    ``accelerator.save_state()`` then writes it to ``<output_dir>/<name>``, and ``load_state()`` reads it, also with
    another number of processes. All ranks have to call both. This includes DDP, where Accelerate itself needs only the
    main process and many scripts call ``save_state()`` under ``if accelerator.is_main_process``. Checkpoints that
    ``total_limit`` removes take the average with them. The accelerator keeps a reference to the average, as to the
    model, until ``free_memory()``. Works with one process, DDP, FSDP, FSDP2 and DeepSpeed::

        model, optimizer, data = accelerator.prepare(model, optimizer, data)
        ema = prepare_ema(accelerator, model, optimizer, half_life="1000ba")
        ...                                 # train as before: accelerator.accumulate(), .backward(), optimizer.step()
        with ema.average_parameters():
            evaluate(model)

    Do not call ``register_for_checkpointing(ema)``: it would save rank 0's part only, and therefore raises.
    ``save_state()`` and ``load_state()`` cannot be called inside ``average_parameters()``, where the model has the
    average.

    Args:
        accelerator: the accelerator that prepared the model.
        model: the model as ``prepare()`` returned it, not the one inside.
        optimizer: the optimizer as ``prepare()`` returned it. Each of its real steps is counted; micro-steps of
            gradient accumulation and steps that are skipped for overflow are not. Pass None to call ``ema.update(...)``
            yourself, if ``accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped``. Options that
            count samples, tokens or epochs need that.
        name: the name of the folder beside Accelerate's files: letters, digits, ``_`` and ``-``. Give each of several
            averages a name of its own.
        missing: what ``load_state()`` does with a checkpoint without this average: ``"error"``, or ``"start"`` a new
            average from the weights that were loaded.
        should_update: decides which steps of ``optimizer`` are averaged, in place of ``update_interval`` and
            ``ema_start``. It is called on every rank with the training clock after each real step (under DeepSpeed also
            after micro-steps), such as ``lambda clock: clock.batches >= 100 and clock.batches % 10 == 0``. Use it for
            rules that an interval cannot express.
        options: the options of :class:`ShardedEMA`.

    Raises:
        EMAConfigError: an option is wrong, the name is taken, or model or optimizer were not prepared by this
            accelerator.
        EMAEngineError: the model cannot be averaged, or runs under Megatron-LM or XLA.
    """
    _check_version()
    if not isinstance(accelerator, accelerate.Accelerator):
        raise EMAConfigError(f"accelerator={type(accelerator).__name__}: pass the accelerate.Accelerator")
    if accelerator.distributed_type in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise EMAEngineError(
            f"the accelerator runs {accelerator.distributed_type.value}. Only models in one process and under DDP, "
            "FSDP, FSDP2 and DeepSpeed can be averaged"
        )
    if missing not in _MISSING:
        raise EMAConfigError(f"missing={missing!r}: allowed are {', '.join(map(repr, _MISSING))}")
    check_should_update(should_update, options.get("update_interval"), options.get("ema_start"))
    if should_update is not None and optimizer is None:
        raise EMAConfigError(
            "should_update needs optimizer, after whose steps it is called: pass both, or call ema.update(due=...) "
            "yourself"
        )
    averages = _Averages.of(accelerator)
    averages.check_name(name)
    if not _is_prepared(accelerator, model):
        raise EMAConfigError(
            f"model={type(model).__name__}: it was not prepared by this accelerator. Pass what accelerator.prepare() "
            "returned for it"
        )
    if optimizer is not None and not any(optimizer is one for one in accelerator._optimizers):
        raise EMAConfigError(
            f"optimizer={type(optimizer).__name__}: it was not prepared by this accelerator. Pass what "
            "accelerator.prepare() returned for it, or None and call update() yourself"
        )
    ema = ShardedEMA(model, **options)
    if optimizer is not None and (others := sorted(ema.units - {"ba"})):
        raise EMAConfigError(
            f"the options count in {', '.join(others)}, but of an optimizer only steps can be counted: leave optimizer "
            "out, and call ema.update(samples=..., tokens=..., epochs=...) after each real step"
        )
    if optimizer is not None:
        ema.attach(optimizer, call=None if should_update is None else functools.partial(_update, ema, should_update))
    averages.known[name] = _Average(ema, missing)
    return ema


def _update(ema: ShardedEMA, should_update: ShouldUpdate) -> None:
    ema.update(due=is_due(should_update, ema.clock.advance(batches=1)))


def _check_version() -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", accelerate.__version__)[:2])
    if found < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise EMAConfigError(
            f"accelerate {accelerate.__version__} is installed, and prepare_ema() needs {oldest} or later: "
            f"pip install -U 'accelerate>={oldest}'"
        )


def _is_prepared(accelerator: accelerate.Accelerator, model: Any) -> bool:
    """Returns whether ``prepare()`` of this accelerator returned a model. Accelerate's list has the model inside DDP.
    Local.
    """
    if not getattr(model, "_is_accelerate_prepared", False):
        return False
    return any(model is one or unwrapped(model) is unwrapped(one) for one in accelerator._models)


@dataclass(frozen=True)
class _Average:
    ema: ShardedEMA
    missing: str


class _Averages:
    """Holds the averages of one accelerator by name, and saves and loads them with its checkpoints.

    Accelerate's hooks run before it has loaded schedules and samplers and, without a sharded strategy, the model and
    the optimizer; and an optimizer may be stepped in order to load it. So averages are loaded at the end of
    ``load_state()``, and the hook only finds their paths. No event comes that late, so methods of the accelerator
    *object* are wrapped.
    """

    def __init__(self, accelerator: accelerate.Accelerator) -> None:
        self.known: dict[str, _Average] = {}
        self._accelerator = accelerator
        self._found: dict[str, Path | None] = {}  # where load_state() will find each average
        self._loading = False
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._look)
        for method in ("save_state", "load_state", "register_for_checkpointing", "free_memory"):
            inner = getattr(accelerator, method)
            wrapper = functools.partial(getattr(self, f"_{method}"), inner)
            setattr(accelerator, method, functools.update_wrapper(wrapper, inner))

    @classmethod
    def of(cls, accelerator: accelerate.Accelerator) -> _Averages:
        """Returns the averages of an accelerator. They are an attribute of it, and so live as long as it does."""
        averages = vars(accelerator).get(_ATTRIBUTE)
        if averages is None:
            averages = cls(accelerator)
            setattr(accelerator, _ATTRIBUTE, averages)
        return cast(_Averages, averages)

    def check_name(self, name: str) -> None:
        """Raises EMAConfigError if a name is no valid folder name, or this accelerator has an average of that name."""
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise EMAConfigError(f"name={name!r}: allowed are letters, digits, '_' and '-'; it is a folder's name")
        if name in self.known:
            raise EMAConfigError(
                f"name={name!r}: this accelerator has an average of that name. Give each its own, such as "
                f"name={name + '2'!r}; accelerator.free_memory() lets go of those that there are"
            )

    # In place of the accelerator's methods.

    def _save_state(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._refuse("save_state()")
        return inner(*args, **kwargs)

    def _load_state(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._refuse("load_state()")
        self._loading = True
        try:
            result = inner(*args, **kwargs)
        finally:
            self._loading = False
        self._load()
        return result

    def _register_for_checkpointing(self, inner: Callable[..., Any], *objects: Any) -> Any:
        _refuse_registered(objects)
        return inner(*objects)

    def _free_memory(self, inner: Callable[..., Any], *objects: Any) -> Any:
        self.known.clear()
        return inner(*objects)

    def _refuse(self, call: str) -> None:
        """Raises EMAStateError inside ``average_parameters()``, before anything is written or loaded. Local."""
        _refuse_registered(self._accelerator._custom_objects)
        for average in self.known.values():
            if (holder := average.ema.held_by) is not None:
                raise EMAStateError(
                    f"accelerator.{call} inside average_parameters(), which {holder} holds open: the model has the "
                    "averaged weights there; call it after the with block"
                )

    # Hooks: on all ranks.

    def _save(self, _models: object, _weights: object, folder: str) -> None:
        # A call of Accelerator.save_state(accelerator) does not pass the check in front of accelerator.save_state().
        self._refuse("save_state()")
        try:
            for name, average in self.known.items():
                average.ema.save(Path(folder) / name)
        except BaseException:
            # Accelerate has made the folder, and a script that resumes from the newest folder would take it.
            with suppress(OSError):  # it is not empty: under some strategies the weights are written before
                Path(folder).rmdir()
            raise

    def _look(self, _models: object, folder: str) -> None:
        """Finds the path of each average, as rank 0 sees it. Raises CheckpointError on every rank if one is missing."""
        paths = {name: Path(folder) / name for name in self.known}
        # On a network file system ranks may see different folders. All take the answer of rank 0, so that either every
        # rank loads an average or none does: load() is collective.
        exists = broadcast_object_list([[path.is_dir() for path in paths.values()]])[0]
        self._found = {}
        lacking = []
        for (name, path), there in zip(paths.items(), exists, strict=True):
            self._found[name] = path if there else None
            if not there and self.known[name].missing == "error":
                lacking.append(name)
        if lacking:
            raise CheckpointError(
                f"the checkpoint {folder} has no average {', '.join(map(repr, lacking))}: it was written without "
                "prepare_ema(), or with another name=. Pass missing='start' to prepare_ema() to start it from the "
                "checkpoint's weights"
            )
        if not self._loading:
            # Accelerator.load_state(accelerator) was called, so nothing of ours runs after this hook.
            self._load()

    def _load(self) -> None:
        """Loads each average that :meth:`_look` found, and restarts the others from the loaded weights. Collective."""
        # Cleared before the loads: after one that raises, the next load_state() must not find these paths again.
        found = self._found
        self._found = {}
        for name, path in found.items():
            ema = self.known[name].ema
            if path is not None:
                ema.load(path)
                continue
            logger.warning("The checkpoint has no average %r: it starts anew from the weights that were loaded.", name)
            ema.reset()


def _refuse_registered(objects: Any) -> None:
    if any(isinstance(one, ShardedEMA) for one in objects):
        raise EMAConfigError(
            "register_for_checkpointing(ema): Accelerate would pickle the part of the average that rank 0 has, and no "
            "other. Leave the call out: after prepare_ema(), save_state() and load_state() have all ranks write and "
            "read the average"
        )
