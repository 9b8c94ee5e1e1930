"""Parameters that are DTensors: FSDP2 (``fully_shard``), HSDP, tensor parallel, and any mix of them.

Only the geometry of a shard is taken from the DTensor; shadows are plain tensors. (``DTensor.from_local`` without
``shape=`` and ``stride=`` guesses a different full shape on each rank when shards are uneven.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

# Private, and so are the attributes of FSDP2's states and units that are read here; read in torch 2.13.
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard

# Private in torch 2.13 (and since 2.4): the placement that FSDP2 gives to a parameter which tensor parallelism has
# already sharded along the same dimension. There is no public way to name it.
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from dist_ema.engines.names import Slot, kind_of
from dist_ema.engines.plain import PlainEngine
from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.sharding.runs import Runs, box_runs, chunk, count
from dist_ema.sharding.spec import Replicas, TensorSpec
from dist_ema.sharding.subclasses import hidden_type, look_through


class DTensorEngine(PlainEngine):
    """Each rank averages the local part of its DTensors. What is not a DTensor is held whole by each rank."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._find_units()

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        if not isinstance(tensor, DTensor):
            return super().spec(slot, tensor)
        mesh, placements = tensor.device_mesh, tensor.placements  # ND mesh, one placement a dimension
        runs = shard_runs(tensor.shape, mesh, placements, slot.name)
        # The arithmetic of placements against what is there: a custom sharding would be averaged under wrong indices.
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
            lowest_mesh_rank=int(mesh.mesh.min()),
            replicas=replicas,
            primary=primary,
            aliases=slot.aliases,
            hidden=hidden_type(_local(tensor)),
        )

    def _read_specs(self) -> list[TensorSpec]:
        self._find_units()
        return super()._read_specs()

    def _find_units(self) -> None:
        self._units = units_of(self._model)
        self.reshard()  # else a full copy that a forward left behind would be taken for what the optimizer steps
        tensors = [*self._model.parameters(), *self._model.buffers()]
        meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
        self._ranks = frozenset(rank for mesh in meshes for rank in mesh.mesh.flatten().tolist())

    def ranks(self) -> frozenset[int]:
        return self._ranks

    def _read_sources(self) -> list[Tensor]:
        # As local() does, without a thousand calls of it.
        tensors = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in self._held()]
        return look_through(tensors, self._specs) if self._has_subclasses else tensors

    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def reshard(self) -> None:
        """After a forward without backward the root's parameters are full plain tensors, and a write to the shards
        would be ignored by the next forward. So it would while ``unshard(async_op=True)`` is under way."""
        for unit in self._units:
            if unit._all_gather_result is not None:
                unit.wait_for_unshard()
            unit._to_sharded()  # type: ignore[no-untyped-call]  # reshard() does nothing after a forward that raised

    def publish(self) -> None:
        """The next forward waits for all that its stream was asked before, and with that for what was written. Local.

        After ``set_post_optim_event()`` it would wait for that event alone, which the last optimizer step recorded.
        """
        states = [state for state, _ in _states_and_units(self._model)]
        # The outermost one, which is asked, may have no weights of its own.
        states += [module._get_fsdp_state() for module in self._model.modules() if isinstance(module, FSDPModule)]
        for state in states:
            state._state_ctx.post_optim_event = None

    def _refuse_others(self) -> None:
        return  # a weight of a unit around the model is this engine's as well

    def _check_first(self, sources: Sequence[Tensor]) -> None:
        if units_of(self._model) != self._units:
            raise EMAStateError(
                "fully_shard was applied to the model, or to one around it, after the average was made. Make the "
                "average afterwards, or call reset()"
            )


def units_of(model: nn.Module) -> list[FSDPParamGroup]:
    """Every FSDP2 unit that holds a weight of the model. Local.

    Also the units of modules around it: their forward gathers those weights, and only they can reshard them.
    """
    return [unit for _, unit in _states_and_units(model)]


def _states_and_units(model: nn.Module) -> Iterator[tuple[FSDPState, FSDPParamGroup]]:
    """Those units, each with the state that has it."""
    modules = set(model.modules())
    # Neither a parameter nor its module leads to the unit; this registry, from modules to weak references of what may
    # be the same state, knows all that are alive.
    states = dict.fromkeys(reference() for reference in list(_module_state_mapping.values()))
    for state in states:
        if not isinstance(state, FSDPState):
            continue
        several = getattr(state, "_fsdp_param_groups", None)  # since torch 2.12; before there was one at most
        for unit in [state._fsdp_param_group] if several is None else several:
            if unit is not None and not modules.isdisjoint(_holders(unit)):
                yield state, unit


def _holders(unit: FSDPParamGroup) -> Iterator[nn.Module]:
    """The modules whose parameters an FSDP2 unit manages."""
    for parameter in unit.fsdp_params:
        yield parameter._module_info.module
        yield from parameter._module_info.shared_modules


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
    # Indices that are left of each tensor dimension; every mesh dimension that shards one cuts what was left of it.
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
    """The ranks that share a DTensor's shadow with this one, and whether this rank writes its elements."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None, False
    shared, primary = shared_dimension(mesh.shape, coordinate, placements)
    if shared is None:
        return None, primary
    group = mesh.get_group(shared)  # 1D: the ranks along that dimension, of which this is one
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
    # A process group runs along one dimension; the ranks along the other replicated ones average the same elements
    # again, and of them only the first writes.
    shared = max(replicated, key=lambda dim: sizes[dim])
    return shared, all(coordinate[dim] == 0 for dim in replicated if dim != shared)
