"""Runs against the indexing of torch: a wrong run is a silently permuted weight, in memory and in every file."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_ema.engines.dtensor import shard_runs
from dist_ema.geometry import runs as geometry
from dist_ema.geometry.runs import (
    Rows,
    Runs,
    box_runs,
    chunk,
    chunks,
    count,
    cut,
    flattened,
    merge,
    overlap,
    split_evenly,
    split_for_all,
    whole,
)

pytestmark = pytest.mark.core

settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=200)
settings.load_profile("repeatable")


def places(runs: Runs) -> list[int]:
    """Every position in ``runs``, in order."""
    return [index for start, length in runs for index in range(start, start + length)]


def check_canonical(runs: Runs) -> None:
    """Sorted, disjoint, no empty run: what files and gathers rely on."""
    assert all(length > 0 for _, length in runs)
    assert all(first[0] + first[1] <= second[0] for first, second in pairwise(runs))


@st.composite
def rows_of(draw: st.DrawFn, size: int) -> Runs:
    """Runs of one length at equal distances inside ``range(size)``."""
    step = draw(st.integers(2, 9))
    length = draw(st.integers(1, step - 1))
    start = draw(st.integers(0, size - length))
    rows = Rows(start, length, step, draw(st.integers(1, (size - start - length) // step + 1)))
    # Parts of them too, whose first and last run are incomplete.
    low = draw(st.integers(0, count(rows) - 1))
    return cut(rows, low, draw(st.integers(low + 1, count(rows)))) if draw(st.booleans()) else rows


def runs_of(size: int) -> st.SearchStrategy[Runs]:
    """Sorted, disjoint runs inside ``range(size)``."""
    return st.one_of(pieces_of(size), rows_of(size)) if size > 9 else pieces_of(size)


@st.composite
def pieces_of(draw: st.DrawFn, size: int) -> Runs:
    """Some that may touch, as the pieces of a cut do."""
    cuts = sorted(draw(st.sets(st.integers(0, size), max_size=8)))
    keep = draw(st.lists(st.booleans(), min_size=len(cuts), max_size=len(cuts)))
    return tuple((low, high - low) for (low, high), kept in zip(pairwise(cuts), keep, strict=False) if kept)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Runs]]:
    """A shape of up to four dimensions, some of one element or none, and what is kept of each."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    return shape, [draw(st.one_of(runs_of(size), st.just(whole(size)))) for size in shape]


@given(boxes())
def test_box_runs_are_the_elements_that_indexing_takes(box: tuple[tuple[int, ...], list[Runs]]) -> None:
    shape, kept = box
    full = np.arange(int(np.prod(shape))).reshape(shape)
    taken = full[np.ix_(*[places(intervals) for intervals in kept])] if shape else full
    runs = box_runs(shape, kept)
    assert places(runs) == taken.reshape(-1).tolist()
    check_canonical(runs)
    assert merge(runs) == runs, "a shard of whole rows must be one run"


def test_columns_are_kept_as_numbers_not_as_a_tuple_for_each_row() -> None:
    """256 experts sharded along their columns have two million rows, in each of 58 layers."""
    shape = (256, 7168, 2048)
    runs = box_runs(shape, [whole(256), whole(7168), ((256, 256),)])
    assert runs == Rows(256, 256, 2048, 256 * 7168)
    assert box_runs(shape, [((3, 2),), whole(7168), ((0, 1),)]) == Rows(3 * 7168 * 2048, 1, 2048, 2 * 7168)
    assert box_runs(shape, [((3, 2),), ((0, 7),), whole(2048)]) == Rows(3 * 7168 * 2048, 7 * 2048, 7168 * 2048, 2)
    assert Rows(1, 2, 5, 3) == ((1, 2), (6, 2), (11, 2)) != Rows(1, 2, 5, 2)


def test_parts_of_columns_are_numbers_too() -> None:
    """Where replicas share a shard of columns, or a load reads it in parts, a tuple for each row was made of a part."""
    runs = Rows(256, 256, 2048, 256 * 7168)
    half = cut(runs, 1000, 200_000_000)
    assert isinstance(half, Rows)
    assert (half[0], half[-1], count(half)) == ((256 + 3 * 2048 + 232, 24), (256 + 781_249 * 2048, 256), 199_999_000)
    assert all(isinstance(part, Rows) for part in chunks(half, 1 << 19))
    assert sum(map(count, chunks(half, 1 << 19))) == count(half)


