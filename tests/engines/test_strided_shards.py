"""Strided shards: packed tensor parallelism, FSDP2 over tensor parallelism, and both at once.

torch writes ``_StridedShard`` for two different cuts. A reader that takes one for the other returns the right rows in a
wrong order, and neither a count of elements nor a checksum of the file notices. ``full_tensor()`` is no reference: for
FSDP2 over packed layers it returns wrong rows itself. Each test compares with the weights as they were before they were
cut, or with torch's own ``_split_tensor``.
"""

from __future__ import annotations

from itertools import product
from math import prod
from pathlib import Path

from support.scaled import check_average

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Partial, Placement, Replicate, Shard, _MaskPartial
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dist_ema import ShardedEMA
from dist_ema.engines import placements as rules
from dist_ema.engines.placements import placed_runs
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.runs import Rows, Runs


def places(runs: Runs) -> list[int]:
    return [place for start, length in runs for place in range(start, start + length)]


def _strided_pieces(size: int, factor: int, parts: int) -> list[list[int]]:
    pieces, _ = StridedShard(0, split_factor=factor)._split_tensor(torch.arange(size), parts, with_padding=False)
    return [piece.tolist() for piece in pieces]


def test_a_strided_shard_alone_is_cut_as_torch_cuts_it() -> None:
    """Today's packed layers of transformers: gate and up in one weight. All sizes, also those that do not divide."""
    for size, parts, factor in product(range(1, 28), range(1, 8), range(1, 8)):
        expected = _strided_pieces(size, factor, parts)
        found = [
            places(placed_runs((size,), (parts,), (rank,), [StridedShard(0, split_factor=factor)], "w"))
            for rank in range(parts)
        ]
        assert found == expected, (size, parts, factor)


