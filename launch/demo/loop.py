"""The training loop, the same for every engine: train, average, evaluate both, save, export, and check."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from demo.full_copy import measure
from demo.options import EXPORT, Options
from demo.ranks import first
from demo.report import Report, Summary, output_folder, say
from demo.resume import Resume
from demo.stop import Agreement, Stop
from demo.text import Text
from demo.wrap import Wrapped, plain, process_group, wrap
from dist_ema import ShardedEMA

LOG_EVERY = 10  # steps between two readings of the loss, each of which waits for the device
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # between the losses of the sharded average and of its export


def train(options: Options, stop: Callable[[], int]) -> Summary | None:
    """One run, from its newest checkpoint to its end or until any rank is asked to stop. Collective.

    Args:
        options: of the run.
        stop: asked after each step; a :class:`stop.Stop`, where True is ``EXPORT``.

    Returns:
        How it ended, the same on every rank; also of a run that had been finished before. None if it was left with no
        more than a checkpoint, as ``Stop.SAVE`` asks for.

    Raises:
        ValueError: the text is too short, or not the one that the interrupted run was trained on.
        RuntimeError: the exported weights do not have the validation loss of the sharded average.
    """
    text = Text.read(options.data, options.context)
    with process_group() as device:
        out = output_folder(options)
        finished = first(lambda: Summary.read(out), "looking for an earlier run")
        if finished is not None and finished.steps == options.steps:
            say(f"{out}: finished already, after step {finished.steps}\n\n{finished.table()}")
            return finished
        resume = Resume(options, out, text)
        with closing(Report(options, out, resume.step, resume.curves)) as report:
            return _run(options, Agreement(stop), device, text, out, resume, report)


def _run(
    options: Options, agreement: Agreement, device: torch.device, text: Text, out: Path, resume: Resume, report: Report
) -> Summary | None:
    windows = text.windows(options.eval_windows, options.context)
    wrapped = wrap(options, device, resume.universal)
    ema = ShardedEMA(
        wrapped.model,
        half_life=options.half_life,
        update_interval=options.update_interval,
        ema_start=options.ema_start,
        max_duration=f"{options.steps}ba",
    )
    resume.load(wrapped, ema)
    part, parts = wrapped.data_rank, wrapped.data_size
    each = options.batch // parts
    updates: list[float] = []
    seconds, mark, stop, step = 0.0, time.perf_counter(), Stop.NO, resume.step
    for step in range(resume.step + 1, options.steps + 1):
        batch = text.batch(step, options.batch, options.context, options.seed, part, parts)
        loss = token_losses(wrapped.forward, batch.to(device)).mean()
        wrapped.backward(loss)
        wrapped.step()
        # Where progress is counted in batches alone, ``ema.attach(optimizer)`` before the loop does the same.
        before = time.perf_counter()
        ema.update(samples=options.batch, tokens=options.batch * options.context)
        updates.append(time.perf_counter() - before)

        stop = agreement.stop()
        due = step % options.eval_every == 0 or step == options.steps
        if step % LOG_EVERY == 0 or due:
            report.step(step, _mean(loss))
        if due and stop != Stop.SAVE:
            seconds += time.perf_counter() - mark
            _evaluate_both(step, wrapped, ema, windows, each, device, report)
            mark = time.perf_counter()
        if resume.due(step) or (stop and options.checkpoint_every is not None):
            seconds += time.perf_counter() - mark
            resume.save(step, wrapped, ema, report.curves)
            mark = time.perf_counter()
        if stop:
            break
    seconds += time.perf_counter() - mark
    if stop == Stop.SAVE:
        report.left(step, saved=options.checkpoint_every is not None)
        return None
    if not report.curves or report.curves[-1][0] != step:  # stopped between two evaluations
        _evaluate_both(step, wrapped, ema, windows, each, device, report)
    _, live, averaged = report.curves[-1]
    export = _export(ema, out)
    exported = _evaluate_export(export, options, windows, each, device)
    if abs(exported - averaged) > TOLERANCE[options.precision]:
        raise RuntimeError(f"{export}: its validation loss is {exported}, but that of the sharded average {averaged}")
    copied = first(lambda: measure(options, device), "measuring a full copy")
    summary = Summary(
        options.engine,
        dist.get_world_size(),
        step,
        live,
        averaged,
        exported,
        ema.memory_report(),
        seconds / max(1, step - resume.step),
        export,
        median(updates) if updates else 0.0,
        copied.seconds,
        copied.size,
    )
    if not stop:
        first(lambda: summary.write(out), "writing the summary")
    report.end(summary, stopped=bool(stop))
    return summary


def _evaluate_both(
    step: int,
    wrapped: Wrapped,
    ema: ShardedEMA,
    windows: Tensor,
    batch: int,
    device: torch.device,
    report: Report,
) -> None:
    """Evaluates live and averaged weights, for the report. Collective."""
    live = evaluate(wrapped, windows, batch, device)
    with ema.average_parameters():
        averaged = evaluate(wrapped, windows, batch, device)
    report.evaluation(step, live, averaged, ema.metrics())


def _export(ema: ShardedEMA, out: Path) -> Path:
    """Exports the average, in place of the export of a run that was stopped here before. Collective."""
    export, earlier = out / EXPORT, out / f".{EXPORT}.earlier"

    def move_away() -> None:
        shutil.rmtree(earlier, ignore_errors=True)
        if export.exists():
            export.rename(earlier)

    first(move_away, f"replacing {export}")
    ema.export(export)
    first(lambda: shutil.rmtree(earlier, ignore_errors=True), f"removing {earlier}")
    return export


def token_losses(forward: Callable[[Tensor], Tensor], windows: Tensor) -> Tensor:
    """Cross entropy in nats of each byte after the first: windows ``[batch, context + 1]`` to ``[batch, context]``."""
    logits = forward(windows[:, :-1]).float()
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@torch.no_grad()
def evaluate(wrapped: Wrapped, windows: Tensor, batch: int, device: torch.device) -> float:
    """Validation loss in nats per byte, over windows shared out to the ranks. Collective; the same on every rank."""
    total = _sum_losses(wrapped.forward, windows, batch, device, wrapped.data_rank, wrapped.data_size)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def _sum_losses(
    forward: Callable[[Tensor], Tensor], windows: Tensor, batch: int, device: torch.device, rank: int, size: int
) -> Tensor:
    """Sum and number of the windows' losses, float64."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for start in range(0, len(windows), batch * size):
        mine = torch.arange(start + rank * batch, start + (rank + 1) * batch)
        # Every rank runs as many forwards as the others, as they are collective; windows past the end count nothing.
        counted = (mine < len(windows)).to(device)
        losses = token_losses(forward, windows[mine.clamp(max=len(windows) - 1)].to(device)).double().mean(1)
        total += torch.stack([(losses * counted).sum(), counted.sum()])
    return total


def _mean(loss: Tensor) -> float:
    """The mean of the ranks' losses. Collective."""
    total = loss.detach().float()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


@torch.no_grad()
def _evaluate_export(folder: Path, options: Options, windows: Tensor, batch: int, device: torch.device) -> float:
    """Loads the exported files into a plain model on rank 0, as anyone would, and evaluates it. Collective."""
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    if dist.get_rank() == 0:
        model = plain(options, device)
        weights = {
            name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        model.load_state_dict(weights, strict=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            total = _sum_losses(model, windows, batch, device, rank=0, size=1)
        loss[0] = total[0] / total[1]
    dist.broadcast(loss, 0)
    return loss.item()
