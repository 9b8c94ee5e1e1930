"""Notices that a model's parameters were replaced, added, removed, resized or tied differently.

An average refers to tensor objects: if a parameter is another object than before, the average no longer follows the
model. So every ``update()`` calls :meth:`Binding.check`, which works in two steps::

    _Snapshot.read()              fast: compares whole lists of objects with those noted before
        | differs
    Binding._find_slots_again()   slow and rare: walks over the model by name. Was a tensor changed, or only a module?
        | a tensor was changed
    EMAStateError                 names the tensor

For thousands of tensors a Python loop over names would take longer than the update itself. Hence the first step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, compress
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dist_ema.engines.names import Slot, walk_slots
from dist_ema.errors import EMAStateError

#: All names of one tensor, and a slot that holds it.
Named: TypeAlias = "tuple[Sequence[str], Slot | None]"
#: Decides whether a tensor is left out of the average, given its canonical name and whether it is a buffer.
Ignored: TypeAlias = Callable[[str, bool], bool]
#: The names of each tensor, and a slot that holds it.
_Names: TypeAlias = "dict[frozenset[str], Slot | None]"

#: What nn.Module keeps in its ``__dict__``, each a dict by key.
_FIELDS = ("_parameters", "_buffers", "_modules")
_ADVICE = (
    "Call reset() to start a new average of the model as it is now, or rebind(model) to go on with this one, where all "
    "that it averages is still there"
)
#: Names that an error lists; it counts the others.
_MOST_NAMES = 3
#: Stands for an ignored tensor that was removed, as an index into what was read.
_REMOVED = -1


def ignore_nothing(name: str, is_buffer: bool) -> bool:
    """Implements :data:`Ignored` for a model of which every tensor is averaged."""
    return False


class Binding:
    """Remembers which tensor object each slot held, and raises once a parameter is not that object any more.

    The names and shapes are noted at construction. The objects are noted at the first ``check()`` in which no parameter
    is on the meta device, so weights may be materialized or loaded after construction. ``requires_grad`` is not looked
    at. Ignored tensors may be added, removed and changed. Buffers may be replaced and resized.

    Args:
        model: the module that holds all the slots.
        slots: the places to check.
        shape_of: returns the full shape of a tensor, for engines that empty a parameter between uses.
        walk: lists all names that the model has now, those of one tensor together, with its slot if it is one of
            ``slots``; by default from ``walk_slots(model)``.
        ignored: decides which tensors are left out of the average.

    Attributes:
        resized: indices of the slots whose shape has changed. The engine that reads them clears them.
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
        self._slots = list(slots)
        self._names, self._ignored_names = self._walk_names()
        self._shapes = [None if (tensor := slot.get()) is None else shape_of(tensor) for slot in self._slots]
        self._ignored = [ignored(slot.name, slot.is_buffer) for slot in self._slots]
        # Averaged parameters must stay the same object and keep their shape.
        self._must_stay = [
            not slot.is_buffer and not is_ignored for slot, is_ignored in zip(self._slots, self._ignored, strict=True)
        ]
        self._bound: list[Tensor] | None = None
        self.resized: set[int] = set()
        self.outdated = False
        self.held: list[Tensor] = []
        self._take_snapshot()

    def check(self) -> list[Tensor]:
        """Returns the tensor in every slot; an empty tensor for an ignored one that was removed. Local; no host sync.

        Raises:
            EMAStateError: if a parameter was replaced, added, removed or resized. The error names it.
        """
        # Otherwise torch would ask each DTensor, for each attribute read, whether it overrides the reading. That takes
        # longer than the update itself.
        with torch._C.DisableTorchFunctionSubclass():
            tensors = self._read()
            if list(map(self._shape_of, tensors)) != self._shapes:
                self._note_shapes(tensors)
            parameters = list(compress(tensors, self._must_stay))
            if self._bound is None and not any(tensor.is_meta for tensor in parameters):
                self._bound = parameters
            if self._bound is not None and not all(map(operator.is_, parameters, self._bound)):
                raise self._changed_slot(tensors)
            self.held = tensors
            return tensors

    def _read(self) -> list[Tensor]:
        """Returns the tensor in every slot. Raises EMAStateError if the model has other tensors than before."""
        found = self._snapshot.read()
        if found is None:
            self._find_slots_again()
            found = self._snapshot.read()
        if found is None:
            raise EMAStateError(f"the model changed while it was read. {_ADVICE}")
        found.append(None)  # found[_REMOVED]
        held = list(map(found.__getitem__, self._indices))
        tensors = [tensor for tensor in held if tensor is not None]
        return tensors if len(tensors) == len(held) else self._without_removed(held)

    def _without_removed(self, held: Sequence[Tensor | None]) -> list[Tensor]:
        """Puts an empty tensor in place of each ignored one that was removed. Raises EMAStateError for others."""
        tensors = []
        for tensor, is_ignored in zip(held, self._ignored, strict=True):
            if tensor is None and not is_ignored:
                raise self._changed_slot(held)
            tensors.append(torch.empty(0) if tensor is None else tensor)
        self.outdated = True
        return tensors

    def _note_shapes(self, tensors: Sequence[Tensor]) -> None:
        """Notes which buffers and ignored tensors were resized. Raises EMAStateError for an averaged parameter."""
        for index, (tensor, must_stay) in enumerate(zip(tensors, self._must_stay, strict=True)):
            shape = self._shape_of(tensor)
            if shape == self._shapes[index]:
                continue
            if must_stay:
                raise self._changed_slot(tensors)
            self._shapes[index] = shape
            self.resized.add(index)

    def _find_slots_again(self) -> None:
        """Finds the slots again in a model whose modules have changed. Raises EMAStateError if its tensors have.

        Modules without tensors are added and removed, caches fill up, and a module may be wrapped later, for example by
        ``torch.compile``. None of these changes a tensor.
        """
        held = [slot.get() for slot in self._slots]
        for tensor, is_ignored in zip(held, self._ignored, strict=True):
            if tensor is None and not is_ignored:
                raise self._changed_slot(held)
        names, ignored_names = self._walk_names()
        if names.keys() != self._names.keys() and not _only_more_names(list(self._names), names):
            raise _other_tensors(list(self._names), list(names))
        self.outdated = self.outdated or ignored_names.keys() != self._ignored_names.keys()
        places: dict[str, Slot] = {}
        for tied, slot in (names | ignored_names).items():
            if slot is not None:
                places |= dict.fromkeys(tied, slot)
        for slot in self._slots:
            if slot.name in places:
                slot.owner = places[slot.name].owner
                slot.key = places[slot.name].key
        self._take_snapshot()

    def _walk_names(self) -> tuple[_Names, _Names]:
        """Returns the names of each averaged tensor, and those of each ignored one."""
        averaged: _Names = {}
        ignored: _Names = {}
        for names, slot in self._walk():
            is_buffer = slot is not None and slot.is_buffer
            found = ignored if self._is_ignored(names[0], is_buffer) else averaged
            found[frozenset(names)] = slot
        return averaged, ignored

    def _take_snapshot(self) -> None:
        """Notes every tensor of the model as it is now, and where each slot is among them."""
        self._snapshot = _Snapshot(self._model)
        places = self._snapshot.places()
        self._indices = [places.get((id(getattr(slot.owner, slot.field)), slot.key), _REMOVED) for slot in self._slots]

    def _changed_slot(self, held: Sequence[Tensor | None]) -> EMAStateError:
        """Returns the error that names the first slot that changed.

        Args:
            held: what each slot holds now; None if it is empty.
        """
        found = list(zip(self._slots, held, self._shapes, self._must_stay, strict=True))
        for slot, tensor, shape, must_stay in found:
            if must_stay and tensor is not None and self._shape_of(tensor) != shape:
                return EMAStateError(
                    f"{slot.name!r} had the shape {shape} when the average was made and has {self._shape_of(tensor)} "
                    f"now. {_ADVICE}"
                )
            if slot.is_buffer and tensor is None and not self._is_ignored(slot.name, True):
                return EMAStateError(f"the buffer {slot.name!r} was removed after the average was made. {_ADVICE}")
        parameters = [(slot.name, tensor) for slot, tensor, _, must_stay in found if must_stay]
        # Before the first check() no object is known: only a parameter that is missing is a change.
        bound: Sequence[Tensor | None] = self._bound or [tensor for _, tensor in parameters]
        for (name, tensor), old in zip(parameters, bound, strict=True):
            if tensor is not old or tensor is None:
                return EMAStateError(f"parameter {name!r} was replaced after the average was created. {_ADVICE}")
        return EMAStateError(f"the model changed while it was read. {_ADVICE}")


