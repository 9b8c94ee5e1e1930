"""What a newcomer meets first: the guide's example, what things print, and what an import costs."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_ema
from dist_ema import ShardedEMA, schedules, verify_checkpoint
from dist_ema.errors import EMAStateError

GUIDE = Path(__file__).parent.parent / "dist_ema" / "README.md"
#: Of torch, and costly: what plain and DDP users have no need of.
COSTLY = {"torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"}


def run(code: str, *arguments: str) -> str:
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_readmes_example_runs_to_its_end(tmp_path: Path) -> None:
    """As it is written, with the command that the README gives, on two processes."""
    section = GUIDE.read_text().split("## A whole program\n")[1].split("\n## ")[0]
    example = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    command = re.findall(r"^torchrun (.*)$", section, re.MULTILINE)[0].split()
    assert "--nproc-per-node=2" in command
    script = tmp_path / command[-1]
    script.write_text(example)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "average" / "model.safetensors").stat().st_size > 0
    assert "ShardedEMA on DTensorEngine" in result.stdout


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
