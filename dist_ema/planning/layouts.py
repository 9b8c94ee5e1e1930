"""Computes what one rank of an imagined run would hold: specs without a process group, a wrapper or weights.

The model is given as the specs of its plain module (:class:`PlainEngine` on the meta device). Where the real engines
compute a shard themselves (DTensors), the same functions do it here; where the wrapper has cut the tensors (FSDP1,
ZeRO), its rule is written out, as read in torch 2.13 and deepspeed 0.19.8. Tests compare both with real engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard  # see engines/placements.py

from dist_ema.engines.placements import placed_runs, shared_dimension
from dist_ema.errors import EMAConfigError
from dist_ema.geometry.runs import Runs
from dist_ema.geometry.spec import Replicas, TensorSpec

#: What tensor parallelism does to the tensors that it touches, by canonical name: the dimension that it shards, or None
#: where it replicates.
Styles = Mapping[str, int | None]
#: Bytes at whose multiples FSDP1 (with ``use_orig_params``) begins every parameter of a unit.
_FSDP1_ALIGNMENT = 16
#: ZeRO-1 and 2 pad the flat buffer to a multiple of so many elements per rank.
_ZERO_ALIGNMENT = 2


@dataclass(frozen=True)
class Layout:
    """Describes how a model is spread over ranks.

    Attributes:
        engine: one of ``ENGINES``.
        world_size: ranks in all.
        replicate: copies of the model, each sharded over the other ranks (hsdp; fsdp1 as HYBRID_SHARD).
        tensor_parallel: ranks that share each layer (tp, fsdp2+tp).
    """

    engine: str
    world_size: int
    replicate: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        """Raises EMAConfigError naming the first value that is wrong, and what is allowed."""
        if self.engine not in ENGINES:
            raise EMAConfigError(f"engine={self.engine!r}: allowed are {', '.join(ENGINES)}")
        sizes = {"replicate": self.replicate, "tensor_parallel": self.tensor_parallel}
        for option, value in {"world_size": self.world_size, **sizes}.items():
            if value < 1:
                raise EMAConfigError(f"{option}={value}: must be at least 1")
        for option, engines in (("replicate", ("hsdp", "fsdp1")), ("tensor_parallel", ("tp", "fsdp2+tp"))):
            if sizes[option] > 1 and self.engine not in engines:
                raise EMAConfigError(f"{option}={sizes[option]}: only with engine={' or '.join(engines)}")
        if self.world_size % (self.replicate * self.tensor_parallel):
            raise EMAConfigError(
                f"world_size={self.world_size}: must be a multiple of replicate={self.replicate} x "
                f"tensor_parallel={self.tensor_parallel}"
            )

    @property
    def shards(self) -> int:
        """Returns the ranks over which one copy of the model is sharded, tensor parallelism apart."""
        return self.world_size // (self.replicate * self.tensor_parallel)

    def source_dtype(self, spec: TensorSpec) -> torch.dtype:
        """Returns the dtype of what is averaged: DeepSpeed keeps fp32 masters of trained bf16 and fp16 weights."""
        has_master = self.engine.startswith("zero") and spec.kind == "parameter" and spec.dtype.itemsize < 4
        return torch.float32 if has_master else spec.dtype


@dataclass(frozen=True)
class _Place:
    """Describes one rank and its coordinates: tensor parallelism varies fastest, then shards, then replicas."""

    layout: Layout
    rank: int

    @property
    def tensor(self) -> int:
        return self.rank % self.layout.tensor_parallel

    @property
    def shard(self) -> int:
        return self.rank // self.layout.tensor_parallel % self.layout.shards

    @property
    def replica(self) -> int:
        return self.rank // (self.layout.tensor_parallel * self.layout.shards)


def simulate(model: Sequence[TensorSpec], layout: Layout, rank: int, styles: Styles) -> list[TensorSpec]:
    """Returns the specs of one rank, in the order of ``model``. Pure.

    Args:
        model: the unsharded tensors.
        layout: the layout of the run.
        rank: from 0 to ``layout.world_size - 1``.
        styles: for tp and fsdp2+tp, what tensor parallelism does to a tensor, by name. Other tensors are not touched.
    """
    if not 0 <= rank < layout.world_size:
        raise EMAConfigError(f"rank={rank}: allowed are 0 to {layout.world_size - 1}")
    return ENGINES[layout.engine](model, _Place(layout, rank), styles)


def _plain(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    return list(model)


def _ddp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    replicas = _replicas(place.rank, place.layout.world_size)
    return [replace(spec, partitioned=True, replicas=replicas) if spec.kind == "parameter" else spec for spec in model]


# DTensors: the functions of the real engine, on a mesh of numbers.


def _fsdp2(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Shards as ``fully_shard`` does: the first dimension, also of frozen parameters. Buffers stay whole."""
    return [_dtensor(spec, [(place.layout.shards, place.shard, Shard(0))], 0) for spec in model]


def _hsdp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    layout = place.layout
    mesh = [(layout.replicate, place.replica, Replicate()), (layout.shards, place.shard, Shard(0))]
    return [_dtensor(spec, mesh, 0) for spec in model]


