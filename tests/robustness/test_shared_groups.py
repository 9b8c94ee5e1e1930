"""Several averages and our own threads talk to other ranks at the same time: answers of two calls must not be mixed.

All objects of the same ranks share two process groups, of which one is for saves in the background.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, read_checkpoint
from dist_ema.comm import groups
from dist_ema.errors import CheckpointError, EMAError, EMAStateError
from dist_ema.storage.local import RunWriter


@contextmanager
def slow_disk(rank: int) -> Iterator[None]:
    """Each rank's disk is slow at other moments."""
    delays, inner = random.Random(rank), RunWriter.sync

    def late(self: RunWriter) -> None:
        time.sleep(delays.choice([0, 0.05, 0.2]))
        inner(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "sync", late)
        yield


def moved(case: str, by: float, **options: object) -> ShardedEMA:
    model = CASES[case].model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by)
    ema = ShardedEMA(model, decay=0.5, **options)
    ema.update()
    return ema


def same(found: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], value) for name, value in want.items())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_calls_beside_saves_of_several_objects_get_their_own_answers(rank: int, case: str, tmp_path: Path) -> None:
    """Both threads used one group: ranks took a message of one call for that of the other, or waited for ever."""
    one, two = moved(case, 1.0), moved(case, 2.0)
    want_one, want_two = one.full_state_dict(), two.full_state_dict()
    one.save(tmp_path / "before")
    snapshots = two.snapshot(tmp_path / "snapshots", every="1ba")
    with slow_disk(rank):
        for number in range(3):
            one.save(tmp_path / "one", block=False, timeout=60 + number)
            two.save(tmp_path / "two", block=False)
            two.update()
            one.export(tmp_path / f"{number}")
            two.metrics()
            one.fingerprint()
            full = two.full_state_dict()
            assert same(full, want_two)
            one.load(tmp_path / "before")
            one.state_dict()
            one.wait()
            two.wait()
            if rank == 0:
                assert same(load_file(tmp_path / f"{number}/model.safetensors"), want_one)
                assert same(read_checkpoint(tmp_path / "one"), want_one)
                assert same(read_checkpoint(tmp_path / "two"), want_two)
    assert len(snapshots.paths()) == 3
    dist.barrier()


@pytest.mark.world_size(2)
def test_a_save_that_fails_leaves_its_turn_to_the_next(rank: int, tmp_path: Path) -> None:
    one, two = moved("ddp", 1.0), moved("ddp", 2.0)
    inner = RunWriter.sync

    def broken(self: RunWriter) -> None:
        if rank == 1:
            raise OSError("a bad block")
        inner(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunWriter, "sync", broken)
        one.save(tmp_path / "one", block=False)
        with pytest.raises(CheckpointError, match="a bad block"):
            one.wait()
    two.save(tmp_path / "two", block=False)
    two.wait()
    want = two.full_state_dict()
    assert rank or same(read_checkpoint(tmp_path / "two"), want)


@pytest.mark.world_size(2)
def test_the_same_call_on_two_objects_is_refused(rank: int) -> None:
    """Both have the same tensors: rank 0's part of one and rank 1's part of the other look like a whole average."""
    pair = [moved("fsdp2", 1.0), moved("fsdp2", 2.0)]
    for name in ("metrics", "full_state_dict", "fingerprint"):
        with pytest.raises(EMAStateError, match="different objects: number 1 on rank 0, number 2 on rank 1"):
            getattr(pair[rank], name)()
    assert pair[0].fingerprint() != pair[1].fingerprint()
    if rank == 0:
        ShardedEMA(build(), decay=0.9)  # of other options: it changes no number of the others
    assert pair[1].metrics()["ema/num_updates"] == 1


