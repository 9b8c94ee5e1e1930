"""Plain modules, which know no other rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.engines.base import Engine, write_count
from dist_ema.engines.binding import Binding
from dist_ema.engines.declared import Declaration, declaration
from dist_ema.engines.deepspeed.marks import Unwrapped
from dist_ema.engines.names import Slot, kind_of, walk_slots
from dist_ema.errors import EMAEngineError
from dist_ema.geometry.spec import TensorSpec
from dist_ema.geometry.subclasses import CachedScale, cached_scales, hidden_type, is_hidden, look_through


class PlainEngine(Engine):
    """A module whose parameters lie whole on this rank, unless they declare to be a part of a larger tensor.

    Nothing says that another rank holds the same values, so the shadow is not split; full tensors are the lowest
    rank's. Base of the engines that keep parameters where ``nn.Module`` does.
    """

    def __init__(self, model: nn.Module) -> None:
        self.group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self._model = model
        self._slots: list[Slot] = []
        self._declared: dict[str, Declaration] = {}  # by canonical name

    def modules(self) -> list[nn.Module]:
        return [self._model]

    def _read_specs(self) -> list[TensorSpec]:
        self._refuse_others()
        self._slots = walk_slots(self._model)
        self._unwrapped = Unwrapped(self._model, self._slots)
        self._unwrapped.refuse()
        self._binding = Binding(self._model, self._slots, ignored=self._ignored)
        held = [(slot, tensor) for slot in self._slots if (tensor := slot.get()) is not None]
        self._declared = {}
        self._inside: list[tuple[int, tuple[slice, ...]]] = []
        for place, (slot, tensor) in enumerate(held):
            found = self.declared(slot, tensor)
            if found is not None:
                self._declared[slot.name] = found
                if found.inside is not None:
                    self._inside.append((place, found.inside))
        self._has_subclasses = any(is_hidden(self.local(tensor)) for _, tensor in held)
        return [self.spec(slot, tensor) for slot, tensor in held]

    def spec(self, slot: Slot, tensor: Tensor) -> TensorSpec:
        """Describes how this rank holds the tensor of one slot. Local."""
        declared = self._declared.get(slot.name)
        if declared is not None:
            return self._declared_spec(slot, tensor, declared)
        return TensorSpec.unsharded(
            slot.name, tensor, kind=kind_of(slot, tensor), partitioned=False, aliases=slot.aliases
        )

    def declared(self, slot: Slot, tensor: Tensor) -> Declaration | None:
        """Return what the tensor of one slot declares about its place in a larger tensor. Local."""
        return declaration(slot.name, tensor)

    def _declared_spec(self, slot: Slot, tensor: Tensor, declared: Declaration) -> TensorSpec:
        """Return the spec of a plain tensor that declares to be a part. Which rank has the rest, nothing says here."""
        if self.group is None and declared.shape != tensor.shape:
            raise EMAEngineError(
                f"{slot.name!r} declares to be a part of a tensor of shape {tuple(declared.shape)}, but there is no "
                "process group whose other ranks could hold the rest. Call torch.distributed.init_process_group() "
                "before the average is made"
            )
        return TensorSpec(
            slot.name,
            declared.shape,
            tensor.dtype,
            declared.runs,
            kind=kind_of(slot, tensor),
            aliases=slot.aliases,
            hidden=hidden_type(tensor),
            declared=True,
        )

    def local(self, tensor: Tensor) -> Tensor:
        """Returns this rank's part of what a slot holds. Local, no copy."""
        return tensor

    def _read_sources(self) -> list[Tensor]:
        tensors = self._without_padding(list(self._held()))  # a copy: the binding keeps its own
        return look_through(tensors, self._announced) if self._has_subclasses else tensors

    def _without_padding(self, tensors: list[Tensor]) -> list[Tensor]:
        """Replace each local tensor that holds more than it declares by a view of the declared part. Local, no copy."""
        for place, inside in self._inside:
            tensors[place] = tensors[place].detach()[inside]
        return tensors

    def caches(self) -> list[CachedScale]:
        """See :meth:`Engine.caches`: the scales of torchao's float8 weights."""
        return cached_scales([self.local(tensor) for tensor in self._held()]) if self._has_subclasses else []

    def write_counts(self) -> list[int]:
        """See :meth:`Engine.write_counts`. A DTensor, like any subclass around a tensor, has a counter of its own."""
        counts = []
        for outer, source in zip(self._held(), self.sources(), strict=True):
            tensors = {id(tensor): tensor for tensor in (outer, self.local(outer), source)}
            counts.append(sum(map(write_count, tensors.values())))
        return counts

    def held(self) -> list[Tensor]:
        """Returns the parameters and buffers themselves, in the order of the last ``sources()``. Local."""
        return self._binding.held

    def _held(self) -> list[Tensor]:
        """Returns what every slot holds. Local. Raises EMAStateError if a slot holds another tensor than before."""
        self._unwrapped.check()  # first, since DeepSpeed also changes what the binding looks at
        held = self._binding.check()
        self._follow(self._binding)
        return held

    def _read_spec(self, number: int) -> TensorSpec:
        slot = self._slots[number]
        tensor = slot.get()
        return self._removed(number) if tensor is None else self.spec(slot, tensor)

    def _trained_of(self, numbers: Sequence[int]) -> list[int]:
        held = self._binding.held
        return [number for number in numbers if held[number].requires_grad]

    def _check_first(self, sources: Sequence[Tensor]) -> None:
        self._refuse_others()

    def _refuse_others(self) -> None:
        """Raises EMAEngineError for weights that lie here in part only, since something else than this class's wrapper
        has cut them: one around the model, or one that came after the engine. Local."""
        refuse_sharded(self._model)


def refuse_sharded(model: nn.Module) -> None:
    """Raises EMAEngineError if a model that is taken for a plain one was sharded by a wrapper outside of it. Local.

    Its weights are then parts, or copies that the wrapper replaces at any time.

    Modules that nobody has imported have wrapped nothing, so they are not imported here either.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from dist_ema.engines.fsdp1 import refuse_outer_unit

        refuse_outer_unit(model)
    slots = walk_slots(model)
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        for slot in slots:
            if isinstance(slot.get(), DTensor):
                raise EMAEngineError(
                    f"{slot.name!r} is a DTensor now: the model was sharded after the average was made. Make a new "
                    "ShardedEMA of the sharded model"
                )
