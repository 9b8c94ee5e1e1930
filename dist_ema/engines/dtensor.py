"""Models whose parameters are DTensors: FSDP2 (``fully_shard``), HSDP, tensor parallelism, and any mix of them.

Each rank averages the local tensor of its DTensors. Where its elements lie in the full tensor follows from the mesh and
the placements. A Linear weight of 8 rows and 4 columns on four ranks::

                 FSDP2       HSDP                     FSDP2 over column-wise TP        FSDP2 over row-wise TP
    mesh         (4,)        (2, 2) replicate, shard  (2, 2) dp, tp                    (2, 2) dp, tp
    placements   Shard(0)    Replicate(), Shard(0)    _StridedShard(0, 2), Shard(0)    Shard(0), Shard(1)

    rank 0       rows 0 1    rows 0 to 3              rows 0 1                         rows 0 to 3, columns 0 1
    rank 1       rows 2 3    rows 4 to 7              rows 4 5                         rows 0 to 3, columns 2 3
    rank 2       rows 4 5    rows 0 to 3              rows 2 3                         rows 4 to 7, columns 0 1
    rank 3       rows 6 7    rows 4 to 7              rows 6 7                         rows 4 to 7, columns 2 3

    replicas     none        ranks 0, 2 and 1, 3      none                             none

Replicas hold the same elements and share one shadow. The rules for each placement, and for packed tensor parallelism,
are in ``placements.py``. ``reenactment.py`` compares them with what torch does.

The shadows are plain tensors. ``DTensor.from_local`` is not used: without ``shape=`` and ``stride=`` it guesses the
full shape, and guesses a different one on each rank when shards are uneven.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor, nn

# These modules are private, and so are the attributes of FSDP2's states, parameter groups and parameters that this file
# reads. All were read in torch 2.9, 2.13 and 2.14, in distributed/fsdp/_fully_shard/. This file calls a parameter group
# (what one call of fully_shard gathers together) a unit.
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

#: The attribute that Megatron-FSDP sets on its parameters. Read in megatron-fsdp 0.6.1, megatron_fsdp.py.
_MEGATRON = "__fsdp_param__"


class DTensorEngine(PlainEngine):
    """Averages the local part of each DTensor. Every rank averages the whole of each tensor that is not a DTensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._find_units()

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        if not isinstance(tensor, DTensor):
            return super().spec(slot, tensor)
        mesh = tensor.device_mesh
        placements = tensor.placements  # one for each dimension of the mesh

        # Step 1: where this rank's elements lie.
        declared = self._declared.get(slot.name)
        if declared is not None:
            # The declaration has the runs. The placements still tell along which mesh dimensions there are copies.
            check_placements(placements, tensor.ndim, slot.name)
            runs = declared.runs
        else:
            if hasattr(tensor, _MEGATRON):
                raise EMAEngineError(
                    f"parameter {slot.name!r} is sharded by Megatron-FSDP, which distributes rows differently from "
                    f"what its placements {placements} mean. Before the average is made, call "
                    "megatron_fsdp.uneven_dtensor.update_uneven_dtensor_chunk_metadata(parameter) for every parameter "
                    "on every rank: each parameter then declares its rows"
                )
            refuse_shard_order(slot.name, tensor)
            runs = shard_runs(tensor.shape, mesh, placements, slot.name, self._fsdp_dims(slot, tensor))

        # Step 2: compare the number of elements with the local tensor. A custom sharding would otherwise be averaged
        # and saved under wrong indices. (check_layout() compares the elements themselves.)
        if declared is None and count(runs) != _local(tensor).numel():
            raise EMAEngineError(
                f"parameter {slot.name!r}: {placements} on a mesh of shape {tuple(mesh.shape)} should leave "
                f"{count(runs)} of {tensor.numel()} elements on this rank, but it holds "
                f"{_local(tensor).numel()}. Shard it with fully_shard, parallelize_module or distribute_tensor"
            )

        # Step 3: keep the layout for check_layout(), and find the ranks that hold the same elements.
        self._keep_layout(slot, tensor, runs, declared is None)
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

    def _keep_layout(self, slot: Slot, tensor: DTensor, runs: Runs, as_placed: bool) -> None:
        """Keeps what :meth:`check_layout` compares. Local.

        The comparison cannot read the module then: a forward may have put a full copy in the place of the shard.
        ``as_placed`` is False for a tensor that declares its elements: its placements do not describe them.
        """
        parameter = self._managed.get((id(slot.owner), slot.key))
        if parameter is not None and not fsdp_dims(parameter, tensor):
            parameter = None  # FSDP2 describes a tensor that the user has replaced
        # Weights on the meta device may be sharded again when they get memory, so there is nothing to compare yet.
        is_comparable = as_placed and not tensor.is_meta
        divisions = divisions_of(tensor, parameter) if is_comparable else None
        mesh = tensor.device_mesh
        placements = tuple(tensor.placements)
        placed = Placed(slot.name, tensor.shape, _local(tensor).shape, runs, divisions, mesh, placements)
        self._placed.append(placed)

    def check_layout(self) -> None:
        check_placed(self._placed)

    def layout(self, name: str) -> str:
        elements = super().layout(name)
        placed = next((str(tensor) for tensor in self._placed if tensor.name == name), "")
        return f"{elements}, placed as {placed}" if placed else elements

    def _find_units(self) -> None:
        self._units = units_of(self._model)
        self._managed = managed_parameters(self._units)
        # A full copy that a forward left in a module would be taken for the tensor that the optimizer steps.
        self.reshard()
        tensors = [*self._model.parameters(), *self._model.buffers()]
        meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
        self._ranks = frozenset(rank for mesh in meshes for rank in mesh.mesh.flatten().tolist())

    def _fsdp_dims(self, slot: Slot, tensor: DTensor) -> frozenset[int]:
        """Return the mesh dimensions that belong to the tensor's FSDP2 unit; none if no unit manages it. Local."""
        parameter = self._managed.get((id(slot.owner), slot.key))
        return frozenset() if parameter is None else fsdp_dims(parameter, tensor)

    def ranks(self) -> frozenset[int]:
        return self._ranks

    def _read_sources(self) -> list[Tensor]:
        # This is local() written out: a thousand calls of it would cost more than the rest of the function.
        tensors = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in self._held()]
        tensors = self._without_padding(tensors)
        return look_through(tensors, self._announced) if self._has_subclasses else tensors

    def local(self, tensor: Tensor) -> Tensor:
        return _local(tensor)

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        # requires_grad_(True) after a forward pass reaches only the full parameters. The backward pass drops these, and
        # the flag with them. But it leaves the gradient on the sharded parameter, and that shows it was trained.
        held = self._binding.held
        return [number for number in numbers if held[number].requires_grad or held[number].grad is not None]

    def reshard(self) -> None:
        """Puts the sharded parameters back into their modules. Local.

        After a forward without backward the root's parameters are full plain tensors. The next forward would use them
        as they are and ignore what was written to the shards. The same is true while ``unshard(async_op=True)`` is
        under way.
        """
        for unit in self._units:
            # An all-gather under way has read the shards already, and would put its copy in place later.
            if unit._all_gather_result is not None:
                unit.wait_for_unshard()
            if not unit.is_sharded:
                _copy_requires_grad_to_shards(unit)
            # Not reshard(): after a forward that raised, the unit's state is still FORWARD, and reshard() may then
            # leave the root as it is.
            unit._to_sharded()  # type: ignore[no-untyped-call]

    def publish(self) -> None:
        """Makes the next forward wait for the writes to the sources. Local.

        FSDP2's all-gather streams wait for the current stream at the start of a forward, and so for the writes. But
        after ``set_post_optim_event()`` they wait only for that event, which was recorded before the writes. So the
        event is dropped.
        """
        states = [state for state, _ in _states_and_units(self._model)]
        # The outermost state is the one that reads the event. It may have no parameters, and then it has no unit.
        states += [module._get_fsdp_state() for module in self._model.modules() if isinstance(module, FSDPModule)]
        for state in states:
            state._state_ctx.post_optim_event = None

    def _refuse_others(self) -> None:
        return  # FSDP2 units around the model are allowed: units_of() finds them

    def _check_first(self, sources: Sequence[Tensor]) -> None:
        if units_of(self._model) != self._units:
            raise EMAStateError(
                "fully_shard was applied to the model, or to a module around it, after the average was made. Make the "
                "average after fully_shard, or call reset()"
            )


