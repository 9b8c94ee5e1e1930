"""The command line on real checkpoints: what it prints, writes and refuses, its exit status, its memory."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dist_ema import ShardedEMA, read_checkpoint, schedules
from dist_ema.cli import main
from dist_ema.formats.manifest import NAME, Manifest
from dist_ema.storage.local import RunWriter

INDEX = "model.safetensors.index.json"
LARGE = 1 << 28


class Small(nn.Module):
    """A tied pair, a frozen part, a buffer of integers, a 0-d and an empty parameter, brackets in a name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 30)
        self.norm = nn.BatchNorm1d(30)
        self.head = nn.Linear(30, 20)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(30, 30).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.register_parameter("[red]", nn.Parameter(torch.ones(2)))


@torch.no_grad()
def make(**options: object) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(3)
    model = Small()
    options.setdefault("averages", {"fast": 0.5, "slow": schedules.HalfLife("100tok")})
    ema = ShardedEMA(model, **options)
    for _ in range(3):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        ema.update(samples=4, tokens=128, epochs=0.25)
    return model, ema


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, ShardedEMA]:
    _, ema = make()
    ema.save(tmp_path / "saved")
    return tmp_path / "saved", ema


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    status, out, err = run(capsys, *arguments, "--json")
    assert err == ""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    return status, json.loads(out, parse_constant=refuse)


def data(path: Path) -> Path:
    return path / Manifest.from_bytes((path / NAME).read_bytes()).data


