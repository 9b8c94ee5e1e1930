"""Computes which elements one rank of an imagined run would hold, without a process group, a wrapper or weights.

The model is given as the specs of its plain module (:class:`PlainEngine` on the meta device). For DTensors the
functions of the real engine compute the shards. For FSDP1 and ZeRO, whose wrappers cut the tensors themselves, this
file has their rules, as read in torch 2.13 and deepspeed 0.19.8. Tests compare both kinds with real engines.

Ranks are numbered such that tensor parallelism varies fastest, then shards, then replicas. Eight ranks as 2 replicas of
2 shards of 2 tensor-parallel ranks::

    replica 0    shard 0: ranks 0 1    shard 1: ranks 2 3
    replica 1    shard 0: ranks 4 5    shard 1: ranks 6 7
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

#: For each tensor of tensor parallelism, by canonical name: the dimension that is sharded, or None if it is replicated.
#: Other tensors are not in it.
Styles = Mapping[str, int | None]
#: FSDP1 (with ``use_orig_params``) begins every parameter of a unit at a multiple of this many bytes.
_FSDP1_ALIGNMENT = 16
#: ZeRO-1 and 2 pad the flat buffer such that the piece of each rank is a multiple of this many elements.
_ZERO_ALIGNMENT = 2


@dataclass(frozen=True)
class Layout:
    """Describes how a model is spread over ranks.

    Attributes:
        engine: one of ``ENGINES``.
        world_size: number of ranks.
        replicate: number of copies of the model, each sharded over its part of the ranks (hsdp; fsdp1 as HYBRID_SHARD).
        tensor_parallel: number of ranks over which each layer is sharded (tp, fsdp2+tp).
    """

    engine: str
    world_size: int
    replicate: int = 1
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        """Raises EMAConfigError, which names the first value that is wrong and the values that are allowed."""
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
        """Returns the number of ranks over which one copy of the model is sharded, not counting tensor parallelism."""
        return self.world_size // (self.replicate * self.tensor_parallel)

    def source_dtype(self, spec: TensorSpec) -> torch.dtype:
        """Returns the dtype of the tensor that is averaged.

        DeepSpeed keeps fp32 masters of trained bf16 and fp16 weights, so the average is made of these.
        """
        has_master = self.engine.startswith("zero") and spec.kind == "parameter" and spec.dtype.itemsize < 4
        return torch.float32 if has_master else spec.dtype


@dataclass(frozen=True)
class _Place:
    """One rank and its coordinates, as in the drawing above."""

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
        styles: which dimension tensor parallelism shards; only tp and fsdp2+tp use it.
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
    """Returns the specs under ``fully_shard``, which cuts the first dimension of all parameters, trained or frozen."""
    return [_dtensor(spec, [(place.layout.shards, place.shard, Shard(0))], 0) for spec in model]


def _hsdp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    layout = place.layout
    mesh = [(layout.replicate, place.replica, Replicate()), (layout.shards, place.shard, Shard(0))]
    return [_dtensor(spec, mesh, 0) for spec in model]


def _tp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Returns the specs under tensor parallelism. Tensors without a style are plain and whole.

    If there are more ranks, each group of tensor-parallel ranks has a model by itself.
    """
    layout = place.layout
    first = place.rank - place.tensor  # the lowest rank of this group
    specs = []
    for spec in model:
        if spec.name in styles:
            mesh = [(layout.tensor_parallel, place.tensor, _placement(styles[spec.name]))]
            specs.append(_dtensor(spec, mesh, first))
        else:
            specs.append(spec)
    return specs


