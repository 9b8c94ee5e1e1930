"""What a newcomer meets first: the programs of README and guide, what things print, and what an import costs."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from support import ROOT

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

import dist_ema
from dist_ema import ShardedEMA, schedules, verify_checkpoint
from dist_ema.errors import CheckpointError, EMAStateError

README, START = ROOT / "README.md", ROOT / "dist_ema" / "guide" / "start.md"
#: Of torch, and costly: what plain and DDP users have no need of.
COSTLY = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"}


def run(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def program(page: Path, number: int, script: Path) -> list[str]:
    """Writes a program of a page as the page says, and returns the arguments of torchrun that the page gives."""
    text = page.read_text()
    script.write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number])
    command = re.findall(r"^torchrun (.*)$", text, re.MULTILINE)[0].split()
    assert command == ["--nproc-per-node=2", script.name]
    return command


def start(folder: Path, *command: str) -> str:
    """Runs Python in a folder, and returns what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_first_program_of_the_readme_runs_alone(tmp_path: Path) -> None:
    """It is what a stranger copies first."""
    script = tmp_path / "first.py"
    script.write_text(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0])
    (printed,) = re.findall(r"tensor\(\[\[([\d.]+)", start(tmp_path, script.name))
    assert float(printed) == pytest.approx(16, abs=2)
    assert (tmp_path / "average" / "model.safetensors").stat().st_size > 0


def test_the_program_of_the_readme_goes_on_at_another_world_size(tmp_path: Path) -> None:
    """It says so, and its second run would else begin anew without a word."""
    command = program(README, 1, tmp_path / "train.py")
    torchrun = ("-m", "torch.distributed.run", "--standalone")
    assert "200 updates" in start(tmp_path, *torchrun, *command)
    assert "400 updates" in start(tmp_path, *torchrun, "--nproc-per-node=1", command[-1])


def test_the_program_of_the_guide_runs_with_and_without_torchrun(tmp_path: Path) -> None:
    """As it is written, alone and with the command that the guide gives, on two processes."""
    command = program(START, 0, tmp_path / "example.py")
    assert "ShardedEMA on PlainEngine" in start(tmp_path, command[-1])
    (tmp_path / "average").rename(tmp_path / "earlier")
    assert "ShardedEMA on DTensorEngine" in start(tmp_path, "-m", "torch.distributed.run", "--standalone", *command)
    assert (tmp_path / "average" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    "use",
    [
        "model = nn.Linear(3, 2)",
        "dist.init_process_group('gloo', init_method=f'file://{sys.argv[1]}/store', rank=0, world_size=1); "
        "model = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))",
    ],
    ids=["plain", "ddp"],
)
def test_plain_and_ddp_do_not_wait_for_fsdp_and_dtensor(use: str, tmp_path: Path) -> None:
    """They take 1.3 seconds and more to import, four times as long as all of this library."""
    before = "import sys, torch; import torch.distributed as dist; from torch import nn"
    after = (
        "from dist_ema import ShardedEMA; ema = ShardedEMA(model, buffers='average'); ema.update(); ema.update(); "
        "ema.full_state_dict(); ema.metrics(); ema.save(f'{sys.argv[1]}/ema'); ema.load(f'{sys.argv[1]}/ema'); "
        "ema.average_parameters().__enter__(); "
        f"print(sorted(sys.modules.keys() & {COSTLY!r} - before))"
    )
    code = f"{before}\n{use}\nbefore = set(sys.modules)\n{after}"
    assert run(code, str(tmp_path)) == "[]"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['dist-ema', '--help']\nfrom dist_ema.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    printed = run(code)
    assert "inspect" in printed and printed.endswith("False")


def test_every_schedule_is_there_under_its_bare_name() -> None:
    """The README writes ``PowerFunction(...)``."""
    concrete = [
        kind for name, kind in vars(schedules).items()
        if isinstance(kind, type) and issubclass(kind, schedules.Schedule)
        and kind not in (schedules.Schedule, schedules.UnknownSchedule) and not name.startswith("_")
    ]  # fmt: skip
    assert len(concrete) >= 8
    for kind in concrete:
        assert getattr(dist_ema, kind.__name__) is kind
        assert kind.__name__ in dist_ema.__all__ and kind.__name__ in dir(dist_ema)


def test_repr_of_an_average_says_what_it_is() -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, averages={"fast": 0.9, "slow": schedules.HalfLife("10tok")})
    parts = ("ShardedEMA", "PlainEngine", "'fast': ConstantDecay(decay=0.9)", "'slow': HalfLife(", "2 tensors")
    for part in (*parts, "8 elements", "0 updates", "progress 0ba"):
        assert part in repr(ema), repr(ema)
    ema.update(tokens=5)
    ema.update(tokens=5, epochs=0.5)
    for part in (*parts, "2 updates", "progress 1ba 5tok 0.5ep"):
        assert part in repr(ema), repr(ema)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    assert "NaN" not in repr(ema)
    ema.update()
    assert "1 NaN or Inf element left out on this rank" in repr(ema), repr(ema)
    assert "ShardedEMA" in repr(ShardedEMA.__new__(ShardedEMA))  # in the traceback of a construction that failed


def test_repr_of_a_checkpoint_fits_on_a_line(tmp_path: Path) -> None:
    """It listed every tensor of the model."""
    ema = ShardedEMA(nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))), decay=0.9)
    ema.update()
    ema.save(tmp_path / "c")
    text = repr(verify_checkpoint(tmp_path / "c"))
    for part in ("Manifest", "'ema': ConstantDecay(decay=0.9)", "updates=1", "clock 1ba", "80 tensors in 1 file,"):
        assert part in text, text
    assert len(text) < 200
    for name in ("schedules", "seen.updates", "clock", "averages", "files"):
        assert name in (verify_checkpoint.__doc__ or "")


@pytest.mark.parametrize(
    "copying", [copy.copy, copy.deepcopy, pickle.dumps, lambda ema: torch.save({"ema": ema}, os.devnull)]
)
@pytest.mark.parametrize("inside", [False, True])
def test_copies_and_pickles_are_refused(copying: Callable[[object], object], inside: bool) -> None:
    """A shallow copy shared the shadow with a clock of its own; the others failed at some lock inside."""
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model)
    ema.update()
    target: object = ema
    if inside:
        model.average = ema  # type: ignore[assignment]
        target = model if copying is not copy.copy else ema
    with pytest.raises(EMAStateError, match=r"cannot be copied or pickled.*save\(\).*state_dict\(\)"):
        copying(target)


def test_a_folder_of_another_form_is_named_with_what_reads_it(tmp_path: Path) -> None:
    """The README writes an export and a directory of DCP, and a reader looks into them next."""
    ema = ShardedEMA(nn.Linear(3, 2), decay=0.5)
    ema.update()
    ema.export(tmp_path / "average")
    torch.distributed.checkpoint.save({"ema": ema}, checkpoint_id=tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"no checkpoint.*looks like an export.*dist-ema diff"):
        verify_checkpoint(tmp_path / "average")
    with pytest.raises(CheckpointError, match=r"no checkpoint.*torch.distributed.checkpoint: dcp.load reads it"):
        ema.load(tmp_path / "checkpoint")