@pytest.mark.world_size(2)
def test_threads_of_the_user_get_an_answer_or_an_error(rank: int) -> None:
    """Ranks may order the calls of two threads differently. None may then wait for ever, or take the other's answer."""
    pair = [moved("fsdp2", 1.0), moved("fsdp2", 2.0)]
    want = [ema.fingerprint() for ema in pair]
    wrong: list[object] = []

    def call(index: int) -> None:
        for _ in range(15):
            try:
                if pair[index].fingerprint() != want[index]:
                    wrong.append(index)
            except EMAStateError as error:
                if "different objects" not in str(error):
                    wrong.append(error)

    threads = [Thread(target=call, args=(index,), daemon=True) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and not any(thread.is_alive() for thread in threads)
    assert [ema.fingerprint() for ema in pair] == want


def _facts() -> dict[str, int]:
    gc.collect()
    groups_of_torch = len(dist.distributed_c10d._world.pg_map)
    threads, descriptors = (len(list(Path("/proc/self", name).iterdir())) for name in ("task", "fd"))
    return {"groups": groups_of_torch, "threads": threads, "descriptors": descriptors}


def _grown(before: dict[str, int]) -> dict[str, int]:
    """What there is more of than before; threads that are over need a moment to end."""
    until = time.monotonic() + 5
    while True:
        grown = {name: count - before[name] for name, count in _facts().items() if count > before[name]}
        if not grown or time.monotonic() > until:
            return grown
        time.sleep(0.05)


@pytest.mark.world_size(3)
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not say")
@pytest.mark.parametrize("ending", ["close", "delete"])
def test_objects_that_are_closed_or_deleted_leave_no_threads_and_descriptors(
    ending: str, rank: int, tmp_path: Path
) -> None:
    """A sweep makes hundreds of averages in one process, and each had left groups with threads and sockets."""
    pair = dist.new_group([0, 1])

    def one() -> None:
        for group in (None, pair) if rank < 2 else (None,):
            model = DDP(nn.Linear(3, 3)) if group is None else nn.Linear(3, 3)
            ema = ShardedEMA(model, decay=0.5, group=group)
            ema.update()
            snapshots = ema.snapshot(tmp_path / "snapshots", every="1ba")
            ema.update()
            ema.wait()
            snapshots.remove()
            ema.save(tmp_path / f"{group is None}")
            if ending == "close":
                ema.close()

    one()
    one()
    before = _facts()
    for _ in range(4):
        one()
    assert _grown(before) == {}


def _again(tmp_path: Path, rank: int, size: int = 2) -> None:
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"file://{tmp_path}/again", rank=rank, world_size=size)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full-orig"])
def test_after_a_new_process_group_calls_say_so_and_rebind_goes_on(rank: int, case: str, tmp_path: Path) -> None:
    """A job that survives a lost node makes its groups anew. torch's KeyError named neither the call nor the cause."""
    ema = moved(case, 1.0)
    ema.save(tmp_path / "ema")
    want = ema.fingerprint(include_untracked=False)
    _again(tmp_path, rank)

    def visit() -> None:
        with ema.average_parameters():
            pass

    calls: list[Callable[[], object]] = [ema.metrics, ema.state_dict, ema.full_state_dict, ema.copy_to, visit]
    calls += [ema.fingerprint, lambda: ema.export(tmp_path / "out"), lambda: list(ema.iter_full_tensors())]
    calls += [lambda: ema.save(tmp_path / "c", block=False), lambda: ema.load(tmp_path / "ema")]
    calls += [lambda: ema.snapshot(tmp_path / "s", every="1ba"), lambda: ema.copy_to(into=build())]
    for call in calls:
        with pytest.raises(EMAError, match=r"the average was made in is gone.*rebind\(model\)"):
            call()
    model = CASES[case].model()
    ema.rebind(model)
    assert ema.fingerprint(include_untracked=False) == want
    ema.update()
    with ema.average_parameters():
        pass
    ema.save(tmp_path / "c", block=False)
    ema.close()
    other = ShardedEMA(CASES[case].model(), decay=0.5)
    other.load(tmp_path / "ema")
    assert other.fingerprint(include_untracked=False) == want


@pytest.mark.world_size(2)
def test_an_average_whose_ranks_have_changed_places_is_not_rebound(rank: int, tmp_path: Path) -> None:
    """Each rank holds a part of the average, and the parts would be taken for others."""
    ema = moved("ddp", 1.0)
    ema.save(tmp_path / "ema")
    want = ema.fingerprint(include_untracked=False)
    _again(tmp_path, 1 - rank)
    with pytest.raises(EMAStateError, match=r"rank 1 of 2 in the new process group, and was rank 0 of 2.*load\(\)"):
        ema.rebind(DDP(build()))
    fresh = ShardedEMA(DDP(build()), decay=0.5)
    fresh.load(tmp_path / "ema")
    assert fresh.fingerprint(include_untracked=False) == want


@pytest.mark.world_size(2)
def test_uneven_inputs_under_join_are_an_error_that_says_how_to_go_on(rank: int, tmp_path: Path) -> None:
    """A rank that has no more batches makes no more steps, so it has averaged less often than the others."""
    torch.manual_seed(0)
    model = DDP(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = ShardedEMA(model, decay=0.5)
    ema.attach(optimizer)
    ema.update()
    ema.save(tmp_path / "ema")
    with model.join():
        for _ in range(2 + rank):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    for call in (ema.metrics, ema.full_state_dict, ema.copy_to):
        with pytest.raises(
            EMAStateError, match=r"updates differs between ranks: 3, 4.*throw_on_early_termination=True.*reset\(\)"
        ):
            call()
    ema.load(tmp_path / "ema")
    ema.update()
    assert ema.metrics()["ema/num_updates"] == 2


@pytest.mark.world_size(2)
def test_tensors_of_two_moments_do_not_come_from_one_iteration(rank: int, tmp_path: Path) -> None:
    """A checkpoint of the same number of updates had been mixed in without a word."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dist_ema.comm.gather.WINDOW_BYTES", 64)
        ema = moved("fsdp2", 1.0)
        ema.save(tmp_path / "ema")
        ways: list[Callable[[], object]] = [lambda: ema.load(tmp_path / "ema"), ema.update, ema.reset]
        for change in ways:
            tensors = ema.iter_full_tensors()
            next(tensors)
            change()
            with pytest.raises(EMAStateError, match="updated, loaded or reset since the first tensor"):
                list(tensors)
    assert set(groups._teams) == {(0, 1)}


def test_a_copy_into_another_averages_teacher_is_refused() -> None:
    """It would silently become the other average."""
    teacher = build().requires_grad_(False)
    other = ShardedEMA(build(), decay=0.5, into=teacher)
    other.update(batches=0, due=True)
    ema = ShardedEMA(build(), decay=0.9)
    ema.update()
    with pytest.raises(EMAStateError, match=r"another ShardedEMA averages into .* close\(\) on it first"):
        ema.copy_to(into=teacher)
    other.close()
    ema.copy_to(into=teacher)
    before = other.fingerprint()
    assert before == ema.fingerprint()
