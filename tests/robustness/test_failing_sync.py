"""Every close and every sync of a save, export, merge and snapshot fails once, as on a disk that is full or broken."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from support.any_engine import small_ema
from support.faults import Faults

import pytest

from dist_ema import merge, synthesize, verify_checkpoint
from dist_ema.errors import CheckpointError
from dist_ema.offline.export import export_checkpoint
from dist_ema.storage import staging


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints ``1`` and ``2`` of so many updates, and their exports."""
    folder = tmp_path_factory.mktemp("sources")
    for updates in (1, 2):
        small_ema(updates).save(folder / f"{updates}")
        small_ema(updates).export(folder / f"export-{updates}")
        (folder / f"export-{updates}" / "config.json").write_text('{"model_type": "x"}')
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk itself is left alone."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def save(folder: Path, sources: Path) -> None:
    small_ema(2).save(folder / "deep" / "c")


def export(folder: Path, sources: Path) -> None:
    small_ema(2).export(folder / "c", config_from=str(sources / "export-1"))


def export_offline(folder: Path, sources: Path) -> None:
    export_checkpoint(sources / "2", folder / "c")


def merge_folders(folder: Path, sources: Path) -> None:
    merge([sources / "export-1", sources / "export-2"], folder / "c", force=True)


def merge_checkpoints(folder: Path, sources: Path) -> None:
    merge([sources / "1", sources / "2"], folder / "c", checkpoint=True, force=True)


def nothing(folder: Path, sources: Path) -> None:
    """No output is there before."""


def old_export(folder: Path, sources: Path) -> None:
    merge([sources / "export-1"], folder / "c")


def each_fault(
    tmp_path: Path, sources: Path, prepare: Callable[[Path, Path], None], act: Callable[[Path, Path], None]
) -> int:
    """Lets each call fail in a folder of its own. Gives the number of calls."""
    for number in itertools.count():
        folder = tmp_path / str(number)
        folder.mkdir()
        prepare(folder, sources)
        before = files(folder)
        faults = Faults(folder, number)
        with faults.active():
            try:
                act(folder, sources)
                raised = None
            except Exception as error:
                raised = error
        if faults.struck is None:
            assert raised is None
            return number
        path = faults.struck[1]
        if path.endswith(("lock", "lock (deleted)")):
            assert raised is None, "there is nothing in a lock that could be lost"
            continue
        assert isinstance(raised, CheckpointError), (faults.struck, raised)
        named = folder if path == str(folder) else Path(path)
        assert named.name in str(raised), (faults.struck, raised)
        assert files(folder) == before and not list(folder.rglob(".dist_ema*")), (faults.struck, sorted(files(folder)))
        assert {path.name for path in folder.iterdir()} <= {"c"}, "a folder that was made for the output is left"
        if number % 4 == 0:
            act(folder, sources)  # the next one succeeds
    raise AssertionError


@pytest.mark.parametrize(
    ("prepare", "act"),
    [
        (nothing, save),
        (nothing, export),
        (nothing, export_offline),
        (nothing, merge_folders),
        (old_export, merge_folders),
        (nothing, merge_checkpoints),
    ],
    ids=lambda value: value.__name__,
)
def test_a_close_or_a_sync_that_fails_leaves_what_was_there(
    prepare: Callable[[Path, Path], None], act: Callable[[Path, Path], None], sources: Path, tmp_path: Path
) -> None:
    """The error named no file; after a failed last sync a new output stood under its name, and the next one refused."""
    assert each_fault(tmp_path, sources, prepare, act) >= 6


def test_a_checkpoint_is_replaced_or_stands_when_a_close_or_a_sync_fails(sources: Path, tmp_path: Path) -> None:
    """From the second rename on the new one stands, and the data of the old one stay until the next save."""
    last = False
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(sources / "1", folder / "c")
        faults = Faults(folder, number)
        with faults.active():
            try:
                small_ema(2).save(folder / "c")
                raised = None
            except CheckpointError as error:
                raised = error
        if faults.struck is None:
            break
        path = faults.struck[1]
        updates = verify_checkpoint(folder / "c").seen.updates
        if path.endswith(("lock", "lock (deleted)")):
            assert raised is None and updates == 2
            continue
        assert raised is not None and Path(path).name in str(raised), (faults.struck, raised)
        assert [found.name for found in folder.iterdir()] == ["c"]
        last = updates == 2
        assert len(list((folder / "c").iterdir())) == (3 if last else 2)
        assert ("has the new checkpoint" in str(raised)) == last
        if last:
            small_ema(2).save(folder / "c")
            assert len(list((folder / "c").iterdir())) == 2
    assert last and number > 12


def test_a_snapshot_that_fails_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An error of removing an old snapshot was no error of this library, and its directory was left behind."""
    errors = set()
    for updates in (1, 2, 6):
        small_ema(updates).save(tmp_path / "before" / f"{updates}ba")
    for number in itertools.count():
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", folder)
        ema = small_ema(1)
        ema.load(folder / "2ba")
        snapshots = ema.snapshot(folder, every="1ba", keep=2)
        faults = Faults(folder, number)
        with faults.active():
            try:
                ema.update()
                ema.wait()
                raised = None
            except CheckpointError as error:
                raised = error
        names = [path.name for path in snapshots.paths()]
        for path in folder.glob("**/*ba"):
            verify_checkpoint(path)  # nothing half-written has a good name
        assert len(list(folder.glob("**/6ba"))) == 1 and {"1ba", "2ba"} <= {*names, "1ba"} and "2ba" in names
        assert not list(folder.glob(".dist_ema*"))
        if faults.struck is None:
            break
        path = faults.struck[1]
        if not path.endswith("lock"):
            assert raised is not None and Path(path).name in str(raised), (faults.struck, raised)
            errors.add(str(raised).partition(" ")[0])
        if number % 4 == 0:
            ema.update()  # as if nothing had happened
            ema.wait()
            assert [path.name for path in snapshots.paths()][-1] == "4ba" and len(snapshots.paths()) == 2
    assert names == ["2ba", "3ba"] and errors == {"snapshot", "save", "removing"}


def test_of_several_syntheses_each_is_whole_or_not_there(tmp_path: Path) -> None:
    """They are renamed one after the other, so the first may stand when the second one fails."""
    for updates in (3, 6):
        small_ema(updates).save(tmp_path / "snapshots" / f"{updates}ba")
    counts = set()
    for number in itertools.count():
        folder = tmp_path / f"out-{number}"
        folder.mkdir()
        faults = Faults(folder, number)
        with faults.active():
            try:
                synthesize(tmp_path / "snapshots", folder / "c", target=["decay=.5", "decay=.6"])
                raised = None
            except CheckpointError as error:
                raised = error
        left = [path for path in folder.rglob("*") if path.is_dir() and path.name != "c"]
        counts.add(len(left))
        for path in left:
            assert set(files(path)) == {"README.md", "merge.json", "model.safetensors"}, faults.struck
        if faults.struck is None:
            break
        assert raised is not None or faults.struck[1].endswith("lock")
    assert counts == {0, 1, 2}


def test_files_stay_if_nobody_can_tell_which_name_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the rename back cannot be synced either, a power failure may bring the first one back."""

    def fail(path: Path) -> None:
        """The directory of the new name can never be synced."""
        if path == tmp_path:
            raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(staging, "sync", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        small_ema(1).export(tmp_path / "c")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".dist_ema-saving-") and (left / "content" / "model.safetensors").is_file()
    monkeypatch.undo()
    small_ema(1).export(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "the next one removes them"
