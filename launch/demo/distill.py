"""A student that learns from its own average: a byte-level GPT with gaps in its input, and a teacher that has none."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from demo.gpt import GPT
from demo.loop import token_losses
from demo.text import Text
from demo.wrap import process_group
from dist_ema import ShardedEMA

CONTEXT, BATCH, WINDOWS, SEED = 128, 16, 128, 0
LAYERS, WIDTH, HEADS = 4, 96, 4


@dataclass
class Evaluation:
    """Validation losses in nats per byte, after so many steps."""

    step: int
    student: float
    teacher: float


@dataclass(frozen=True)
class Distillation:
    """What is trained.

    Attributes:
        steps: optimizer steps.
        every: steps between two evaluations.
        gaps: part of the student's input bytes that are replaced at random.
        share: of the teacher in the loss; the rest is the text itself.
        half_life: of the teacher.
        lr: of AdamW.
    """

    steps: int
    every: int
    gaps: float
    share: float
    half_life: str
    lr: float

    def run(self, data: str | None) -> list[Evaluation]:
        """Trains and evaluates both. Collective; the same result on every rank."""
        with process_group() as device:
            text = Text.read(data, CONTEXT)
            windows = text.windows(WINDOWS, CONTEXT).to(device)
            student, teacher = _sharded(device), _sharded(device).requires_grad_(False)
            optimizer = torch.optim.AdamW(student.parameters(), lr=self.lr)
            ema = ShardedEMA(student, into=teacher, half_life=self.half_life)
            ema.attach(optimizer)
            ema.update(batches=0, due=True)  # the teacher begins as the student is
            rank, ranks, found = dist.get_rank(), dist.get_world_size(), []
            for step in range(1, self.steps + 1):
                batch = text.batch(step, BATCH * ranks, CONTEXT, SEED, rank, ranks).to(device)
                self._loss(student, teacher, batch, step * ranks + rank).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad()
                if step % self.every == 0 or step == self.steps:
                    found.append(Evaluation(step, _evaluate(student, windows), _evaluate(teacher, windows)))
            return found

    def _loss(self, student: nn.Module, teacher: nn.Module, batch: Tensor, seed: int) -> Tensor:
        """Cross entropy with the text, and with what the teacher expects of the whole of it."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        draws = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(seed)).to(batch.device)
        logits = student(torch.where(draws < self.gaps, 0, inputs)).float().transpose(1, 2)
        with torch.no_grad():
            expected = teacher(inputs).float().softmax(-1).transpose(1, 2)
        text, own = F.cross_entropy(logits, targets), F.cross_entropy(logits, expected)
        return (1 - self.share) * text + self.share * own


def _sharded(device: torch.device) -> GPT:
    """A model of its own, with the same initial weights and the same units each time."""
    torch.manual_seed(SEED)
    model = GPT(LAYERS, WIDTH, HEADS, CONTEXT).to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@torch.no_grad()
def _evaluate(model: nn.Module, windows: Tensor) -> float:
    """The same on every rank, as each looks at all windows."""
    losses = [token_losses(model, part).double().mean(1) for part in torch.split(windows, 32)]
    return float(torch.cat(losses).mean())


def verdict(found: list[Evaluation]) -> str:
    """Whether the teacher is ahead of the student, and since when."""
    last = found[-1]
    ahead = [one.step for one in found if one.teacher < one.student]
    if last.teacher >= last.student:
        return f"the teacher is not ahead: {last.teacher:.4f}, and the student {last.student:.4f} nats per byte"
    return (
        f"the teacher is ahead by {last.student - last.teacher:.4f} nats per byte ({last.teacher:.4f}, the student "
        f"{last.student:.4f}), as at {len(ahead)} of {len(found)} evaluations"
    )


def write(found: list[Evaluation], out: Path) -> None:
    """``distill.json`` and ``distill.png``. One rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    out.mkdir(parents=True)
    (out / "distill.json").write_text(json.dumps([asdict(one) for one in found], indent=1))
    figure, axis = pyplot.subplots(figsize=(5.5, 3.4), layout="constrained")
    steps = [one.step for one in found]
    axis.plot(steps, [one.student for one in found], color="#c2792d", label="student")
    axis.plot(steps, [one.teacher for one in found], color="#0b6e99", label="teacher, its average")
    axis.set_xlabel("steps")
    axis.set_ylabel("validation loss, nats per byte")
    axis.legend(frameon=False)
    figure.savefig(out / "distill.png", dpi=110)
    pyplot.close(figure)