class _Snapshot:
    """Notes every parameter, buffer and child of all modules of a model, as they are at construction. Local.

    Buffers are often replaced (``self.steps = self.steps + 1``), so of buffers only the keys are compared.
    """

    def __init__(self, model: nn.Module) -> None:
        # nn.Module keeps its parameters, buffers and children in three dicts of its own __dict__. vars() reads them at
        # the speed of C, while getattr(module, name) is a Python call for each.
        self._modules = [vars(module) for module in model.modules()]
        self._dicts: dict[str, list[dict[str, Any]]] = {}
        for field in _FIELDS:
            self._dicts[field] = list(map(operator.itemgetter(field), self._modules))
        every = list(chain.from_iterable(self._dicts.values()))
        self._empty = [held for held in every if not held]
        self._filled = [held for held in every if held]
        self._sizes = list(map(len, self._filled))
        self._keys = list(chain.from_iterable(self._filled))
        self._parameters, self._buffers, self._children = (
            [held for held in self._dicts[field] if held] for field in _FIELDS
        )
        self._known_parameters: list[Tensor | None] = _values(self._parameters)
        self._known_children: list[nn.Module | None] = _values(self._children)
        self._missing_buffers = [buffer is None for buffer in _values(self._buffers)]

    def places(self) -> dict[tuple[int, str], int]:
        """Maps each place (``id()`` of the dict that holds a tensor, and its key) to its index in ``read()``."""
        places = [(id(held), key) for held in self._parameters + self._buffers for key in dict.keys(held)]
        return {place: index for index, place in enumerate(places)}

    def read(self) -> list[Tensor | None] | None:
        """Returns all parameters and buffers, or None if the model is not as it was. No host sync.

        The comparisons are in the order of their cost. Each one makes the next one meaningful: the same dicts, then the
        same lengths, then the same keys in the same order, so that values can be compared one by one.
        """
        for field, dicts in self._dicts.items():
            if not all(map(operator.is_, map(operator.itemgetter(field), self._modules), dicts)):
                return None
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return None
        if list(chain.from_iterable(self._filled)) != self._keys:
            return None
        parameters, buffers, children = map(_values, (self._parameters, self._buffers, self._children))
        # Identity, because ``!=`` on lists would compare the elements of the tensors.
        if not all(map(operator.is_, parameters, self._known_parameters)):
            return None
        if not all(map(operator.is_, children, self._known_children)):
            return None
        if [buffer is None for buffer in buffers] != self._missing_buffers:
            return None
        return parameters + buffers