@given(runs_of(60))
def test_runs_for_compiled_code_are_the_same_runs(runs: Runs) -> None:
    assert list(flattened(runs)) == [number for run in runs for number in run]


def test_box_runs_refuse_a_dimension_too_few() -> None:
    with pytest.raises(ValueError, match="one list of intervals per dimension, got 1 for shape"):
        box_runs((2, 3), [((0, 2),)])


@given(st.integers(0, 40), st.integers(1, 9))
def test_chunk_is_torch_chunk_for_sizes_that_no_part_divides(size: int, parts: int) -> None:
    """5 rows on 4 ranks are 2, 2, 1 and none."""
    expected = [piece.tolist() for piece in torch.arange(size).chunk(parts)] if size else []
    expected += [[] for _ in range(parts - len(expected))]
    assert [places(chunk(whole(size), parts, index)) for index in range(parts)] == expected


@given(runs_of(40), st.integers(1, 6))
def test_chunk_of_a_chunk_divides_what_is_left(runs: Runs, parts: int) -> None:
    """The second mesh dimension cuts what the first has left, not the full dimension."""
    expected = [piece.tolist() for piece in torch.tensor(places(runs), dtype=torch.int64).chunk(parts)]
    found = [places(chunk(runs, parts, index)) for index in range(parts)]
    assert [part for part in found if part] == [part for part in expected if part]


@given(runs_of(60), st.integers(0, 70), st.integers(0, 70))
def test_cut_takes_local_elements_by_number(runs: Runs, start: int, stop: int) -> None:
    assert places(cut(runs, start, stop)) == places(runs)[start:stop]
    check_canonical(cut(runs, start, stop))


@given(runs_of(60), st.integers(1, 70))
def test_chunks_cover_runs_in_order_and_stay_within_the_limit(runs: Runs, limit: int) -> None:
    parts = list(chunks(runs, limit))
    assert [place for part in parts for place in places(part)] == places(runs)
    assert all(count(part) == limit for part in parts[:-1])
    assert all(0 < count(part) <= limit for part in parts)


@given(runs_of(60), st.integers(0, 60), st.integers(0, 60))
def test_overlap_finds_each_element_of_a_window_once(runs: Runs, start: int, stop: int) -> None:
    """Local number and place in the window belong to the same element of the full tensor."""
    local = places(runs)
    found = {}
    for first, inside, length in overlap(runs, start, stop):
        assert length > 0
        found |= {inside + step: local[first + step] for step in range(length)}
    assert found == {place - start: place for place in local if start <= place < stop}


@given(runs_of(60))
def test_merge_keeps_elements_and_leaves_no_neighbours(runs: Runs) -> None:
    merged = merge(runs)
    assert places(merged) == places(runs)
    assert all(first[0] + first[1] < second[0] for first, second in pairwise(merged))
    assert count(merged) == len(places(runs))


@given(
    st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 2, 4, 8])), max_size=8),
    st.integers(1, 7),
)
def test_split_evenly_covers_every_element_once_and_in_equal_bytes(tensors: list[tuple[int, int]], parts: int) -> None:
    """An element that nobody averages, or two replicas that both do, would be wrong without any error."""
    sizes, itemsizes = [size for size, _ in tensors], [item for _, item in tensors]
    split = [split_evenly(sizes, itemsizes, parts, index) for index in range(parts)]
    for place, size in enumerate(sizes):
        taken = [index for ranges in split for index in range(*ranges[place])]
        assert taken == list(range(size)), "in order of the parts, each element once"
    held = [sum((stop - start) * item for (start, stop), item in zip(r, itemsizes, strict=True)) for r in split]
    widest = max(itemsizes, default=1)
    assert max(held) - min(held) <= 1 + 2 * widest, "each part has two ends, each off by less than an element"
    assert sum(held) == sum(size * item for size, item in tensors)
    nonempty = [[(place, *range_) for place, range_ in enumerate(ranges) if range_[0] < range_[1]] for ranges in split]
    assert split_for_all(sizes, itemsizes, parts) == nonempty, "replicas must not disagree on who has what"


