"""A save in the background whose process was forked, whose group is gone, or whose other ranks do not come."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Event

from support.models import build

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.errors import CheckpointError, EMAStateError
from dist_ema.storage.local import RunWriter

SCRIPT = """
import os, sys, threading, time, torch
from dist_ema import ShardedEMA, read_checkpoint
from dist_ema.storage.local import RunWriter
slow, inner = threading.Event(), getattr(RunWriter, sys.argv[2])
def late(self, *arguments):
    if not slow.is_set():
        slow.set()
        time.sleep(2)
    return inner(self, *arguments)
setattr(RunWriter, sys.argv[2], late)
ema = ShardedEMA(torch.nn.Linear(5, 5), decay=.5)
ema.update()
ema.save(sys.argv[1] + "/c", block=False)
slow.wait()
def updates():
    before = ema.full_state_dict()["weight"].clone()
    with torch.no_grad():
        ema._average.engine.modules()[0].weight.zero_()
    assert ema.update() and torch.equal(ema.full_state_dict()["weight"], before / 2)
    with ema.average_parameters():
        pass
    ema.wait()
    ema.save(sys.argv[1] + "/child", block=False)
    ema.close()
    ema.reset()
    assert torch.equal(read_checkpoint(sys.argv[1] + "/child")["weight"], before / 2)
child = os.fork()
if child == 0:
    begin = time.time()
    try:
        updates()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(9)
deadline = time.time() + 40
while (found := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.time() < deadline:
    time.sleep(.05)
if found == (0, 0):
    os.kill(child, 9)
    os.waitpid(child, 0)
    sys.exit("the child hangs")
ema.close()
loader = torch.utils.data.DataLoader(range(4), num_workers=1, multiprocessing_context="fork")
ema.save(sys.argv[1] + "/c", block=False)
print(os.waitstatus_to_exitcode(found[1]), [int(item) for item in loader])
if os.fork() == 0:
    sys.exit(0)
os.wait()
"""


@pytest.mark.parametrize("moment", ["write", "sync"])
def test_a_child_that_was_forked_during_a_save_averages_and_saves(tmp_path: Path, moment: str) -> None:
    """The thread is the parent's: the child would wait for it for ever, in its next update and at its end."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), moment]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)
    assert (done.returncode, done.stdout) == (0, "0 [0, 1, 2, 3]\n"), done.stderr
    for name in ("c", "child"):
        verify_checkpoint(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "child"]


@contextmanager
def slow(moment: str, seconds: float) -> Iterator[Event]:
    """Every rank's writing takes as long; gives when it has begun."""
    begun = Event()
    with pytest.MonkeyPatch.context() as patch:
        inner = getattr(RunWriter, moment)

        def late(self: RunWriter, *arguments: object) -> object:
            begun.set()
            time.sleep(seconds)
            return inner(self, *arguments)

        patch.setattr(RunWriter, moment, late)
        yield begun


def _again(tmp_path: Path, rank: int) -> None:
    """A group for what comes after the test."""
    dist.init_process_group("gloo", f"file://{tmp_path}/again", rank=rank, world_size=2, timeout=timedelta(seconds=20))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("again", [False, True])
def test_a_save_outlives_the_groups_that_a_program_destroys(rank: int, tmp_path: Path, again: bool) -> None:
    """Scripts end with destroy_process_group(), and notebooks begin anew with another. Later calls are refused."""
    ema = ShardedEMA(DDP(build()), decay=0.5)
    ema.update()
    ema.save(tmp_path / "old")
    with slow("sync", 0.5) as begun:
        ema.save(tmp_path / "c", block=False, timeout=5)
        begun.wait(10)
        dist.destroy_process_group()
        if again:
            _again(tmp_path, rank)
        ema.wait()
    ema.close()
    ema.update()
    for call in (lambda: ema.save(tmp_path / "d"), ema.full_state_dict, ema.metrics, ema.fingerprint, ema.copy_to):
        with pytest.raises((CheckpointError, EMAStateError), match="the average was made in is gone"):
            call()
    ema.close()
    verify_checkpoint(tmp_path / "c")
    if not again:
        _again(tmp_path, rank)


@pytest.mark.world_size(2)
def test_a_group_that_is_destroyed_before_close_does_not_matter(rank: int, tmp_path: Path) -> None:
    ema = ShardedEMA(DDP(build()), decay=0.5)
    ema.update()
    ema.save(tmp_path / "c", block=False)
    ema.wait()
    dist.destroy_process_group()
    _again(tmp_path, rank)
    ema.close()
    verify_checkpoint(tmp_path / "c")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("block", [True, False])
def test_the_first_save_waits_as_long_as_it_is_told(rank: int, tmp_path: Path, block: bool) -> None:
    """Its own group has to be made first, whose making waits as long as the store does: minutes."""
    ema = ShardedEMA(DDP(build()), decay=0.5)
    ema.update()
    if rank == 1:
        time.sleep(4)
    else:
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match="did not answer within 2 s"):
            ema.save(tmp_path / "c", block=block, timeout=2)
        assert time.monotonic() - begin < 3.9
        ema.close()
    assert not (tmp_path / "c").exists()
    dist.destroy_process_group()  # which is of no use any more
    _again(tmp_path, rank)