def _tp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Shards by tensor parallelism alone. Groups of ranks are independent; tensors without a style are plain."""
    layout = place.layout
    first = place.rank - place.tensor
    return [
        _dtensor(spec, [(layout.tensor_parallel, place.tensor, _placement(styles[spec.name]))], first)
        if spec.name in styles
        else spec
        for spec in model
    ]


def _fsdp2_tp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Shards by ``fully_shard`` on one dimension of a mesh, over tensor parallelism on the other."""
    layout = place.layout
    specs = []
    for spec in model:
        if spec.name not in styles:
            specs.append(_dtensor(spec, [(layout.shards, place.shard, Shard(0))], place.tensor))
            continue
        inner = _placement(styles[spec.name])
        outer = StridedShard(0, split_factor=layout.tensor_parallel) if inner == Shard(0) else Shard(0)
        mesh = [(layout.shards, place.shard, outer), (layout.tensor_parallel, place.tensor, inner)]
        specs.append(_dtensor(spec, mesh, 0, fsdp_dims=(0,)))
    return specs


def _placement(dim: int | None) -> Placement:
    return Replicate() if dim is None else Shard(dim)


def _dtensor(
    spec: TensorSpec, mesh: Sequence[tuple[int, int, Placement]], team: int, fsdp_dims: Sequence[int] = ()
) -> TensorSpec:
    """Returns a DTensor's spec, given for each mesh dimension its size, this rank's coordinate and the placement."""
    if spec.kind == "buffer":
        return spec
    if not spec.shape:
        raise EMAConfigError(f"parameter {spec.name!r} has no dimension, and so cannot be a DTensor's shard")
    sizes, coordinate, placements = zip(*mesh, strict=True)
    shared, primary = shared_dimension(sizes, coordinate, placements)
    return replace(
        spec,
        runs=placed_runs(spec.shape, sizes, coordinate, placements, spec.name, fsdp_dims),
        partitioned=True,
        lowest_mesh_rank=team,
        replicas=None if shared is None else _replicas(coordinate[shared], sizes[shared]),
        primary=primary,
    )


# Flat parameters.


def _fsdp1(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Shards as FSDP1 does with ``use_orig_params``: one unit for each block, and one for the rest.

    Frozen parameters are part of the units.
    """
    layout = place.layout
    units: dict[str, list[TensorSpec]] = {}
    for spec in model:
        if spec.kind != "buffer":
            units.setdefault(_block(spec.name), []).append(spec)
    runs: dict[str, Runs] = {}
    for unit in units.values():
        begins = []
        position = 0
        for spec in unit:
            position = _round_up(position, _FSDP1_ALIGNMENT // spec.dtype.itemsize)
            begins.append(position)
            position += spec.numel
        size = -(-position // layout.shards)
        for spec, begin in zip(unit, begins, strict=True):
            runs[spec.name] = _piece(begin, spec.numel, size, place.shard)
    replicas = _replicas(place.replica, layout.replicate) if layout.replicate > 1 else None
    return [
        replace(spec, runs=runs[spec.name], partitioned=True, replicas=replicas) if spec.name in runs else spec
        for spec in model
    ]


def _zero0(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    replicas = _replicas(place.rank, place.layout.world_size) if place.layout.world_size > 1 else None
    return [replace(spec, partitioned=True, replicas=replicas) if spec.kind == "parameter" else spec for spec in model]


def _zero1(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Shards as ZeRO-1 and 2 do: the masters of all trained parameters, one parameter group, laid end to end."""
    world = place.layout.world_size
    total = sum(spec.numel for spec in model if spec.kind == "parameter")
    size = _round_up(total, _ZERO_ALIGNMENT * world) // world
    specs = []
    position = 0
    for spec in model:
        if spec.kind == "parameter":
            specs.append(replace(spec, runs=_piece(position, spec.numel, size, place.rank), partitioned=True))
            position += spec.numel
        else:
            specs.append(spec)
    return specs


def _zero3(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Shards as ZeRO-3 does: each parameter by itself, including frozen ones."""
    return [
        spec
        if spec.kind == "buffer"
        else replace(
            spec,
            runs=_piece(0, spec.numel, -(-spec.numel // place.layout.world_size), place.rank),
            partitioned=True,
        )
        for spec in model
    ]


def _piece(begin: int, numel: int, size: int, index: int) -> Runs:
    """Returns which elements of a tensor at ``begin`` of a flat buffer lie in piece ``index`` of ``size`` elements."""
    start = max(index * size - begin, 0)
    stop = min((index + 1) * size - begin, numel)
    return ((start, stop - start),) if start < stop else ()


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _block(name: str) -> str:
    """Returns the block that a parameter belongs to (``model.layers.3``), or ``""`` for the rest of the model."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


class _NoGroup:
    """Replaces a process group: shares tell sets of replicas apart by it, and never call it."""


_NO_GROUP = cast(dist.ProcessGroup, _NoGroup())


def _replicas(index: int, size: int) -> Replicas:
    return Replicas(_NO_GROUP, index, size)


#: How each engine spreads a model.
ENGINES: dict[str, Callable[[Sequence[TensorSpec], _Place, Styles], list[TensorSpec]]] = {
    "plain": _plain,
    "ddp": _ddp,
    "fsdp1": _fsdp1,
    "fsdp2": _fsdp2,
    "hsdp": _hsdp,
    "tp": _tp,
    "fsdp2+tp": _fsdp2_tp,
    "zero0": _zero0,
    "zero1": _zero1,
    "zero2": _zero1,
    "zero3": _zero3,
}