def flip(file: Path, position: int) -> None:
    """Flips a bit; negative positions count from the end."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def one_line(text: str) -> bool:
    return text.startswith("dist-ema: ") and text.endswith("\n") and text.count("\n") == 1


# inspect


def test_inspect_describes_every_average_and_tensor(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA]
) -> None:
    path, ema = saved
    status, found = run_json(capsys, "inspect", path)
    assert (status, found["started"], found["updates"], found["skipped"]) == (0, True, 3, 0)
    assert found["averages"]["fast"]["schedule"] == {"kind": "ConstantDecay", "decay": 0.5}
    assert found["averages"]["slow"]["schedule"] == {"kind": "HalfLife", "half_life": "100tok"}
    training = {"batches": 3, "samples": 12, "tokens": 384, "epochs": 0.75, "updates": 0}
    assert found["progress"]["training"] == training
    assert found["progress"]["averaged"]["tokens"] == 256
    for name in ("fast", "slow"):
        state = ema.full_state_dict(name)
        rows = [row for row in found["tensors"] if row["average"] in (name, None)]
        assert {known for row in rows for known in (row["name"], *row["aliases"])} == state.keys()
        for row in rows:
            assert (tuple(row["shape"]), row["bytes"]) == (state[row["name"]].shape, state[row["name"]].nbytes)
            assert (data(path) / row["file"]).is_file()
    assert found["totals"]["tensors"] == len(found["tensors"])
    assert found["totals"]["bytes"] == sum(row["bytes"] for row in found["tensors"])
    sizes = {file: (data(path) / file).stat().st_size for file in found["files"]}
    assert found["files"] == sizes
    assert (found["totals"]["files"], found["totals"]["file_bytes"]) == (3, sum(sizes.values()))


def test_inspect_cuts_and_interprets_no_name(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA]
) -> None:
    """Brackets are markup to rich, and its tables are 80 characters wide where there is no terminal."""
    status, out, err = run(capsys, "inspect", saved[0])
    assert (status, err) == (0, "")
    for text in (
        "HalfLife(half_life='100tok')",
        "[red]",
        "embed.weight = head.weight",
        "averages/slow/model.safetensors",
        "384",
        "0.75",
        "not averaged",
        "3 files",
    ):
        assert text in out


def test_a_checkpoint_from_before_the_first_update_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(2, 2))
    ema.save(tmp_path / "saved")
    assert "before the first update" in run(capsys, "inspect", tmp_path / "saved")[1]
    status, _, err = run(capsys, "export", tmp_path / "saved", tmp_path / "out")
    assert status == 0
    assert "before the first update" in err and one_line(err)


# verify


@pytest.mark.parametrize("threads", [1, 3])
def test_verify_finds_nothing_wrong_with_a_whole_checkpoint(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], threads: int
) -> None:
    before = torch.get_num_threads()
    status, out, err = run(capsys, "verify", saved[0], "--threads", threads)
    assert (status, err) == (0, "") and "is whole" in out
    assert torch.get_num_threads() == before
    status, found = run_json(capsys, "verify", saved[0])
    assert (status, found["whole"], found["findings"]) == (0, True, [])
    assert found["totals"] == run_json(capsys, "inspect", saved[0])[1]["totals"]


def test_verify_names_every_damage_and_not_only_the_first(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA]
) -> None:
    """The last tensors of one file, a header of the next, a missing third."""
    folder = data(saved[0])
    fast, slow, live = (folder / name / "model.safetensors" for name in ("averages/fast", "averages/slow", "live"))
    flip(fast, -1)
    flip(fast, -40)
    flip(slow, 12)
    live.unlink()
    status, found = run_json(capsys, "verify", saved[0])
    assert (status, found["whole"]) == (1, False)
    where = [(finding["file"], finding["tensor"] is None) for finding in found["findings"]]
    assert where[-2:] == [("averages/slow/model.safetensors", True), ("live/model.safetensors", True)]
    assert {file for file, _ in where[:-2]} == {"averages/fast/model.safetensors"}
    status, out, err = run(capsys, "verify", saved[0])
    assert (status, err) == (1, "")
    assert len(out.splitlines()) == len(found["findings"]) + 1
    assert all(finding["file"] in out and (finding["tensor"] or "") in out for finding in found["findings"])


def test_a_damaged_manifest_is_a_finding(capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA]) -> None:
    flip(saved[0] / NAME, 300)
    status, found = run_json(capsys, "verify", saved[0])
    assert (status, [finding["file"] for finding in found["findings"]], found["totals"]) == (1, [NAME], None)
    status, out, err = run(capsys, "inspect", saved[0])
    assert (status, out) == (1, "") and one_line(err) and NAME in err


def test_verify_checks_every_chunk_of_a_large_tensor(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor is cut into stripes for threads, and these into chunks: none may be left out or counted twice."""
    monkeypatch.setattr("dist_ema.offline.verify.IO_CHUNK", 1 << 10)
    monkeypatch.setattr("dist_ema.offline.verify._STRIPE", 3 << 10)
    ema = ShardedEMA(nn.Linear(100, 101, bias=False))
    ema.update()
    ema.save(tmp_path / "saved")
    assert run(capsys, "verify", tmp_path / "saved")[0] == 0
    file = data(tmp_path / "saved") / "averages/ema/model.safetensors"
    whole = file.read_bytes()
    for position in range(1, 100 * 101 * 4, 3999):
        flip(file, -position)
        status, found = run_json(capsys, "verify", tmp_path / "saved")
        assert (status, [finding["tensor"] for finding in found["findings"]]) == (1, ["weight"])
        file.write_bytes(whole)


# export


