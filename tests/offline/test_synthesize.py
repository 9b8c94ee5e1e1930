"""Averages made out of snapshots, against averages that were truly kept and the best that any sum could be."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_ema import (
    ConstantDecay,
    HalfLife,
    PowerFunction,
    ShardedEMA,
    Uniform,
    read_checkpoint,
    synthesize,
    verify_checkpoint,
)
from dist_ema.cli import main
from dist_ema.errors import CheckpointCorruptError, CheckpointError, EMAConfigError
from dist_ema.schedules import Schedule

STEPS, EVERY, BATCH = 400, 20, 10
TWO = {"short": PowerFunction(sigma_rel=0.05), "long": PowerFunction(sigma_rel=0.10)}


class Run:
    """A short training: its snapshots, every moment's weights in float64, and the live ones of each snapshot."""

    def __init__(self, folder: Path, averages: dict[str, Schedule | float], **options: Any) -> None:
        torch.manual_seed(0)
        self.folder, self.history = folder, []
        self.model = nn.Linear(60, 50)
        self.ema = ShardedEMA(self.model, averages=averages, **options)
        for step in range(1, STEPS + 1):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            self.ema.update(batches=BATCH)
            if self.ema.num_updates:
                self.history.append(self.model.weight.detach().double().clone().numpy().ravel())
            if step % EVERY == 0:
                self.ema.save(folder / f"{step * BATCH:06}")

    def kept(self, weights: np.ndarray) -> np.ndarray:
        """The average that has these weights of the moments."""
        return np.asarray(weights) @ np.array(self.history[: len(weights)])


def best(columns: list[np.ndarray], wanted: np.ndarray) -> float:
    """The error of the best sum of these values there is, by brute force; its weights sum to 1."""
    matrix = np.stack(columns, 1)
    differences, last = matrix[:, :-1] - matrix[:, -1:], matrix[:, -1]
    found = np.linalg.lstsq(differences, wanted - last, rcond=None)[0]
    return float(np.linalg.norm(differences @ found + last - wanted))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"), TWO)


def made(path: str) -> np.ndarray:
    return read_checkpoint(path)["weight"].double().numpy().ravel()


TARGETS: dict[str, Callable[[], Schedule]] = {
    "sigma_rel=.075": lambda: PowerFunction(sigma_rel=0.075),
    "gamma=10": lambda: PowerFunction(gamma=10),
    "half_life=600ba": lambda: HalfLife("600ba"),
    "decay=.999": lambda: ConstantDecay(0.999),
}


def test_what_is_made_is_what_would_have_been_kept(run: Run, tmp_path: Path) -> None:
    """Power functions and exponentials between the two that were kept, all in one pass."""
    found = synthesize(run.folder, tmp_path / "out", target=list(TARGETS), checkpoint=True)
    for one, (words, schedule) in zip(found, TARGETS.items(), strict=True):
        wanted = run.kept(schedule().profile(STEPS * BATCH - BATCH, every=BATCH).weights)
        error = float(np.linalg.norm(made(one.out) - wanted))
        assert error < 0.02 * np.linalg.norm(wanted)
        assert one.residual < (0.03 if isinstance(schedule(), PowerFunction) else 0.3)
        assert bool(one.notes) == (one.residual > 0.05)
        kept = [
            read_checkpoint(source["path"], source["average"])["weight"].double().numpy().ravel() * weight
            for source, weight in zip(one.sources, one.weights, strict=True)
        ]
        assert np.allclose(made(one.out), sum(kept), rtol=1e-6, atol=1e-6)
        said = json.loads((Path(one.out) / "merge.json").read_text())
        assert (said["scheme"], said["residual"]) == (f"synthesize {words}", one.residual)
        assert [source["average"] for source in said["sources"][:2]] == ["short", "long"]
        assert said["sources"][0]["progress"]["batches"] == EVERY * BATCH
        manifest = verify_checkpoint(one.out)
        assert manifest.schedules == {"ema": schedule()}


