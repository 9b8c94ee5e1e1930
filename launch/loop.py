"""The training loop, the same for every engine: train, average, evaluate both, export, and check the export."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from options import EXPORT, Options
from report import Report, Summary
from safetensors.torch import load_file
from text import Text
from torch import Tensor
from wrap import Wrapped, plain, process_group, wrap

from dist_ema import ShardedEMA

LOG_EVERY = 10  # steps between two readings of loss and stop signal, each of which waits for the device
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # between the losses of the sharded average and of its export


def train(options: Options, stop: Callable[[], bool]) -> Summary:
    """One run, to its end or until ``stop()`` says so on any rank. Collective; the summary is the same on every rank.

    Raises:
        ValueError: the text is too short.
        RuntimeError: the exported weights do not have the validation loss of the sharded average.
    """
    text = Text.read(options.data, options.context)
    windows = text.windows(options.eval_windows, options.context)
    with process_group() as device, closing(Report(options, dist.get_rank(), dist.get_world_size())) as report:
        wrapped = wrap(options, device)
        ema = ShardedEMA(
            wrapped.model,
            half_life=options.half_life,
            update_interval=options.update_interval,
            ema_start=options.ema_start,
            max_duration=f"{options.steps}ba",
        )
        samples = options.batch * wrapped.data_size
        batches = text.batches(options.batch, options.context, options.seed, wrapped.data_rank)
        seconds, mark, stopped = 0.0, time.perf_counter(), False
        for step, batch in zip(range(1, options.steps + 1), batches, strict=False):
            loss = token_losses(wrapped.forward, batch.to(device)).mean()
            wrapped.backward(loss)
            wrapped.step()
            # Where progress is counted in batches alone, ``ema.attach(optimizer)`` before the loop does the same.
            ema.update(samples=samples, tokens=samples * options.context)

            due = step % options.eval_every == 0 or step == options.steps
            if step % LOG_EVERY == 0 or due:
                mean, stopped = _agree(loss, stop())
                report.step(step, mean)
            if due or stopped:
                seconds += time.perf_counter() - mark
                live = evaluate(wrapped, windows, options.batch, device)
                with ema.average_parameters():
                    averaged = evaluate(wrapped, windows, options.batch, device)
                report.evaluation(step, live, averaged, ema.metrics())
                mark = time.perf_counter()
            if stopped:
                break

        export = report.out / EXPORT
        ema.export(export)
        exported = _evaluate_export(export, options, windows, device)
        summary = Summary(
            options.engine,
            dist.get_world_size(),
            step,
            live,
            averaged,
            exported,
            ema.memory_report(),
            seconds / step,
            export,
        )
        report.end(summary, stopped)
    if abs(exported - averaged) > TOLERANCE[options.precision]:
        raise RuntimeError(f"{export}: its validation loss is {exported}, but that of the sharded average {averaged}")
    return summary


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


def _agree(loss: Tensor, stop: bool) -> tuple[float, bool]:
    """The mean of the ranks' losses, and whether any of them wants to stop. Collective."""
    values = torch.stack([loss.detach().float(), torch.tensor(float(stop), device=loss.device)])
    dist.all_reduce(values)
    mean, stops = (values / dist.get_world_size()).tolist()
    return mean, stops > 0


@torch.no_grad()
def _evaluate_export(folder: Path, options: Options, windows: Tensor, device: torch.device) -> float:
    """Loads the exported files into a plain model on rank 0, as anyone would, and evaluates it. Collective."""
    loss = torch.zeros(1, dtype=torch.float64, device=device)
    if dist.get_rank() == 0:
        model = plain(options, device)
        weights = {
            name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        model.load_state_dict(weights, strict=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            total = _sum_losses(model, windows, options.batch, device, rank=0, size=1)
        loss[0] = total[0] / total[1]
    dist.broadcast(loss, 0)
    return loss.item()