@pytest.mark.parametrize("name", ["fast", "slow"])
def test_export_is_the_full_state_dict_and_loads_into_the_plain_model(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], tmp_path: Path, name: str
) -> None:
    path, ema = saved
    status, out, err = run(capsys, "export", path, tmp_path / "one", "--name", name)
    size = (tmp_path / "one" / "model.safetensors").stat().st_size / 1000
    assert (status, out, err) == (
        0,
        f"{tmp_path / 'one'}: {size:.1f} kB in 1 file, model.safetensors; and README.md\n",
        "",
    )
    state, expected = load_file(tmp_path / "one" / "model.safetensors"), ema.full_state_dict(name)
    assert {"embed.weight", "head.weight", "frozen.weight", "norm.num_batches_tracked"} <= state.keys()
    torch.testing.assert_close(state, expected, rtol=0, atol=0)
    Small().load_state_dict(state)
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"model.safetensors", "README.md"}
    # In pieces, in another precision.
    arguments = ("--name", name, "--dtype", "bf16", "--max-shard-size", "2KB")
    status, found = run_json(capsys, "export", path, tmp_path / "many", *arguments)
    assert (status, found["out"]) == (0, str(tmp_path / "many"))
    assert found["files"] == {file.name: file.stat().st_size for file in (tmp_path / "many").iterdir()}
    ema.export(tmp_path / "reference", name=name, dtype=torch.bfloat16, max_shard_size="2KB")
    found, expected = (
        {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}
        for folder in (tmp_path / "many", tmp_path / "reference")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weight_map = json.loads((tmp_path / "many" / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1 and weight_map.keys() == expected.keys()


def test_export_writes_the_very_bytes_of_an_export_from_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    ema = ShardedEMA(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20)))
    ema.update()
    ema.save(tmp_path / "saved")
    ema.export(tmp_path / "memory")
    assert run(capsys, "export", tmp_path / "saved", tmp_path / "file")[0] == 0
    first, second = (tmp_path / name / "model.safetensors" for name in ("memory", "file"))
    assert first.read_bytes() == second.read_bytes()


def test_export_copies_a_configuration(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], tmp_path: Path
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "hub" / "model.safetensors").write_text("not this")
    arguments = ("--name", "fast", "--config-from", tmp_path / "hub")
    assert run(capsys, "export", saved[0], tmp_path / "out", *arguments)[0] == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_export_of_damaged_data_leaves_nothing_and_other_averages_do_not_matter(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], tmp_path: Path
) -> None:
    flip(data(saved[0]) / "averages/fast/model.safetensors", -1)
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, "export", saved[0], tmp_path / "out", "--name", "fast")
    assert (status, out) == (1, "") and one_line(err) and "averages/fast/model.safetensors" in err
    assert sorted(tmp_path.iterdir()) == before
    assert run(capsys, "export", saved[0], tmp_path / "out", "--name", "slow")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "SAVED", "OUT"],  # which of the two?
        ["export", "SAVED", "OUT", "--name", "medium"],
        ["export", "SAVED", "SAVED", "--name", "fast"],
        ["export", "SAVED", "SAVED/ema.json/OUT", "--name", "fast"],
        ["export", "SAVED", "OUT", "--name", "fast", "--dtype", "int8"],
        ["export", "SAVED", "OUT", "--name", "fast", "--max-shard-size", "much"],
        ["export", "SAVED", "OUT", "--name", "fast", "--config-from", "missing"],
        ["export", "SAVED"],
        ["export", "SAVED", "", "--name", "fast"],
        ["import", "SAVED", ""],
        ["import", "", "OUT"],
        ["inspect", ""],
        ["verify", ""],
        ["diff", "SAVED", ""],
        ["inspect", "missing"],
        ["inspect", "SAVED/ema.json"],
        ["verify", "."],
        ["verify", "SAVED", "--threads", "0"],
        ["verify", "SAVED", "--no-such-option"],
        ["verify", "new\nline"],
        ["diff", "SAVED", "missing"],
        ["diff", "SAVED", "SAVED", "--name", "medium"],
        ["repair", "SAVED"],
        [],
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, ShardedEMA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    replaced = [argument.replace("SAVED", "saved").replace("OUT", "out") for argument in arguments]
    status, out, err = run(capsys, *replaced)
    assert (status, out) == (2, "")
    assert one_line(err), err
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        (["export", "saved", "out"], "--name is missing: the checkpoint has 'fast', 'slow'"),
        (["export", "saved", "out", "--name", "medium"], "--name 'medium': the checkpoint has"),
        (["export", "saved", "out", "--name", "fast", "--max-shard-size", "much"], "--max-shard-size 'much': allowed"),
        (["import", "weights.safetensors", "saved", "--format", "state-dict"], "--overwrite"),
        (["merge", "saved", "saved", "--out", "out", "--name", "fast", "--weights", "1,2"], "--weights [1.0, 2.0] sum"),
        (["profile", "--half-life", "soon"], "--half-life 'soon': not a time string"),
    ],
    ids=str,
)
def test_errors_use_the_words_of_the_command_line(
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, ShardedEMA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    say: str,
) -> None:
    """``name=None`` is Python; whoever types a command looks for an option. With --json the error is an object."""
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.ones(2)}, "weights.safetensors")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and one_line(err) and say in err, err
    assert not re.search(r"\b[a-z_]+=", err), err
    status, out, err = run(capsys, *arguments, "--json")
    assert status == 2 and f"dist-ema: {json.loads(out)['error']}\n" == err
    assert json.loads(out)["status"] == 2