def test_it_is_within_a_tenth_of_the_best_sum_that_there_is(tmp_path: Path) -> None:
    """Brute force over the values, which knows the average that was kept; of steps that are independent."""
    run = Run(tmp_path / "run", TWO)
    rng = np.random.default_rng(0)
    run.history = [rng.standard_normal(3000) for _ in run.history]
    columns = []
    for name, schedule in TWO.items():  # snapshots of those weights, in place of the trained ones
        for path in sorted(run.folder.iterdir()):
            steps = int(path.name) // BATCH
            columns.append(run.kept(schedule.profile((steps - 1) * BATCH, every=BATCH).weights))
            _rewrite(path, name, columns[-1])
    wanted = run.kept(PowerFunction(sigma_rel=0.07).profile((STEPS - 1) * BATCH, every=BATCH).weights)
    (one,) = synthesize(
        run.folder, tmp_path / "out", target="sigma_rel=.07", checkpoint=True, dtype=torch.float64, verify=False
    )
    (values,) = (load_file(file)["weight"] for file in Path(one.out).glob("data-*/averages/ema/model.safetensors"))
    error = float(np.linalg.norm(values.numpy().ravel() - wanted))
    assert 0 < error <= 1.1 * best(columns, wanted)


def _rewrite(path: Path, name: str, values: np.ndarray) -> None:
    """Puts values into a checkpoint's file, whose fingerprint is then wrong."""
    from safetensors import safe_open

    (file,) = path.glob(f"data-*/averages/{name}/model.safetensors")
    with safe_open(file, framework="pt") as opened:
        assert opened.get_slice("weight").get_shape() == [50, 60]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    begin = 8 + length + json.loads(data[8 : 8 + length])["weight"]["data_offsets"][0]
    data[begin : begin + 4 * values.size] = values.astype("<f4").tobytes()
    file.write_bytes(bytes(data))


def test_an_earlier_moment_is_made_as_it_was_then(run: Run, tmp_path: Path) -> None:
    (one,) = synthesize(run.folder, tmp_path / "out", target="sigma_rel=.08", at="3200ba", checkpoint=True)
    wanted = run.kept(PowerFunction(sigma_rel=0.08).profile(3200 - BATCH, every=BATCH).weights)
    assert np.linalg.norm(made(one.out) - wanted) < 0.01 * np.linalg.norm(wanted)


