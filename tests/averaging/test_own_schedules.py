"""A schedule of the user's own: it is registered, or refused before anything has trained.

It used to train, and the first save said that nobody could read it again; or a DCP checkpoint was written and called
damaged at the resume. And a file with a schedule that this program does not know is no damaged file: its tensors are
whole.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import dist_ema
from dist_ema import ShardedEMA, schedules
from dist_ema.errors import CheckpointCorruptError, EMAConfigError
from dist_ema.schedules import Schedule
from dist_ema.schedules.registry import KIND_OF, KINDS


@dataclasses.dataclass(frozen=True)
class Annealing(Schedule):
    """Kept up to ``stop``: 1 - gamma / (gamma + stop)."""

    gamma: float = 4.0
    steps: tuple[int, ...] = ()

    def _log_retain(self, start: float, stop: float) -> float:
        return math.log1p(-self.gamma / (self.gamma + stop))


class NoDataclass(Schedule):
    """Has no fields that could be saved."""

    def _log_retain(self, start: float, stop: float) -> float:
        return -1.0


@dataclasses.dataclass(frozen=True)
class HalfLife(schedules.HalfLife):
    """Has the name of one of the library's, which files would be read as."""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Forgets what a test has registered."""
    kinds, names = dict(KINDS), dict(KIND_OF)
    yield
    for known, before in ((KINDS, kinds), (KIND_OF, names)):
        known.clear()
        known.update(before)  # type: ignore[arg-type]


def train(schedule: Schedule, updates: int = 5) -> ShardedEMA:
    torch.manual_seed(0)
    ema = ShardedEMA(model := nn.Linear(3, 3), schedule=schedule)
    for _ in range(updates):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update()
    return ema


def same(one: ShardedEMA, other: ShardedEMA) -> bool:
    return one.fingerprint() == other.fingerprint() and one.num_updates == other.num_updates


@pytest.mark.parametrize("schedule", [Annealing(), NoDataclass(), HalfLife("3ba")], ids=lambda one: type(one).__name__)
def test_an_unregistered_schedule_is_refused_before_training(schedule: Schedule) -> None:
    for options in ({"schedule": schedule}, {"averages": {"a": 0.5, "b": schedule}}):
        with pytest.raises(EMAConfigError, match=r"schedules\.register\(") as caught:
            ShardedEMA(nn.Linear(3, 3), **options)
        assert ("averages['b']" if "averages" in options else "schedule=") in str(caught.value)


def through_save(ema: ShardedEMA, again: ShardedEMA, path: Path) -> None:
    ema.save(path)
    again.load(path)


def through_dcp(ema: ShardedEMA, again: ShardedEMA, path: Path) -> None:
    dcp.save({"ema": ema}, checkpoint_id=path)
    dcp.load({"ema": again}, checkpoint_id=path)