def test_a_damaged_manifest_is_an_object_too(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA]
) -> None:
    (saved[0] / "ema.json").write_bytes(b"{}")
    status, out, _ = run(capsys, "inspect", saved[0], "--json")
    assert status == 1 and json.loads(out)["type"] == "CheckpointCorruptError"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_reader_that_closes_the_pipe_is_no_error(saved: tuple[Path, ShardedEMA], options: list[str]) -> None:
    """``dist-ema inspect CKPT | head -1`` ended with status 1 under ``set -o pipefail``, or with a traceback."""
    command = [sys.executable, "-m", "dist_ema", "inspect", str(saved[0]), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before anything is written
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "merge"])
def test_a_trainers_folder_points_at_the_averages_in_it(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder of checkpoint-* the newest comes first, and checkpoint-1000 is newer than checkpoint-200."""
    _, ema = make(averages={"fast": 0.5})
    for step in (200, 1000):
        ema.save(tmp_path / "run" / f"checkpoint-{step}" / "ema")
    for folder in ("run", "run/checkpoint-1000"):
        out = [str(tmp_path / "out")] if command == "export" else ["-o", str(tmp_path / "out")] * (command == "merge")
        assert main([command, str(tmp_path / folder), *out]) == 2
        said = capsys.readouterr().err
        (advised, *others) = re.findall(r"\S+/ema\b", said)
        assert advised == str(tmp_path / "run/checkpoint-1000/ema"), said
        assert command == "merge" or others == [str(tmp_path / "run/checkpoint-200/ema")] * (folder == "run")
    assert main([command, advised, *out]) == 0


def test_a_trainers_file_points_at_the_average_beside_it(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], tmp_path: Path
) -> None:
    """Lightning's average of run.ckpt is run.ckpt.ema, and run.ckpt is what people have at hand."""
    (tmp_path / "run.ckpt").touch()
    saved[0].rename(tmp_path / "run.ckpt.ema")
    status, _, err = run(capsys, "verify", tmp_path / "run.ckpt")
    assert status == 2 and f"There is one at {tmp_path / 'run.ckpt.ema'}" in err
    assert run(capsys, "verify", tmp_path / "run.ckpt.ema")[0] == 0


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, ShardedEMA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunWriter, "write", fail)
    status, out, err = run(capsys, "export", saved[0], tmp_path / "out", "--name", "fast")
    assert (status, out) == (2, "") and one_line(err) and "No space left" in err
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


# diff


def test_diff_of_equal_checkpoints(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], tmp_path: Path
) -> None:
    """Two saves of one moment differ in their data folders' names alone."""
    path, ema = saved
    ema.save(tmp_path / "again")
    status, found = run_json(capsys, "diff", path, tmp_path / "again")
    assert (status, found["equal"], found["differing"]) == (0, True, 0)
    assert {row["average"] for row in found["tensors"]} == {"fast", "slow", None}
    assert all(row["distance"] == row["largest"] == row["relative"] == 0 for row in found["tensors"])
    status, out, err = run(capsys, "diff", path, tmp_path / "again", "--name", "slow")
    assert (status, err) == (0, "") and "are equal" in out and "fast" not in out


