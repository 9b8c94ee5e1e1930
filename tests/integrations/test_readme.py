"""The lines for each trainer in the guide, as they are written: what a newcomer copies."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support import ROOT

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from dist_ema import ShardedEMA, read_checkpoint

GUIDE = ROOT / "dist_ema" / "guide"
LINES, COMING = GUIDE / "trainers.md", GUIDE / "coming-from.md"
#: What a reader of COMING has: the library that each section is about, without "-" lines.
SECTIONS = re.findall(r"^## (.*)$", COMING.read_text(), re.MULTILINE)


def snippet(trainer: str) -> str:
    return LINES.read_text().split(f"**{trainer}**")[1].split("```python\n")[1].split("```")[0]


def run(section: str, folder: Path, /, **names: Any) -> dict[str, Any]:
    """Runs a snippet in a folder of its own, and returns what it has named."""
    before = Path.cwd()
    os.chdir(folder)
    warnings.simplefilter("ignore")
    try:
        exec(compile(snippet(section), str(LINES), "exec"), names)
    finally:
        os.chdir(before)
    return names


@pytest.mark.world_size(1)
def test_composers_lines(tmp_path: Path) -> None:
    from support import composer_runs

    names = run(
        "Composer", tmp_path, model=composer_runs.Net(), train=composer_runs.loader(0), evaluate=composer_runs.loader(1)
    )
    assert names["trainer"].state.eval_metrics
    average = load_file(tmp_path / "averaged" / "model.safetensors")
    saved = torch.load(tmp_path / "checkpoints" / "ep3-ba9-rank0.pt", weights_only=False)["state"]["model"]
    assert all(torch.equal(value, saved[name]) for name, value in average.items())


@pytest.mark.world_size(1)
def test_lightnings_lines(tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("loss", self.training_step(batch, index))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader(torch.randn(8, 3), batch_size=2)  # type: ignore[arg-type]
    names = run("Lightning", tmp_path, module=Module(), train=data, evaluate=data)
    assert names["trainer"].callbacks[0].ema.num_updates == 8
    (saved,) = tmp_path.rglob("*.ckpt.ema")
    assert read_checkpoint(saved)["layer.weight"].shape == (1, 3)


@pytest.mark.world_size(1)
def test_hugging_faces_lines(tmp_path: Path) -> None:
    from test_transformers import EVAL, TRAIN, tiny
    from transformers import AutoModelForCausalLM, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=8, report_to=[], use_cpu=True
    )
    names = run("Hugging Face Trainer", tmp_path, model=tiny(), arguments=arguments, train=TRAIN, evaluate=EVAL["a"])
    ema: ShardedEMA = names["callback"].ema
    assert ema.num_updates == 6
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "averaged").state_dict()
    assert all(torch.equal(saved[name], value) for name, value in ema.full_state_dict().items())


@pytest.mark.world_size(1)
def test_accelerates_lines(tmp_path: Path) -> None:
    from accelerate.state import AcceleratorState

    model = nn.Linear(3, 1)
    train = DataLoader(torch.randn(8, 3), batch_size=2)  # type: ignore[arg-type]
    try:
        names = run(
            "Accelerate", tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), train=train
        )
    finally:
        AcceleratorState._reset_state(True)
    assert names["ema"].num_updates == 2
    assert read_checkpoint(tmp_path / "state" / "ema")["weight"].shape == (1, 3)


@pytest.mark.world_size(1)
def test_fabrics_lines(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    train = DataLoader(torch.randn(8, 3), batch_size=2)  # type: ignore[arg-type]
    names = run("Fabric", tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), train=train)
    assert names["ema"].num_updates == 4
    assert read_checkpoint(tmp_path / "checkpoint.ema")["weight"].shape == (1, 3)


@pytest.mark.world_size(2)
def test_torchtitans_lines(tmp_path: Path) -> None:
    """The trainer is that of the tests, built as torchtitan's is."""
    from test_torchtitan import Trainer

    from dist_ema.schedules import HalfLifeFraction

    trainer = Trainer(tmp_path)
    trainer.validator = SimpleNamespace(validate=trainer.validate)
    names = run("torchtitan", tmp_path, trainer=trainer, ShardedEMA=ShardedEMA, HalfLifeFraction=HalfLifeFraction)
    trainer.train(3)
    assert names["ema"].num_updates == 3
    assert trainer.checkpointer.states["ema"] is names["ema"]
    assert trainer.validator.validate() != trainer.validate()


def new_lines(section: str) -> str:
    """The lines of a section's diff that a reader has in the end."""
    (diff,) = re.findall(
        r"^```diff\n(.*?)^```", COMING.read_text().split(f"## {section}\n")[1].split("\n## ")[0], re.M | re.S
    )
    assert all(line[0] in "+- " for line in diff.splitlines())
    return "\n".join(line[1:] for line in diff.splitlines() if line[0] != "-")


@pytest.mark.world_size(1)
@pytest.mark.parametrize("section", [section for section in SECTIONS if not section.startswith("NeMo")])
def test_lines_of_those_who_come_from_another_library(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that is named otherwise fails at the first line that they have changed."""
    from support import composer_stubs

    from dist_ema import HalfLifeFraction, Warmup, update_bn
    from dist_ema.integrations.lightning import EMACallback

    composer_stubs.import_composer()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleNamespace(model_parts=[model], optimizers=optimizer, checkpointer=SimpleNamespace(states={}))
    names = {
        "model": model,
        "unet": model,
        "optimizer": optimizer,
        "trainer": trainer,
        "loader": [torch.randn(4, 3)] * 3,
    }
    names |= {"ShardedEMA": ShardedEMA, "Warmup": Warmup, "HalfLifeFraction": HalfLifeFraction}
    exec(compile(new_lines(section), str(COMING), "exec"), names | {"update_bn": update_bn, "EMACallback": EMACallback})
