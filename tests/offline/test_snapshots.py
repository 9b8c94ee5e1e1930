"""Snapshots while training: of the right moment, without a collective call of the thread that trains."""

from __future__ import annotations

import errno
import threading
import uuid
from pathlib import Path
from typing import Any
from unittest import mock

from support.models import CASES, build

import fsspec
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import PowerFunction, ShardedEMA, merge, read_checkpoint, synthesize, verify_checkpoint
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.shadow.reading import wait_for_reads
from dist_ema.storage.local import RunWriter

NAMES = ("all_gather", "all_reduce", "broadcast", "reduce", "barrier", "all_gather_object", "new_group")


@torch.no_grad()
def step(model: nn.Module, ema: ShardedEMA, value: float) -> None:
    """The same bits on any shard."""
    wait_for_reads()  # as every optimizer does
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if parameter.requires_grad:
            local.fill_(value)
    ema.update()


def dense(values: list[float], decay: float) -> float:
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    return average


def elsewhere(function: Any) -> Any:
    """Refuses calls of the thread that trains."""

    def call(*args: Any, **kwargs: Any) -> Any:
        assert threading.current_thread() is not threading.main_thread(), function.__name__
        return function(*args, **kwargs)

    return call


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("case", "options"), [("fsdp2", {}), ("fsdp2", {"offload": "cpu"}), ("ddp", {})])
def test_each_is_the_average_of_its_moment(case: str, options: dict[str, Any], rank: int, tmp_path: Path) -> None:
    model = CASES[case].wrap(build(scalar=False))
    ema = ShardedEMA(model, decay=0.9, **options)
    ema.snapshot(tmp_path / "all", every="3ba")
    kept = ema.snapshot(tmp_path / "kept", every="2ba", keep=2, dtype=torch.bfloat16)
    values = []
    with mock.patch.multiple(dist, **{name: elsewhere(getattr(dist, name)) for name in NAMES}):
        for number in range(1, 11):
            values.append(float(number))
            step(model, ema, values[-1])
            if number == 4:
                ema._average.catalogue = None  # as after a reset(), when nobody knows what other ranks hold
    ema.wait()
    dist.barrier()
    plain = build(scalar=False)
    trained = next(name for name, parameter in plain.named_parameters() if parameter.requires_grad)
    assert [path.name for path in kept.paths()] == ["8ba", "10ba"]
    for path, updates in ((tmp_path / "all" / "3ba", 3), (tmp_path / "all" / "9ba", 9), (tmp_path / "kept" / "8ba", 8)):
        manifest = verify_checkpoint(path)
        assert (manifest.clock.batches, manifest.seen.updates) == (updates, updates)
        weight = read_checkpoint(path)[trained]
        expected = torch.full_like(weight, dense(values[:updates], 0.9))
        torch.testing.assert_close(weight, expected, rtol=2**-8 if weight.dtype == torch.bfloat16 else 1e-6, atol=0)
        dtypes = {tensor.dtype for tensor in manifest.averages["ema"].values()}
        assert ("BF16" in dtypes) == (path.parent.name == "kept")
        assert manifest.lacking == tuple(name for name, value in plain.named_parameters() if not value.requires_grad)


@pytest.mark.world_size(2)
def test_a_restart_goes_on_and_sets_those_beyond_its_moment_aside(rank: int, tmp_path: Path) -> None:
    """Else synthesize() would mix two runs, and keep= would remove what was just written."""
    averages = {"short": PowerFunction(sigma_rel=0.05), "long": PowerFunction(sigma_rel=0.1)}
    for start in (0, 15):  # the second run goes on from the snapshot of 15, before the one of 20
        model = CASES["fsdp2"].wrap(build(scalar=False))
        ema = ShardedEMA(model, averages=averages)
        if start:
            ema.load(tmp_path / "15ba")
            assert ema.clock.batches == 15
        snapshots = ema.snapshot(tmp_path, every="5ba")
        for number in range(start + 1, 31 if start else 23):
            step(model, ema, float(number + start))
        ema.wait()
        dist.barrier()
    assert [path.name for path in snapshots.paths()] == ["5ba", "10ba", "15ba", "20ba", "25ba", "30ba"]
    assert [path.name for path in (tmp_path / "abandoned-1").iterdir()] == ["20ba"]
    assert verify_checkpoint(tmp_path / "abandoned-1" / "20ba").clock.batches == 20
    made = synthesize(snapshots.paths(), tmp_path / "out", target="sigma_rel=.07", checkpoint=True)
    assert made[0].residual < 0.2
    merge(snapshots.paths()[-3:], tmp_path / "merged", name="long", scheme="wsm:sqrt")
    snapshots.remove()
    for _ in range(6):
        ema.update()
    ema.wait()
    assert len(snapshots.paths()) == 6


def test_what_fails_in_one_is_raised_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5)
    snapshots = ema.snapshot(tmp_path / "s", every="2ba")
    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "sync", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        ema.update()
        ema.update()
        with pytest.raises(CheckpointError, match="No space left"):
            ema.wait()
    assert not snapshots.paths()
    ema.update()
    ema.update()
    ema.wait()
    assert [path.name for path in snapshots.paths()] == ["4ba"]
    assert ema.num_updates == 4