def units_of(model: nn.Module) -> list[FSDPParamGroup]:
    """Returns every FSDP2 unit that holds a weight of the model. Local.

    The units of modules around the model are included: their forward gathers its weights, and only they can reshard
    them.
    """
    return [unit for _, unit in _states_and_units(model)]


def _states_and_units(model: nn.Module) -> Iterator[tuple[FSDPState, FSDPParamGroup]]:
    """Yields each unit of :func:`units_of` with the FSDP2 state that it belongs to. Local."""
    modules = set(model.modules())
    # Neither a parameter nor its module leads to a unit outside of the model. torch's registry has all living states,
    # as weak references by module. Several modules may have the same state, so that the dict drops duplicates.
    states = dict.fromkeys(reference() for reference in list(_module_state_mapping.values()))
    for state in states:
        if not isinstance(state, FSDPState):
            continue
        # A state has a list of units since torch 2.12. Earlier versions have one unit or None.
        units = getattr(state, "_fsdp_param_groups", None)
        if units is None:
            units = [state._fsdp_param_group]
        for unit in units:
            if unit is not None and not modules.isdisjoint(_modules_of(unit)):
                yield state, unit


def _copy_requires_grad_to_shards(unit: FSDPParamGroup) -> None:
    """Sets ``requires_grad`` of a unit's sharded parameters to that of the full parameters in its modules. Local.

    After a forward pass the modules hold full parameters, and a user's ``requires_grad_()`` reaches only these. To
    reshard would discard what the user set, because FSDP2 copies the flag from the sharded to the full parameters at
    the next forward.
    """
    for parameter in unit.fsdp_params:
        place = parameter._module_info
        in_module = place.module._parameters.get(place.param_name)
        if in_module is not None and in_module.requires_grad is not parameter.sharded_param.requires_grad:
            parameter.sharded_param.requires_grad_(in_module.requires_grad)


