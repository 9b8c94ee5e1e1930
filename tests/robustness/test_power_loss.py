"""A power failure at any moment leaves the old result or the new one under its name, and never a broken one.

A process that is killed loses nothing that it has written. A machine that loses its power does: bytes and names that
were not synced are gone, each by itself. So a rename that is on disk may lead to a file that is not.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from support.killing import forked, make_trainer, train_once, whole
from support.power_loss import Tree, lay_out, record

import pytest
import torch

from dist_ema import merge, read_checkpoint, verify_checkpoint
from dist_ema.offline.merging.snapshots import paths_of

Mark = Callable[[], None]
Files = dict[str, bytes]

#: In both forms; the long one draws many more losses.
thoroughness = pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.long)])


def _send_trees(root: Path, play: Callable[[Path, Mark], None], thorough: bool, pipe: Connection) -> None:
    pipe.send(record(root, play, thorough))


def _each_failure(
    server: multiprocessing.context.BaseContext,
    folder: Path,
    play: Callable[[Path, Mark], None],
    thorough: bool,
    check: Callable[[Path, int], object],
    staging: bool = False,
) -> list[object]:
    """Plays in ``folder / "root"``, then checks what each failure leaves. Gives what the checks return.

    Args:
        server: starts the process that plays.
        folder: for files.
        play: as of :func:`power_loss.record`.
        thorough: as of :func:`power_loss.record`.
        check: gets the directory that a failure left, and how many operations had returned.
        staging: lay out the staging directories too, and check two states that differ in these alone.
    """
    (folder / "root").mkdir(exist_ok=True)
    with forked(server, _send_trees, folder / "root", play, thorough) as (_, pipe):
        trees: list[tuple[Tree, int]] = pipe.recv()
    if not (staging or thorough):
        trees = list(dict.fromkeys((_without_staging(tree), done) for tree, done in trees))
    found = []
    for tree, done in trees:
        lay_out(tree, folder / "left")
        found.append(check(folder / "left", done))
        shutil.rmtree(folder / "left")
    return found


def _without_staging(tree: Tree) -> Tree:
    return frozenset((path, content) for path, content in tree if ".dist_ema-saving-" not in path)


# Saves.


def _save_three_times(root: Path, mark: Mark) -> None:
    model, ema = make_trainer()
    for _ in range(3):
        train_once(model, ema)
        ema.save(root / "deep" / "c")  # the first makes the parent too
        mark()


@thoroughness
def test_a_save_lasts_and_the_old_checkpoint_stands_until_then(
    thorough: bool, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """Else the manifest is on disk before the data that it names, and the only checkpoint is gone."""

    def check(left: Path, done: int) -> int:
        path = left / "deep" / "c"
        found = whole(path) if path.exists() else 0
        assert found in (done, done + 1)
        return found

    found = _each_failure(server, tmp_path, _save_three_times, thorough, check)
    assert set(found) == {0, 1, 2, 3}


# Exports and merges.


def _files(path: Path) -> Files:
    """The bytes of all files, without the versions on a model card: those of the libraries that a process imported."""
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    if "README.md" in found:
        found["README.md"] = found["README.md"].partition(b"| versions | dist_ema")[0]
    return found


def _export(root: Path, mark: Mark) -> None:
    model, ema = make_trainer()
    train_once(model, ema)
    ema.export(root / "out", name="fast", max_shard_size="8KB")
    mark()


@thoroughness
def test_an_export_is_whole_or_not_there(
    thorough: bool, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """A directory of the right names and sizes with zeros in it is loaded without an error."""
    model, ema = make_trainer()
    train_once(model, ema)
    ema.export(tmp_path / "expected", name="fast", max_shard_size="8KB")  # two files and their index

    def check(left: Path, done: int) -> bool:
        path = left / "out"
        if path.exists():
            assert _files(path) == _files(tmp_path / "expected")
        assert path.exists() or done == 0
        return path.exists()

    found = _each_failure(server, tmp_path, _export, thorough, check)
    assert set(found) == {False, True}


def _merge(root: Path, mark: Mark) -> None:
    sources = root.parent
    merge([sources / "a"], root / "out", name="fast", max_shard_size="8KB")
    mark()
    merge([sources / "b"], root / "out", name="fast", max_shard_size="8KB", force=True)
    mark()


def _merge_to_checkpoint(root: Path, mark: Mark) -> None:
    sources = root.parent
    merge([sources / "a"], root / "out", name="fast", checkpoint=True)
    mark()
    merge([sources / "b"], root / "out", name="fast", checkpoint=True, force=True)
    mark()


def _make_sources(folder: Path) -> None:
    model, ema = make_trainer()
    for name in "ab":
        train_once(model, ema)
        ema.save(folder / name)


@thoroughness
def test_a_merge_is_whole_and_force_keeps_the_old_one_until_then(
    thorough: bool, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """An output that is replaced must not be gone, or half of each, in between."""
    _make_sources(tmp_path)
    expected: list[Files] = []
    for name in "ab":
        merge([tmp_path / name], tmp_path / name / "out", name="fast", max_shard_size="8KB")
        expected.append(_files(tmp_path / name / "out"))
    assert expected[0] != expected[1]

    def check(left: Path, done: int) -> int:
        path = left / "out"
        found = 1 + expected.index(_files(path)) if path.exists() else 0
        assert found in (done, done + 1)
        return found

    found = _each_failure(server, tmp_path, _merge, thorough, check)
    assert set(found) == {0, 1, 2}


@thoroughness
def test_a_merge_into_a_checkpoint_is_whole_and_force_keeps_the_old_one_until_then(
    thorough: bool, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """A checkpoint is replaced in two renames, with files beside the manifest."""
    _make_sources(tmp_path)
    expected = [read_checkpoint(tmp_path / name, name="fast")["0.weight"] for name in "ab"]
    assert not torch.equal(*expected)

    def check(left: Path, done: int) -> int:
        path = left / "out"
        if not path.exists():
            assert done == 0
            return 0
        verify_checkpoint(path)
        weight = read_checkpoint(path)["0.weight"]
        (found,) = [number for number, one in enumerate(expected, start=1) if torch.equal(weight, one)]
        assert found in (done, done + 1)
        return found

    found = _each_failure(server, tmp_path, _merge_to_checkpoint, thorough, check)
    assert set(found) == {0, 1, 2}


# Snapshots.


def _snapshots(root: Path, mark: Mark) -> None:
    """The clock reads 1, 2, 3, then 4, 5, 6, then 2 again: two snapshots are removed, or set aside."""
    model, ema = make_trainer()
    ema.load(root.parent / "a")
    snapshots = ema.snapshot(root / "s", every="1ba", keep=2)
    for number in range(2, 6):
        if number == 5:
            ema.load(root.parent / "b")  # at 2, so those of 3 and 4 are of another run
        train_once(model, ema)
        ema.wait()
        assert snapshots.paths()
        mark()


@thoroughness
def test_a_snapshot_is_whole_or_has_lost_its_name(
    thorough: bool, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """A snapshot that was being removed kept its name while its files went, and synthesize() takes all of a folder."""
    _make_sources(tmp_path)
    # The newest, by the number of snapshots that are written. That of 4 is set aside before the second one of 3.
    newest = [None, "2ba", "3ba", None, "3ba"]

    def check(left: Path, done: int) -> frozenset[str]:
        folder = left / "s"
        named = [path for path in folder.rglob("*") if re.fullmatch(r"\d+ba", path.name)] if folder.exists() else []
        taken = [Path(path) for path in paths_of([folder]) if Path(path) != folder]
        assert set(taken) <= set(named), "synthesize() takes what is no snapshot"
        for path in named:
            assert whole(path) == int(path.name.removesuffix("ba"))
        names = frozenset(path.name for path in taken)
        assert newest[done] is None or newest[done] in names
        assert done < 4 or "4ba" not in names, "two runs are mixed"
        return names

    found = _each_failure(server, tmp_path, _snapshots, thorough, check, staging=True)
    assert {frozenset(), frozenset({"2ba"}), frozenset({"2ba", "3ba"}), frozenset({"3ba", "4ba"})} <= set(found)
