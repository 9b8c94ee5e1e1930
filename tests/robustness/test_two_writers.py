"""Two saves to one place, one of which comes late: a whole checkpoint is left, and who lost it is told so.

The trainers are forked from the pool's server, so that each costs milliseconds.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.any_engine import average_ema, make_ema, small_ema
from support.killing import CHANGES, forked, make_trainer, train_once, whole

import pytest
import torch

from dist_ema import verify_checkpoint
from dist_ema.errors import CheckpointError
from dist_ema.formats.manifest import NAME
from dist_ema.storage import local_commit
from dist_ema.storage.local import RunWriter
from dist_ema.storage.local_commit import LocalWriter

LANES = 3
ROUNDS = 12
#: Updates of the checkpoint that is there, of the writer that comes late, and of the one that is in time.
OLD, LATE, NEW = 1, 2, 3


def _save(path: str | Path, updates: int) -> None:
    model, ema = make_trainer()
    for _ in range(updates):
        train_once(model, ema)
    ema.save(path)


def _outcome(path: Path, updates: int) -> str:
    try:
        _save(path, updates)
    except CheckpointError as error:
        return str(error)
    return "saved"


def _save_and_stop(path: Path, count: int, pipe: Connection) -> None:
    """Stops itself at the operation on files of this number; says how it ended, and whether it got so far."""
    left = count

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        here = str(arguments[0]).startswith(str(path.parent)) if arguments and str(arguments[0])[0] == "/" else True
        if (writes or event in CHANGES) and here:
            left -= 1
            if left == -1:
                pipe.send(("stopped", f"{event} {arguments[:2]}"))
                os.kill(os.getpid(), signal.SIGSTOP)

    os.fsync = lambda _: None
    sys.addaudithook(hook)
    said = _outcome(path, LATE)
    pipe.send((said, left >= 0))


def _stop_late_writer(server: multiprocessing.context.BaseContext, path: Path, operation: int) -> tuple[str, str, bool]:
    """One writer stops at an operation, another saves, the first goes on. Gives where it stopped and what it said."""
    with forked(server, _save_and_stop, path, operation) as (process, pipe):
        said, where = pipe.recv()
        if said == "stopped":
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)
            assert _outcome(path, NEW) == "saved", where
            assert whole(path) == NEW, where
            os.kill(process.pid or 0, signal.SIGCONT)
            said, _ = pipe.recv()
            return where, said, False
        return "", said, True


@pytest.mark.parametrize("there", ["nothing", "a directory", "a checkpoint"])
def test_a_writer_that_sleeps_at_any_operation_while_another_saves_does_no_harm_when_it_wakes(
    there: str, server: multiprocessing.context.BaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was taken for dead wrote a manifest whose data the restarted one had removed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(local_commit, "_PATIENCE", 0.05)
    torch.set_num_threads(1)

    def attempt(operation: int) -> tuple[str, str, bool]:
        path = tmp_path / str(operation) / "c"
        path.parent.mkdir()
        if there == "a directory":
            path.mkdir()
        elif there == "a checkpoint":
            _save(path, OLD)
        where, said, done = _stop_late_writer(server, path, operation)
        assert done or whole(path) == NEW, (where, said)
        assert done or said == "saved" or "another" in said, (where, said)
        assert [found.name for found in path.parent.iterdir()] == ["c"], (where, said)
        assert {found.name[:5] for found in path.iterdir()} == {"data-", NAME[:5]}, (where, said)
        assert len(list(path.iterdir())) == 2, (where, said)
        return where, said, done

    results: list[tuple[str, str, bool]] = []
    with ThreadPoolExecutor(LANES) as pool:
        while not results or not results[-1][2]:
            results += pool.map(attempt, range(len(results), len(results) + LANES))
    sleepers = [said == "saved" for _, said, done in results if not done]
    assert sleepers == sorted(sleepers)  # until it is in its place it is told, after that it was not too late
    assert sleepers.count(False) > 10
    assert any("rename" in where and said != "saved" for where, said, _ in results)


def _save_when_told(path: Path, updates: int, pipe: Connection) -> None:
    os.fsync = lambda _: None
    model, ema = make_trainer()
    for _ in range(updates):
        train_once(model, ema)
    pipe.send("ready")
    pipe.recv()
    begin = time.monotonic()
    try:
        ema.save(path)
        said = "saved"
    except CheckpointError as error:
        said = str(error)
    pipe.send((said, begin, time.monotonic()))


@pytest.mark.parametrize("there", ["nothing", "a directory", "a checkpoint"])
def test_of_two_writers_side_by_side_at_least_one_succeeds_and_its_checkpoint_stands(
    there: str, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """Rounds ended without a checkpoint and without an error."""

    def one_round(number: int) -> int:
        path = tmp_path / str(number) / "c"
        path.parent.mkdir()
        if there == "a directory":
            path.mkdir()
        elif there == "a checkpoint":
            _save(path, OLD)
        with (
            forked(server, _save_when_told, path, LATE) as (_, first),
            forked(server, _save_when_told, path, NEW) as (_, second),
        ):
            pipes = {LATE: first, NEW: second}
            assert [pipe.recv() for pipe in pipes.values()] == ["ready"] * 2
            for pipe in pipes.values():
                pipe.send("go")
            said = {updates: pipe.recv() for updates, pipe in pipes.items()}
        saved = {updates for updates, (what, _, _) in said.items() if what == "saved"}
        assert whole(path) in saved, said
        for updates in saved:  # one that began when the other had ended has replaced it
            (other,) = said.keys() - {updates}
            if said[updates][1] > said[other][2]:
                assert whole(path) == updates, said
        assert all("another" in what for what, _, _ in said.values() if what != "saved"), said
        assert [found.name for found in path.parent.iterdir()] == ["c"], said
        assert len(list(path.iterdir())) == 2, said
        return len(saved)

    with ThreadPoolExecutor(LANES) as pool:
        assert 1 in set(pool.map(one_round, range(ROUNDS)))  # in some they did meet


@pytest.mark.world_size(2)
@pytest.mark.parametrize("block", [True, False])
def test_a_save_that_was_overtaken_is_an_error_on_every_rank(rank: int, block: bool, tmp_path: Path) -> None:
    """Rank 0 alone puts the checkpoint in its place; the others would go on as if theirs were there."""
    ema = make_ema("fsdp2")
    average_ema(ema, range(2))
    ema.save(tmp_path / "c")
    average_ema(ema, range(2, 3))
    ema.save(tmp_path / "other")
    commit = LocalWriter.commit

    def overtaken(self: LocalWriter, manifest: bytes) -> None:
        for found in sorted((tmp_path / "other").iterdir()):  # the data, then the manifest
            found.rename(tmp_path / "c" / found.name)
        commit(self, manifest)

    LocalWriter.commit = overtaken  # type: ignore[method-assign]
    try:
        with pytest.raises(CheckpointError, match=r"rank 0.*was replaced by another save"):
            ema.save(tmp_path / "c", block=block)
            ema.wait()
    finally:
        LocalWriter.commit = commit  # type: ignore[method-assign]
    if rank == 0:
        assert verify_checkpoint(tmp_path / "c").seen.updates == NEW
        assert sorted(found.name for found in tmp_path.iterdir()) == ["c", "other"]
        assert len(list((tmp_path / "c").iterdir())) == 3  # the old data, which the next save removes
    ema.close()


def _stop_while_writing(path: Path, call: str, pipe: Connection) -> None:
    write = RunWriter.write

    def stop(*arguments: Any) -> None:
        write(*arguments)
        RunWriter.write = write  # type: ignore[method-assign]
        pipe.send("writing")
        os.kill(os.getpid(), signal.SIGSTOP)

    RunWriter.write = stop  # type: ignore[method-assign]
    getattr(small_ema(LATE), call)(path)
    pipe.send("done")


def test_what_killed_exports_and_saves_left_is_removed_and_nothing_of_those_that_run(
    server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """A hidden directory of a model's size stayed for ever after each export that was killed."""
    calls = ("save", "export")
    with ExitStack() as stack:

        def begin(call: str, fate: str) -> tuple[BaseProcess, Connection]:
            started = stack.enter_context(forked(server, _stop_while_writing, tmp_path / f"{call}-{fate}", call))
            assert started[1].recv() == "writing"
            return started

        alive = [begin(call, "alive") for call in calls]
        running = set(tmp_path.iterdir())
        killed = [begin(call, "killed") for call in calls]
        for process, _ in killed:
            process.kill()
            process.join()
        assert len(running) == 2 and len(list(tmp_path.iterdir())) == 4
        for found in tmp_path.iterdir():
            os.utime(found, (0, 0))  # long ago, by the clock
        for call in calls:
            getattr(small_ema(NEW), call)(tmp_path / call)
            assert {*tmp_path.iterdir()} - {tmp_path / each for each in calls} == running
        for process, pipe in alive:
            os.kill(process.pid or 0, signal.SIGCONT)
            assert pipe.recv() == "done"
    assert sorted(found.name for found in tmp_path.iterdir()) == ["export", "export-alive", "save", "save-alive"]
    names = {found.name for found in (tmp_path / "export-alive").iterdir()}
    assert names == {"model.safetensors", "README.md"}
    assert verify_checkpoint(tmp_path / "save-alive").seen.updates == LATE