def test_moments_in_every_unit_have_a_name(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.5)
    kinds = {
        unit: ema.snapshot(tmp_path / unit, every=f"{value}{unit}") for unit, value in {"ep": 0.5, "tok": 1000}.items()
    }
    for _ in range(4):
        ema.update(tokens=500, epochs=0.25)
        ema.wait()
    assert {unit: [path.name for path in one.paths()] for unit, one in kinds.items()} == {
        "ep": ["0.5ep", "1ep"],
        "tok": ["1000tok", "2000tok"],
    }


@pytest.mark.parametrize(
    "options",
    [{"every": "0ba"}, {"every": "x"}, {"keep": 0}, {"keep": True}, {"dtype": torch.int8}, {"folder": ""}],
)
def test_what_is_wrong_is_refused_at_once(options: dict[str, Any], tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.5)
    with pytest.raises(EMAConfigError):
        ema.snapshot(**{"folder": tmp_path, "every": "5ba", **options})
    ema.update()
    assert not list(tmp_path.iterdir())


def test_snapshots_at_a_url(tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.5)
    ema.snapshot("memory://snapshots", every="2ba")
    ema.update()
    ema.update()
    ema.wait()
    assert verify_checkpoint("memory://snapshots/2ba").seen.updates == 2
    with pytest.raises(EMAConfigError, match="at a URL are not removed"):
        ema.snapshot("memory://snapshots", every="2ba", keep=3)


def test_a_rollback_sets_snapshots_at_a_url_aside(caplog: pytest.LogCaptureFixture) -> None:
    """They stayed among those of the new run, and a list of all that is there mixed two runs."""
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5)
    folder = f"memory://{uuid.uuid4().hex}"
    ema.snapshot(folder, every="1ba")
    for number in range(1, 5):
        step(model, ema, float(number))
        ema.wait()
    ema.load(f"{folder}/2ba", strict=False)
    step(model, ema, -3.0)
    ema.wait()
    assert "beyond 2ba" in caplog.text and "3ba, 4ba" in caplog.text and "ema.json.abandoned" in caplog.text
    system, root = fsspec.core.url_to_fs(folder)
    assert read_checkpoint(f"{folder}/3ba")["weight"][0, 0] == -0.75, "of the new run"
    assert sorted(name.rpartition("/")[2] for name in system.find(f"{root}/3ba")) == ["ema.json", "model.safetensors"]
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        read_checkpoint(f"{folder}/4ba")
    system.mv(f"{root}/4ba/ema.json.abandoned", f"{root}/4ba/ema.json")
    assert verify_checkpoint(f"{folder}/4ba").clock.batches == 4, "nothing is lost"
    for path in ("1ba", "2ba", "3ba"):
        verify_checkpoint(f"{folder}/{path}")


def test_a_rollback_keeps_the_new_snapshots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The newest by number were those of the part that was thrown away, and each new one was removed at once."""
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5)
    snapshots = ema.snapshot(tmp_path / "s", every="1ba", keep=3)
    for number in range(1, 11):
        step(model, ema, float(number))
        if number == 5:
            ema.save(tmp_path / "good")
    ema.load(tmp_path / "good")  # in the same process; another one calls snapshot() before or after load()
    for number in range(6, 8):
        step(model, ema, float(-number))
    ema.wait()
    assert [path.name for path in snapshots.paths()] == ["6ba", "7ba"]
    assert sorted(path.name for path in (tmp_path / "s" / "abandoned-1").iterdir()) == ["10ba", "8ba", "9ba"]
    assert "5ba" in caplog.text and "8ba, 9ba, 10ba" in caplog.text and "abandoned-1" in caplog.text
    assert read_checkpoint(tmp_path / "s" / "7ba")["weight"][0, 0] < 0
    synthesize(tmp_path / "s", tmp_path / "out", target="decay=.5")  # of the new run alone
    for number in range(8, 20):
        step(model, ema, float(-number))
    ema.wait()
    assert [path.name for path in snapshots.paths()] == ["17ba", "18ba", "19ba"]
    assert len(list((tmp_path / "s").iterdir())) == 4, "nothing else is left behind"


def test_moments_with_the_same_six_digits_have_different_names(tmp_path: Path) -> None:
    """Names had six digits, so two snapshots of a long run in epochs replaced each other."""
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.5)
    snapshots = ema.snapshot(tmp_path, every="0.000001ep")
    for _ in range(3):
        ema.update(epochs=1000.0000001)
        ema.wait()
    ema.update(epochs=1e-6)
    ema.wait()
    moments = [snapshots._moment(path.name) for path in snapshots.paths()]
    assert len(moments) == 4 and moments == sorted(moments)
    (tmp_path / "0.333333ep").mkdir()
    assert snapshots._moment("0.333333ep") == 0.333333, "names of earlier versions are read"
    (tmp_path / "0.333333ep").rmdir()
