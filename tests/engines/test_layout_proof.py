"""The proof of the layout: what a wrongly read layout would do silently, each kind of it, is noticed on every rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from support.models import CASES

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dist_ema import ShardedEMA
from dist_ema.engines import dtensor as dtensor_engine
from dist_ema.engines.base import Engine
from dist_ema.engines.reenactment import Division, kept_indices
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.positions import holds, position_sums
from dist_ema.geometry.runs import Rows, Runs, box_runs, cut, merge, whole
from dist_ema.geometry.spec import TensorSpec

MASK = (1 << 64) - 1


def reference(positions: Sequence[int]) -> list[int]:
    """The same sums, one position at a time, in Python's integers."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return value ^ (value >> 31)

    return [len(positions), sum(mix(one + 1) - mix(one) for one in positions) & MASK]


def elements(runs: Runs) -> list[int]:
    return [start + offset for start, length in runs for offset in range(length)]


def test_sums_of_runs_are_those_of_their_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, cut rows and repeated rows take other ways through the code."""
    monkeypatch.setattr("dist_ema.geometry.positions.BLOCK", 3)
    generator = random.Random(0)
    held: list[Runs] = [(), whole(7), ((2**45, 5), (3, 1))]
    for _ in range(40):
        length = generator.randint(1, 4)
        rows = Rows(generator.randint(0, 9), length, length + generator.randint(1, 3), generator.randint(2, 9))
        start = generator.randint(0, 2 * length)
        held += [rows, rows, tuple(rows), cut(rows, start, start + generator.randint(0, 3 * length))]
    assert position_sums(held).tolist() == [reference(elements(runs)) for runs in held]


def test_sets_of_equal_power_sums_have_other_sums() -> None:
    """A wrong order of shards exchanges regular patterns. These have the same count, sum, squares and cubes."""
    even = [number for number in range(16) if number.bit_count() % 2 == 0]
    odd = [number for number in range(16) if number.bit_count() % 2 == 1]
    first, second = (merge(tuple((number, 1) for number in numbers)) for numbers in (even, odd))
    sums = position_sums([first, second, whole(16)])
    assert sums[0, 0] == sums[1, 0]
    assert sums[0, 1] != sums[1, 1]
    assert (sums[0] + sums[1] == sums[2]).all()
    assert (sums[0] + sums[0] != sums[2]).any()


def test_runs_are_compared_with_indices_exactly() -> None:
    """Both ends of each run are looked at; a run that is moved, joined or exchanged has another end."""
    generator = random.Random(1)
    for _ in range(200):
        shape = tuple(generator.randint(1, 5) for _ in range(generator.randint(1, 3)))
        kept = [np.array(sorted(generator.sample(range(size), generator.randint(1, size)))) for size in shape]
        numbers = np.arange(int(np.prod(shape))).reshape(shape)[np.ix_(*kept)].reshape(-1)
        runs = box_runs(shape, [merge(tuple((int(one), 1) for one in indices)) for indices in kept])
        assert elements(runs) == numbers.tolist()
        assert holds(runs, shape, kept)
        size = int(np.prod(shape))
        other = sorted(generator.sample(range(size), len(numbers)))
        others = merge(tuple((one, 1) for one in other))
        assert holds(others, shape, kept) == (other == numbers.tolist())
        assert not holds(merge((*runs, (size, 1))), shape, kept)
    assert holds(((0, 1),), (), [])
    assert not holds(((0, 2),), (2,), [np.array([1, 0])])  # no run goes backwards


def test_indices_are_cut_by_torch() -> None:
    """FSDP2 over a packed layer: tensor parallelism takes its half of both parts, then FSDP2 one piece of that."""
    packed = StridedShard(0, split_factor=2)
    kept = [
        kept_indices((8, 3), [Division(0, 2, tp, packed), Division(0, 2, dp, None)])[0].tolist()
        for dp in range(2)
        for tp in range(2)
    ]
    assert kept == [[0, 1], [2, 3], [4, 5], [6, 7]]
    empty = kept_indices((1, 3), [Division(0, 4, 3, None)])
    assert [indices.tolist() for indices in empty] == [[], [0, 1, 2]]


@contextmanager
def reading(change: Callable[[TensorSpec], TensorSpec]) -> Iterator[None]:
    """Every engine announces changed specs."""
    specs = Engine.specs

    def changed(self: Engine) -> list[TensorSpec]:
        return [change(spec) for spec in specs(self)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "specs", changed)
        yield


def shifted(spec: TensorSpec) -> TensorSpec:
    """Each rank but the first reads its elements one place too early: one is held twice, one is missing."""
    return replace(spec, runs=tuple((max(start - 1, 0), length) for start, length in spec.runs))


def longer(spec: TensorSpec) -> TensorSpec:
    return replace(spec, shape=torch.Size([spec.numel + 1]))


def written_twice(spec: TensorSpec) -> TensorSpec:
    """Replicas of which nobody knows, so that each of them writes."""
    return replace(spec, replicas=None)


KINDS = {
    "missing": ("fsdp1-full-orig", longer, "some are missing"),
    "misplaced": ("fsdp1-full-orig", shifted, "some of them are missing and others are held twice"),
    "doubled": ("ddp", written_twice, "some are held more than once"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.world_size(2)
def test_elements_that_are_not_held_once(kind: str) -> None:
    """Every rank has as many elements as it should, so that nothing else notices."""
    case, change, message = KINDS[kind]
    wanted = "module.0.down.weight"  # of which both ranks hold a part
    with reading(lambda spec: change(spec) if spec.name == wanted else spec):
        ema = ShardedEMA(CASES[case].model(), decay=0.5)
        assert ema.update()  # local, and does not know of it
        for call in (ema.full_state_dict, ema.fingerprint):
            with pytest.raises(EMAEngineError, match=rf"'{wanted}'.*{message}.*rank 1: "):
                call()
    ema.reset()  # reads the layout anew
    ema.update()
    ema.full_state_dict()
    with (
        reading(lambda spec: change(spec) if spec.name == wanted else spec),
        pytest.raises(EMAEngineError, match=message),
    ):
        ema.rebind(CASES[case].model())
    ema.full_state_dict()


@pytest.mark.parametrize("kind", ["misplaced", "doubled"])
@pytest.mark.world_size(2)
def test_an_update_that_is_sent_to_a_teacher_is_the_first_collective_call(kind: str) -> None:
    """With ``sync="gather"`` the update would have put elements in wrong places into the teacher."""
    case, change, message = KINDS[kind]
    wanted = "module.0.down.weight"
    teacher = CASES[case].plain().requires_grad_(False)
    with reading(lambda spec: change(spec) if spec.name == wanted else spec):
        ema = ShardedEMA(CASES[case].model(), into=teacher, sync="gather", decay=0.5)
        with pytest.raises(EMAEngineError, match=rf"'{wanted}'.*{message}"):
            ema.update()


class _Model(nn.Module):
    def __init__(self, placements: Sequence[Any], shape: tuple[int, ...] = (8, 4)) -> None:
        super().__init__()
        sizes = (2, 2) if len(placements) == 2 else (dist.get_world_size(),)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("left", "right")[: len(sizes)])
        for name in ("first", "second"):
            full = torch.randn(shape)
            setattr(self, name, nn.Parameter(distribute_tensor(full, mesh, placements, src_data_rank=None)))


def other_rank(shape: Any, sizes: Any, coordinate: Any, placements: Any, *rest: Any) -> Runs:
    """Ranks exchange their pieces, so that together they still hold everything once."""
    there = [size - 1 - place for size, place in zip(sizes, coordinate, strict=True)]
    return _placed_runs(shape, sizes, there, placements, *rest)


def unstrided(shape: Any, sizes: Any, coordinate: Any, placements: Any, *rest: Any) -> Runs:
    """What was read before strided shards were known."""
    plain = [Shard(one.dim) if isinstance(one, StridedShard) else one for one in placements]
    return _placed_runs(shape, sizes, coordinate, plain, *rest)


def transposed(shape: Any, sizes: Any, coordinate: Any, placements: Any, *rest: Any) -> Runs:
    """Rows in place of columns: as many elements, of a square."""
    return _placed_runs(shape, sizes, coordinate, [Shard(1 - one.dim) for one in placements], *rest)


_placed_runs = dtensor_engine.placed_runs
WRONG = {
    "exchanged": (other_rank, [Shard(0)], (8, 4)),
    "exchanged columns": (other_rank, [Shard(1)], (8, 4)),
    "packed": (unstrided, [StridedShard(0, split_factor=2)], (8, 4)),
    "packed columns": (unstrided, [StridedShard(1, split_factor=2)], (4, 8)),
    "transposed": (transposed, [Shard(0)], (4, 4)),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.world_size(2)
def test_elements_of_another_rank(kind: str) -> None:
    """Together the ranks hold everything once, so that a sum over them shows nothing; the rows are in another order."""
    wrong, placements, shape = WRONG[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dtensor_engine, "placed_runs", wrong)
        ema = ShardedEMA(_Model(placements, shape), decay=0.5)
        assert ema.update()
        mesh = r"on a mesh of shape \(2,\) with dimensions 'left'"
        with pytest.raises(EMAEngineError, match=rf"'first' of shape .* is sharded as .*Shard.* {mesh}"):
            ema.full_state_dict()
    ema.reset()
    ema.full_state_dict()


@pytest.mark.world_size(4)
def test_layouts_that_torch_makes_pass(rank: int) -> None:
    """Uneven and empty shards, two dimensions of a mesh, replicas, and a rank that knows another layout of its own."""
    for placements, shape in [
        ([Shard(0)], (5, 3)),
        ([Shard(0)], (1, 3)),
        ([Shard(1)], (3, 6)),
        ([Replicate()], (3,)),
        ([Shard(0), Shard(0)], (7, 2)),
        ([Shard(1), Shard(0)], (5, 7)),
        ([Replicate(), StridedShard(1, split_factor=2)], (3, 10, 2)),
        ([StridedShard(0, split_factor=2), Replicate()], (8, 2)),
    ]:
        ema = ShardedEMA(_Model(placements, shape), decay=0.5)
        ema.update()
        assert len(ema.fingerprint()) == 2


@pytest.mark.world_size(2)
def test_one_rank_that_reads_another_layout_is_told_to_all(rank: int) -> None:
    """The others would go on to send and wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(dtensor_engine, "placed_runs", unstrided)
        ema = ShardedEMA(_Model([StridedShard(0, split_factor=2)]), decay=0.5)
    with pytest.raises(EMAEngineError, match="rank 1: EMAEngineError: 'first'"):
        ema.metrics()
