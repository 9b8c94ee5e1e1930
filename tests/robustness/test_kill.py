"""A save that is killed with SIGKILL, wherever it was, leaves the old checkpoint or the new one, whole.

The trainers are forked from the pool's server, so that each costs milliseconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

from support.killing import CHANGES, forked, make_trainer, train_once, whole

import pytest
import torch.distributed as dist

from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.errors import CheckpointError
from dist_ema.formats.manifest import NAME, Manifest

KILLS = 200
KILLS_OF_A_RANK = 12
LANES = 4
#: Seconds that a rank waits for another one: more than a busy machine takes to start one.
PATIENCE = 15
#: Seconds after which nobody is waiting any more.
HANGS = 180
#: What a killed process may leave in the directory that holds the checkpoint.
LEFTOVER = re.compile(r"\.dist_ema-saving-[0-9a-f]{16}-[0-9a-f]{32}")


def _clean(path: Path, ema: ShardedEMA) -> None:
    """The next save into the same parent removes what was left."""
    for found in path.parent.iterdir():
        if found != path:
            assert LEFTOVER.fullmatch(found.name), found
            if not (found / "lock").exists():  # killed before there was one: it is removed when it is a minute old
                os.utime(found, (0, 0))
    ema.save(path)
    assert whole(path) == ema.num_updates
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert sorted(found.name for found in path.iterdir()) == [_manifest(path).data, NAME]


def _manifest(path: Path) -> Manifest:
    return Manifest.from_bytes((path / NAME).read_bytes())


# At random moments.


def _no_sync() -> None:
    """A process that is killed loses nothing that it has written: most kills need not wait for the disk."""
    os.fsync = lambda _: None


def _save_for_ever(path: Path, sync: bool, pipe: Connection) -> None:
    if not sync:
        _no_sync()
    model, ema = make_trainer()
    ema.load(path)
    while True:
        train_once(model, ema)
        block = ema.num_updates % 2 == 0
        pipe.send(("started", ema.num_updates))
        ema.save(path, block=block)
        ema.wait()
        pipe.send(("finished", ema.num_updates))


def _drain(pipe: Connection) -> list[tuple[str, int]]:
    """What a process said before it died."""
    said = []
    with contextlib.suppress(EOFError, ConnectionResetError):
        while True:
            said.append(pipe.recv())
    return said


def _kill_at_random(server: multiprocessing.context.BaseContext, path: Path, seed: int, kills: int) -> int:
    """Kills a trainer so often in the middle of a save. Gives the number of times that the old checkpoint stayed."""
    draw = random.Random(seed)
    path.parent.mkdir()
    model, ema = make_trainer()
    train_once(model, ema)
    ema.save(path)
    killed = old = 0
    took = None
    while killed < kills:
        at = whole(path) + 1
        with forked(server, _save_for_ever, path, seed == 0) as (process, pipe):
            assert pipe.recv() == ("started", at)
            if took is None or killed % 20 == 10:  # how long a save takes, now
                start = time.perf_counter()
                assert pipe.recv() == ("finished", at)
                took = time.perf_counter() - start
                at += 1
                assert pipe.recv() == ("started", at)
            time.sleep(draw.random() * took)
            process.kill()
            process.join()
            said = _drain(pipe)
        at = max([at, *(number for word, number in said if word == "started")])
        inside = ("finished", at) not in said
        found = whole(path)
        assert found in ((at - 1, at) if inside else (at,))
        killed += inside
        old += found < at
    _clean(path, ema)
    return old


def test_200_kills_at_random_moments_leave_the_old_checkpoint_or_the_new_one(
    server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """A save that is not atomic loses both when the job is preempted."""
    with ThreadPoolExecutor(LANES) as pool:  # most of the time is spent waiting for the disk
        lanes = range(LANES)
        old = sum(
            pool.map(lambda lane: _kill_at_random(server, tmp_path / str(lane) / "c", lane, KILLS // LANES), lanes)
        )
    assert 0 < old < KILLS  # both happened


# At every single operation on files.


def _write_and_die(call: str, path: Path, number: int, pipe: Connection) -> None:
    """Kills itself at the operation of this number; says how many there were if there were fewer."""
    model, ema = make_trainer()
    if path.exists():
        ema.load(path)
    train_once(model, ema)
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            left -= 1
            if left == -1:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda _: hook("os.fsync", ())
    sys.addaudithook(hook)
    ema.save(path) if call == "save" else ema.export(path, name="fast")
    pipe.send(number - left)
    left = sys.maxsize


@pytest.mark.parametrize("fresh", [False, True])
def test_a_kill_at_every_operation_on_files_leaves_a_whole_checkpoint(
    fresh: bool, server: multiprocessing.context.BaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of microseconds is not hit at random; and a new checkpoint's name must not come before its data."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    model, ema = make_trainer()
    train_once(model, ema)
    ema.save(tmp_path / "old")
    operation, results = 0, []
    while True:
        path = tmp_path / str(operation) / "c"
        path.parent.mkdir()
        if not fresh:
            shutil.copytree(tmp_path / "old", path)
        with forked(server, _write_and_die, "save", path, operation) as (process, pipe):
            process.join()
            said = _drain(pipe)
        found = whole(path) if path.exists() else 0
        assert found in ((0, 1) if fresh else (1, 2))
        results.append(found)
        if said:
            break
        assert process.exitcode == -signal.SIGKILL
        _clean(path, ema)
        operation += 1
    assert results == sorted(results)  # once the new one is there, it stays
    assert operation > 25 and results[0] < results[-1]


def test_an_export_that_is_killed_at_any_operation_leaves_nothing_for_ever(
    server: multiprocessing.context.BaseContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export is never written again: what a kill leaves in it stays, and a directory is taken for a whole one."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    model, ema = make_trainer()
    train_once(model, ema)
    ema.export(tmp_path / "whole", name="fast")
    whole_export = {found.name: found.read_bytes() for found in (tmp_path / "whole").iterdir()}
    assert whole_export.keys() == {"model.safetensors", "README.md"}
    there = []
    for operation in count():
        path = tmp_path / str(operation) / "c"
        path.parent.mkdir()
        with forked(server, _write_and_die, "export", path, operation) as (process, pipe):
            process.join()
            done = bool(_drain(pipe))
        there.append(path.exists())
        if there[-1]:
            found_export = {found.name: found.read_bytes() for found in path.iterdir()}
            assert found_export.keys() == whole_export.keys()
            assert found_export["model.safetensors"] == whole_export["model.safetensors"]
        if done:
            break
        for found in path.parent.iterdir():
            if found != path and not (found / "lock").exists():
                os.utime(found, (0, 0))
        ema.export(path.parent / "next", name="fast")
        assert sorted(found.name for found in path.parent.iterdir()) == ["c", "next"][1 - there[-1] :]
    assert there == sorted(there) and len(there) > 10
    assert there.count(True) > 1, "no kill came after it was in its place"


# A rank among others.


def _save_for_ever_together(path: Path, rank: int, rendezvous: str, pipe: Connection) -> None:
    _no_sync()
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", f"file://{rendezvous}", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    model, ema = make_trainer(shard=True)
    ema.load(path)
    while True:
        train_once(model, ema)
        pipe.send(("started", ema.num_updates))
        try:
            ema.save(path, block=ema.num_updates % 2 == 0, timeout=PATIENCE)
            ema.wait()
        except CheckpointError as error:
            pipe.send((str(error), ema.num_updates))
            os._exit(7)
        pipe.send(("finished", ema.num_updates))


def _kill_a_rank(server: multiprocessing.context.BaseContext, folder: Path, seed: int, kills: int) -> None:
    draw = random.Random(seed)
    path = folder / "run" / "c"
    path.parent.mkdir(parents=True)
    model, ema = make_trainer()
    train_once(model, ema)
    ema.save(path)
    for kill in range(kills):
        before = whole(path)
        with contextlib.ExitStack() as stack:
            ranks = [
                stack.enter_context(forked(server, _save_for_ever_together, path, rank, str(folder / f"group{kill}")))
                for rank in range(2)
            ]
            for _, pipe in ranks:
                assert pipe.recv() == ("started", before + 1)
                if kill:  # in the first one the ranks have yet to find each other, which takes most of it
                    assert pipe.recv() == ("finished", before + 1)
                    assert pipe.recv() == ("started", before + 2)
            time.sleep(draw.random() * 0.1)
            dead = draw.randrange(2)
            ranks[dead][0].kill()
            survivor, pipe = ranks[1 - dead]
            survivor.join(HANGS)
            assert survivor.exitcode is not None, "the survivor hangs"
            said = _drain(pipe)
            assert survivor.exitcode == 7, said
        assert "is gone" in said[-1][0]
        started = max(number for _, number in [("started", before + 1), *said])
        assert started - 1 <= whole(path) <= started + 1
    _clean(path, ema)


def test_a_killed_rank_is_an_error_on_the_other_and_the_checkpoint_is_whole(
    server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """The survivors must neither hang nor commit a checkpoint without the dead rank's part."""
    lanes = 6  # they mostly wait for a rank that is gone
    with ThreadPoolExecutor(lanes) as pool:
        done = [
            pool.submit(_kill_a_rank, server, tmp_path / str(lane), lane, KILLS_OF_A_RANK // lanes)
            for lane in range(lanes)
        ]
        for each in done:
            each.result()


# A failure that nobody saw.


SCRIPT = """
import logging, sys, torch
from dist_ema import ShardedEMA
from dist_ema.storage.local import RunWriter
logging.basicConfig(filename={log!r})
ema = ShardedEMA(torch.nn.Linear(3, 2), decay=0.5)
ema.update()
ema.save({path!r})
def full(*_):
    raise OSError(28, "No space left on device")
RunWriter.write = full
ema.save({path!r}, block=False)
print("trained")
sys.exit({status})
"""


@pytest.mark.parametrize("status", [0, 3])
def test_a_program_that_ends_with_a_failed_save_says_so(status: int, tmp_path: Path) -> None:
    """Exit status 0, and a checkpoint that is not there; found out when it is needed."""
    script = SCRIPT.format(log=str(tmp_path / "log"), path=str(tmp_path / "c"), status=status)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert done.stdout == "trained\n"
    verify_checkpoint(tmp_path / "c")
    assert {found.name for found in tmp_path.iterdir()} == {"c", "log"}
