"""Checkpoints of trainers with an average in them, as an earlier version wrote them, and the runs that go on from them.

``data/written_by_0.1.0/write.py`` and ``test_written_by_trainers.py`` both use this module. A run writes
after two or three steps. A reader resumes, and looks at the average before it trains.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support import written

import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA

STEPS = 3
AVERAGES = {"fast": 0.5, "slow": 0.875}
#: By file: the trainer, and the number of ranks.
FILES = {
    "transformers": ("transformers", 1),
    "accelerate": ("accelerate", 1),
    "lightning": ("lightning", 1),
    "composer": ("composer", 1),
    "composer_sharded": ("composer", 2),
}


class Net(nn.Module):
    """A tied pair, a frozen part, buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """A loss."""
        return self.head(self.frozen(self.norm(self.embed(tokens)))).square().mean()


TOKENS = torch.arange(12).remainder(7).reshape(STEPS, 4)


def facts(ema: ShardedEMA) -> dict[str, Any]:
    """What the file has to bring back. Collective; complete on rank 0."""
    return written.facts(ema)


# Each: trains from the start, or goes on from a checkpoint, and gives the average then.


def transformers(folder: Path, resume: bool) -> dict[str, Any]:
    """``checkpoint-3`` in the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from dist_ema.integrations.transformers import EMACallback

    os.environ.pop("LOCAL_RANK", None)  # what Accelerate takes for several processes
    torch.manual_seed(0)
    sizes = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    rows = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        max_steps=STEPS,
        learning_rate=0.1,
        optim="sgd",
        save_strategy="no" if resume else "steps",
        save_steps=STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
    )
    callback = EMACallback(averages=AVERAGES, evaluate="slow")
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS}") if resume else None)
    assert callback.ema is not None
    return facts(callback.ema)


def accelerate(folder: Path, resume: bool) -> dict[str, Any]:
    """A folder of ``save_state()``, with two averages."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from dist_ema.integrations.accelerate import prepare_ema

    os.environ.pop("LOCAL_RANK", None)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    try:
        accelerator = Accelerator(cpu=True)
        model = Net()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        ema = prepare_ema(accelerator, model, optimizer, decay=0.5)
        other = prepare_ema(accelerator, model, optimizer, name="other", half_life="2ba", dtype=torch.bfloat16)
        if resume:
            accelerator.load_state(str(folder))
        else:
            for tokens in TOKENS:
                accelerator.backward(model(tokens))
                optimizer.step()
                optimizer.zero_grad()
            accelerator.save_state(str(folder))
        return {"ema": facts(ema), "other": facts(other)}
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def lightning(folder: Path, resume: bool) -> dict[str, Any]:
    """``run.ckpt`` and ``run.ckpt.ema``."""
    import lightning.pytorch as pl

    from dist_ema.integrations.lightning import EMACallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, tokens: Tensor, _: int) -> Tensor:
            return self.net(tokens)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    found: list[dict[str, Any]] = []

    class Look(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            found.append(facts(averaging.ema))

    averaging = EMACallback(averages=AVERAGES, evaluate="slow")
    trainer = pl.Trainer(
        callbacks=[averaging, Look()],
        max_epochs=2 if resume else 1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(TOKENS, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(Module(), loader, ckpt_path=str(folder / "run.ckpt") if resume else None)
    if resume:
        return found[0]
    trainer.save_checkpoint(folder / "run.ckpt")
    return facts(averaging.ema)


def composer(folder: Path, resume: bool) -> dict[str, Any]:
    """``ba2.pt``, or a folder of shards: in the middle of an epoch, whose end moves the clock."""
    from support import composer_runs as runs

    from dist_ema.integrations.composer import EMA

    fsdp = "sharded" if runs.dist.get_world_size() > 1 else None
    saved = folder / ("ep0-ba2" if fsdp else "ba2.pt")
    algorithm = EMA(half_life="2ba")
    options: dict[str, Any] = {"load_path": str(saved)} if resume else {}
    if not resume:
        options = {"save_folder": str(folder), "save_filename": "ba{batch}.pt", "save_interval": "2ba"}
    run = runs.trainer(algorithm, fsdp=fsdp, duration="2ba", **options)
    if not resume:
        run.fit()
    assert algorithm.ema is not None
    found = facts(algorithm.ema)
    run.close()
    return found


_RUNS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "transformers": transformers,
    "accelerate": accelerate,
    "lightning": lightning,
    "composer": composer,
}


@contextmanager
def _quietly() -> Iterator[None]:
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)


def write(kind: str, folder: Path) -> dict[str, Any]:
    """Writes the checkpoint; gives what the average was."""
    with _quietly():
        return _RUNS[kind](folder, False)


def read(kind: str, folder: Path) -> dict[str, Any]:
    """Resumes from it; gives what the average is then."""
    with _quietly():
        return _RUNS[kind](folder, True)
