"""Runs that are killed and started again end where the uninterrupted run ends: weights, optimizer and average."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from support import ROOT
from support.launching import ENGINES, arguments, environment, reference
from support.zero_models import reset_deepspeed

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from demo import loop  # isort: skip
from demo.checkpoints import SAME, Record, begin, commit, latest  # isort: skip
from demo.options import EXPORT, parse  # isort: skip
from demo.report import FINISHED, Summary  # isort: skip
from demo.stop import Stop  # isort: skip
from train import main  # isort: skip

from dist_ema import read_checkpoint

STEPS = 6
#: Seconds after which a run is not slow but hanging.
HANGS = 600
RUN = {"batch": 12, "steps": STEPS, "eval_every": 100, "checkpoint_every": 3}


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:08}"


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {path: found for key, part in items for path, found in tensors(part, f"{name}/{key}").items()}


def saved(out: Path, steps: int, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint: averages, weights and optimizer states."""
    found: dict[str, Any] = {"ema": read_checkpoint(checkpoint(out, steps) / "ema")}
    model = checkpoint(out, steps) / "model"
    if (model / ".metadata").exists():
        scratch.mkdir()
        dcp_to_torch_save(model, scratch / "model.pt")
        found["model"] = torch.load(scratch / "model.pt")
    else:
        found |= {file.name: torch.load(file, weights_only=False) for file in sorted(model.glob("*.pt"))}
    return tensors(found)


def assert_same_end(
    interrupted: Path, uninterrupted: Path, scratch: Path, exactly: bool = True, steps: int = STEPS
) -> None:
    """Exactly: all tensors of the last checkpoint. Else to rounding: the averages, and the validation losses."""
    if not exactly:
        ours, theirs = (read_checkpoint(checkpoint(out, steps) / "ema") for out in (interrupted, uninterrupted))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        ends = [json.loads((out / FINISHED).read_text()) for out in (interrupted, uninterrupted)]
        assert ends[0]["live"] == pytest.approx(ends[1]["live"], abs=1e-5)
        return
    ours, theirs = saved(interrupted, steps, scratch / "ours"), saved(uninterrupted, steps, scratch / "theirs")
    assert list(ours) == list(theirs)
    assert len(ours) > 30
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def run(engine: str, out: Path, stop_after: int = 0, stop: int = Stop.SAVE, **options: object) -> None:
    """One run in the pool. After ``stop_after`` steps its last rank, and no other, is asked to ``stop``. Collective."""
    if engine.startswith("zero"):
        reset_deepspeed()
    asked = count(1)
    size = dist.get_world_size()

    def wanted() -> int:
        return stop if next(asked) == stop_after and dist.get_rank() == size - 1 else Stop.NO

    summary = main(arguments(engine, **(RUN | options), out=out), world_size=size, stop=wanted)
    assert (summary is None) == (stop_after > 0 and stop == Stop.SAVE)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For uninterrupted runs, each of which is made once for all tests, and only read afterwards."""
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture
def uninterrupted(runs: Path, on_ranks: Callable[..., None]) -> Callable[[str, int], Path]:
    """Gives the folder of an engine's uninterrupted run on so many processes."""

    def made(engine: str, world_size: int) -> Path:
        out = runs / f"{engine}-{world_size}"
        if not (out / FINISHED).exists():
            shutil.rmtree(out, ignore_errors=True)  # of one that failed
            on_ranks(run, world_size, engine=engine, out=out)
        return out

    return made


@pytest.mark.parametrize(
    ("engine", "world_size"), [(engine, 2) for engine in ENGINES] + [("fsdp2", 1), ("zero1", 1), ("hsdp", 4), ("tp", 4)]
)
def test_no_engine_trains_or_averages_differently_from_one_process(
    engine: str, world_size: int, uninterrupted: Callable[[str, int], Path]
) -> None:
    """A loss scaled twice, batches that a tensor-parallel group does not share, a rank left out of the evaluation."""
    out = uninterrupted(engine, world_size)
    summary = Summary.read(out)
    assert summary is not None
    live, averaged = reference(parse(arguments(engine, **RUN), world_size))
    assert (summary.engine, summary.world_size, summary.steps) == (engine, world_size, STEPS)
    assert summary.live == pytest.approx(live, abs=1e-3)
    assert summary.averaged == pytest.approx(averaged, abs=1e-3)
    assert summary.exported == pytest.approx(summary.averaged, abs=1e-5)
    assert abs(summary.live - summary.averaged) > 0.01
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tensorboard").glob("events*"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_resumes_bit_for_bit(
    engine: str, tmp_path: Path, on_ranks: Callable[..., None], uninterrupted: Callable[[str, int], Path]
) -> None:
    parts = tmp_path / "parts"
    on_ranks(run, 2, engine=engine, out=parts, stop_after=4)
    on_ranks(run, 2, engine=engine, out=parts)
    assert_same_end(parts, uninterrupted(engine, 2), tmp_path)