SHAPES = [(7,), (1,), (5, 3), (1, 4), (3, 1), (4, 6), (2, 5, 3), (7, 15), (0, 3)]


def _check_runs(name: str, tensor: DTensor, full: torch.Tensor) -> None:
    runs = shard_runs(tensor.shape, tensor.device_mesh, tensor.placements, name)
    local = tensor.to_local().reshape(-1).tolist()
    assert full.reshape(-1)[places(runs)].tolist() == local, (name, tensor.placements, runs)
    check_canonical(runs)


@pytest.mark.world_size()
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shard_runs_are_what_distribute_tensor_leaves_on_one_mesh_dimension(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for shape in SHAPES:
        full = torch.arange(float(np.prod(shape))).reshape(shape)
        for placement in [Replicate(), *[Shard(dim) for dim in range(len(shape))]]:
            _check_runs(str(shape), distribute_tensor(full, mesh, [placement]), full)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("mesh_shape", [(2, 2), (1, 4), (4, 1)])
def test_shard_runs_are_what_distribute_tensor_leaves_on_two_mesh_dimensions(
    rank: int, mesh_shape: tuple[int, int]
) -> None:
    """Shard(0) twice cuts what the first has left; Shard(0) with Shard(1) leaves a box of many runs."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("a", "b"))
    for shape in SHAPES:
        full = torch.arange(float(np.prod(shape))).reshape(shape)
        options: list[Placement] = [Replicate(), *[Shard(dim) for dim in range(len(shape))]]
        for pair in product(options, repeat=2):
            _check_runs(f"{shape} {pair}", distribute_tensor(full, mesh, pair), full)


@pytest.mark.world_size()
@pytest.mark.parametrize(("world_size", "tp"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("rows", [4, 8, 12, 20])
def test_strided_shards_of_fsdp2_over_tensor_parallelism_keep_their_rows(
    rank: int, world_size: int, tp: int, rows: int
) -> None:
    """FSDP2 shards last but stands first in the placements: read left to right, the rows come out permuted."""
    mesh = init_device_mesh("cpu", (world_size // tp, tp), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, rows), nn.Linear(rows, 7))
    full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    kinds = set()
    for name, parameter in model.named_parameters():
        _check_runs(name, parameter, full[name])
        kinds |= {type(placement).__name__ for placement in parameter.placements}
    assert "_StridedShard" in kinds, kinds


@st.composite
def runs_in_shape(draw: st.DrawFn) -> tuple[Runs, tuple[int, ...]]:
    """Any runs of a tensor, or those of a box of it (what DTensors hold)."""
    if draw(st.booleans()):
        shape, kept = draw(boxes())
        return box_runs(shape, kept), shape
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=4)))
    return draw(runs_of(int(np.prod(shape)))), shape


@given(runs_in_shape())
def test_boxes_are_the_elements_of_the_runs_in_their_order(case: tuple[Runs, tuple[int, ...]]) -> None:
    """A box in the wrong place, or two in the wrong order, permutes a weight in every file."""
    runs, shape = case
    full = np.arange(int(np.prod(shape))).reshape(shape)
    found = geometry.boxes(runs, shape)
    taken = [
        full[tuple(slice(start, start + size) for start, size in zip(*box, strict=True))].reshape(-1) for box in found
    ]
    assert [index for part in taken for index in part.tolist()] == places(runs)
    assert all(part.size for part in taken), "an empty box"
    assert len(found) <= len(merge(runs)) * max(2 * len(shape) - 1, 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_a_shard_that_is_a_box_is_one_box(shape: list[int], data: st.DataObject) -> None:
    """The columns of a tensor-parallel weight would otherwise be thousands of pieces of a file."""
    spans = [sorted(data.draw(st.tuples(st.integers(0, size - 1), st.integers(1, size)))) for size in shape]
    kept = [((low, max(high - low, 1)),) for low, high in spans]
    (box,) = geometry.boxes(box_runs(shape, kept), shape)
    offsets = tuple(intervals[0][0] for intervals in kept)
    assert box == (offsets, tuple(intervals[0][1] for intervals in kept))
