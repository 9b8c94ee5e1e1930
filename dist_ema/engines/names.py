"""Walks over a wrapped model and yields canonical names: those that the plain model's ``state_dict()`` has.

Wrappers add themselves to names in two ways:

- Some use a token that no user writes: ``_orig_mod`` (torch.compile), ``_checkpoint_wrapped_module``,
  ``_fsdp_wrapped_module``. These are dropped wherever they occur in a name.
- DistributedDataParallel, DataParallel and the DeepSpeed engine use the word ``module``, which users also give to
  layers of their own. It is dropped only if the type of the module is one of these wrappers. The type also identifies
  the wrapper of Lightning Fabric, which registers the model twice.

How an engine notices that a tensor was replaced is in ``binding.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_ema.engines.wrappers import is_fabric, loaded, unwrap_module
from dist_ema.errors import EMAEngineError

#: What torch's wrappers call the attribute of what they wrap. No user writes these words.
TOKENS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
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
        """Returns the owner's attribute that has the key."""
        return "_buffers" if self.is_buffer else "_parameters"

    def get(self) -> Tensor | None:
        """Returns what the place holds now."""
        held: Tensor | None = getattr(self.owner, self.field).get(self.key)
        return held


def walk_modules(
    module: nn.Module, prefix: str = "", first_numbers: Mapping[nn.Module, int] | None = None
) -> Iterator[tuple[str, nn.Module]]:
    """Yields every module with its canonical name, wrappers under the name of what they wrap, in ``state_dict()``
    order.

    A module that is registered twice is visited twice, as ``state_dict()`` does. Raises EMAEngineError for a scripted
    one, which keeps its tensors elsewhere.

    Args:
        module: where to begin.
        prefix: its name.
        first_numbers: of lists of modules that hold this rank's part of a longer list, the number of their first one.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise EMAEngineError(
            f"{prefix or 'the model'} is a scripted module, whose weights cannot be followed: average it without "
            "torch.jit.script, or leave that module out of it"
        )
    yield prefix, module
    if is_fabric(module):
        yield from walk_modules(unwrap_module(module), prefix, first_numbers)
        return
    first = first_numbers.get(module, 0) if first_numbers else 0
    for key, child in module._modules.items():
        if child is None:
            continue
        if first:
            key = str(int(key) + first)
        transparent = key in TOKENS or (isinstance(module, _MODULE_WRAPPERS) and key == "module")
        name = prefix if transparent else f"{prefix}.{key}" if prefix else key
        yield from walk_modules(child, name, first_numbers)


def walk_slots(module: nn.Module, first_numbers: Mapping[nn.Module, int] | None = None) -> list[Slot]:
    """Returns every parameter and persistent buffer once, first name first; the other names of tied tensors are its
    aliases.

    ``first_numbers`` as in :func:`walk_modules`.
    """
    seen: dict[int, Slot] = {}
    names: set[str] = set()
    for prefix, owner in walk_modules(module, first_numbers=first_numbers):
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


def kind_of(slot: Slot, tensor: Tensor) -> Literal["parameter", "frozen", "buffer"]:
    """Returns the spec's kind of what a slot holds."""
    if slot.is_buffer:
        return "buffer"
    return "parameter" if tensor.requires_grad else "frozen"


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the innermost module whose state dict has the canonical names: without FSDP1, DDP, torch.compile.
    Local.
    """
    inner = module
    for name, found in walk_modules(module):
        if name:
            break
        inner = found
    return inner


def plain_type(module: nn.Module) -> type:
    """Returns the class that the user wrote: ``fully_shard`` gives a module another, made of that and its own."""
    fsdp = loaded("torch.distributed.fsdp", "FSDPModule")
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, fsdp))
