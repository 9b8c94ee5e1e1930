"""Files that an earlier version wrote are read bit for bit: users have terabytes of them.

A change of a format, of a pickled class's path or of what a clock means is seen here and nowhere else, since all other
tests read what the same version has just written.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from support import written

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.dcp.boxed import BoxedTensor

#: Engines and world sizes that read what all engines have written: shards by rows, flat slices, replicas, none.
READERS = [("plain", 1), ("fsdp2", 3), ("zero2", 2), ("hsdp", 4)]
SHARDED = [reader for reader in READERS if reader[0] != "plain"]


def fresh(engine: str, options: str, like: range = range(written.UPDATES)) -> ShardedEMA:
    """A run that starts anew, with the live weights of the moment when the file was written, and another seed."""
    ema = written.make(engine, options, seed=9)
    written.advance(ema, like, options, update=False)
    return ema


def check(ema: ShardedEMA, name: str, options: str, moment: str = "written") -> None:
    """Everything is what the writer recorded. Collective."""
    found = written.facts(ema)
    if not dist.is_initialized() or dist.get_rank() == 0:
        assert found == written.expected()[f"options/{options}/{moment}"], name


def check_later(ema: ShardedEMA, name: str, options: str) -> None:
    """It goes on as the writer would have: the clock, the schedule and the seed are those of the file. Collective."""
    written.advance(ema, written.MOMENTS["later"], options)
    check(ema, name, options, "later")


@pytest.mark.parametrize("name", written.SAVED)
def test_a_saved_average_is_loaded_and_goes_on(name: str) -> None:
    options = written.SAVED[name][1]
    dist_ema.verify_checkpoint(written.FOLDER / name)
    ema = fresh("plain", options)
    ema.load(written.FOLDER / name)
    check(ema, name, options)
    check_later(ema, name, options)


@pytest.mark.world_size()
@pytest.mark.parametrize(("engine", "world_size"), SHARDED)
def test_a_saved_average_is_loaded_under_another_engine_and_world_size(engine: str, rank: int, world_size: int) -> None:
    for options in ("engine", "bf16", "without_untracked"):
        ema = fresh(engine, options)
        for name in [name for name, (_, used) in written.SAVED.items() if used == options]:
            ema.reset()
            ema.load(written.FOLDER / name)
            check(ema, name, options)
        check_later(ema, name, options)


@pytest.mark.parametrize("name", written.SAVED)
def test_a_saved_average_is_read_in_one_process(name: str) -> None:
    options = written.SAVED[name][1]
    found = {
        average: written.digests(dist_ema.read_checkpoint(written.FOLDER / name, average))
        for average in dist_ema.verify_checkpoint(written.FOLDER / name).averages
    }
    expected: dict[str, Any] = written.expected()[f"options/{options}/written"]["averages"]
    if options == "without_untracked":
        lacking = {
            name for name, value in written.make("plain", options)._average.engine.modules()[0].named_parameters()
        }
        lacking = {name for name in lacking if name.startswith("frozen.")}
        expected = {
            average: {key: value for key, value in tensors.items() if key not in lacking}
            for average, tensors in expected.items()
        }
    assert found == expected


@pytest.mark.world_size()
@pytest.mark.parametrize(("engine", "world_size"), READERS)
def test_a_dcp_checkpoint_is_loaded_under_any_engine(engine: str, rank: int, world_size: int) -> None:
    for options in ("few", "schedules"):
        ema = fresh(engine, options)
        for name in [name for name, (_, used) in written.DCP.items() if used == options]:
            ema.reset()
            dcp.load({"ema": ema}, checkpoint_id=written.FOLDER / name)
            check(ema, name, options)
        check_later(ema, name, options)


def load_file(path: Path) -> dict[str, Any]:
    """As users are told to: without running code."""
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


@pytest.mark.world_size()
@pytest.mark.parametrize(
    ("name", "engine", "world_size"),
    [(name, engine, written.ENGINES[engine]) for name, (engine, _) in written.PER_RANK.items()],
)
def test_each_ranks_file_of_torch_save_is_loaded(name: str, engine: str, rank: int, world_size: int) -> None:
    """They pickle ``dist_ema.dcp.boxed.BoxedTensor`` by its path."""
    state = load_file(written.FOLDER / f"{name}.rank{rank}.pt")
    parts = [part for average in state["averages"].values() for part in average.values()]
    assert parts and all(type(part) is BoxedTensor for part in parts)
    options = written.PER_RANK[name][1]
    ema = fresh(engine, options)
    ema.load_state_dict(state)
    check(ema, name, options)


@pytest.mark.world_size(2)
def test_live_weights_in_a_file_of_torch_save_are_put_back(rank: int) -> None:
    """Those that a file does not hold stay as they are, so only tensors in the average are compared."""
    ((name, (engine, options)),) = written.LIVE.items()
    model = fresh("plain", options)  # before the first update the average is the model
    expected = model.full_state_dict("slow", include_untracked=False)
    for path, reader in ((f"{name}.rank{rank}.pt", engine), ("torch_save/full_live.pt", "plain")):
        ema = written.make(reader, options)
        ema.load_state_dict(load_file(written.FOLDER / path))
        average = written.digests(ema.full_state_dict("slow", include_untracked=False))
        ema.reset()
        live = written.digests(ema.full_state_dict("slow", include_untracked=False))
        if rank == 0:
            assert average.items() <= written.expected()[f"options/{options}/written"]["averages"]["slow"].items()
            assert live == written.digests(expected)
            assert average != live


@pytest.mark.world_size()
@pytest.mark.parametrize(("engine", "world_size"), READERS)
@pytest.mark.parametrize("name", written.FULL)
def test_a_file_of_full_tensors_is_loaded_under_any_engine(name: str, engine: str, rank: int, world_size: int) -> None:
    options = written.FULL[name][1]
    state = load_file(written.FOLDER / f"{name}.pt")
    state.pop("live", None)
    ema = fresh(engine, options)
    ema.load_state_dict(state)
    check(ema, name, options)


def test_a_dcp_checkpoint_that_torch_turned_into_a_file_is_loaded(tmp_path: Path) -> None:
    for name, (_, options) in written.DCP.items():
        dcp_to_torch_save(written.FOLDER / name, tmp_path / "one.pt")
        ema = fresh("plain", options)
        ema.load_state_dict(load_file(tmp_path / "one.pt")["ema"])
        check(ema, name, options)


@pytest.mark.parametrize("name", written.READABLE)
def test_snapshots_and_merges_are_read(name: str) -> None:
    found = written.digests(dist_ema.read_checkpoint(written.FOLDER / name, written.READABLE[name]))
    assert found == written.expected()[name]


def test_snapshots_are_merged_as_they_were(tmp_path: Path) -> None:
    """Their folder is listed, and the sums are the same bits."""
    snapshots = [written.FOLDER / "snapshots" / moment for moment in ("2ba", "4ba")]
    for name, checkpoint in (("merged", False), ("merged_checkpoint", True)):
        out = tmp_path / name
        dist_ema.merge(snapshots, out, name="slow", weights=[0.25, 0.75], checkpoint=checkpoint)
        read = (lambda path: dist_ema.read_checkpoint(path, "slow")) if checkpoint else written.read_folder
        assert written.digests(read(out)) == written.expected()[name]
    shutil.copytree(written.FOLDER / "snapshots", tmp_path / "snapshots")
    dist_ema.synthesize(tmp_path / "snapshots", tmp_path / "synthesized", target="decay=0.75", checkpoint=True)
    assert written.digests(dist_ema.read_checkpoint(tmp_path / "synthesized")) == written.expected()["synthesized"]


@pytest.mark.parametrize("name", written.FOLDERS)
def test_exports_are_sources_of_a_merge(name: str, tmp_path: Path) -> None:
    assert written.digests(written.read_folder(written.FOLDER / name)) == written.expected()[name]
    dist_ema.merge([written.FOLDER / name] * 2, tmp_path / "out", scheme="uniform")
    assert written.digests(written.read_folder(tmp_path / "out")) == written.expected()[name]