def _values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    # dict.values, so that a subclass of dict cannot slow this down.
    return list(chain.from_iterable(map(dict.values, dicts)))


def _named(slots: Iterable[Slot]) -> list[Named]:
    return [((slot.name, *slot.aliases), slot) for slot in slots]


def _other_tensors(before: Sequence[frozenset[str]], now: Sequence[frozenset[str]]) -> EMAStateError:
    """Returns the error for a model with other names than before, or with other ties between them."""
    old = frozenset().union(*before)
    new = frozenset().union(*now)
    changes = []
    for names, what in ((new - old, "added"), (old - new, "removed or renamed")):
        if names:
            changes.append(f"{_first_names(names)} {'was' if len(names) == 1 else 'were'} {what}")
    if not changes:
        tied = frozenset().union(*(set(before) ^ set(now)))
        changes.append(f"weight tying of {_first_names(tied)} changed (re-tie after to_empty())")
    return EMAStateError(f"the model has other tensors than when the average was made: {'; '.join(changes)}. {_ADVICE}")


def _only_more_names(before: Sequence[frozenset[str]], now: Iterable[frozenset[str]]) -> bool:
    """Returns whether the tensors are the same and some only have a further name, as after ``self.cache = self.layer``.

    Each tensor of before must then be found under all of its names, no two of them may have become one tensor, and
    there may be no further tensor.
    """
    found = {name: names for names in now for name in names}
    matched = [found.get(next(iter(names)), frozenset()) for names in before]
    kept_all_names = all(names <= more for names, more in zip(before, matched, strict=True))
    return kept_all_names and len(set(matched)) == len(before) == len(set(found.values()))


def _first_names(names: frozenset[str]) -> str:
    shown = ", ".join(map(repr, sorted(names)[:_MOST_NAMES]))
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"