def through_torch_save(ema: ShardedEMA, again: ShardedEMA, path: Path) -> None:
    torch.save(ema.state_dict(full=True), path)
    again.load_state_dict(torch.load(path, weights_only=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [through_save, through_dcp, through_torch_save])
def test_a_registered_schedule_is_saved_and_goes_on(
    way: Callable[[ShardedEMA, ShardedEMA, Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with an option that JSON turns from a tuple into a list: it is the same schedule."""
    schedules.register("Annealing", Annealing)
    ema, again = train(Annealing(3.0, (1, 2))), train(Annealing(3.0, (1, 2)), updates=0)
    way(ema, again, tmp_path / "c")
    assert same(ema, again)
    assert not [record for record in caplog.records if record.name.startswith("dist_ema")]
    other = train(Annealing(2.0), updates=0)
    way(ema, other, tmp_path / "d")
    assert "continues with Annealing(gamma=2.0" in caplog.text


def test_a_registered_name_is_the_one_in_files(tmp_path: Path) -> None:
    schedules.register("mine.v1", HalfLife)
    ema = train(HalfLife("2ba"))
    ema.save(tmp_path / "c")
    assert '"kind":"mine.v1"' in (tmp_path / "c" / "ema.json").read_text()
    (found,) = dist_ema.verify_checkpoint(tmp_path / "c").schedules.values()
    assert type(found) is HalfLife and found == HalfLife("2ba")


@pytest.mark.parametrize(
    ("kind", "cls", "said"),
    [
        ("", Annealing, "kind=''"),
        ("a b", Annealing, "kind='a b'"),
        (None, Annealing, "kind=None"),
        ("HalfLife", Annealing, "of this library"),
        ("Annealing", Annealing(), "a subclass"),
        ("Annealing", nn.Linear, "a subclass"),
        ("Annealing", Schedule, "a subclass"),
        ("NoDataclass", NoDataclass, "@dataclass"),
        ("taken", Annealing, "use another name"),
        ("second", HalfLife, "registered as 'taken'"),
    ],
)
def test_what_cannot_be_registered_says_why(kind: Any, cls: Any, said: str) -> None:
    schedules.register("taken", HalfLife)
    with pytest.raises(EMAConfigError) as caught:
        schedules.register(kind, cls)
    assert said in str(caught.value)


def test_a_class_that_a_notebook_defines_again_replaces_the_old_one() -> None:
    for gamma in (1.0, 2.0):
        cls = dataclasses.make_dataclass("Again", [("gamma", float, gamma)], bases=(Annealing,), frozen=True)
        schedules.register("Again", cls)
        schedules.register("Again", cls)
        assert train(cls()).num_updates == 5


@dataclasses.dataclass(frozen=True)
class Bad(Annealing):
    """Takes what no file can give back."""

    option: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.option, list):
            raise RuntimeError("of the test")


@pytest.mark.parametrize(
    "option",
    [math.nan, {"a": 1}, [1], ((1, 2),), "x" * 3000, object(), 10**400, {1}],
    ids=["nan", "dict", "list", "nested", "long", "object", "huge", "set"],  # the same in every process
)
def test_options_that_no_file_can_give_back_are_refused(option: Any) -> None:
    """By the constructor: not by the first save, and not by the load of what was saved."""
    schedules.register("Bad", Bad)
    try:
        schedule = Bad(option=option)
    except RuntimeError:  # the list that (1,) is read as
        schedule = Bad(option=(1,))
    with pytest.raises(EMAConfigError, match="schedule=Bad"):
        ShardedEMA(nn.Linear(3, 3), schedule=schedule)


# Files whose schedule is not known here.


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    """A folder of two snapshots, a dcp checkpoint and a torch file, by a program that knows more than this one."""
    schedules.register("Annealing", Annealing)
    torch.manual_seed(0)
    ema = ShardedEMA(model := nn.Linear(3, 3), averages={"ema": Annealing(), "other": 0.5})
    snapshots = ema.snapshot(tmp_path / "snapshots", every="3ba")
    for _ in range(6):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update()
        ema.wait()
    assert len(snapshots.paths()) == 2
    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp")
    torch.save(ema.state_dict(full=True), tmp_path / "file.pt")
    ema.save(tmp_path / "c")
    del KINDS["Annealing"], KIND_OF[Annealing]
    return tmp_path


def test_an_unknown_schedule_is_no_damage(unknown: Path) -> None:
    manifest = dist_ema.verify_checkpoint(unknown / "c")
    assert "Annealing(gamma=4.0" in repr(manifest)
    found = dist_ema.read_checkpoint(unknown / "c", "ema")
    sources = [unknown / "snapshots" / "3ba", unknown / "snapshots" / "6ba"]
    dist_ema.merge(sources, unknown / "merged", name="ema", scheme="uniform", checkpoint=True)
    (merged,) = dist_ema.verify_checkpoint(unknown / "merged").schedules.values()
    assert merged.to_dict() == {"kind": "Annealing", "gamma": 4.0, "steps": []}
    ema = ShardedEMA(nn.Linear(3, 3), averages={"ema": 0.9, "other": 0.5})
    for load in (
        lambda: ema.load(unknown / "c"),
        lambda: dcp.load({"ema": ema}, checkpoint_id=unknown / "dcp"),
        lambda: ema.load_state_dict(torch.load(unknown / "file.pt", weights_only=True)),
    ):
        ema.reset()
        load()
        assert all(torch.equal(value, found[name]) for name, value in ema.full_state_dict("ema").items())


def test_the_command_line_takes_it(unknown: Path) -> None:
    """It runs in a process of its own, which cannot know the user's class at all."""
    for arguments in (
        ["verify", str(unknown / "c")],
        ["inspect", str(unknown / "c"), "--json"],
        ["export", str(unknown / "c"), str(unknown / "out"), "--name", "ema"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "dist_ema", *arguments], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr + done.stdout


def test_numbers_of_an_unknown_schedule_are_asked_for_and_not_guessed(unknown: Path) -> None:
    with pytest.raises(EMAConfigError, match=r"schedules\.register\('Annealing', \.\.\.\)"):
        dist_ema.synthesize(unknown / "snapshots", unknown / "out", name="ema", target="decay=.5")
    schedules.register("Annealing", Annealing)
    made = dist_ema.synthesize(unknown / "snapshots", unknown / "out", name="ema", target="decay=.5")
    assert math.isfinite(made[0].residual or 0.0)


def test_a_registered_class_that_has_changed_since_is_no_damage_either(unknown: Path) -> None:
    changed = dataclasses.make_dataclass("Annealing", [("rate", float, 1.0)], bases=(NoDataclass,), frozen=True)
    schedules.register("Annealing", changed)
    dist_ema.verify_checkpoint(unknown / "c")
    with pytest.raises(EMAConfigError, match="does not take these options"):
        dist_ema.synthesize(unknown / "snapshots", unknown / "out", name="ema", target="decay=.5")


@pytest.mark.parametrize(
    "data", [{}, {"kind": 3}, {"kind": "two words"}, {"kind": "ConstantDecay", "decay": 2.0}, {"kind": "x" * 200}, None]
)
def test_what_describes_no_schedule_is_damage_still(data: Any) -> None:
    from dist_ema.dcp.texts import _write, read_schedule

    with pytest.raises(EMAConfigError):
        schedules.from_file(data)
    if data is not None:
        with pytest.raises(CheckpointCorruptError):
            read_schedule(_write(data), "ema")
