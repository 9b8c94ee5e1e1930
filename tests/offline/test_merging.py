"""Weighted sums of checkpoints against dense float64 ones; of every kind, engine and number of ranks."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from support.any_engine import make_ema, perturb_ema
from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.memory import peak_growth
from dist_ema import PowerFunction, ShardedEMA, merge, read_checkpoint, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    EMAConfigError,
    EMAStateError,
)
from dist_ema.offline.merging.schemes import scheme_weights
from dist_ema.storage.local import RunWriter


class Net(nn.Module):
    """Floats, integers, a tied weight, a scalar, an empty tensor, and one larger than a range."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 1001)
        self.head = nn.Linear(1001, 300, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(7)
        self.scale = nn.Parameter(torch.ones(()))
        self.none = nn.Parameter(torch.ones(0, 3))


def states(count: int) -> list[dict[str, Tensor]]:
    """Weights of one model at several moments."""
    found = []
    for step in range(count):
        torch.manual_seed(step)
        model = Net()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter))
        model.norm.num_batches_tracked.fill_(step)
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    return found


def save_average(path: Path, state: dict[str, Tensor]) -> None:
    model = Net()
    model.load_state_dict(state)
    ShardedEMA(model, decay=0.9).save(path)


def save_pretrained(path: Path, state: dict[str, Tensor]) -> None:
    path.mkdir()
    names = list(state)
    where = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name].clone() for name in part}, path / file)
        where |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def save_dcp(path: Path, state: dict[str, Tensor]) -> None:
    dcp.save({"model": state, "optimizer": {"step": torch.ones(1)}}, checkpoint_id=path)


def save_file_of_torch(path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)


KINDS: list[Callable[[Path, dict[str, Tensor]], None]] = [save_average, save_pretrained, save_file_of_torch]


def dense(found: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    """The slow and obvious sum, in float64; integers are the newest ones."""
    return {
        name: sum(weight * one[name].double() for weight, one in zip(weights, found, strict=True))
        if newest.is_floating_point()
        else newest
        for name, newest in found[-1].items()
    }


def check(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].shape == value.shape, name
        if value.is_floating_point():  # to the last bit, but for ties of the rounding
            assert torch.allclose(state[name].double(), value, rtol=2**-23, atol=1e-12), name
        else:
            assert torch.equal(state[name], value), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[dict[str, Tensor]]]:
    """Four moments, of three kinds and the first kind again."""
    folder, found = tmp_path_factory.mktemp("saved"), states(4)
    paths = [folder / f"{number}" for number in range(4)]
    for path, state, save in zip(paths, found, [*KINDS, save_average], strict=True):
        save(path, state)
    return paths, found


