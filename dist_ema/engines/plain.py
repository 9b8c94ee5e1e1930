"""Plain modules, whose parameters each rank holds whole, and the base of the engines for DDP and DTensors.

A plain tensor may also declare to be a part of a larger one (``declared.py``). It is then averaged as that part.
"""

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
    """Averages a module whose parameters lie whole on this rank, unless they declare to be a part of a larger tensor.

    Other ranks are not known to hold the same values, so each rank averages the whole of its tensors. The lowest rank
    writes them to checkpoints. Base class of the engines whose parameters stand in ``nn.Module``'s own dicts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        self._model = model
        self._slots: list[Slot] = []
        self._declared: dict[str, Declaration] = {}  # by canonical name; only tensors that declare something

    def modules(self) -> list[nn.Module]:
        return [self._model]

    def _read_specs(self) -> list[TensorSpec]:
        # Step 1: find the tensors, and refuse modules whose weights belong to a wrapper around them.
        self._refuse_others()
        self._slots = walk_slots(self._model)
        self._unwrapped = Unwrapped(self._model, self._slots)
        self._unwrapped.refuse()
        self._binding = Binding(self._model, self._slots, ignored=self._ignored)

        # Step 2: read what tensors declare.
        held = [(slot, tensor) for slot in self._slots if (tensor := slot.get()) is not None]
        self._declared = {}
        # The number of each tensor that has padding, and where in it the declared elements are.
        self._inside: list[tuple[int, tuple[slice, ...]]] = []
        for number, (slot, tensor) in enumerate(held):
            found = self.declared(slot, tensor)
            if found is not None:
                self._declared[slot.name] = found
                if found.inside is not None:
                    self._inside.append((number, found.inside))

        # Step 3: describe each tensor. Subclasses such as float8 weights take a slower path in _read_sources().
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
        """Return the spec of a plain tensor that declares to be a part of a larger one. Local.

        The spec does not tell which ranks have the rest; ``comm/catalogue.py`` finds that out.
        """
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
        """Returns this rank's part of the tensor in a slot: here the tensor itself. Local, no copy."""
        return tensor

    def _read_sources(self) -> list[Tensor]:
        tensors = self._without_padding(list(self._held()))  # a copy of the list, which belongs to the binding
        return look_through(tensors, self._announced) if self._has_subclasses else tensors

    def _without_padding(self, tensors: list[Tensor]) -> list[Tensor]:
        """Replace each local tensor that holds more than it declares by a view of the declared part. Local, no copy."""
        for number, inside in self._inside:
            tensors[number] = tensors[number].detach()[inside]
        return tensors

    def caches(self) -> list[CachedScale]:
        """See :meth:`Engine.caches`: the scales of torchao's float8 weights."""
        return cached_scales([self.local(tensor) for tensor in self._held()]) if self._has_subclasses else []

    def write_counts(self) -> list[int]:
        """See :meth:`Engine.write_counts`. Local.

        A DTensor, like any subclass around a tensor, has another counter than the tensor inside. A write through either
        counts, so the counters are added up.
        """
        counts = []
        for outer, source in zip(self._held(), self.sources(), strict=True):
            # By id, so that a tensor that is all three counts once.
            tensors = {id(tensor): tensor for tensor in (outer, self.local(outer), source)}
            counts.append(sum(map(write_count, tensors.values())))
        return counts

    def held(self) -> list[Tensor]:
        """Returns the parameters and buffers themselves, in the order of the last ``sources()``. Local."""
        return self._binding.held

    def _held(self) -> list[Tensor]:
        """Returns the tensor in every slot. Local. Raises EMAStateError if a slot holds another tensor than before."""
        # First the check for DeepSpeed. It changes parameters, so the binding would raise with a less helpful text.
        self._unwrapped.check()
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
