"""The launch scripts: every configuration in process, and one real start of each script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from unittest import mock

from support import ROOT
from support.launching import arguments, environment, free_port
from support.zero_models import reset_deepspeed

import psutil
import pytest
import torch

from demo import loop  # isort: skip
from demo.options import EXPORT, Options, parse  # isort: skip
from demo.report import _folder  # isort: skip
from demo.text import Text  # isort: skip
from demo.wrap import process_group  # isort: skip
from train import main  # isort: skip


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "tp", "zero1", "zero3"])
@pytest.mark.world_size(2)
def test_bf16_leaves_the_export_what_the_average_was(engine: str, tmp_path: Path) -> None:
    if engine.startswith("zero"):
        reset_deepspeed()
    summary = main(arguments(engine, out=tmp_path, precision="bf16"), world_size=2)
    assert summary.exported == pytest.approx(summary.averaged, abs=loop.TOLERANCE["bf16"])


@pytest.mark.world_size(2)
def test_half_life_in_tokens_counts_those_of_all_ranks(tmp_path: Path) -> None:
    """Four sequences of 16 bytes on two ranks: 192 tokens are three batches."""
    batches = main(arguments("fsdp2", out=tmp_path / "batches"), world_size=2)
    tokens = main(arguments("fsdp2", out=tmp_path / "tokens", half_life="192tok"), world_size=2)
    assert tokens.averaged == batches.averaged


@pytest.mark.world_size(2)
def test_a_stop_signal_on_one_rank_does_not_leave_the_others_waiting(tmp_path: Path, rank: int) -> None:
    summary = main(arguments("fsdp2", out=tmp_path, steps=100), world_size=2, stop=lambda: rank == 1)
    assert summary.steps < 20
    assert summary.export.exists()


@pytest.mark.world_size(2)
def test_an_export_unlike_the_average_is_not_reported_as_success(
    tmp_path: Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_evaluate_export", lambda *_: 0.0)
        with pytest.raises(RuntimeError, match=r"its validation loss is 0\.0, but that of the sharded average"):
            main(arguments("ddp", out=tmp_path), world_size=2)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepz", "5"], "stepz is unknown: did you mean steps?"),
        (["--half-life", "5ba"], "half-life is unknown: did you mean half_life?"),
        (["--engine", "fsdp3"], "fsdp2"),
        (["--steps", "0"], "steps"),
        (["--heads", "5"], "width=96: must be a multiple of heads=5"),
        (["--half_life", "20"], "half_life='20'"),
        (["--half_life", "0ba"], "half_life='0ba'"),
        (["--update_interval", "1ep"], "ba, sp, tok"),
        (["--data", "/nowhere/at/all"], "data=/nowhere/at/all: no such file or folder"),
        (["--checkpoint_every", "5ep"], "checkpoint_every='5ep'"),
        (["--batch", "5"], "batch=5: must be a multiple of 2"),
        (["--replicas", "2"], "replicas=2: only with engine=hsdp, not engine=ddp"),
        (["--engine", "hsdp", "--replicas", "3"], "replicas=3: must divide the number of processes, 2"),
        (["--engine", "tp", "--context", "7"], "context=7: must be a multiple of tensor_parallel=2"),
        (["--engine", "zero1"], "engine=zero1: needs deepspeed"),
        (["--config", str(ROOT / "configs" / "zero1.yaml"), "--engine", "zero2"], "zero_optimization.stage 1"),
        (
            ["--config", str(ROOT / "configs" / "zero1.yaml"), "--engine", "ddp"],
            "only with engine=zero1, zero2 or zero3",
        ),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(argv, world_size=2)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_yaml_key_names_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.yaml").write_text("engine: ddp\nhalf_lif: 5ba\n")
    with pytest.raises(SystemExit) as exit_:
        parse(["--config", str(tmp_path / "my.yaml")], world_size=1)
    assert exit_.value.code == 2
    assert "half_lif is unknown: did you mean half_life?" in capsys.readouterr().err


def test_deepspeed_json_and_options_cannot_contradict_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With bf16 set behind its back, train.py would compare bf16 losses as if they were fp32."""
    (tmp_path / "my.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    with pytest.raises(SystemExit):
        parse(["--engine=zero2", f"--deepspeed={tmp_path / 'my.json'}"], world_size=1)
    assert "has bf16, which train.py sets; use precision=bf16" in capsys.readouterr().err


def test_a_command_line_option_wins_over_the_yaml(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("steps: 7\nbatch: 3\n")
    options = parse(["--config", str(tmp_path / "my.yaml"), "--steps", "9"], world_size=1)
    assert (options.steps, options.batch) == (9, 3)


def test_a_wrong_option_does_not_wait_for_torch() -> None:
    """On a cluster every process would import torch, and some already join the group, before one of them says no."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "train.py"), "--stepz=5"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 2
    assert "did you mean steps?" in result.stderr
    assert "jsonargparse" in result.stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in result.stderr.splitlines())


def test_an_earlier_export_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / EXPORT).mkdir()
    with pytest.raises(SystemExit):
        parse(["--out", str(tmp_path)], world_size=1)
    assert "holds the export of an earlier run" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [_folder(Options(engine="fsdp2")) for _ in range(2)]
    assert [str(folder) for folder in folders] == ["runs/fsdp2-001", "runs/fsdp2-002"]


def test_binary_and_hidden_files_are_not_read_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * 4000)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0" + b"b" * 4000)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "c").write_bytes(b"c" * 4000)
    text = Text.read(str(tmp_path), context=16)
    assert (len(text.training), len(text.validation)) == (3800, 200)
    assert set(text.training.tolist()) == {ord("a")}


def test_too_little_text_is_an_error_and_not_an_empty_loop(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match="found 5 bytes to train on and 0 to validate with"):
        Text.read(str(tmp_path), context=16)


def test_ranks_share_out_a_batch_that_does_not_depend_on_their_number() -> None:
    text = Text(torch.arange(256, dtype=torch.uint8).repeat(50), torch.zeros(100, dtype=torch.uint8))
    whole, later = (text.batch(step, 12, 16, seed=0) for step in (5, 6))
    assert not torch.equal(whole, later)
    for parts in (2, 3, 4):
        assert torch.equal(whole, torch.cat([text.batch(5, 12, 16, 0, part, parts) for part in range(parts)]))


def test_plain_python_runs_without_torchrun_and_without_bars_in_a_log(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments(None)]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, timeout=600)
    output = (result.stdout + result.stderr).decode()
    assert result.returncode == 0, output
    assert not {"\r", "\x1b", "\b"} & set(output), output
    assert "validation loss, exported" in output
    assert (tmp_path / "runs" / "ddp-001" / EXPORT / "model.safetensors").exists()


def test_two_nodes_find_each_other_by_multi_node_sh(tmp_path: Path) -> None:
    port = free_port()
    nodes = [
        subprocess.Popen(
            [ROOT / "launch" / "multi_node.sh", *arguments("fsdp2", out=tmp_path)],
            env=environment(NNODES=2, NPROC=1, HEAD="127.0.0.1", PORT=port, ADDRESS="127.0.0.1", RUN_ID=f"test{port}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        outputs = [node.communicate(timeout=600)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], outputs
    tables = [output for output in outputs if "validation loss, exported" in output]
    assert len(tables) == 1, outputs
    assert "world size                  2" in tables[0]


def test_a_preempted_slurm_job_still_exports(tmp_path: Path) -> None:
    """Slurm signals every process of the job's steps: torchrun has to survive what train.py reacts to."""
    stubs = {
        "scontrol": "echo 127.0.0.1",  # show hostnames
        "srun": 'for node in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & done; wait -n; wait -n',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\nset -e\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = environment(
        SLURM_JOB_NUM_NODES=2,
        SLURM_GPUS_ON_NODE=1,
        SLURM_JOB_NODELIST="n",
        SLURM_JOB_ID=free_port(),
        ADDRESS="127.0.0.1",
    )
    variables["PATH"] = f"{tmp_path}{os.pathsep}{variables['PATH']}"
    command = ["bash", "launch/slurm.sbatch", *arguments("fsdp2", out=tmp_path / "out", steps=10**6, eval_every=10)]
    log = tmp_path / "log"
    with log.open("w") as output:
        job = psutil.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT)
    started: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 600
        while "step    10" not in log.read_text() and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        started = job.children(recursive=True)
        for process in started:
            if any(word in " ".join(process.cmdline()) for word in ("torchrun", "train.py")):
                process.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=600) == 0, log.read_text()
    finally:
        for process in [*started, job]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
    assert "stopped by a signal after step" in log.read_text()
    assert any((tmp_path / "out" / "checkpoints").iterdir())
    assert (tmp_path / "out" / EXPORT / "model.safetensors").exists()


@pytest.mark.world_size(1)
def test_a_caller_s_gloo_group_trains_on_the_cpu_also_where_there_is_a_gpu(rank: int) -> None:
    """Weights on a GPU would be gathered in a group that cannot send them under every engine."""
    with mock.patch.object(torch.cuda, "is_available", lambda: True), process_group() as device:
        assert device.type == "cpu"


def test_a_lock_that_a_killed_build_has_left_is_logged_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch waits for it without a word at every later start of DeepSpeed."""
    from demo.extension_lock import warn_of_locks

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert warn_of_locks() == []
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    assert warn_of_locks() == [lock]
    assert str(lock) in caplog.text and "since 72" in caplog.text
    assert lock.exists()
