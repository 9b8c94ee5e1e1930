"""Canonical names: a walk over a wrapped model that yields what the plain model's ``state_dict()`` would, and no more.

Wrappers put themselves into names in two ways. Some rename an attribute to a token that no user writes
(``_orig_mod`` of torch.compile, ``_checkpoint_wrapped_module``, ``_fsdp_wrapped_module``): those are dropped wherever
they stand. DistributedDataParallel, DataParallel and the DeepSpeed engine use the plain word ``module``, which is also
a fine name for a user's own layer: there the type decides, as it does for Lightning Fabric's wrapper, which registers
the model twice.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_ema.engines.wrappers import is_fabric, unwrap_module
from dist_ema.errors import EMAEngineError, EMAStateError

_TOKENS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_MODULE_WRAPPERS = (DistributedDataParallel, DataParallel)


@dataclass(eq=False)
class Slot:
    """A place in a module that holds a parameter or a persistent buffer.

    Attributes:
        name: canonical name of the place.
        owner: the module that holds it.
        key: its key in the owner's ``_parameters`` or ``_buffers``.
        is_buffer: which of the two.
        aliases: canonical names of other places that hold the same tensor (tied weights).
    """

    name: str
    owner: nn.Module
    key: str
    is_buffer: bool
    aliases: tuple[str, ...] = ()

    @property
    def field(self) -> str:
        """The owner's attribute that has the key."""
        return "_buffers" if self.is_buffer else "_parameters"

    def get(self) -> Tensor | None:
        """What the place holds now."""
        held: Tensor | None = getattr(self.owner, self.field).get(self.key)
        return held


def walk_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module with its canonical name, wrappers under the name of what they wrap, in ``state_dict()`` order.

    A module that is registered twice is visited twice, as ``state_dict()`` does.
    """
    yield prefix, module
    if is_fabric(module):
        yield from walk_modules(unwrap_module(module), prefix)
        return
    for key, child in module._modules.items():
        if child is None:
            continue
        transparent = key in _TOKENS or (isinstance(module, _MODULE_WRAPPERS) and key == "module")
        name = prefix if transparent else f"{prefix}.{key}" if prefix else key
        yield from walk_modules(child, name)


def walk_slots(module: nn.Module) -> list[Slot]:
    """Every parameter and persistent buffer once, first name first; the other names of tied tensors are its aliases."""
    seen: dict[int, Slot] = {}
    names: set[str] = set()
    for prefix, owner in walk_modules(module):
        persistent = [key for key in owner._buffers if key not in owner._non_persistent_buffers_set]
        places: list[tuple[str, Tensor | None, bool]] = [
            (key, owner._parameters[key], False) for key in owner._parameters
        ]
        places += [(key, owner._buffers[key], True) for key in persistent]
        for key, tensor, is_buffer in places:
            name = f"{prefix}.{key}" if prefix else key
            if tensor is None or name in names:
                continue
            if is_lazy(tensor):
                raise EMAEngineError(
                    f"{name!r} has no shape yet: its module ({type(owner).__name__}) is lazy. Run one batch through "
                    "the model, or load its weights, before"
                )
            names.add(name)
            if id(tensor) in seen:
                seen[id(tensor)].aliases += (name,)
            else:
                seen[id(tensor)] = Slot(name, owner, key, is_buffer)
    return list(seen.values())


class Binding:
    """Remembers which tensor object stood in each slot, to notice one that was replaced, frozen or unfrozen.

    The objects are noted at the first ``check()`` after the meta device, so that weights may be materialised or loaded
    after construction; which parameters are trained, and all shapes, are noted at construction.

    Args:
        slots: the places.
        shape_of: the shape of what stands there, for engines that empty a parameter between uses.
    """

    def __init__(self, slots: Iterable[Slot], shape_of: Callable[[Tensor], torch.Size] = Tensor.size) -> None:
        self._shape_of = shape_of
        self._all = list(slots)
        self._owners = [slot.owner for slot in self._all]
        self._fields = [slot.field for slot in self._all]
        self._keys = [slot.key for slot in self._all]
        self._shapes = [None if (tensor := slot.get()) is None else shape_of(tensor) for slot in self._all]
        self._are_parameters = [not slot.is_buffer for slot in self._all]
        self._trained = [_is_trained(slot) for slot in self._all if not slot.is_buffer]
        self._bound: list[Tensor] | None = None

    def check(self) -> list[Tensor]:
        """What every slot holds. Local; no host sync.

        Raises EMAStateError, naming the parameter, if one no longer holds what it held.
        """
        # Whole lists are compared: at every update, for thousands of tensors, a loop in Python would take longer than
        # the update itself. So would asking each DTensor whether it handles the reading of an attribute.
        with torch._C.DisableTorchFunctionSubclass():
            held: list[Tensor | None] = list(map(dict.get, map(getattr, self._owners, self._fields), self._keys))
            tensors = [tensor for tensor in held if tensor is not None]
            if len(tensors) < len(held) or list(map(self._shape_of, tensors)) != self._shapes:
                raise self._complaint(held)
            parameters = list(itertools.compress(tensors, self._are_parameters))
            if self._bound is None and not any(tensor.is_meta for tensor in parameters):
                self._bound = parameters
            same = self._bound is None or all(map(operator.is_, parameters, self._bound))
            if not same or [tensor.requires_grad for tensor in parameters] != self._trained:
                raise self._complaint(held)
            return tensors

    def _complaint(self, held: Sequence[Tensor | None]) -> EMAStateError:
        """What is wrong with the first slot that changed."""
        advice = "Call reset() to start a new average of the model as it is now"
        for slot, tensor, shape in zip(self._all, held, self._shapes, strict=True):
            found = None if tensor is None else self._shape_of(tensor)
            if found != shape and (tensor is not None or slot.is_buffer):
                return EMAStateError(
                    f"{slot.name!r} had the shape {shape} when the average was made and has {found} now. {advice}"
                )
        places = [(slot.name, tensor) for slot, tensor in zip(self._all, held, strict=True) if not slot.is_buffer]
        bound: Sequence[Tensor | None] = self._bound or [tensor for _, tensor in places]
        for (name, tensor), old, trained in zip(places, bound, self._trained, strict=True):
            if tensor is not old or tensor is None:
                return EMAStateError(
                    f"parameter {name!r} is another tensor than the one that is averaged: it was replaced since. "
                    f"{advice}"
                )
            if tensor.requires_grad is not trained:
                was, now = ("trained", "frozen") if trained else ("frozen", "trained")
                return EMAStateError(
                    f"parameter {name!r} was {was} when the average was made and is {now} now. {advice}"
                )
        return EMAStateError(f"the model changed while it was read. {advice}")


def _is_trained(slot: Slot) -> bool:
    tensor = slot.get()
    return tensor is not None and tensor.requires_grad
