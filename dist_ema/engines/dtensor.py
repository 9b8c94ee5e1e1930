"""Parameters that are DTensors: FSDP2 (``fully_shard``), HSDP, tensor parallel, and any mix of them.

Only the geometry of a shard is taken from the DTensor; shadows are plain tensors. (``DTensor.from_local`` without
``shape=`` and ``stride=`` guesses a different full shape on each rank when shards are uneven.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

# Private in torch 2.13 (and since 2.4): the placement that FSDP2 gives to a parameter which tensor parallelism has
# already sharded along the same dimension. There is no public way to name it.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dist_ema.engines.base import Replicas, TensorSpec
from dist_ema.engines.replicated import PlainEngine, kind_of
from dist_ema.engines.subclasses import hidden_type, look_through
from dist_ema.engines.walk import Slot
from dist_ema.errors import EMAEngineError
from dist_ema.geometry import Runs, box_runs, chunk, count


class DTensorEngine(PlainEngine):
    """Each rank averages the local part of its DTensors. What is not a DTensor is held whole by each rank."""

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        if not isinstance(tensor, DTensor):
            return super().spec(slot, tensor)
        mesh, placements = tensor.device_mesh, tensor.placements
        runs = shard_runs(tensor.shape, mesh, placements, slot.name)
        if count(runs) != _local(tensor).numel():
            raise EMAEngineError(
                f"parameter {slot.name!r}: {placements} on a mesh of shape {tuple(mesh.shape)} should leave "
                f"{count(runs)} of {tensor.numel()} elements on this rank, but it holds "
                f"{_local(tensor).numel()}. Shard it with fully_shard, parallelize_module or distribute_tensor"
            )
        replicas, primary = replicas_of(mesh, placements)
        return TensorSpec(
            slot.name,
            tensor.shape,
            tensor.dtype,
            runs,
            kind=kind_of(slot, tensor),
            team=int(mesh.mesh.min()),
            replicas=replicas,
            primary=primary,
            aliases=slot.aliases,
            hidden=hidden_type(_local(tensor)),
        )

    def specs(self) -> list[TensorSpec]:
        self._wrapped = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
        return super().specs()

    def ranks(self) -> frozenset[int]:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
        return frozenset(rank for mesh in meshes for rank in mesh.mesh.flatten().tolist())

    def sources(self) -> list[Tensor]:
        # As local() does, without a thousand calls of it.
        tensors = self._binding.check()
        tensors = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in tensors]
        return look_through(tensors, self._specs) if self._has_subclasses else tensors

    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def reshard(self) -> None:
        """After a forward without backward the root's parameters are full plain tensors, and a write to the shards
        would be ignored by the next forward."""
        for module in self._wrapped:
            module.reshard()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter or buffer, as a plain tensor. Local, no copy."""
    # to_local() outside of no_grad would record a graph; the attribute is what it returns (torch 2.13).
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_runs(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Placement], name: str) -> Runs:
    """Runs of this rank's part of a DTensor; none on a rank outside of the mesh."""
    coordinate = mesh.get_coordinate()
    return () if coordinate is None else placed_runs(shape, mesh.shape, coordinate, placements, name)


def placed_runs(
    shape: Sequence[int], sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement], name: str
) -> Runs:
    """Runs of the rank at ``coordinate`` of a mesh of shape ``sizes``. Pure."""
    kept: list[Runs] = [((0, size),) if size else () for size in shape]
    for mesh_dim in _sharding_order(placements):
        placement = placements[mesh_dim]
        if isinstance(placement, (Shard, StridedShard)):
            kept[placement.dim] = chunk(kept[placement.dim], sizes[mesh_dim], coordinate[mesh_dim])
        elif not isinstance(placement, Replicate):
            raise EMAEngineError(
                f"parameter {name!r} is placed as {placement} on mesh dimension {mesh_dim}: only Shard and Replicate "
                "can be averaged. Redistribute it first"
            )
    return box_runs(shape, kept)


def _sharding_order(placements: Sequence[Placement]) -> list[int]:
    """Mesh dimensions in the order in which the tensor was cut: left to right, but a strided shard after all that
    stand to its right, which is what FSDP2 over tensor parallelism did."""
    plain = [dim for dim, placement in enumerate(placements) if not isinstance(placement, StridedShard)]
    strided = [dim for dim, placement in enumerate(placements) if isinstance(placement, StridedShard)]
    return plain + strided[::-1]


def replicas_of(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Replicas | None, bool]:
    """The ranks that share a DTensor's shadow with this one, and whether this rank speaks for them."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None, False
    shared, primary = shared_dimension(mesh.shape, coordinate, placements)
    if shared is None:
        return None, primary
    group = mesh.get_group(shared)
    return Replicas(group, dist.get_rank(group), dist.get_world_size(group)), primary


def shared_dimension(
    sizes: Sequence[int], coordinate: Sequence[int], placements: Sequence[Placement]
) -> tuple[int | None, bool]:
    """The largest mesh dimension over which a DTensor is replicated, and whether this rank is first in the others."""
    replicated = [
        dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate) and sizes[dim] > 1
    ]
    if not replicated:
        return None, True
    shared = max(replicated, key=lambda dim: sizes[dim])
    return shared, all(coordinate[dim] == 0 for dim in replicated if dim != shared)