SCHEMES = ["uniform", "lawa:2", "ema:0.3", "wsm:linear", "wsm:sqrt", "wsm:cosine", "wsm:0.9,0.5,0.1"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_its_dense_sum_over_sources_of_several_kinds(
    scheme: str, saved: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    paths, found = saved
    merged = merge(paths, tmp_path / "out", scheme=scheme)
    assert math.fsum(merged.weights) == pytest.approx(1)
    check(load_file(tmp_path / "out" / "model.safetensors"), dense(found, list(merged.weights)))
    said = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert said["scheme"] == scheme
    assert [source["weight"] for source in said["sources"]] == list(merged.weights)
    assert [source["kind"] for source in said["sources"]] == ["average", "pretrained", "file", "average"]
    read = [weight != 0 for weight in merged.weights]
    assert ["fingerprint" in source for source in said["sources"]] == [*read[:-1], True]  # integers of the newest


def test_wsm_is_what_a_falling_learning_rate_would_have_given() -> None:
    """Each step between two sources counts as often as its factor says."""
    theta = torch.randn(5, dtype=torch.float64).cumsum(0)
    factors = [0.9, 0.6, 0.3, 0.2]
    trained = theta[0] + sum(factor * (b - a) for factor, a, b in zip(factors, theta, theta[1:], strict=False))
    weights = scheme_weights("wsm:0.9,0.6,0.3,0.2", 5)
    assert float(trained) == pytest.approx(float(sum(w * t for w, t in zip(weights, theta, strict=True))))
    for shape, fall in {
        "linear": lambda x: x,
        "sqrt": math.sqrt,
        "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
    }.items():
        factors = [1 - fall(j / 5) for j in range(1, 5)]
        assert scheme_weights(f"wsm:{shape}", 5) == pytest.approx(
            scheme_weights("wsm:" + ",".join(map(repr, factors)), 5)
        )
    average = theta[0]
    for one in theta[1:]:
        average = 0.7 * average + 0.3 * one
    weights = scheme_weights("ema:0.3", 5)
    assert float(average) == pytest.approx(float(sum(w * t for w, t in zip(weights, theta, strict=True))))


def test_weights_may_be_negative_and_need_not_sum_to_one_if_that_is_meant(
    saved: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    paths, found = saved
    merge(paths, tmp_path / "a", weights=[-0.5, 0, 0, 1.5], dtype=torch.bfloat16, max_shard_size="300KB")
    files = sorted((tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    assert (tmp_path / "a" / "model.safetensors.index.json").exists()
    state = {name: value for file in files for name, value in load_file(file).items()}
    expected = dense(found, [-0.5, 0, 0, 1.5])
    assert torch.equal(state["embed.weight"], expected["embed.weight"].bfloat16())
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(EMAConfigError, match=r"sum to 2, not to 1: .* any_sum=True"):
        merge(paths, tmp_path / "b", weights=[0.5] * 4)
    merge(paths, tmp_path / "b", weights=[0.5] * 4, any_sum=True)
    check(load_file(tmp_path / "b" / "model.safetensors"), dense(found, [0.5] * 4))


def test_a_tied_tensor_is_found_under_any_of_its_names_and_complex_ones_are_summed(tmp_path: Path) -> None:
    """save_pretrained leaves out the second name, torch.save has both."""
    kept = []
    for number in range(2):
        torch.manual_seed(number)
        weight, phase = torch.randn(5, 3), torch.randn(4, dtype=torch.complex64)
        kept.append((weight, phase))
        if number:
            save_pretrained(tmp_path / "b", {"embed.weight": weight, "phase": phase})
        else:
            torch.save({"embed.weight": weight, "head.weight": weight, "phase": phase}, tmp_path / "a")
    for order, weights in ((("a", "b"), [0.25, 0.75]), (("b", "a"), [0.75, 0.25])):
        out = tmp_path / "".join(order)
        merge([tmp_path / name for name in order], out, weights=weights)
        found = load_file(out / "model.safetensors")
        assert set(found) == {"embed.weight", "phase"} | ({"head.weight"} if order[1] == "a" else set())
        for name, index in (("embed.weight", 0), ("phase", 1)):
            torch.testing.assert_close(found[name], 0.25 * kept[0][index] + 0.75 * kept[1][index])


def test_training_goes_on_from_a_merge(saved: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path) -> None:
    """Of averages, with name, clock and schedule of the newest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5))
    model[1].bias.requires_grad_(False)
    ema = ShardedEMA(model, averages={"a": 0.5, "b": PowerFunction(sigma_rel=0.1)})
    kept = []
    for step in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(tokens=100)
        ema.save(tmp_path / f"{step}")
        kept.append(ema.full_state_dict("b"))
    merge([tmp_path / f"{step}" for step in (1, 2, 3)], tmp_path / "out", name="b", checkpoint=True)
    manifest = verify_checkpoint(tmp_path / "out")
    assert manifest.schedules == {"b": PowerFunction(sigma_rel=0.1)}
    assert (manifest.clock.batches, manifest.clock.tokens, manifest.seen.updates) == (3, 300, 3)
    assert list(manifest.live) == ["1.bias"]
    found = ShardedEMA(model, averages={"b": PowerFunction(sigma_rel=0.1)})
    found.load(tmp_path / "out")
    check(found.full_state_dict(), dense(kept, [1 / 3] * 3) | {"1.bias": model[1].bias.detach().double()})
    found.update(tokens=100)
    assert found.num_updates == 4
    found.save(tmp_path / "out")  # over it, as over any checkpoint
    verify_checkpoint(tmp_path / "out")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["plain", "fsdp1-full", "fsdp2", "tp", "zero1", "zero3"])
def test_merges_have_the_same_bits_from_every_engine_and_on_two_ranks(case: str, rank: int, tmp_path: Path) -> None:
    ema = make_ema(case)
    for step in range(3):
        perturb_ema(ema, step)
        with mock.patch.object(ema._average.engine, "stepped", lambda: True):
            ema.update()
        ema.save(tmp_path / f"{step}")
    paths = [tmp_path / f"{step}" for step in range(3)]
    merge(paths, tmp_path / "both", name="fast", scheme="wsm:sqrt", dtype=torch.float32)  # by two ranks
    dist.barrier()
    if rank == 0:
        with mock.patch.object(dist, "is_initialized", lambda: False):
            merge(paths, tmp_path / "one", name="fast", scheme="wsm:sqrt", dtype=torch.float32)
        both, one = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "one"))
        assert both.keys() == one.keys()
        assert all(
            torch.equal(both[name].view(-1).view(torch.uint8), one[name].view(-1).view(torch.uint8)) for name in one
        )
        kept = [read_checkpoint(path, "fast") for path in paths]
        expected = dense(kept, scheme_weights("wsm:sqrt", 3))
        check({name: value for name, value in both.items() if name in expected}, expected)
    dist.barrier()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["fsdp1-full-orig", "fsdp2"])
def test_a_model_s_dcp_directory_is_read_by_ranges_of_its_parts(case: str, rank: int, tmp_path: Path) -> None:
    """As FSDP1 and FSDP2 shard it, under a prefix and without one as torchtitan writes it; no part is loaded whole."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    for step in range(2):
        torch.manual_seed(step)
        model = build(scalar=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step)
        plain = {name: value.clone() for name, value in model.state_dict().items()}
        wrapped = CASES[case].wrap(model)
        state = get_model_state_dict(wrapped)
        content = {"model": state, "optimizer": {"lr": 0.1}} if step else {**state, "optimizer.step": torch.ones(1)}
        dcp.save(content, checkpoint_id=tmp_path / f"{step}")
        if rank == 0:
            torch.save(plain, tmp_path / f"plain-{step}")
    dist.barrier()
    if rank == 0:
        with mock.patch.object(dist, "is_initialized", lambda: False):
            merge([tmp_path / "0", tmp_path / "1"], tmp_path / "cut")  # "model." is taken off by itself
            with mock.patch("dist_ema.formats.dcp_directory._load_part") as load:
                merge([tmp_path / "plain-1", tmp_path / "0"], tmp_path / "out", weights=[0.25, 0.75])
                merge([tmp_path / "1"] * 2, tmp_path / "again", prefix="model.")
            assert not load.called
        kept = [torch.load(tmp_path / f"plain-{step}") for step in range(2)]
        check(load_file(tmp_path / "out" / "model.safetensors"), dense(kept, [0.75, 0.25]))
        check(load_file(tmp_path / "again" / "model.safetensors"), dense(kept[1:], [1.0]))
        check(load_file(tmp_path / "cut" / "model.safetensors"), dense(kept, [0.5, 0.5]))
    dist.barrier()


def test_memory_is_some_ranges_whatever_the_size(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}")
        paths[-1].mkdir()
        save_file({"weight": torch.full((8 << 20,), float(number))}, paths[-1] / "model.safetensors")  # 32 MiB
    merge(paths, tmp_path / "first")
    grown = peak_growth(lambda: merge(paths, tmp_path / "out"))
    assert grown < 32 << 20
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["weight"], torch.full((8 << 20,), 2.5))


# What is refused.


def corrupt(path: Path) -> None:
    (file,) = path.glob("data-*/averages/ema/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(bytes(data))


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no source": ({"sources": []}, EMAConfigError, "allowed is a list of paths"),
    "no list": ({"sources": "0"}, EMAConfigError, "allowed is a list of paths"),
    "no such path": ({"sources": ["0", "gone"]}, CheckpointError, "gone does not exist"),
    "an empty folder": ({"sources": ["0", "empty"]}, CheckpointError, "has no safetensors files"),
    "another model": ({"sources": ["0", "other"]}, CheckpointMismatchError, "other has no 'embed.weight'"),
    "another shape": ({"sources": ["0", "shape"]}, CheckpointMismatchError, r"'scale' is \(\) in .* and \(2,\) in"),
    "a pickle that names code": ({"sources": ["0", "code"]}, CheckpointError, "no code of a file is run"),
    "a damaged source": ({"sources": ["damaged", "0"]}, CheckpointCorruptError, "is damaged.*norm.running_var"),
    "a partial file": ({"sources": ["partial", "0"]}, CheckpointCorruptError, "partial.*is damaged"),
    "no such scheme": ({"scheme": "mean"}, EMAConfigError, "allowed are uniform, lawa:K"),
    "too many of lawa": ({"scheme": "lawa:3"}, EMAConfigError, "there are 2 sources"),
    "too few of wsm": ({"scheme": "wsm:.5,.2"}, EMAConfigError, "2 sources have 1 steps"),
    "weights and scheme": ({"weights": [0, 1], "scheme": "uniform"}, EMAConfigError, "give one of them"),
    "weights of none": ({"weights": [0, 0]}, EMAConfigError, "all weights are zero"),
    "too few weights": ({"weights": [1]}, EMAConfigError, "a finite number for each of the 2 sources"),
    "no numbers": ({"weights": [math.nan, 1]}, EMAConfigError, "a finite number for each"),
    "no such average": ({"name": "slow"}, EMAConfigError, "name='slow'"),
    "no dtype of floats": ({"dtype": torch.int8}, EMAConfigError, "dtype=torch.int8"),
    "an output that exists": ({"out": "empty"}, CheckpointError, "exists already"),
    "an output that is a URL": ({"out": "memory://x"}, EMAConfigError, "a merge is a directory of this machine"),
    "configuration of a checkpoint": ({"checkpoint": True, "config_from": "0"}, EMAConfigError, "no configuration"),
    "no configuration": ({"config_from": "gone"}, EMAConfigError, "no such file or directory"),
    "no size": ({"max_shard_size": "much"}, EMAConfigError, "max_shard_size='much'"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, saved: tuple[list[Path], list[dict[str, Tensor]]]) -> Path:
    folder, found = tmp_path_factory.mktemp("bad"), saved[1]
    for number in (0, 1):
        save_average(folder / f"{number}", found[number])
    save_average(folder / "damaged", found[0])
    corrupt(folder / "damaged")
    (folder / "empty").mkdir()
    save_pretrained(folder / "other", {"weight": torch.ones(3)})
    save_pretrained(folder / "shape", {**found[0], "scale": torch.ones(2)})
    save_pretrained(folder / "partial", found[0])
    file = folder / "partial" / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    torch.save({"state_dict": {"weight": torch.ones(3)}, "optimizer": subprocess.Popen}, folder / "code")
    return folder


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_merged_is_refused_by_name_and_leaves_nothing(
    why: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, error, match = BAD[why]
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    options = {"sources": ["0", "1"], "out": "out", **given}
    with pytest.raises(error, match=match):
        merge(options.pop("sources"), options.pop("out"), **options)
    assert sorted(place.rglob("*")) == before


@pytest.mark.world_size(2)
def test_ranks_that_disagree_are_told_and_make_nothing(rank: int, tmp_path: Path) -> None:
    """Halves of two merges would be a model that nobody asked for."""
    if rank == 0:
        for number in range(2):
            save_pretrained(tmp_path / f"{number}", {"a": torch.ones(3), "b": torch.ones(2)})
    dist.barrier()
    paths = [tmp_path / "0", tmp_path / "1"]
    for options in ({"weights": [rank, 1 - rank]}, {"dtype": [torch.float32, torch.bfloat16][rank]}):
        with pytest.raises(EMAStateError, match="ranks ask for different things"):
            merge(paths, tmp_path / "out", **options)
    with pytest.raises(CheckpointError, match=r"rank 1.*does not exist"):
        merge(paths if rank == 0 else [*paths[:1], tmp_path / "gone"], tmp_path / "out")
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_no_verify_takes_what_is_there(place: Path, tmp_path: Path) -> None:
    merge([place / "damaged", place / "0"], tmp_path / "out", verify=False)


def test_averages_stand_in_the_order_of_training(tmp_path: Path) -> None:
    """wsm of sources the wrong way round is another model."""
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5)
    for number in range(2):
        ema.update()
        ema.save(tmp_path / f"{number}")
    merged = merge([tmp_path / "1", tmp_path / "0"], tmp_path / "out", scheme="wsm:0.25")
    assert [Path(source["path"]).name for source in merged.sources] == ["0", "1"]
    assert merged.weights == (0.75, 0.25)


def test_a_full_disk_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunWriter, "sync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    for checkpoint in (False, True):
        with pytest.raises(CheckpointError, match="No space left"):
            merge([place / "0", place / "1"], tmp_path / "parent" / "out", checkpoint=checkpoint)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_killed_merge_leaves_what_the_next_one_removes(checkpoint: bool, place: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, dist_ema\n"
        "from dist_ema.storage.local import RunWriter\n"
        "RunWriter.sync = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"dist_ema.merge([{str(place / '0')!r}, {str(place / '1')!r}], 'out', checkpoint={checkpoint})\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert not (tmp_path / "out").exists()
    merge([place / "0", place / "1"], tmp_path / "out", checkpoint=checkpoint)
    assert [found.name for found in tmp_path.iterdir()] == ["out"]


# The command.


def test_the_command_merges_and_says_what(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = [str(place / "0"), str(place / "1")]
    assert main(["merge", *sources, "--out", str(tmp_path / "a"), "--weights", "0.25,.75", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert said["weights"] == [0.25, 0.75]
    assert main(["merge", *sources, "--out", str(tmp_path / "b"), "--scheme", "wsm:.75", "--checkpoint"]) == 0
    assert "of 2 sources" in capsys.readouterr().out
    assert torch.equal(
        load_file(tmp_path / "a" / "model.safetensors")["scale"], read_checkpoint(tmp_path / "b")["scale"]
    )
    assert main(["merge", *sources, "--out", str(tmp_path / "a")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["merge", *sources, "--out", str(tmp_path / "c"), "--weights", "a,b"]) == 2
    assert main(["merge", str(place / "damaged"), sources[0], "--out", str(tmp_path / "c")]) == 1
    assert main(["merge", str(place / "damaged"), sources[0], "--out", str(tmp_path / "c"), "--no-verify"]) == 0


def test_the_command_runs_on_several_processes(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dist_ema"]
    command += ["merge", str(place / "0"), str(place / "1"), "--out", str(tmp_path / "both")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 2 sources") == 1
    merge([place / "0", place / "1"], tmp_path / "one")
    both, one = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "one"))
    assert both == one
