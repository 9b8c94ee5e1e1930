"""Parameters that are DTensors: FSDP2 (``fully_shard``), HSDP, tensor parallel, and any mix of them.

Only the geometry of a shard is taken from the DTensor; shadows are plain tensors. (``DTensor.from_local`` without
``shape=`` and ``stride=`` guesses a different full shape on each rank when shards are uneven.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

# Private, and so are the attributes of FSDP2's states, units and parameters that are read here; read in torch 2.9,
# 2.13 and 2.14.
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from dist_ema.engines.declared import Declaration, declaration
from dist_ema.engines.names import Slot, kind_of
from dist_ema.engines.placements import check_placements, placed_runs, shared_dimension
from dist_ema.engines.plain import PlainEngine
from dist_ema.engines.reenactment import Placed, check_placed, divisions_of
from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.geometry.runs import Runs, count
from dist_ema.geometry.spec import Replicas, TensorSpec
from dist_ema.geometry.subclasses import hidden_type, look_through

#: The mark that Megatron-FSDP puts on its parameters. Read in megatron-fsdp 0.6.1, megatron_fsdp.py.
_MEGATRON = "__fsdp_param__"


class DTensorEngine(PlainEngine):
    """Each rank averages the local part of its DTensors. What is not a DTensor is held whole by each rank."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._find_units()

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        if not isinstance(tensor, DTensor):
            return super().spec(slot, tensor)
        # The mesh may have several dimensions. There is one placement for each.
        mesh = tensor.device_mesh
        placements = tensor.placements
        declared = self._declared.get(slot.name)
        if declared is not None:
            check_placements(placements, tensor.ndim, slot.name)  # they still say along which dimensions it is copied
            runs = declared.runs
        else:
            if hasattr(tensor, _MEGATRON):
                raise EMAEngineError(
                    f"parameter {slot.name!r} is one of Megatron-FSDP, which packs rows in another way than its "
                    f"{placements} says. Call megatron_fsdp.uneven_dtensor.update_uneven_dtensor_chunk_metadata("
                    "parameter) for every parameter, on every rank, before the average is made: each parameter then "
                    "declares its rows"
                )
            refuse_shard_order(slot.name, tensor)
            runs = shard_runs(tensor.shape, mesh, placements, slot.name, self._fsdp_dims(slot, tensor))
        # Compare the arithmetic with what is there: a custom sharding would be averaged under wrong indices.
        if declared is None and count(runs) != _local(tensor).numel():
            raise EMAEngineError(
                f"parameter {slot.name!r}: {placements} on a mesh of shape {tuple(mesh.shape)} should leave "
                f"{count(runs)} of {tensor.numel()} elements on this rank, but it holds "
                f"{_local(tensor).numel()}. Shard it with fully_shard, parallelize_module or distribute_tensor"
            )
        self._note(slot, tensor, runs, declared is None)
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

    def declared(self, slot: Slot, tensor: Tensor) -> Declaration | None:
        if not isinstance(tensor, DTensor):
            return super().declared(slot, tensor)
        return declaration(slot.name, _local(tensor), tensor.shape, tensor)

    def _read_specs(self) -> list[TensorSpec]:
        self._find_units()
        self._placed: list[Placed] = []
        return super()._read_specs()

    def _note(self, slot: Slot, tensor: DTensor, runs: Runs, as_placed: bool) -> None:
        """Keeps what `check_layout` needs: later a forward may have put a full copy in the shard's place. Local."""
        parameter = self._managed.get((id(slot.owner), slot.key))
        if parameter is not None and not fsdp_dims(parameter, tensor):
            parameter = None  # it describes another tensor
        # A declared part lies where it says, not as placed. Meta weights may be sharded again when they are made.
        divisions = divisions_of(tensor, parameter) if as_placed and not tensor.is_meta else None
        mesh = tensor.device_mesh
        placements = tuple(tensor.placements)
        placed = Placed(slot.name, tensor.shape, _local(tensor).shape, runs, divisions, mesh, placements)
        self._placed.append(placed)

    def check_layout(self) -> None:
        check_placed(self._placed)

    def layout(self, name: str) -> str:
        held = super().layout(name)
        placed = next((str(tensor) for tensor in self._placed if tensor.name == name), "")
        return f"{held}, placed as {placed}" if placed else held

    def _find_units(self) -> None:
        self._units = units_of(self._model)
        self._managed = managed_parameters(self._units)
        self.reshard()  # else a full copy that a forward left behind would be taken for what the optimizer steps
        tensors = [*self._model.parameters(), *self._model.buffers()]
        meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
        self._ranks = frozenset(rank for mesh in meshes for rank in mesh.mesh.flatten().tolist())

    def _fsdp_dims(self, slot: Slot, tensor: DTensor) -> frozenset[int]:
        """Return the mesh dimensions along which an FSDP2 unit cut this tensor; none if no unit manages it. Local."""
        parameter = self._managed.get((id(slot.owner), slot.key))
        return frozenset() if parameter is None else fsdp_dims(parameter, tensor)

    def ranks(self) -> frozenset[int]:
        return self._ranks

    def _read_sources(self) -> list[Tensor]:
        # As local() does, without a thousand calls of it.
        tensors = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in self._held()]
        tensors = self._without_padding(tensors)
        return look_through(tensors, self._announced) if self._has_subclasses else tensors

    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        # A flag that was set after a forward pass reached only the full parameters, which the backward pass has dropped
        # by now. What they got is a gradient of the sharded parameter.
        held = self._binding.held
        return [number for number in numbers if held[number].requires_grad or held[number].grad is not None]

    def reshard(self) -> None:
        """After a forward without backward the root's parameters are full plain tensors, and a write to the shards
        would be ignored by the next forward. So it would while ``unshard(async_op=True)`` is under way."""
        for unit in self._units:
            if unit._all_gather_result is not None:
                unit.wait_for_unshard()
            if not unit.is_sharded:
                _keep_flags(unit)
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
    """Returns every FSDP2 unit that holds a weight of the model. Local.

    Also the units of modules around it: their forward gathers those weights, and only they can reshard them.
    """
    return [unit for _, unit in _states_and_units(model)]


