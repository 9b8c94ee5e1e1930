"""The average beside a Lightning checkpoint: killed saves, Slurm's names, and files of Lightning's own averaging."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_lightning import DECAY, Module, Watch, callback, full, loader, trainer

from dist_ema.errors import CheckpointError
from dist_ema.integrations import lightning_checkpoints as checkpoints
from dist_ema.storage import staging

pl = pytest.importorskip("lightning.pytorch", reason="is in the extra 'lightning'")
pytestmark = pytest.mark.filterwarnings("ignore")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the save runs after it."""


def _fit(folder: Path, steps: int, **options: Any) -> tuple[Any, Any]:
    averaging = callback()
    run = trainer(folder, callbacks=[averaging], max_epochs=-1, max_steps=steps, accumulate_grad_batches=1)
    run.fit(Module(), loader(), **options)
    return run, averaging


@pytest.mark.parametrize("overwrites", [False, True], ids=["new name", "same name"])
@pytest.mark.parametrize("moment", ["average written", "file written", "old average moved"])
def test_a_killed_save_leaves_a_checkpoint_with_its_average(
    moment: str, overwrites: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file used to appear before its average, so a kill between the two left a file that could not be resumed."""
    run, _ = _fit(tmp_path, 2)
    first = tmp_path / "hpc_ckpt_1.ckpt"
    run.save_checkpoint(first)
    second = first if overwrites else tmp_path / "hpc_ckpt_2.ckpt"
    run, _ = _fit(tmp_path, 3, ckpt_path=first)

    def killed(*_: object, **__: object) -> None:
        raise Killed

    def killed_between_renames(_: Path, target: Path) -> None:
        if target.exists():
            target.rename(staging.staging_path(target, staging.Staging.new_token()))  # as replace_directory() begins
        raise Killed

    if moment == "average written":
        monkeypatch.setattr(run.strategy, "save_checkpoint", killed)
    elif moment == "file written":
        monkeypatch.setattr(checkpoints, "replace_directory", killed)
    else:
        monkeypatch.setattr(checkpoints, "replace_directory", killed_between_renames)
    with pytest.raises(Killed):
        run.save_checkpoint(second)
    monkeypatch.undo()
    for found in tmp_path.glob("*hpc_ckpt_*"):
        assert (tmp_path / found.name.removesuffix(".ema")).exists(), "Lightning wants this file"
    steps = {"average written": 2}.get(moment, 3)
    newest = first if moment == "average written" else second
    _, resumed = _fit(tmp_path, 5, ckpt_path=newest)
    assert resumed.ema.clock.batches == resumed.ema.num_updates == 5
    assert torch.load(newest, weights_only=False)["global_step"] == steps


def test_an_average_that_waits_for_no_checkpoint_is_removed_by_a_later_run(tmp_path: Path) -> None:
    """A killed save under a new name leaves a model's worth of bytes that nothing would find again."""
    _, averaging = _fit(tmp_path, 2)
    waiting = Path(str(checkpoints.first_place(str(tmp_path / "never.ckpt"))))
    averaging.ema.save(waiting)
    _fit(tmp_path, 1)
    assert waiting.exists(), "another run may be about to write its checkpoint"
    os.utime(waiting, (0, 0))
    _fit(tmp_path, 1)
    assert not waiting.exists()


def _builtin(folder: Path) -> Path:
    """A run with Lightning's own callback."""
    saving = pl.callbacks.ModelCheckpoint(folder, save_last=True)
    own = pl.callbacks.EMAWeightAveraging(decay=DECAY)
    trainer(folder, callbacks=[own, saving], max_epochs=1, accumulate_grad_batches=1).fit(Module(), loader())
    return folder / "last.ckpt"


def test_a_run_of_lightnings_own_callback_goes_on_from_its_live_weights(tmp_path: Path) -> None:
    """Its file has the average as state_dict: a run that trains on from that has lost its live weights."""
    path = _builtin(tmp_path)
    saved = torch.load(path, weights_only=False)
    seen: dict[str, Any] = {}
    averaging = callback()

    def look(module: Any) -> None:
        seen["live"] = full(module)
        seen["average"] = averaging.ema.full_state_dict()
        seen["clock"] = averaging.ema.clock.batches, averaging.ema.clock.epochs, averaging.ema.num_updates

    options = {"callbacks": [averaging, Watch(look)], "max_epochs": 2, "accumulate_grad_batches": 1}
    module = Module()
    trainer(tmp_path, **options).fit(module, loader(), ckpt_path=path, weights_only=False)
    for name, value in saved["current_model_state"].items():
        assert torch.equal(seen["live"][name], value), name
    averaged = {name for name, tensor in module.named_parameters() if tensor.requires_grad}
    for name in averaged:
        assert torch.equal(seen["average"][name], saved["state_dict"][name]), name
    assert seen["clock"] == (5, 1.0, 5)
    assert averaging.ema.num_updates == 10


def test_several_averages_do_not_take_one_of_lightnings_own_callback(tmp_path: Path) -> None:
    """Which of them it would be is not known."""
    path = _builtin(tmp_path)
    several = callback(decay=None, averages={"fast": 0.5, "slow": 0.9}, evaluate=False)
    with pytest.raises(CheckpointError, match=r"one average.*fast, slow.*decay="):
        trainer(tmp_path, callbacks=[several]).fit(Module(), loader(), ckpt_path=path, weights_only=False)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_module_ends_on_the_average_and_the_last_checkpoint_on_live_weights(strategy: str, tmp_path: Path) -> None:
    """An average that were written into the module too early would be saved as the weights to train on from."""
    saving = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    averaging, module, live = callback(average_at_end=True), Module(strategy == "fsdp2"), {}
    run = trainer(tmp_path, strategy, 2, callbacks=[averaging, saving])
    module.on_train_end = lambda: live.update(full(module))
    run.fit(module, loader())
    average = averaging.ema.full_state_dict()
    ends = full(module)
    for name, value in average.items():
        torch.testing.assert_close(ends[name], value, atol=0, rtol=0)
    again = Module(strategy == "fsdp2")
    resumed = trainer(tmp_path, strategy, 2, callbacks=[callback(), Watch(lambda found: begin.update(full(found)))])
    begin: dict[str, torch.Tensor] = {}
    resumed.fit_loop.max_epochs = 3
    resumed.fit(again, loader(), ckpt_path=run.checkpoint_callback.last_model_path)
    assert all(torch.equal(begin[name], value) for name, value in live.items())
    assert not all(torch.equal(begin[name], value) for name, value in ends.items())