def test_diff_measures_as_dense_tensors_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, decay in (("a", 0.5), ("b", 0.9)):
        make(averages=None, decay=decay)[1].save(tmp_path / name)
    a, b = read_checkpoint(tmp_path / "a"), read_checkpoint(tmp_path / "b")
    status, found = run_json(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (status, found["equal"]) == (1, False)
    assert found["differing"] == sum(not row["equal"] for row in found["tensors"])
    relative = [row["relative"] for row in found["tensors"]]
    assert relative == sorted(relative, reverse=True) and relative[0] > 0
    for row in found["tensors"]:
        x, y = a[row["name"]].double(), b[row["name"]].double()
        assert row["equal"] == torch.equal(x, y)
        assert row["norm"] == pytest.approx(float(x.norm()))
        assert row["distance"] == pytest.approx(float((x - y).norm()))
        assert row["largest"] == pytest.approx(float((x - y).abs().max()) if x.numel() else 0)
    status, out, _ = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert status == 1 and out.splitlines()[-1].endswith("differ")


@torch.no_grad()
def test_diff_sees_bits_and_what_is_not_a_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """-0.0 equals 0.0 and NaN does not equal itself, but bits are bits; and JSON has no NaN."""
    values = {"a": [0.0, math.nan, 0.0], "b": [-0.0, math.nan, 0.0]}
    for name, (zero, nan, number) in values.items():
        model = nn.ParameterDict(
            {"zero": torch.full((3,), zero), "nan": torch.full((3,), nan), "number": torch.full((3,), number)}
        )
        if name == "b":
            model["number"][1] = math.nan
        ema = ShardedEMA(model)
        ema.update()
        ema.save(tmp_path / name)
    status, found = run_json(capsys, "diff", tmp_path / "a", tmp_path / "b")
    rows = {row["name"]: row for row in found["tensors"]}
    assert (status, [row["equal"] for row in (rows["zero"], rows["nan"], rows["number"])]) == (1, [False, True, False])
    assert [found["tensors"][0]["name"], rows["number"]["distance"], rows["zero"]["distance"]] == ["number", "nan", 0]


def test_diff_lists_what_is_missing_and_mismatched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, model in (
        ("a", nn.ModuleDict({"same": nn.Linear(2, 3), "other": nn.Linear(4, 4, bias=False)})),
        ("b", nn.ModuleDict({"same": nn.Linear(2, 4), "another": nn.Linear(4, 4, bias=False)})),
    ):
        ShardedEMA(model).save(tmp_path / name)
    status, out, err = run(capsys, "diff", tmp_path / "a", tmp_path / "b")
    assert (status, out) == (2, "") and one_line(err)
    for name in ("'same.weight'", "'same.bias'", "'other.weight'", "'another.weight'"):
        assert name in err


def test_diff_does_not_compare_damaged_data(
    capsys: pytest.CaptureFixture[str], saved: tuple[Path, ShardedEMA], tmp_path: Path
) -> None:
    shutil.copytree(saved[0], tmp_path / "copy")
    flip(data(tmp_path / "copy") / "averages/fast/model.safetensors", -1)
    status, out, err = run(capsys, "diff", saved[0], tmp_path / "copy")
    assert (status, out) == (1, "") and one_line(err) and "averages/fast/model.safetensors" in err


# The program.


@pytest.mark.parametrize(
    ("arguments", "say"),
    [
        (
            ["inspect", "saved/ema.json"],
            "saved/ema.json is no checkpoint: it is a file, and a checkpoint is a directory",
        ),
        (["verify", "saved/ema.json"], "saved/ema.json is no checkpoint: it is a file"),
        (["import", "saved/ema.json", "new"], "saved/ema.json cannot be imported"),
        (["import", "picture.png", "new"], "picture.png cannot be imported"),
        (["import", "empty", "new"], "empty cannot be imported"),
        (["import", "a.zip", "new"], "a.zip is a zip file, but not one of torch.save"),
        (["import", "a.safetensors", "new"], "--format state-dict takes them"),
        (["import", "picture.png/x", "new"], "picture.png/x cannot be read: Not a directory"),
        (["plan", "picture.png"], "picture.png cannot be read as a config.json"),
        (["plan", "missing"], "missing does not exist"),
        (["export", "saved"], "(see dist-ema export --help)"),
        (["verify", "saved", "--threads", "many"], "(see dist-ema verify --help)"),
        (["repair"], "(see dist-ema --help)"),
    ],
    ids=str,
)
def test_a_wrong_file_is_said_in_a_sentence_and_is_no_damage(
    capsys: pytest.CaptureFixture[str],
    saved: tuple[Path, ShardedEMA],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    say: str,
) -> None:
    """``[Errno 20]`` tells a programmer something, and status 1 would say that a checkpoint is damaged."""
    monkeypatch.chdir(tmp_path)
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    Path("empty").touch()
    with zipfile.ZipFile("a.zip", "w") as packed:
        packed.writestr("readme.txt", "hello")
    save_file({"a": torch.ones(2)}, "a.safetensors")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and one_line(err), err
    assert say in err and "Errno" not in err
    assert not Path("new").exists()


def test_shells_can_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands and options; without torch, or each press of the key would take seconds."""
    code = "import sys; from dist_ema.cli import main; main()\nprint(sys.modules.keys() & {'torch'}, file=sys.stderr)"
    environment = os.environ | {"_DIST_EMA_COMPLETE": "complete_bash", "COMP_WORDS": "dist-ema ve", "COMP_CWORD": "1"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert result.stdout.split() == ["verify"], result.stderr
    assert "torch" not in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["export", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    code = f"import sys; from dist_ema.cli import main; status = main({arguments!r})\n"
    code += "print(status, sorted(sys.modules.keys() & {'torch', 'numpy', 'rich'}), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr == "0 []\n"
    assert result.stdout


def test_the_module_is_the_program(saved: tuple[Path, ShardedEMA]) -> None:
    """Its own process, so also that nothing but the answer is on stdout, and no traceback on stderr."""
    flip(data(saved[0]) / "live/model.safetensors", -1)
    command = [sys.executable, "-m", "dist_ema", "verify", str(saved[0])]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    assert json.loads(result.stdout)["findings"][0]["file"] == "live/model.safetensors"
    command[-1] += "-not"
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "") and one_line(result.stderr)


def test_a_terminal_gets_a_bar(saved: tuple[Path, ShardedEMA]) -> None:
    main_end, terminal = pty.openpty()
    command = [sys.executable, "-m", "dist_ema", "verify", str(saved[0])]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, text=True, env=environment, check=False)
    os.close(terminal)
    shown = os.read(main_end, 1 << 16).decode()
    os.close(main_end)
    assert result.returncode == 0 and "is whole" in result.stdout
    assert "verify" in shown


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 256 MiB, most of it one tensor."""
    folder = tmp_path_factory.mktemp("large")
    model = nn.Sequential(nn.Linear(8192, 7168, bias=False), nn.Linear(8192, 1024, bias=False))
    ema = ShardedEMA(model)
    ema.update()
    ema.save(folder / "saved")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "saved", "out", "--dtype", "bf16"],
        ["verify", "saved", "--threads", "2"],
        ["diff", "saved", "saved"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_memory_does_not_grow_with_the_checkpoint(large: Path, arguments: list[str]) -> None:
    """The high-water mark of the process while it works, over what it has with everything imported."""
    code = f"""
import sys
import zipfile
from pathlib import Path
import torch, dist_ema.cli, rich.console, rich.table
from dist_ema.offline import export
from dist_ema.offline import compare
from dist_ema.offline import verify
from dist_ema.kernels.fingerprint import partial_digest
partial_digest(torch.zeros(8), ((0, 8),))
def status(entry):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(entry + ":"))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
result = dist_ema.cli.main({arguments!r})
print(result, status("VmHWM") - before, file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=large, check=False)
    status, grown = map(int, result.stderr.split())
    assert status == 0
    assert grown < LARGE // 4, f"{grown / 2**20:.0f} MiB"