def _modules_of(unit: FSDPParamGroup) -> Iterator[nn.Module]:
    """Yields the modules whose parameters an FSDP2 unit manages."""
    for parameter in unit.fsdp_params:
        yield parameter._module_info.module
        yield from parameter._module_info.shared_modules


def managed_parameters(units: Sequence[FSDPParamGroup]) -> dict[tuple[int, str], FSDPParam]:
    """Return FSDP2's object for each parameter of the units, by the id of its module and its name in it. Local.

    A parameter that several modules share has an entry for each of them.
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
    """Return the dimensions of the tensor's mesh along which FSDP2 shards or replicates it. Local.

    FSDP2 puts its own mesh in front of the one that tensor parallelism used::

        fully_shard(layer, mesh=mesh["dp"])         tensor's mesh (dp, tp)        FSDP2's dimensions: 0
        fully_shard(layer, mesh=mesh["rep", "dp"])  tensor's mesh (rep, dp, tp)   FSDP2's dimensions: 0, 1

    With ``dp_mesh_dims`` (since torch 2.12) the mesh is given whole, and FSDP2's dimensions may be any of it. They are
    then found by name. The result is empty if ``parameter`` describes another tensor than ``tensor``.
    """
    spec = parameter._sharding_spec
    own = parameter.mesh_info.mesh
    if tensor.device_mesh != spec.mesh or tuple(tensor.placements) != tuple(spec.placements):
        return frozenset()  # the user has put another DTensor in the place of FSDP2's
    if getattr(parameter.mesh_info, "is_spmd_mesh", False):
        names = spec.mesh.mesh_dim_names or ()
        own_names = own.mesh_dim_names or ()
        return frozenset(dim for dim, name in enumerate(names) if name in own_names)
    return frozenset(range(own.ndim))


def refuse_shard_order(name: str, tensor: DTensor) -> None:
    """Raise EMAEngineError if a DTensor was not cut along its mesh dimensions from left to right. Local.

    The order matters where several mesh dimensions cut one tensor dimension. Since torch 2.10 a DTensor can have
    another order, in ``_spec.shard_order``. No public function of torch makes such a tensor.
    """
    order = getattr(tensor._spec, "shard_order", None)
    for entry in order or ():
        if list(entry.mesh_dims) != sorted(entry.mesh_dims):
            raise EMAEngineError(
                f"parameter {name!r}: dimension {entry.tensor_dim} was cut along the mesh dimensions "
                f"{tuple(entry.mesh_dims)} in this order, but only ascending order is supported. Redistribute it first"
            )


def _local(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a parameter or buffer, as a plain tensor. Local, no copy."""
    # Outside of no_grad, to_local() would record a graph. It returns this attribute (read in torch 2.13).
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
    if coordinate is None:
        return ()
    return placed_runs(shape, mesh.shape, coordinate, placements, name, fsdp_dims)


def replicas_of(mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[Replicas | None, bool]:
    """Returns the ranks that share a DTensor's shadow with this one, and whether this rank may write its elements.
    Local.

    A rank outside of the mesh holds no element: it gets ``(None, False)``.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None, False
    shared, primary = shared_dimension(mesh.shape, coordinate, placements)
    if shared is None:
        return None, primary
    group = mesh.get_group(shared)  # 1D: the ranks along that dimension, of which this is one
    return Replicas(group, dist.get_rank(group), dist.get_world_size(group)), primary