def test_ddp_sums_gradients_in_the_order_of_the_uninterrupted_run(
    tmp_path: Path, on_ranks: Callable[..., None]
) -> None:
    """It groups them anew after its first backward, which shows where three ranks or more add up."""
    on_ranks(run, 3, engine="ddp", out=tmp_path / "whole")
    on_ranks(run, 3, engine="ddp", out=tmp_path / "parts", stop_after=4)
    on_ranks(run, 3, engine="ddp", out=tmp_path / "parts")
    assert_same_end(tmp_path / "parts", tmp_path / "whole", tmp_path)


@pytest.mark.parametrize(
    ("engine", "before", "now", "engine_now"),
    [
        ("fsdp1", 2, 3, "fsdp1"),
        ("fsdp2", 2, 1, "ddp"),
        ("tp", 2, 3, "tp"),
        ("zero1", 2, 3, "zero1"),
        ("zero2", 1, 2, "zero2"),
        ("zero3", 3, 2, "zero3"),
    ],
)
def test_another_world_size_or_engine_changes_nothing_but_rounding(
    engine: str,
    before: int,
    now: int,
    engine_now: str,
    tmp_path: Path,
    on_ranks: Callable[..., None],
    uninterrupted: Callable[[str, int], Path],
) -> None:
    parts = tmp_path / "parts"
    on_ranks(run, before, engine=engine, out=parts, stop_after=4)
    on_ranks(run, now, engine=engine_now, out=parts)
    assert_same_end(parts, uninterrupted(engine, before), tmp_path, exactly=False)
    assert not list((parts / "checkpoints").glob(".*"))