def test_older_versions_of_torch_cut_a_strided_shard_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 cuts factor x parts equal pieces at once. Uneven sizes then lie elsewhere."""
    monkeypatch.setattr(rules, "_cuts_in_one_step", lambda: True)
    for size, parts, factor in product(range(1, 20), range(1, 5), range(1, 5)):
        step = -(-size // (parts * factor))
        pieces = [list(range(size))[start : start + step] for start in range(0, size, step)]
        pieces += [[]] * (parts * factor - len(pieces))
        for rank in range(parts):
            expected = [index for group in range(factor) for index in pieces[group * parts + rank]]
            found = placed_runs((size,), (parts,), (rank,), [StridedShard(0, split_factor=factor)], "w")
            assert places(found) == expected, (size, parts, factor, rank)


def _fsdp_over(
    size: int, sizes: tuple[int, ...], inner: tuple[Placement, ...], place: tuple[int, ...]
) -> tuple[tuple[Placement, ...], list[int]]:
    """What FSDP2 on the first mesh dimension does to a 1-D tensor that the others have cut: placements and elements."""
    left = torch.arange(size)
    for placement, parts, index in zip(inner, sizes[1:], place[1:], strict=True):
        if isinstance(placement, StridedShard):
            left = placement._split_tensor(left, parts, with_padding=False)[0][index]
        elif isinstance(placement, Shard):
            chunks = left.chunk(parts) if left.numel() else ()
            left = chunks[index] if index < len(chunks) else left[:0]
    chunks = left.chunk(sizes[0]) if left.numel() else ()
    kept = chunks[place[0]] if place[0] < len(chunks) else left[:0]
    pieces = prod(
        parts for placement, parts in zip(inner, sizes[1:], strict=True) if not isinstance(placement, Replicate)
    )
    outer = StridedShard(0, split_factor=pieces) if pieces > 1 else Shard(0)
    return (outer, *inner), kept.tolist()


def test_fsdp2_cuts_last_whatever_it_lies_over() -> None:
    """The factor counts ranks in one placement and matrices in the other; both may be the same number."""
    inner = [Shard(0), Replicate(), StridedShard(0, split_factor=2), StridedShard(0, split_factor=3)]
    checked = 0
    for size, sizes in product([*range(1, 15), 24], [(2, 2), (3, 2), (2, 3), (4, 2)]):
        for placement in inner:
            for place in product(*map(range, sizes)):
                placements, expected = _fsdp_over(size, sizes, (placement,), place)
                found = placed_runs((size,), sizes, place, placements, "w", fsdp_dims={0})
                assert places(found) == expected, (size, sizes, placements, place)
                checked += 1
    assert checked > 1000


def test_a_strided_shard_that_could_mean_two_things_is_refused_on_every_rank() -> None:
    """Two strided shards that no FSDP2 unit manages: cut last by a library like FSDP2, or by distribute_tensor?

    They leave different rows, and the sizes are the same. The answer must not depend on the rank that asks.
    """
    twice = (StridedShard(0, split_factor=2), StridedShard(0, split_factor=2))
    for place in product(range(2), range(2)):
        with pytest.raises(EMAEngineError, match="may have been cut last"):
            placed_runs((8, 3), (2, 2), place, twice, "w")
    # Here both leave the same rows, so there is nothing to know.
    both = (StridedShard(0, split_factor=2), Shard(0))
    assert [places(placed_runs((8,), (2, 2), place, both, "w")) for place in product(range(2), range(2))] == [
        [0, 1],
        [4, 5],
        [2, 3],
        [6, 7],
    ]
    with pytest.raises(EMAEngineError, match="may have been cut last"):
        placed_runs((7,), (3, 2), (0, 0), both, "w")  # on the rank (2, 0) one of them leaves an element, the other none


def test_a_dimension_counted_from_the_end_is_the_same_dimension() -> None:
    """transformers places packed rows at dimension -1."""
    for dim in (1, 2):
        ends = [StridedShard(dim - 3, split_factor=2)]
        begins = [StridedShard(dim, split_factor=2)]
        for rank in range(2):
            assert placed_runs((3, 4, 6), (2,), (rank,), ends, "w") == placed_runs(
                (3, 4, 6), (2,), (rank,), begins, "w"
            )


def test_packed_experts_stay_four_numbers() -> None:
    """A tuple for each row of each expert would be millions of objects."""
    runs = placed_runs((256, 512, 64), (8,), (3,), [StridedShard(1, split_factor=2)], "gate_up")
    assert isinstance(runs, Rows) and len(runs) == 512
    runs = placed_runs((256, 64, 512), (8,), (3,), [StridedShard(2, split_factor=2)], "gate_up")
    assert isinstance(runs, Rows) and len(runs) == 256 * 64 * 2
    full = np.arange(6 * 4 * 8).reshape(6, 4, 8)
    for rank in range(2):
        runs = placed_runs(full.shape, (2,), (rank,), [StridedShard(2, split_factor=2)], "w")
        expected = np.concatenate([full[..., 2 * rank : 2 * rank + 2], full[..., 4 + 2 * rank : 6 + 2 * rank]], axis=-1)
        assert places(runs) == expected.reshape(-1).tolist()


class _Reversed(Shard):
    """A user's placement that cuts from the end."""


@pytest.mark.parametrize("placement", [Partial(), _MaskPartial(offset_shape=torch.Size([4])), _Reversed(0)])
def test_a_placement_that_is_not_known_exactly_is_refused(placement: Placement) -> None:
    """A class derived from Shard may cut otherwise than Shard does."""
    with pytest.raises(EMAEngineError, match="only torch's own Shard, _StridedShard and Replicate"):
        placed_runs((8, 4), (2,), (0,), [placement], "w")


def test_a_placement_of_a_dimension_that_is_not_there_is_refused() -> None:
    with pytest.raises(EMAEngineError, match="has 0 dimensions"):
        placed_runs((), (2,), (0,), [Shard(0)], "logit_scale")


