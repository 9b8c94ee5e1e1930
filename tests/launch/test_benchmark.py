"""The benchmark runs, has everyone in its table, and measures an average that is right. No timings."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from support import ROOT

import pytest
import torch

SCRIPT = ROOT / "launch" / "benchmark.py"

import benchmark  # noqa: E402
from benchmarks import names, teacher  # noqa: E402
from benchmarks.peers import Model, peers, weights  # noqa: E402
from benchmarks.update import measure, off_by, train  # noqa: E402


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """The tables of both dtypes, as JSON has them. A process for each contender's memory is left to the program."""
    tables = [measure(3000, 7, 1, "cpu", dtype, lambda *_: None) for dtype in (torch.float32, torch.bfloat16)]
    rows, guards = ([asdict(one) for table in tables for one in table[part]] for part in (0, 1))
    return {"rows": rows, "guard": guards}


@pytest.fixture(scope="module")
def rows(found: dict[str, Any]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = found["rows"]
    return rows


def test_the_program_prints_its_table() -> None:
    """And what each contender's updates take beside their arguments, of which ours is next to nothing."""
    done = script("update", "--elements", "3000", "--tensors", "7", "--repeats", "1", "--dtype", "fp32", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    memory = {row["contender"]: row["extra_mib"] for row in found["rows"]}
    assert len(memory) == 16
    assert sum(value is not None for value in memory.values()) == 14, "all but the bounds"
    assert sorted(found["calling_thread_ms"]) == ["FSDP2", "plain"]
    assert len(found["guard"]) == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contender_is_in_the_table(rows: list[dict[str, object]], dtype: str) -> None:
    names = [str(row["contender"]) for row in rows if row["source"] == dtype]
    assert len(names) == len(set(names)) == 16
    parts = ("bound: a += w * b", "bound of 3 averages", "three averages", "eager route", "skip_nonfinite=False")
    others = ("torchtitan", "AveragedModel", "diffusers", "ema-pytorch", "timm", "NeMo", "DeepSpeed-Chat", "Composer")
    for part in (*parts, *others):
        assert any(part in name for name in names), (part, names)


@pytest.mark.parametrize(("layout", "dtype"), [("plain", "fp32"), ("FSDP2", "bf16")])
def test_teachers_are_measured_beside_what_is_written_by_hand(layout: str, dtype: str) -> None:
    """All of them average the same weights: an fp32 teacher is the float64 average, a bf16 one to its last bit."""
    rows = {row.contender: row for row in teacher.measure(3000, 7, 1, "cpu", layout, dtype)}
    assert len(rows) == 5
    for part in (teacher.OURS, "DINOv3", "TRL", "compute_ema", "bound"):
        (name,) = (name for name in rows if part in name)
        off = rows[name].off_by
        assert (off is None) == (part == "bound")
        if off is not None and (dtype == "fp32" or part == teacher.OURS):
            assert off < {"fp32": 1e-4, "bf16": 0.5}[dtype], name
    assert rows[teacher.OURS].over_ours == 1


def test_three_averages_are_held_against_the_bound_of_three(rows: list[dict[str, object]]) -> None:
    """26 bytes an element, where three updates of bf16 weights would move 30."""
    for dtype, width in (("fp32", 28), ("bf16", 26)):
        by_name = {str(row["contender"]): row for row in rows if row["source"] == dtype}
        bound = next(row for name, row in by_name.items() if name.startswith("bound of 3"))
        assert bound["of_bound"] == 1
        row = by_name["ShardedEMA, three averages"]
        ms, rate = float(str(row["ms"])), float(str(row["gb_per_s"]))
        assert float(str(row["of_bound"])) == pytest.approx(float(str(bound["ms"])) / ms)
        assert rate * ms * 1e6 == pytest.approx(3000 * width, rel=0.01)  # sizes are rounded down


def test_the_guard_is_measured_on_every_route(found: dict[str, Any]) -> None:
    """As a part of the update without it: of one round, so that the table says it too."""
    measured = [(guard["contender"], guard["source"]) for guard in found["guard"]]
    names = ["ShardedEMA", "ShardedEMA, three averages", "ShardedEMA, eager route"]
    assert measured == [(name, dtype) for dtype in ("fp32", "bf16") for name in names]
    ms = {(row["contender"], row["source"]): row["ms"] for row in found["rows"]}
    for guard in found["guard"]:
        label, dtype = guard["contender"], guard["source"]
        ratio = ms[label, dtype] / ms[f"{label}, skip_nonfinite=False", dtype]
        assert guard["cost"] == pytest.approx(ratio - 1, abs=1e-9)


def test_an_installed_package_is_called_and_another_is_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads the table must see which of the two it was."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ema_pytorch", "timm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ema_pytorch.py").write_text(
        "class EMA:\n    def __init__(self, model, average, **options):\n        self.update = lambda: None\n"
    )
    (tmp_path / "ema_pytorch-9.9.dist-info").mkdir()
    (tmp_path / "ema_pytorch-9.9.dist-info" / "METADATA").write_text("Name: ema-pytorch\nVersion: 9.9\n")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('no torchvision')\n")
    try:
        found = peers(torch.float32)
        assert "the form of timm ModelEmaV3" in found
        model = Model(3000, 7, torch.float32, "cpu")
        before = [weight.clone() for weight in weights(model)]
        called = found["ema-pytorch 9.9 EMA"].builder(model)
        train(model)
        called.update()
        assert off_by(called, before, weights(model), updates=1) == pytest.approx(1)  # this one never moves
    finally:
        sys.modules.pop("ema_pytorch", None)


def test_ours_is_the_float64_average(rows: list[dict[str, object]]) -> None:
    ours = [row for row in rows if str(row["contender"]).startswith("ShardedEMA")]
    assert len(ours) == 12
    for row in ours:
        # Relative to a movement of about 1e-3 of the weights: fp32 rounding shows as some 1e-4.
        assert isinstance(row["off_by"], float)
        assert row["off_by"] < 2e-3


def test_a_bf16_average_does_not_follow(rows: list[dict[str, object]]) -> None:
    frozen = [row for row in rows if "bf16 shadow" in str(row["contender"])]
    assert len(frozen) == 4
    assert all(float(str(row["off_by"])) > 0.5 for row in frozen)


def test_numbers_are_there(rows: list[dict[str, Any]]) -> None:
    ms = {(row["source"], row["contender"]): row["ms"] for row in rows}
    for row in rows:
        assert row["over_ours"] == pytest.approx(row["ms"] / ms[row["source"], "ShardedEMA"])
        bound = str(row["contender"]).startswith("bound")
        assert (row["off_by"] is None) == bound
        if bound:
            assert row["extra_mib"] is None


@pytest.mark.parametrize("arguments", [["--elements", "0"], ["--dtype", "fp8"], ["--repeats", "x"]])
def test_bad_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.app(["update", "--elements", "3000", "--tensors", "7", "--repeats", "1", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_benchmark_of_offloading_has_every_way_to_offload() -> None:
    done = script("offload", "--elements", "1000000", "--steps", "1", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["contender"] for row in rows][:2] == ["no average", "ShardedEMA"]
    assert len([row for row in rows if row["contender"].startswith("offload")]) == 3
    for row in rows:
        assert row["step"] >= row["update"] + row["wait"], "a step's parts take longer than the step"


def test_checkpoints_are_compared_on_several_ranks() -> None:
    """Everyone writes and reads in every run; a contender that fails ends it."""
    done = script("checkpoint", "--elements", "100000", "--ranks", "2", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["ranks"] == 2
    assert found["bytes"] == 4 * 1024 * 8 * (100000 // 8 // 1024)
    bounded = any("direct write" in row["contender"] for row in found["rows"])  # where the file system takes them
    assert len(found["rows"]) == 17 + bounded
    ms = {row["contender"]: row["ms"] for row in found["rows"]}
    for row in found["rows"]:
        assert row["mb_per_s"] * row["ms"] * 1e3 == pytest.approx(found["bytes"])
    assert [row["of_raw"] for row in found["rows"] if row["contender"] in ("raw read", "raw write + fsync")] == [1, 1]
    load = next(row for row in found["rows"] if row["contender"] == "load")
    assert load["of_raw"] == pytest.approx(ms["load"] / ms["raw read"])


def test_calls_wait_for_other_ranks_a_number_of_times_that_no_tensor_adds_to() -> None:
    """A call that waits once for each tensor is slow on many ranks; what is local waits for nobody."""
    done = script("calls", "--processes", "2", "--tensors", "50", "--elements", "8", "--repeats", "1", "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["runs"]
    assert found["ranks"] == 2
    assert found["ms"].keys() == found["waits"].keys()
    assert found["waits"].pop("update, FSDP2") == 0
    assert len(found["waits"]) == 10
    assert all(2 <= count <= 12 for count in found["waits"].values()), found["waits"]


def test_calls_are_measured_by_number_of_names() -> None:
    rows = names.measure([160, 20])
    assert [row.names for row in rows] == [20] * (len(rows) // 2) + [160] * (len(rows) // 2)
    steps = [row.step for row in rows if row.names == 20]
    assert steps == [row.step for row in rows if row.names == 160] and len(steps) == len(set(steps)) == 16
    assert all(row.seconds > 0 for row in rows)


def test_the_benchmark_of_a_device_runs_on_the_cpu_as_well() -> None:
    """Minutes on a GPU are dear."""
    sizes = ["--elements", "30000", "--tensors", "7", "--parameters", "50000", "--repeats", "1"]
    done = script("device", "--device", "cpu", *sizes, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [len(found[table]) for table in ("updates", "calls", "training")] == [8, 8, 7]
    for row in found["updates"]:
        assert row["us"] == row["host_us"] > 0
