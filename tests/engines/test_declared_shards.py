"""Tensors that declare to be a part of a larger one.

A plain tensor looks whole: without its declaration the average of one rank's rows is stored under the name of the full
tensor. A DTensor of Megatron-FSDP says ``Shard(0)`` and holds other rows than ``Shard(0)`` would leave. Declarations
that cannot be true are refused, and so are those that the wrapper around the model cannot honour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from support.scaled import STEPS, check_average, check_same
from support.zero_models import make_engine

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA, read_checkpoint
from dist_ema.engines.declared import declaration
from dist_ema.errors import EMAEngineError

Chunk = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # offsets in the full tensor, in the local one, sizes


def declare(tensor: Any, shape: Sequence[int], chunks: Sequence[Chunk]) -> Any:
    """Sets torch 2.14's attributes."""
    tensor.global_shape = tuple(shape)
    tensor.global_offsets = tuple(chunk[0] for chunk in chunks)
    tensor.local_offsets = tuple(chunk[1] for chunk in chunks)
    tensor.local_sizes = tuple(chunk[2] for chunk in chunks)
    return tensor


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[Chunk]]:
    """A full shape, and chunks that fill a local tensor: along each dimension one or two intervals of the full one."""
    shape, intervals, padding = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        ends = sorted(draw(st.lists(st.integers(0, 9), min_size=2, max_size=4, unique=True)))
        intervals.append([(ends[i], ends[i + 1]) for i in range(0, len(ends) - 1, 2)])
        shape.append(ends[-1] + draw(st.integers(0, 2)))
        padding.append(draw(st.integers(0, 2)))
    chunks: list[Chunk] = []
    for box in product(*intervals):
        local = [
            sum(b - a for a, b in along[: along.index(interval)]) + pad
            for along, interval, pad in zip(intervals, box, padding, strict=True)
        ]
        chunks.append((tuple(a for a, _ in box), tuple(local), tuple(b - a for a, b in box)))
    held = [sum(b - a for a, b in along) + 2 * pad for along, pad in zip(intervals, padding, strict=True)]
    return tuple(shape), tuple(held), draw(st.permutations(chunks))


@given(grids())
def test_a_declaration_is_read_as_it_is_meant(case: tuple[tuple[int, ...], tuple[int, ...], list[Chunk]]) -> None:
    """Several chunks in any order, along any dimension, with padding around them."""
    shape, held, chunks = case
    full = np.arange(int(np.prod(shape))).reshape(shape)
    local = np.full(held, -1)
    for offsets, places, sizes in chunks:
        to = tuple(slice(a, a + size) for a, size in zip(places, sizes, strict=True))
        local[to] = full[tuple(slice(a, a + size) for a, size in zip(offsets, sizes, strict=True))]
    found = declaration("w", declare(torch.tensor(local), shape, chunks))
    assert found is not None and tuple(found.shape) == shape
    kept = torch.tensor(local)[found.inside or ...].reshape(-1)
    runs = [place for start, length in found.runs for place in range(start, start + length)]
    assert runs == kept.tolist()