def test_data_that_were_removed_before_the_end_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest must not name what somebody's clean-up has taken."""
    _save(tmp_path / "c", OLD)
    check = LocalWriter._check_data

    def remove(self: LocalWriter) -> None:
        next((tmp_path / "c" / self.data).rglob("*.safetensors")).unlink()
        check(self)

    monkeypatch.setattr(LocalWriter, "_check_data", remove)
    assert "was removed or changed before the save was complete" in _outcome(tmp_path / "c", NEW)
    assert whole(tmp_path / "c") == OLD
    assert len(list((tmp_path / "c").iterdir())) == 2


def test_saves_replace_a_checkpoint_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have none."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for updates in (OLD, LATE, NEW):
        _save(tmp_path / "c", updates)
        assert whole(tmp_path / "c") == updates
        assert len(list((tmp_path / "c").iterdir())) == 2
        assert [found.name for found in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("left", ["held", "by a killed process", "a directory"])
def test_a_lock_that_was_left_does_not_stop_a_save(
    left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that hangs keeps its lock; of one that was killed the file remains, and nobody has it locked."""
    monkeypatch.setattr(local_commit, "_PATIENCE", 0.05)
    _save(tmp_path / "c", OLD)
    lock = tmp_path / "c" / "lock"
    if left == "a directory":
        lock.mkdir()
    else:
        lock.touch()
        os.utime(lock, (time.time() - 3600, time.time() - 3600))
    with lock.open() if lock.is_file() else nullcontext() as file:
        if left == "held":
            assert file is not None
            fcntl.flock(file, fcntl.LOCK_EX)
        _save(tmp_path / "c", NEW)
    assert whole(tmp_path / "c") == NEW
    said = re.search(
        r"Continuing without the lock (\S+): another save to this path has held it for 36\d\d s", caplog.text
    )
    assert (said is not None and said[1] == str(lock)) == (left == "held")
    assert sorted(path.name[:4] for path in (tmp_path / "c").iterdir()) in (["data", "ema."], ["data", "ema.", "lock"])
