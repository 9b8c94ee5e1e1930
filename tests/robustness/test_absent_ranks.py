"""A collective call that some ranks do not make, as in ``if rank == 0: ema.save(...)``, must say whom it waits for."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from support.models import build

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.comm import attendance
from dist_ema.errors import CheckpointError, EMAError, EMAStateError


@contextmanager
def logged(report: float = 0.4) -> Iterator[list[str]]:
    """What the library logs, where it reports after ``report`` seconds and not after ten."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dist_ema")
    logger.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attendance, "ARRIVAL", 0.2)
        patch.setattr(attendance, "_REPORT", report)
        try:
            yield said
        finally:
            logger.removeHandler(handler)


def averaged() -> ShardedEMA:
    ema = ShardedEMA(DDP(build(scalar=False)), decay=0.5)
    ema.update()
    return ema


def visit(ema: ShardedEMA) -> None:
    with ema.average_parameters():
        pass


@pytest.mark.world_size(3)
def test_whoever_waits_says_which_ranks_have_not_come(rank: int, tmp_path: Path) -> None:
    """It waited for minutes in silence, which on a cluster looks like a network that hangs."""
    ema = averaged()
    calls: dict[str, Callable[[], object]] = {
        "metrics()": ema.metrics,  # the first one makes the group, too
        "state_dict()": ema.state_dict,
        "average_parameters()": lambda: visit(ema),
        "save()": lambda: ema.save(tmp_path / "ema"),
    }
    for call, make in calls.items():
        dist.barrier()
        with logged() as said:
            if rank == 1:
                time.sleep(1.5)
            make()
        mine = [text for text in said if text.startswith(f"{call} has waited 0.4 s for rank 1 of 3 ranks")]
        assert bool(mine) is (rank != 1), (call, said)
    with logged() as said:
        for make in calls.values():
            make()
    assert said == []
    verify_checkpoint(tmp_path / "ema")


@pytest.mark.world_size(3)
def test_the_error_names_the_missing_and_the_next_call_works(rank: int, tmp_path: Path) -> None:
    """A late rank must not take the answers of a round that the others have given up."""
    ema = averaged()
    for attempt in range(2):  # at the first nobody is connected yet
        if rank != 2:
            with pytest.raises(CheckpointError, match=r"did not answer within 1 s.* for rank 2 of 3 ranks"):
                ema.save(tmp_path / "ema", timeout=1)
            assert list(tmp_path.iterdir()) == []
        dist.barrier()
        if attempt and rank == 2:  # its connection is that of the round that was given up
            with pytest.raises(EMAStateError, match="is gone"):
                ema.metrics()
        elif attempt:
            time.sleep(0.5)
        dist.barrier()
        assert ema.metrics()["ema/num_updates"] == 1


@pytest.mark.world_size(4)
def test_a_part_of_the_world_is_named_by_global_ranks_whatever_groups_there_are(rank: int) -> None:
    """torch counts up the names of groups, so it would hang where ranks are in different numbers of them."""
    dist.new_group([0, 1])
    pair = dist.new_group([1, 3])
    if rank not in (1, 3):
        return
    ema = ShardedEMA(build(scalar=False), decay=0.5, group=pair)
    ema.update()
    with logged() as said:
        if rank == 3:
            time.sleep(1.5)
        assert ema.metrics()["ema/num_updates"] == 1
    assert [text for text in said if "for rank 3 of 2 ranks" in text] == said[: rank == 1]
    assert bool(said) is (rank == 1)


def _wait_alone(rank: int, size: int, rendezvous: str, connected: bool, pipe: Connection) -> None:
    """Rank 1 does not make the call; the others say what they get."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background ignores it
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    ema = averaged()
    if connected:
        ema.metrics()
    dist.barrier()
    pipe.send("there")
    if rank == 1:
        time.sleep(60)
    try:
        ema.metrics()
    except EMAError as error:
        pipe.send(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        pipe.send("interrupted")


@contextmanager
def _started(
    server: multiprocessing.context.BaseContext, tmp_path: Path, size: int, connected: bool
) -> Iterator[list[tuple[multiprocessing.process.BaseProcess, Connection]]]:
    found = []
    for rank in range(size):
        ours, theirs = server.Pipe()
        arguments = (rank, size, str(tmp_path / "rendezvous"), connected, theirs)
        process = server.Process(target=_wait_alone, args=arguments, daemon=True)  # type: ignore[attr-defined]
        process.start()
        found.append((process, ours))
    try:
        for _, pipe in found:
            assert pipe.poll(60) and pipe.recv() == "there"
        yield found
    finally:
        for process, _ in found:
            process.kill()


def test_a_rank_that_is_killed_while_others_wait_is_an_error_at_once(
    server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    with _started(server, tmp_path, 3, connected=True) as ranks:
        time.sleep(0.5)
        os.kill(ranks[1][0].pid or 0, signal.SIGKILL)
        for rank in (0, 2):
            assert ranks[rank][1].poll(30)
            text = ranks[rank][1].recv()
            assert text.startswith("EMAStateError: metrics() failed: a rank did not answer in time, or is gone"), text


@pytest.mark.parametrize("connected", [True, False])
def test_ctrl_c_ends_a_rank_that_waits(
    server: multiprocessing.context.BaseContext, tmp_path: Path, connected: bool
) -> None:
    """The threads of a round that nobody answers would hold the process up for as long as the round may take."""
    with _started(server, tmp_path, 2, connected) as ranks:
        process, pipe = ranks[0]
        time.sleep(1)
        os.kill(process.pid or 0, signal.SIGINT)
        assert pipe.poll(20) and pipe.recv() == "interrupted"
        process.join(20)
        assert process.exitcode == 0


@pytest.mark.world_size(2)
@pytest.mark.parametrize("call", ["export", "save"])
def test_a_rank_whose_working_directory_was_removed_does_not_keep_the_other_waiting(
    call: str, rank: int, tmp_path: Path
) -> None:
    """A relative path cannot be resolved there, and the other rank would wait for the rank that raised alone."""
    ema = ShardedEMA(DDP(build()), decay=0.5)
    ema.update()
    before = Path.cwd()
    folder = tmp_path / f"rank-{rank}"
    folder.mkdir()
    os.chdir(folder)
    try:
        if rank == 1:
            folder.rmdir()
        with pytest.raises(CheckpointError, match="rank 1: FileNotFoundError"):
            getattr(ema, call)("out")
    finally:
        os.chdir(before)