def _states_and_units(model: nn.Module) -> Iterator[tuple[FSDPState, FSDPParamGroup]]:
    """Yields the units, each with the state that has it."""
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


def _keep_flags(unit: FSDPParamGroup) -> None:
    """Gives the sharded parameters of a unit the ``requires_grad`` of those that stand in its modules now. Local.

    After a forward pass the modules hold full parameters, and a call of ``requires_grad_()`` reaches these alone.
    FSDP2 sets them again from the sharded ones at the next forward. Without a reshard of ours, they would have kept
    what the user set.
    """
    for parameter in unit.fsdp_params:
        place = parameter._module_info
        shown = place.module._parameters.get(place.param_name)
        if shown is not None and shown.requires_grad is not parameter.sharded_param.requires_grad:
            parameter.sharded_param.requires_grad_(shown.requires_grad)


def _holders(unit: FSDPParamGroup) -> Iterator[nn.Module]:
    """Yields the modules whose parameters an FSDP2 unit manages."""
    for parameter in unit.fsdp_params:
        yield parameter._module_info.module
        yield from parameter._module_info.shared_modules


def managed_parameters(units: Sequence[FSDPParamGroup]) -> dict[tuple[int, str], FSDPParam]:
    """Return what FSDP2 knows of each parameter that the units manage, by id of the module and name in it. Local.

    A parameter that several modules share is found under each of them.
    """
    found: dict[tuple[int, str], FSDPParam] = {}
    for unit in units:
        for parameter in unit.fsdp_params:
            info = parameter._module_info
            found[id(info.module), info.param_name] = parameter
            for module, key in zip(info.shared_modules, info.shared_param_names, strict=True):
                found[id(module), key] = parameter
    return found


def fsdp_dims(parameter: FSDPParam, tensor: DTensor) -> frozenset[int]:
    """Return the dimensions of the tensor's mesh that are FSDP2's own; none if it describes another tensor. Local.

    FSDP2 sets its mesh in front of the one that tensor parallelism used. If it was given a mesh of all dimensions
    (``dp_mesh_dims``, since torch 2.12), its dimensions stand anywhere in that mesh and are found by name.
    """
    spec = parameter._sharding_spec
    own = parameter.mesh_info.mesh
    if tensor.device_mesh != spec.mesh or tuple(tensor.placements) != tuple(spec.placements):
        return frozenset()  # the user has put another DTensor in its place
    if getattr(parameter.mesh_info, "is_spmd_mesh", False):
        names = spec.mesh.mesh_dim_names or ()
        own_names = own.mesh_dim_names or ()
        return frozenset(dim for dim, name in enumerate(names) if name in own_names)
    return frozenset(range(own.ndim))


def refuse_shard_order(name: str, tensor: DTensor) -> None:
    """Raise EMAEngineError for a DTensor whose mesh dimensions cut one tensor dimension in another order. Local.

    Since torch 2.10 a DTensor may say so beside its placements. No public call of torch makes such a tensor.
    """
    order = getattr(tensor._spec, "shard_order", None)
    for entry in order or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            raise EMAEngineError(
                f"parameter {name!r}: dimension {entry.tensor_dim} was cut along the mesh dimensions "
                f"{tuple(entry.mesh_dims)} in this order, which cannot be averaged. Redistribute it first"
            )


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a parameter or buffer, as a plain tensor. Local, no copy."""
    # to_local() outside of no_grad would record a graph; the attribute is what it returns (torch 2.13).
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def shard_runs(
    shape: Sequence[int],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    name: str,
    fsdp_dims: Collection[int] = (),
) -> Runs:
    """Return the runs of this rank's part of a DTensor; none on a rank outside of the mesh. Local."""
    coordinate = mesh.get_coordinate()
    return () if coordinate is None else placed_runs(shape, mesh.shape, coordinate, placements, name, fsdp_dims)


def replicas_of(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Replicas | None, bool]:
    """Returns the ranks that share a DTensor's shadow with this one, and whether this rank writes its elements."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None, False
    shared, primary = shared_dimension(mesh.shape, coordinate, placements)
    if shared is None:
        return None, primary
    group = mesh.get_group(shared)  # 1D: the ranks along that dimension, of which this is one
    return Replicas(group, dist.get_rank(group), dist.get_world_size(group)), primary
