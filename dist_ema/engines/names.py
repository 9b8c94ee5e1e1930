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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from dist_ema.engines.census import Census
from dist_ema.engines.wrappers import is_fabric, loaded, unwrap_module
from dist_ema.errors import EMAEngineError, EMAStateError

_TOKENS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_ADVICE = (
    "Call reset() to start a new average of the model as it is now, or rebind(model) to go on with this one, where all "
    "that it averages is still there"
)
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
        transparent = key in _TOKENS or (isinstance(module, _MODULE_WRAPPERS) and key == "module")
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


#: All names of one tensor, and a place where it is.
Named: TypeAlias = tuple[Sequence[str], "Slot | None"]
#: Whether a tensor is in no average, by its canonical name and whether it is a buffer.
Ignored: TypeAlias = Callable[[str, bool], bool]


def ignore_nothing(name: str, is_buffer: bool) -> bool:
    """Returns the :data:`Ignored` of a model of which every tensor counts."""
    return False


class Binding:
    """Remembers which tensor object stood in each slot, to notice one that was added, removed or replaced.

    The objects are noted at the first ``check()`` after the meta device, so that weights may be materialised or loaded
    after construction; names and shapes are noted at construction. ``requires_grad`` does not matter here. Tensors that
    are ``ignored`` may come, go and change; buffers may be replaced and change their shape.

    Args:
        model: what holds all the slots.
        slots: the places.
        shape_of: the shape of what stands there, for engines that empty a parameter between uses.
        walk: all names that the model has now, those of one tensor together, and its slot where it is one of
            ``slots``; by default those of ``walk_slots(model)``.
        ignored: which tensors are in no average.

    Attributes:
        resized: numbers of the slots whose shape has changed; whoever reads them clears them.
        outdated: whether ignored tensors were added or removed.
        held: what the slots held at the last ``check()``.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Iterable[Slot],
        shape_of: Callable[[Tensor], torch.Size] = Tensor.size,
        walk: Callable[[], Sequence[Named]] | None = None,
        ignored: Ignored = ignore_nothing,
    ) -> None:
        self._model = model
        self._shape_of = shape_of
        self._walk = walk if walk is not None else lambda: _named(walk_slots(model))
        self._is_ignored = ignored
        self._all = list(slots)
        self._names, self._ignored_names = self._walk_all()
        self._shapes = [None if (tensor := slot.get()) is None else shape_of(tensor) for slot in self._all]
        self._ignored = [ignored(slot.name, slot.is_buffer) for slot in self._all]
        # Of these the object counts, and the shape.
        self._watched = [
            not slot.is_buffer and not is_ignored for slot, is_ignored in zip(self._all, self._ignored, strict=True)
        ]
        self._bound: list[Tensor] | None = None
        self.resized: set[int] = set()
        self.outdated = False
        self.held: list[Tensor] = []
        self._count()

    def _walk_all(self) -> tuple[dict[frozenset[str], Slot | None], dict[frozenset[str], Slot | None]]:
        """Returns the names of each tensor, with its slot: of those that count, and of those that are ignored."""
        found: dict[frozenset[str], Slot | None] = {}
        ignored: dict[frozenset[str], Slot | None] = {}
        for names, slot in self._walk():
            is_ignored = self._is_ignored(names[0], slot is not None and slot.is_buffer)
            (ignored if is_ignored else found)[frozenset(names)] = slot
        return found, ignored

    def _count(self) -> None:
        """Notes every place of the model as it is now."""
        self._census = Census(self._model)
        places = self._census.places()
        # -1 stands for an ignored tensor that was removed: check() puts None behind the others.
        self._indices = [places.get((id(getattr(slot.owner, slot.field)), slot.key), -1) for slot in self._all]

    def check(self) -> list[Tensor]:
        """Returns what every slot holds; an empty tensor for an ignored one that was removed. Local; no host sync.

        Raises EMAStateError, naming the parameter, if one no longer holds what it held, or the model has others too.
        """
        # Asking each DTensor whether it handles the reading of an attribute would take longer than the update itself.
        with torch._C.DisableTorchFunctionSubclass():
            there = self._census.read()
            if there is None:
                self._look_closer()
                there = self._census.read()
            if there is None:
                raise self._complaint([slot.get() for slot in self._all])
            there.append(None)
            held = list(map(there.__getitem__, self._indices))
            tensors = [tensor for tensor in held if tensor is not None]
            if len(tensors) < len(held):
                tensors = self._without_removed(held)
            if list(map(self._shape_of, tensors)) != self._shapes:
                self._note_shapes(tensors)
            parameters = list(itertools.compress(tensors, self._watched))
            if self._bound is None and not any(tensor.is_meta for tensor in parameters):
                self._bound = parameters
            if self._bound is not None and not all(map(operator.is_, parameters, self._bound)):
                raise self._complaint(held)
            self.held = tensors
            return tensors

    def _without_removed(self, held: Sequence[Tensor | None]) -> list[Tensor]:
        """Puts an empty tensor in the place of an ignored one that was removed; raises EMAStateError for others."""
        tensors = []
        for tensor, is_ignored in zip(held, self._ignored, strict=True):
            if tensor is None and not is_ignored:
                raise self._complaint(held)
            tensors.append(torch.empty(0) if tensor is None else tensor)
        self.outdated = True
        return tensors

    def _note_shapes(self, tensors: Sequence[Tensor]) -> None:
        """Notes what was resized; raises EMAStateError for a parameter that counts."""
        for number, (tensor, is_watched) in enumerate(zip(tensors, self._watched, strict=True)):
            shape = self._shape_of(tensor)
            if shape == self._shapes[number]:
                continue
            if is_watched:
                raise self._complaint(tensors)
            self._shapes[number] = shape
            self.resized.add(number)

    def _look_closer(self) -> None:
        """Finds the slots again in a model whose modules have changed. Raises EMAStateError if its tensors have.

        Modules without tensors come and go, caches fill, and a module may be wrapped later (``torch.compile``).
        """
        held = [slot.get() for slot in self._all]
        if any(tensor is None and not is_ignored for tensor, is_ignored in zip(held, self._ignored, strict=True)):
            raise self._complaint(held)
        now, ignored = self._walk_all()
        if now.keys() != self._names.keys() and not _named_more(list(self._names), now):
            raise _changed(list(self._names), list(now))
        self.outdated = self.outdated or ignored.keys() != self._ignored_names.keys()
        places = {name: slot for names, slot in (now | ignored).items() if slot is not None for name in names}
        for slot in self._all:
            if slot.name in places:
                slot.owner, slot.key = places[slot.name].owner, places[slot.name].key
        self._count()

    def _complaint(self, held: Sequence[Tensor | None]) -> EMAStateError:
        """Describes the first slot that changed."""
        found = list(zip(self._all, held, self._shapes, self._watched, strict=True))
        for slot, tensor, shape, is_watched in found:
            now = None if tensor is None else self._shape_of(tensor)
            if is_watched and tensor is not None and now != shape:
                return EMAStateError(
                    f"{slot.name!r} had the shape {shape} when the average was made and has {now} now. {_ADVICE}"
                )
            if slot.is_buffer and tensor is None and not self._is_ignored(slot.name, True):
                return EMAStateError(f"the buffer {slot.name!r} was removed after the average was made. {_ADVICE}")
        places = [(slot.name, tensor) for slot, tensor, _, is_watched in found if is_watched]
        bound: Sequence[Tensor | None] = self._bound or [tensor for _, tensor in places]
        for (name, tensor), old in zip(places, bound, strict=True):
            if tensor is not old or tensor is None:
                return EMAStateError(f"parameter {name!r} was replaced after the average was created. {_ADVICE}")
        return EMAStateError(f"the model changed while it was read. {_ADVICE}")


def _named(slots: Iterable[Slot]) -> list[Named]:
    return [((slot.name, *slot.aliases), slot) for slot in slots]


def _changed(before: Sequence[frozenset[str]], now: Sequence[frozenset[str]]) -> EMAStateError:
    """Other names than there were, or other ties between them."""
    old = set().union(*before)
    new = set().union(*now)
    found = []
    for names, what in ((new - old, "added"), (old - new, "removed or renamed")):
        if names:
            found.append(f"{_some(names)} {'was' if len(names) == 1 else 'were'} {what}")
    if not found:
        tied = set().union(*(set(before) ^ set(now)))
        found.append(f"weight tying of {_some(tied)} changed (re-tie after to_empty())")
    return EMAStateError(f"the model has other tensors than when the average was made: {'; '.join(found)}. {_ADVICE}")


def _named_more(before: Sequence[frozenset[str]], now: Iterable[frozenset[str]]) -> bool:
    """Returns whether the tensors are the same, and some have another name besides: ``self.cache = self.layer``."""
    found = {name: names for names in now for name in names}
    matched = [found.get(next(iter(names)), frozenset()) for names in before]
    same = all(names <= more for names, more in zip(before, matched, strict=True))
    return same and len(set(matched)) == len(before) == len(set(found.values()))


def _some(names: set[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


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