def _fsdp2_tp(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Returns the specs under ``fully_shard`` on the first dimension of a mesh and tensor parallelism on the second."""
    layout = place.layout
    specs = []
    for spec in model:
        if spec.name not in styles:
            # A parameter without a style is sharded by FSDP2 alone, once for each tensor-parallel coordinate.
            specs.append(_dtensor(spec, [(layout.shards, place.shard, Shard(0))], place.tensor))
            continue
        inner = _placement(styles[spec.name])
        # FSDP2 marks a second cut of the same dimension as a strided shard (see engines/placements.py).
        outer = StridedShard(0, split_factor=layout.tensor_parallel) if inner == Shard(0) else Shard(0)
        mesh = [(layout.shards, place.shard, outer), (layout.tensor_parallel, place.tensor, inner)]
        specs.append(_dtensor(spec, mesh, 0, fsdp_dims=(0,)))
    return specs


def _placement(dim: int | None) -> Placement:
    return Replicate() if dim is None else Shard(dim)


def _dtensor(
    spec: TensorSpec, mesh: Sequence[tuple[int, int, Placement]], lowest_mesh_rank: int, fsdp_dims: Sequence[int] = ()
) -> TensorSpec:
    """Return the spec of a parameter as a DTensor. Buffers are returned as they are.

    Args:
        spec: of the whole tensor.
        mesh: for each dimension of the mesh its size, this rank's coordinate and the placement.
        lowest_mesh_rank: the lowest rank of the mesh.
        fsdp_dims: dimensions of the mesh that belong to FSDP2.
    """
    if spec.kind == "buffer":
        return spec
    if not spec.shape:
        raise EMAConfigError(f"parameter {spec.name!r} is a scalar, which cannot be sharded as a DTensor")
    sizes, coordinate, placements = zip(*mesh, strict=True)
    shared, primary = shared_dimension(sizes, coordinate, placements)
    return replace(
        spec,
        runs=placed_runs(spec.shape, sizes, coordinate, placements, spec.name, fsdp_dims),
        partitioned=True,
        lowest_mesh_rank=lowest_mesh_rank,
        replicas=None if shared is None else _replicas(coordinate[shared], sizes[shared]),
        primary=primary,
    )


# Flat parameters.


def _fsdp1(model: Sequence[TensorSpec], place: _Place, styles: Styles) -> list[TensorSpec]:
    """Returns the specs under FSDP1 with ``use_orig_params``, one unit for each block and one for the other parameters.

    Frozen parameters are in the units as well.
    """
    layout = place.layout
    # Step 1: sort the parameters into units.
    units: dict[str, list[TensorSpec]] = {}
    for spec in model:
        if spec.kind != "buffer":
            units.setdefault(_block(spec.name), []).append(spec)
    # Step 2: lay the parameters of each unit end to end, and cut the result into equal pieces.
    runs: dict[str, Runs] = {}
    for unit in units.values():
        begins = []  # where each parameter begins in the flat parameter
        position = 0
        for spec in unit:
            position = _round_up(position, _FSDP1_ALIGNMENT // spec.dtype.itemsize)
            begins.append(position)
            position += spec.numel
        size = -(-position // layout.shards)  # of a piece, rounded up
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
    """Returns the specs under ZeRO-1 and 2: all trained parameters are in one group, laid end to end and cut."""
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
    """Returns the specs under ZeRO-3, which cuts every parameter by itself, also frozen ones."""
    specs = []
    for spec in model:
        if spec.kind == "buffer":
            specs.append(spec)
            continue
        size = -(-spec.numel // place.layout.world_size)  # of a piece, rounded up
        specs.append(replace(spec, runs=_piece(0, spec.numel, size, place.rank), partitioned=True))
    return specs


def _piece(begin: int, numel: int, size: int, index: int) -> Runs:
    """Returns which elements of a tensor lie in one piece of a flat buffer. Pure.

    Args:
        begin: where the tensor begins in the buffer.
        numel: elements of the tensor.
        size: elements of each piece.
        index: number of the piece.

    >>> _piece(begin=5, numel=7, size=6, index=0), _piece(begin=5, numel=7, size=6, index=1)
    (((0, 1),), ((1, 6),))
    """
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
    """Takes the place of a process group. Shares only compare groups with each other, and never call them."""


_NO_GROUP = cast(dist.ProcessGroup, _NoGroup())


def _replicas(index: int, size: int) -> Replicas:
    return Replicas(_NO_GROUP, index, size)


#: The function that computes the specs of one rank, by the name of the engine.
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