def _shard_as_transformers(full: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    return nn.Parameter(distribute_tensor(full, mesh, [placement], src_data_rank=None))


class _Packed(nn.Module):
    """A fused gate and up projection, stacked experts, a plain column-parallel weight, and a plain one."""

    def __init__(self, full: dict[str, torch.Tensor], mesh: DeviceMesh | None) -> None:
        super().__init__()
        styles = {
            "gate_up": StridedShard(0, split_factor=2),
            "experts": StridedShard(1, split_factor=2),
            "columns": Shard(0),
            "rows": Shard(1),
        }
        for name, tensor in full.items():
            if mesh is None or name not in styles:
                self.register_parameter(name, nn.Parameter(tensor.clone()))
            else:
                self.register_parameter(name, _shard_as_transformers(tensor.clone(), mesh, styles[name]))


def _full(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up": (rows, 3), "experts": (5, 6, 4), "columns": (rows, 2), "rows": (3, 4), "norm": (7,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.world_size()
@pytest.mark.parametrize(("world_size", "rows"), [(2, 10), (3, 8), (4, 14)])
def test_packed_tensor_parallel_weights_keep_their_rows(rank: int, world_size: int, rows: int, tmp_path: Path) -> None:
    full = _full(rows)
    check_average(_Packed(full, init_device_mesh("cpu", (world_size,))), full, tmp_path, rank)


@pytest.mark.world_size(4)
@pytest.mark.parametrize(("layout", "rows"), [("fsdp", 8), ("fsdp", 10), ("fsdp", 4), ("hsdp", 8), ("copied", 10)])
def test_fsdp2_over_packed_tensor_parallelism_keeps_its_rows(rank: int, layout: str, rows: int, tmp_path: Path) -> None:
    """Here full_tensor() itself returns the rows in another order; the weights of before say what is right."""
    full = _full(rows)
    shape, names = {
        "fsdp": ((2, 2), ("dp", "tp")),
        "hsdp": ((2, 1, 2), ("copies", "dp", "tp")),
        "copied": ((1, 2, 2), ("copies", "dp", "tp")),
    }[layout]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    model = _Packed(full, mesh["tp"])
    fully_shard(model, mesh=mesh["dp"] if layout == "fsdp" else mesh["copies", "dp"])
    placements = model.gate_up.placements
    if layout == "fsdp":
        assert placements == (StridedShard(0, split_factor=2), StridedShard(0, split_factor=2))
    check_average(model, full, tmp_path, rank)


@pytest.mark.world_size(4)
def test_fsdp2_on_dimensions_of_a_larger_mesh_is_found_by_their_names(rank: int, tmp_path: Path) -> None:
    """``dp_mesh_dims``: FSDP2's dimensions stand anywhere in the parameter's mesh, here behind tensor parallelism."""
    api = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_api")
    if not hasattr(api, "DataParallelMeshDims"):
        pytest.skip("needs torch 2.12")
    full = {"gate_up": _full(10)["gate_up"]}
    for shape, names in [((2, 2), ("tp", "dp")), ((2, 2), ("dp", "tp")), ((2, 1, 2), ("dp", "cp", "tp"))]:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        placements = [StridedShard(0, split_factor=2) if name == "tp" else Replicate() for name in names]
        model = nn.Module()
        model.gate_up = nn.Parameter(distribute_tensor(full["gate_up"].clone(), mesh, placements, src_data_rank=None))
        own = tuple(name for name in names if name != "tp")
        fully_shard(model, mesh=mesh, dp_mesh_dims=api.DataParallelMeshDims(shard=own))
        check_average(model, full, tmp_path / "-".join(names), rank)


@pytest.mark.world_size(4)
def test_a_tensor_that_replaces_one_of_fsdp2_is_not_read_as_fsdp2_cut_it(rank: int) -> None:
    """The unit still knows the module and the name, but describes another mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    full = _full(8)
    model = _Packed(full, mesh["tp"])
    fully_shard(model, mesh=mesh["dp"])
    lone = init_device_mesh("cpu", (4,))
    model.gate_up = nn.Parameter(
        distribute_tensor(full["gate_up"], lone, [StridedShard(0, split_factor=2)], src_data_rank=None)
    )
    (gate_up,) = [tensor for name, tensor in ShardedEMA(model, decay=0.5).iter_full_tensors() if name == "gate_up"]
    assert torch.equal(gate_up, full["gate_up"])


@pytest.mark.world_size(2)
def test_a_dtensor_cut_in_another_order_is_refused(rank: int) -> None:
    """torch can note the order of cuts beside the placements, which then no longer say where the rows are."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    model = nn.Module()
    model.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0), Shard(0)]))
    spec = model.weight._spec
    if getattr(spec, "shard_order", None) is None:
        pytest.skip("needs torch 2.10")
    spec.shard_order = tuple(entry._replace(mesh_dims=entry.mesh_dims[::-1]) for entry in spec.shard_order)
    with pytest.raises(EMAEngineError, match="in this order"):
        ShardedEMA(model, decay=0.5)
