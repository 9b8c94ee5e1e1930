"""Saves a run at intervals and goes on where it was interrupted: at any number of processes, whatever ended it."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from demo import checkpoints
from demo.checkpoints import EMA, FOLDER, MODEL, SAME, Record
from demo.options import Options
from demo.ranks import everywhere, first
from demo.state import to_universal
from demo.text import Text
from demo.wrap import Wrapped
from dist_ema import ShardedEMA
from dist_ema.schedules.clock import Progress, crossed


class Resume:
    """The checkpoints of one run, for all of its processes.

    Attributes:
        found: the checkpoint to go on from, if there is one.
        step: how many steps it has made; 0 if there is none.
        curves: its evaluations.
    """

    def __init__(self, options: Options, out: Path, text: Text) -> None:
        """Looks for the newest whole checkpoint. Collective.

        Raises:
            ValueError: the text is not the one that the interrupted run was trained on.
        """
        self._options, self._out = options, out
        self._data = zlib.crc32(text.training.numpy().tobytes())
        self.found = first(lambda: self._look(out), "looking for checkpoints")
        self.step = self.found.step if self.found is not None else 0
        self.curves: Sequence[tuple[int, float, float]] = self.found.curves if self.found is not None else ()
        if self.found is not None and self.found.data != self._data:
            raise ValueError(
                f"data={options.data}: is not the text that the run in {out} was trained on: checksum "
                f"{self._data:08x}, and that was {self.found.data:08x}. Give that text, or another out"
            )

    def _look(self, out: Path) -> Record | None:
        checkpoints.clean(out)
        return checkpoints.latest(out)

    @property
    def universal(self) -> bool:
        """Whether DeepSpeed has to read the checkpoint in its universal form: its other one is of one world size."""
        return (
            self.found is not None
            and self.found.engine.startswith("zero")
            and self.found.world_size != dist.get_world_size()
        )

    def load(self, wrapped: Wrapped, ema: ShardedEMA) -> None:
        """Puts the run where the checkpoint was taken. Collective.

        The model has no dropout and the batches follow from the step, so there is no random state to restore.
        """
        if self.found is None:
            return
        path = self._out / FOLDER / self.found.name
        model, away = path / MODEL, checkpoints.temporary(self._out, self.found, "universal")
        if self.universal:
            model = away / MODEL
            first(lambda: to_universal(path / MODEL, model), f"converting {path} to another world size")
        wrapped.load(model)
        ema.load(path / EMA)
        if self.universal:
            first(lambda: shutil.rmtree(away), f"removing {away}")

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be taken after this step. The last step always is such a one."""
        interval = self._options.checkpoint_interval()
        if interval is None:
            return False
        return step == self._options.steps or crossed(self._clock(step - 1), self._clock(step), interval)

    def _clock(self, step: int) -> Progress:
        samples = step * self._options.batch
        return Progress(batches=step, samples=samples, tokens=samples * self._options.context)

    def save(self, step: int, wrapped: Wrapped, ema: ShardedEMA, curves: Sequence[tuple[int, float, float]]) -> None:
        """Writes a checkpoint, which is visible when it is whole, and removes those that are too many. Collective."""
        record = Record(
            step=step,
            engine=self._options.engine,
            world_size=dist.get_world_size(),
            options={name: getattr(self._options, name) for name in SAME},
            data=self._data,
            curves=list(curves),
        )
        operation = f"checkpoint after step {step}"
        staging = first(lambda: checkpoints.begin(self._out, record), operation)
        everywhere(lambda: self._see(staging), operation)
        wrapped.save(staging / MODEL)
        ema.save(staging / EMA)
        first(lambda: checkpoints.commit(self._out, record, self._options.keep_checkpoints), operation)

    @staticmethod
    def _see(staging: Path) -> None:
        if not staging.is_dir():
            raise FileNotFoundError(
                f"{staging} is not seen by every process: give an out that all nodes share, or checkpoint_every=null"
            )