def start(command: list[str], engine: str, out: Path, **options: object) -> psutil.Popen:
    """A real run, with the output in ``out``'s sibling ``log``."""
    arguments_ = arguments(engine, **(RUN | options), out=out)
    with (out.parent / "log").open("a") as log:
        return psutil.Popen(
            [*command, str(ROOT / "launch" / "train.py"), *arguments_],
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_for_checkpoint(process: psutil.Popen, out: Path) -> None:
    """Returns at a random moment after the first one."""
    deadline = time.monotonic() + HANGS
    while True:
        ended = process.poll()
        if latest(out) is not None:
            break
        assert ended is None, (out.parent / "log").read_text()
        assert time.monotonic() < deadline, (out.parent / "log").read_text()
        time.sleep(0.02)
    time.sleep(random.uniform(0, 0.3))


def test_torchrun_restarts_after_kill_9_of_a_rank(tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    """Killed at any moment, within a save too: the run that torchrun starts again ends bit for bit like this one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]

    def kill_a_rank(job: psutil.Popen) -> None:
        with suppress(psutil.NoSuchProcess):  # it has ended
            ranks = [child for child in job.children() if "train.py" in " ".join(child.cmdline())]
            assert len(ranks) in (0, 2)
            for rank in ranks[: random.choice((1, 2))][-1:]:
                rank.kill()

    with killed(torchrun, tmp_path, kill_a_rank) as (job, out, options):
        on_ranks(run, 2, engine="fsdp2", out=tmp_path / "whole", **options)
        assert job.wait(timeout=HANGS) == 0, (out.parent / "log").read_text()
    assert "resumed after step" in (out.parent / "log").read_text()
    assert_same_end(out, tmp_path / "whole", tmp_path, steps=options["steps"])


@contextmanager
def killed(
    command: list[str], folder: Path, kill: Callable[[psutil.Popen], None]
) -> Iterator[tuple[psutil.Popen, Path, dict[str, int]]]:
    """A run of FSDP2 that was killed while it trained, where it writes, and its options.

    A run that had ended before, since this process got no time meanwhile, is followed by a longer one.
    """
    for steps in (50, 500, 5000):
        options = {"steps": steps, "checkpoint_every": steps // 10}
        out = folder / f"killed{steps}" / "out"
        out.parent.mkdir()
        job = start(command, "fsdp2", out, **options)
        try:
            wait_for_checkpoint(job, out)
            kill(job)
            if not (out / FINISHED).exists():
                yield job, out, options
                return
        finally:
            end(job)
    pytest.fail("every run ended before it could be killed")


def end(job: psutil.Popen) -> None:
    """Kills what is left of a run."""
    with suppress(psutil.NoSuchProcess):
        for process in [*job.children(recursive=True), job]:
            process.kill()


def test_kill_9_of_a_whole_job_and_a_start_on_more_processes(tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    with killed([sys.executable], tmp_path, end) as (_, out, options):
        on_ranks(run, 2, engine="fsdp2", out=out, **options)
    on_ranks(run, 1, engine="fsdp2", out=tmp_path / "whole", **options)
    assert_same_end(out, tmp_path / "whole", tmp_path, exactly=False, steps=options["steps"])


def test_sigterm_saves_and_is_no_success(tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    """A scheduler takes exit status 0 for a finished run, and would not start it again."""
    out = tmp_path / "stopped"
    job = start([sys.executable], "ddp", out, steps=10**6, checkpoint_every=50)
    try:
        wait_for_checkpoint(job, out)
        job.terminate()
        assert job.wait(timeout=HANGS) == 143, (tmp_path / "log").read_text()
    finally:
        end(job)
    found = latest(out)
    assert found is not None
    assert f"stopped by SIGTERM after step {found.step};" in (tmp_path / "log").read_text()
    assert not (out / EXPORT).exists()
    steps = found.step + 3
    on_ranks(run, 1, engine="ddp", out=out, steps=steps)
    on_ranks(run, 1, engine="ddp", out=tmp_path / "whole", steps=steps)
    assert_same_end(out, tmp_path / "whole", tmp_path, steps=steps)


def test_the_newest_whole_checkpoints_are_kept_and_found(tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    out, folder = tmp_path / "parts", tmp_path / "parts" / "checkpoints"
    options = {"engine": "fsdp2", "checkpoint_every": f"{2 * 12}sp", "keep_checkpoints": 3}
    on_ranks(run, 1, out=out, stop_after=9, steps=12, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006", "step-00000008", "step-00000009"]
    next((folder / "step-00000009" / "ema").rglob("*.safetensors")).write_bytes(b"damaged")
    (folder / "step-00000012" / "model").mkdir(parents=True)  # copied in part
    (folder / ".step-00000010.saving" / "model").mkdir(parents=True)  # killed
    found = latest(out)
    assert found is not None
    assert found.step == 8
    on_ranks(run, 1, out=out, steps=12, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008", "step-00000010", "step-00000012"]
    on_ranks(run, 1, out=tmp_path / "whole", steps=12, **options)
    assert_same_end(out, tmp_path / "whole", tmp_path, steps=12)


def train_no_more(out: Path, **options: object) -> None:
    """A finished run is started again. Collective."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run", lambda *_: pytest.fail("trains anew"))
        summary = main(arguments("fsdp2", **(RUN | options), out=out), world_size=dist.get_world_size())
    assert summary is not None
    assert summary.steps == STEPS


def test_a_finished_run_says_so_and_a_longer_one_goes_on(tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    on_ranks(run, 2, engine="fsdp2", out=tmp_path / "parts", stop_after=4, stop=Stop.EXPORT)
    early = (tmp_path / "parts" / EXPORT / "model.safetensors").read_bytes()
    on_ranks(run, 2, engine="fsdp2", out=tmp_path / "parts")
    assert (tmp_path / "parts" / EXPORT / "model.safetensors").read_bytes() != early
    on_ranks(train_no_more, 2, out=tmp_path / "parts")
    on_ranks(run, 2, engine="fsdp2", out=tmp_path / "parts", steps=STEPS + 3)
    on_ranks(run, 2, engine="fsdp2", out=tmp_path / "whole", steps=STEPS + 3)
    assert_same_end(tmp_path / "parts", tmp_path / "whole", tmp_path, steps=STEPS + 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--width=8"], "width was 16 and is 8"),
        (["--seed=1"], "seed was 0 and is 1"),
        (["--steps=3"], "it has made 4 steps already, and steps is 3"),
        (
            ["--config", str(ROOT / "configs" / "zero1.yaml")],
            "engine was ddp, whose optimizer states zero1 cannot read",
        ),
        (["--resume=never"], "holds checkpoints of an earlier run, and resume=never"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_before_torch_is_imported(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*arguments("ddp", **RUN, out=tmp_path)]
    ours = parse(argv, world_size=2)
    record = Record(4, "ddp", 2, {name: getattr(ours, name) for name in SAME}, 0, [])
    begin(tmp_path, record)
    commit(tmp_path, record, keep=1)
    assert parse(argv, world_size=3) == ours
    with pytest.raises(SystemExit):
        parse([*argv, *options], world_size=2)
    assert message in capsys.readouterr().err


def test_restarts_by_torchrun_need_a_folder_to_come_back_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(SystemExit):
        parse([], world_size=1)
    assert "torchrun's --max-restarts needs an out" in capsys.readouterr().err