WRONG = {
    "a chunk lies outside of the full tensor": ((4, 2), [((3, 0), (0, 0), (2, 2))], "outside of the full tensor"),
    "a chunk lies outside of the local tensor": ((4, 2), [((0, 0), (1, 0), (2, 2))], "outside of the local tensor"),
    "chunks overlap in the full tensor": (
        (4, 2),
        [((0, 0), (0, 0), (1, 2)), ((0, 0), (1, 0), (1, 2))],
        "overlap in the full",
    ),
    "chunks overlap in the local tensor": (
        (4, 2),
        [((0, 0), (0, 0), (1, 2)), ((2, 0), (0, 0), (2, 2))],
        "overlap in the local",
    ),
    "chunks stand in another order": ((4, 2), [((3, 0), (0, 0), (1, 2)), ((0, 0), (1, 0), (1, 2))], "another order"),
    "a part that no chunk holds": ((4, 2), [((0, 0), (0, 0), (1, 1)), ((1, 1), (1, 1), (1, 1))], "belong to no chunk"),
    "nothing is declared of a full tensor": ((4, 2), [], "declares none"),
    "other dimensions": ((8,), [((0,), (0,), (4,))], "offsets and"),
    "negative": ((4, 2), [((-1, 0), (0, 0), (2, 2))], "outside of the full tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_declaration_that_contradicts_the_tensor_is_refused(what: str) -> None:
    shape, chunks, message = WRONG[what]
    with pytest.raises(EMAEngineError, match=message):
        declaration("weight", declare(torch.zeros(2, 2), shape, chunks))


def test_an_incomplete_declaration_is_refused() -> None:
    tensor: Any = torch.zeros(2, 2)
    tensor.global_shape = (4, 2)
    with pytest.raises(EMAEngineError, match="but not global_offsets, local_offsets, local_sizes"):
        declaration("weight", tensor)
    declare(tensor, (4, 2), [((0, 0), (0, 0), (2, 2))])
    tensor.local_sizes += ((1, 2),)
    with pytest.raises(EMAEngineError, match="different lengths"):
        declaration("weight", tensor)
    tensor.global_shape = "unknown"
    with pytest.raises(EMAEngineError, match="global_shape holds 'unknown'"):
        declaration("weight", tensor)
    plain: Any = torch.zeros(2, 2)
    plain.__create_chunk_list__ = list
    with pytest.raises(EMAEngineError, match="does not tell the shape"):
        declaration("weight", plain)


def test_a_part_without_other_ranks_is_refused() -> None:
    """One process without a process group: nobody could hold the rest."""
    model = nn.Linear(2, 2, bias=False)
    declare(model.weight, (4, 2), [((0, 0), (0, 0), (2, 2))])
    with pytest.raises(EMAEngineError, match="no process group"):
        ShardedEMA(model, decay=0.5)


def _check_average(model: nn.Module, full: Mapping[str, torch.Tensor], folder: Path, rank: int) -> None:
    """As check_average(), and looks at the padding, which the optimizer steps and the average leaves alone."""
    before = {name: _local(parameter).clone() for name, parameter in model.named_parameters()}
    check_average(model, full, folder, rank)
    for name, parameter in model.named_parameters():
        padding = before[name] == -1
        assert torch.equal(_local(parameter)[padding], before[name][padding] * prod(STEPS)), name


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def _parts(rank: int, world_size: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Rows, columns with padding, packed rows of two matrices, one that a single rank holds, and a whole tensor."""
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.rand(7, 2 * world_size + 2, generator=generator) + 1 for name in ("rows", "columns", "one")}
    full |= {"packed": torch.rand(4 * world_size, 3, generator=generator) + 1}
    full |= {"whole": torch.rand(5, generator=generator) + 1}
    model = nn.Module()
    sizes = [7 // world_size + (1 if place < 7 % world_size else 0) for place in range(world_size)]
    first, width = sum(sizes[:rank]), full["rows"].shape[1]
    rows = nn.Parameter(full["rows"][first : first + sizes[rank]].clone())
    model.rows = declare(rows, full["rows"].shape, [((first, 0), (0, 0), (sizes[rank], width))])

    # A row of padding above and below, and a column on the right. The first and the last rank have more columns.
    begin = 0 if rank == 0 else 2 * rank + 1
    stop = width if rank == world_size - 1 else 2 * rank + 3
    columns = torch.full((9, stop - begin + 1), -1.0)
    columns[1:8, :-1] = full["columns"][:, begin:stop]
    part = [((0, begin), (1, 0), (7, stop - begin))]
    model.columns = declare(nn.Parameter(columns), full["columns"].shape, part)

    half = 2 * world_size
    packed = torch.cat([full["packed"][2 * rank : 2 * rank + 2], full["packed"][half + 2 * rank : half + 2 * rank + 2]])
    pieces: list[Chunk] = [((2 * rank, 0), (0, 0), (2, 3)), ((half + 2 * rank, 0), (2, 0), (2, 3))]
    model.packed = declare(nn.Parameter(packed), full["packed"].shape, pieces)

    only = rank == world_size - 1  # a packed buffer leaves a small tensor to one rank
    one = nn.Parameter(full["one"].clone() if only else torch.zeros(0, width))
    model.one = declare(one, full["one"].shape, [((0, 0), (0, 0), (7, width))] if only else [])
    model.whole = nn.Parameter(full["whole"].clone())
    return model, full


@pytest.mark.world_size()
@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_tensors_that_are_parts_are_averaged_as_one(rank: int, world_size: int, tmp_path: Path) -> None:
    model, full = _parts(rank, world_size)
    _check_average(model, full, tmp_path, rank)


@pytest.mark.world_size(4)
def test_parts_that_two_ranks_declare_are_written_once(rank: int, tmp_path: Path) -> None:
    """Copies of a sharded model, and a small tensor that every rank has: added up, their fingerprints would double."""
    full = {"rows": torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) + 1, "whole": torch.arange(3.0) + 1}
    full["frozen"], full["counter"] = full["rows"] * 2, full["rows"] * 3
    start, stop = [(0, 2), (2, 5)][rank % 2]
    rows: list[Chunk] = [((start, 0), (0, 0), (stop - start, 2))]
    model = nn.Module()
    model.rows = declare(nn.Parameter(full["rows"][start:stop].clone()), (5, 2), rows)
    model.whole = declare(nn.Parameter(full["whole"].clone()), (3,), [((0,), (0,), (3,))])
    model.frozen = declare(nn.Parameter(full["frozen"][start:stop].clone(), requires_grad=False), (5, 2), rows)
    model.register_buffer("counter", declare(full["counter"][start:stop].clone(), (5, 2), rows))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    plain = nn.Module()
    for name in ("rows", "whole"):
        plain.register_parameter(name, nn.Parameter(full[name]))
    plain.register_parameter("frozen", nn.Parameter(full["frozen"], requires_grad=False))
    plain.register_buffer("counter", full["counter"])
    reference = ShardedEMA(plain, decay=0.5)
    reference.update()
    assert ema.fingerprint() == reference.fingerprint()
    found = ema.full_state_dict()
    ema.save(tmp_path / "ema")
    stored = read_checkpoint(tmp_path / "ema")
    check_same(stored, full)
    check_same(found, full if rank == 0 else {})


@pytest.mark.world_size()
@pytest.mark.parametrize(("world_size", "copies"), [(2, 1), (3, 1), (4, 2)])
def test_rows_of_a_packed_buffer_are_not_what_their_placement_says(
    rank: int, world_size: int, copies: int, tmp_path: Path
) -> None:
    """Megatron-FSDP: ``Shard(0)`` of 7 rows on 2 ranks would be 4 and 3; the buffer's cut makes them 2 and 5.

    On four ranks the sizes are the same as of ``Shard(0)`` on some ranks, so only the declaration tells.
    """
    shards = world_size // copies
    mesh = init_device_mesh("cpu", (copies, shards), mesh_dim_names=("outer", "inner"))
    full = {"first": torch.rand(7, 3) + 1, "second": torch.rand(6) + 1}
    cuts = {"first": [0, 2, 7, 7][: shards + 1], "second": [0, 3, 6, 6][: shards + 1]}
    model = nn.Module()
    place = rank % shards
    for name, tensor in full.items():
        dist.broadcast(tensor, 0)
        start, stop = cuts[name][place], cuts[name][place + 1]
        local: Any = tensor[start:stop].clone()
        chunk = SimpleNamespace(offsets=(start, 0)[: tensor.ndim], sizes=tuple(local.shape))
        local.__create_chunk_list__ = lambda chunk=chunk: [chunk]
        placements = [Replicate(), Shard(0)]
        made = DTensor.from_local(local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())
        parameter = nn.Parameter(made)
        # from_local() keeps a view of what it is given, and Megatron-FSDP declares on what is kept.
        parameter._local_tensor.__create_chunk_list__ = local.__create_chunk_list__  # type: ignore[attr-defined]
        model.register_parameter(name, parameter)
    _check_average(model, full, tmp_path, rank)


@pytest.mark.world_size(2)
def test_a_parameter_of_megatron_fsdp_has_to_declare_its_rows() -> None:
    """On some ranks the rows may be as many as ``Shard(0)`` leaves there, and on others not."""
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    setattr(model.weight, "__fsdp_param__", True)  # noqa: B010 - Python would change this name in a class only
    advice = r"'weight' is sharded by Megatron-FSDP.*update_uneven_dtensor_chunk_metadata"
    with pytest.raises(EMAEngineError, match=advice):
        ShardedEMA(model, decay=0.5)


@pytest.mark.world_size(2)
def test_a_dtensor_whose_declaration_contradicts_it_is_refused(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for chunks, message in [
        ([SimpleNamespace(offsets=(2 * rank, 0), sizes=(3, 2))], "has the sizes"),
        ([SimpleNamespace(offsets=(i, 0), sizes=(1, 2)) for i in range(2)], "returns 2 chunks"),
        ([SimpleNamespace(offsets=(3, 0), sizes=(2, 2))], "outside of the full tensor"),
        ([], "declares none"),
    ]:
        made: Any = DTensor.from_local(torch.zeros(2, 2), mesh, [Shard(0)], run_check=False)
        model = nn.Module()
        model.weight = nn.Parameter(made)
        model.weight._local_tensor.__create_chunk_list__ = lambda chunks=chunks: chunks
        with pytest.raises(EMAEngineError, match=message):
            ShardedEMA(model, decay=0.5)
    model.weight = nn.Parameter(made)
    declare(model.weight, (6, 2), [((2 * rank, 0), (0, 0), (2, 2))])
    with pytest.raises(EMAEngineError, match=r"global_shape is \(6, 2\), but the DTensor's shape"):
        ShardedEMA(model, decay=0.5)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp1", "fsdp1-flat", "zero0", "zero3"])
def test_a_wrapper_that_takes_parts_for_wholes_is_refused(rank: int, wrapper: str) -> None:
    """DDP makes the parts of all ranks the same, FSDP1 and ZeRO cut them again."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    declare(model[0].weight, (4, 2), [((2 * rank, 0), (0, 0), (2, 2))])
    wrapped: Any
    if wrapper == "ddp":
        wrapped = DistributedDataParallel(model)
    elif wrapper.startswith("fsdp1"):
        ignored = [model[0]] if wrapper == "fsdp1-flat" else None
        wrapped = FullyShardedDataParallel(
            model, use_orig_params=ignored is None, ignored_modules=ignored, device_id=torch.device("cpu")
        )
    else:
        wrapped = make_engine(int(wrapper[-1]), model=model)
    with pytest.raises(EMAEngineError, match=r"0\.weight.* declares to be a part"):
        ShardedEMA(wrapped, decay=0.5)


@pytest.mark.world_size(2)
def test_what_ddp_ignores_may_be_a_part(rank: int, tmp_path: Path) -> None:
    """DDP leaves such parameters to each rank, so that their declaration holds."""
    full = {"part": torch.arange(8.0).reshape(4, 2) + 1, "layer.weight": torch.ones(1, 2)}
    model = nn.Module()
    part = nn.Parameter(full["part"].chunk(2)[rank].clone())
    model.part = declare(part, (4, 2), [((2 * rank, 0), (0, 0), (2, 2))])
    model.layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.layer.weight)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["part"])
    wrapped = DistributedDataParallel(model)
    found = {name: tensor.clone() for name, tensor in ShardedEMA(wrapped, decay=0.5).iter_full_tensors()}
    assert set(found) == set(full)
    assert all(torch.equal(found[name], tensor) for name, tensor in full.items())