def test_windows_falls_and_curves_are_targets_too(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Sharper than what two smooth averages span: what is left is said, and grows with sparser snapshots."""
    caplog.set_level(logging.WARNING)
    linear = lambda steps: np.where(steps > 2000, 1.0, 0.0)  # noqa: E731
    targets = {"window": "window=2000ba", "fall": "wsm:linear@2000ba", "curve": linear}
    found = synthesize(run.folder, tmp_path / "out", target=targets, checkpoint=True)
    assert [Path(one.out).name for one in found] == list(targets)
    assert all(0 < one.residual < 0.2 for one in found)
    wanted = run.kept(
        np.where(np.arange(STEPS) * BATCH > 2000 - BATCH, 1, 0) / (np.arange(STEPS) * BATCH > 2000 - BATCH).sum()
    )
    for one in found:
        assert np.linalg.norm(made(one.out) - wanted) < 0.1 * np.linalg.norm(wanted)
    sparse = sorted(str(path) for path in run.folder.iterdir())[4::5]
    (worse,) = synthesize(sparse, tmp_path / "sparse", target="window=2000ba")
    assert worse.residual > 1.5 * found[0].residual
    assert "too sparse" in caplog.text
    assert worse.notes


def test_snapshots_in_16_bits_are_off_by_as_much_as_their_rounding(tmp_path: Path, run: Run) -> None:
    exact = Run(tmp_path / "exact", TWO)
    coarse = Run(tmp_path / "coarse", TWO, dtype=torch.bfloat16)
    results = [
        synthesize(one.folder, tmp_path / name, target="sigma_rel=.075", checkpoint=True, dtype=torch.float32)[0]
        for name, one in (("a", exact), ("b", coarse))
    ]
    assert results[0].weights == results[1].weights
    gain = sum(map(abs, results[1].weights))
    error = np.abs(made(results[0].out) - made(results[1].out)).max()
    assert error <= 2 * gain * 2**-7 * np.abs(exact.history[-1]).max()


# What is refused.


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no snapshots": ({"snapshots": []}, EMAConfigError, "there is no checkpoint"),
    "no folder": ({"snapshots": "gone"}, CheckpointError, "gone"),
    "a gap in the words": ({"target": "sigma_rel"}, EMAConfigError, "allowed are such as sigma_rel=.05"),
    "no number": ({"target": "decay=x"}, EMAConfigError, "'x' is no number"),
    "no such shape": ({"target": "wsm:square@1000ba"}, EMAConfigError, "shape='square'"),
    "another unit": ({"target": "window=5tok"}, EMAConfigError, "target='5tok'"),
    "a moment to come": ({"at": "9000ba"}, EMAConfigError, "the snapshots reach from 10 to 4000ba"),
    "a moment in another unit": ({"at": "2ep"}, EMAConfigError, "the snapshots count in ba"),
    "no such average": ({"name": "middle"}, EMAConfigError, "name='middle'"),
    "of another run": ({"snapshots": ["run", "later"]}, EMAConfigError, "snapshots of different runs"),
    "of two intervals": ({"snapshots": ["run", "interval"]}, EMAConfigError, "updated every"),
    "not composable": ({"snapshots": ["run", "mean"]}, EMAConfigError, "counts in"),
    "before the first update": ({"snapshots": ["run", "none"]}, CheckpointError, "before the first update"),
    "after one update": ({"snapshots": ["one"]}, EMAConfigError, "before its second update"),
    "damaged": ({"snapshots": ["damaged"]}, CheckpointCorruptError, "is damaged"),
    "two of one name": ({"target": ["decay=.9", "decay=.9"]}, EMAConfigError, "two have one name"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    shutil.copytree(sorted(run.folder.iterdir())[-1], folder / "run")
    shutil.copytree(folder / "run", folder / "damaged")
    (file,) = (folder / "damaged").glob("data-*/averages/long/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(bytes(data))
    model = run.model

    def save(name: str, updates: int, batches: int = BATCH, first: int = 0, **options: Any) -> None:
        ema = ShardedEMA(model, **options)
        if first:
            ema.update(batches=first, due=False)
        for _ in range(updates):
            ema.update(batches=batches)
        ema.save(folder / name)

    save("later", 20, first=500, averages=TWO)
    save("interval", 20, batches=30, averages=TWO)
    save("mean", 20, schedule=Uniform())
    save("none", 0, averages=TWO)
    save("one", 1, averages=TWO)
    return folder


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_made_is_refused_by_name_and_leaves_nothing(
    why: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, error, match = BAD[why]
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    options = {"snapshots": "run", "target": "sigma_rel=.075", **given}
    with pytest.raises(error, match=match):
        synthesize(options.pop("snapshots"), "out", **options)
    assert sorted(place.rglob("*")) == before


def test_the_command_makes_several_and_says_what(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["synthesize", str(run.folder), "--out", str(tmp_path / "out"), "--target", "sigma_rel=.075"]
    assert main([*command, "--target", "window=300ba", "--at", "3000ba", "--checkpoint"]) == 0
    printed = capsys.readouterr()
    assert "too sparse" in printed.err
    assert printed.out.count("off the target by") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sigma_rel=.075", "window=300ba"]
    assert (
        main(["synthesize", str(run.folder), "--out", str(tmp_path / "one"), "--target", "decay=.999", "--json"]) == 0
    )
    (said,) = json.loads(capsys.readouterr().out)
    assert len(said["weights"]) == 2 * STEPS // EVERY
    assert main([*command]) == 2  # it exists
