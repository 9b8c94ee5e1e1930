"""What a run shows and leaves behind: a bar and lines in a terminal, TensorBoard, ``curves.png``, the last table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from textwrap import indent, wrap

import torch.distributed as dist
from tqdm import tqdm

from demo.options import Options

FINISHED = "summary.json"  # in the output folder of a run that has made all of its steps
NEXT = """Next, for a model of yours:
  what an average costs    dist-ema plan --parameters 7B --engine fsdp2 --world-size 8
  a program to copy        dist_ema/guide/start.md"""
AVERAGED, LIVE = "#0b6e99", "#c2792d"


@dataclass(frozen=True)
class Summary:
    """How a run ended; losses in nats per byte.

    Attributes:
        engine: how the model was spread.
        world_size: over how many processes.
        steps: optimizer steps made.
        live: validation loss of the trained weights.
        averaged: of the sharded average, evaluated in the live model.
        exported: of the exported average, loaded into a plain model.
        shadow: what the average cost in memory on this rank.
        step_time: seconds per step, evaluations not counted.
        export: folder of the exported weights.
        update_time: seconds that an update of the average keeps this rank, the median.
        copy_time: seconds of an update of a full copy, without gathering the weights.
        copy_size: bytes of a full copy, which each rank would keep.
    """

    engine: str
    world_size: int
    steps: int
    live: float
    averaged: float
    exported: float
    shadow: str
    step_time: float
    export: Path
    update_time: float = 0.0
    copy_time: float = 0.0
    copy_size: int = 0

    def table(self) -> str:
        """Two columns, to be read by people."""
        rows = {
            "engine": self.engine,
            "world size": f"{self.world_size}",
            "steps": f"{self.steps}",
            "validation loss, live": f"{self.live:.4f}",
            "validation loss, averaged": f"{self.averaged:.4f}",
            "validation loss, exported": f"{self.exported:.4f}",
            "shadow on rank 0": "\n".join(line for part in self.shadow.splitlines() for line in wrap(part, 80)),
            "a full copy would be": f"{self.copy_size / 2**20:.1f} MiB on each rank",
            "time per step": f"{self.step_time * 1000:.0f} ms",
            "update of the average": f"{self.update_time * 1000:.2f} ms; of a full copy {self.copy_time * 1000:.2f} ms "
            "and a gather of the weights",
            "export": f"{self.export}",
        }
        return "\n".join(f"{name:<26}  {indent(value, ' ' * 28).lstrip()}" for name, value in rows.items())

    def write(self, out: Path) -> None:
        """Marks the run in ``out`` as finished."""
        new = out / f".{FINISHED}"
        new.write_text(json.dumps(asdict(self) | {"export": str(self.export)}, indent=1))
        new.rename(out / FINISHED)

    @classmethod
    def read(cls, out: Path) -> Summary | None:
        """How the run in ``out`` ended; None if it has not."""
        try:
            values = json.loads((out / FINISHED).read_text())
        except FileNotFoundError:
            return None
        return cls(**values | {"export": Path(values["export"])})


class Report:
    """Shows and writes on rank 0; on other ranks its methods do nothing.

    Attributes:
        curves: step, live and averaged validation loss of each evaluation.
    """

    def __init__(self, options: Options, out: Path, step: int, curves: Sequence[tuple[int, float, float]]) -> None:
        """Begins after ``step``, 0 for a new run, with the evaluations until then."""
        size = dist.get_world_size()
        self._title = f"{options.engine} on {size} process" + "es" * (size > 1)
        self._out = out
        self.curves = list(curves)
        self._main = dist.get_rank() == 0
        self._bar = tqdm(  # None: if no terminal
            total=options.steps, initial=step, unit="step", disable=None if self._main else True
        )
        if self._main:
            from torch.utils.tensorboard import SummaryWriter

            # What the interrupted run has logged after its checkpoint is made again.
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)
            tqdm.write(f"{self._title}; writing to {out}")
            if step:
                tqdm.write(f"resumed after step {step}")

    def step(self, step: int, loss: float) -> None:
        """Training loss, the mean over the ranks."""
        if self._main:
            self._board.add_scalar("train/loss", loss, step)
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(loss=f"{loss:.3f}")

    def evaluation(self, step: int, live: float, averaged: float, metrics: Mapping[str, float]) -> None:
        """Validation losses, and the average's own figures."""
        self.curves.append((step, live, averaged))
        if self._main:
            tqdm.write(f"step {step:>5}  validation loss: live {live:.4f}  averaged {averaged:.4f}")
            for name, value in {"validation/live": live, "validation/averaged": averaged, **metrics}.items():
                self._board.add_scalar(name, value, step)

    def end(self, summary: Summary, stopped: bool) -> None:
        """Draws the curves and prints the table."""
        if not self._main:
            return
        self._bar.close()
        self._draw()
        if stopped:
            tqdm.write(f"stopped by a signal after step {summary.steps}")
        tqdm.write("\n" + summary.table())
        tqdm.write(f"\n{self._out / 'curves.png'} shows live against averaged weights.\n{NEXT}")

    def left(self, step: int, saved: bool) -> None:
        """Says where a run was left that ends without evaluation and export."""
        if self._main:
            what = "the same command goes on from there" if saved else "checkpoint_every=null: nothing saved"
            tqdm.write(f"stopped by SIGTERM after step {step}; {what}")

    def close(self) -> None:
        """Ends bar and TensorBoard; also where the run failed."""
        self._bar.close()
        if self._main:
            self._board.close()

    def _draw(self) -> None:
        import matplotlib

        matplotlib.use("Agg")  # no display on a cluster
        from matplotlib import pyplot

        steps, live, averaged = zip(*self.curves, strict=True)
        figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
        axes.plot(
            steps,
            live,
            color=LIVE,
            marker="o",
            markersize=3,
            linewidth=1.4,
            label=f"live weights, {live[-1]:.3f} at the end",
        )
        axes.plot(
            steps,
            averaged,
            color=AVERAGED,
            marker="o",
            markersize=3,
            linewidth=1.8,
            label=f"averaged weights, {averaged[-1]:.3f}",
        )
        axes.set(title=f"Validation loss, {self._title}", xlabel="optimizer step", ylabel="loss (nats per byte)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False)
        figure.savefig(self._out / "curves.png", dpi=150)
        pyplot.close(figure)


def say(text: str) -> None:
    """A line of rank 0."""
    if dist.get_rank() == 0:
        tqdm.write(text)


def output_folder(options: Options) -> Path:
    """Makes the run's folder. Collective; the same on every rank."""
    chosen = [_folder(options) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(chosen)
    return Path(str(chosen[0]))


def _folder(options: Options) -> Path:
    """Makes the folder that was asked for, or the next free ``runs/<engine>-<number>``."""
    if options.out is not None:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        return Path(options.out)
    for number in count(1):
        folder = Path("runs") / f"{options.engine}-{number:03}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:  # an earlier run, or one that starts at this very moment
            continue
        return folder
    raise AssertionError("unreachable")
