"""Records which tensors a model holds, and where, to notice one that came, went or took another's place.

At every update, for thousands of tensors, a loop in Python would take longer than the update itself. So whole lists are
compared, and nobody looks closer unless they differ.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import chain
from typing import Any

from torch import Tensor, nn

_FIELDS = ("_parameters", "_buffers", "_modules")


class Census:
    """Every parameter, buffer and child of all modules of a model, as they were when this was made. Local.

    Buffers are often replaced (``self.steps = self.steps + 1``), so of them only the places count.
    """

    def __init__(self, model: nn.Module) -> None:
        # nn.Module keeps its parameters, buffers and children in three dicts of its own __dict__; these are read at C
        # speed, where getattr(module, name) would be a call of Python for each.
        self._modules = [vars(module) for module in model.modules()]
        self._dicts = [(read, list(map(read, self._modules))) for read in map(operator.itemgetter, _FIELDS)]
        self._parameters, self._buffers, self._children = ([held for held in dicts if held] for _, dicts in self._dicts)
        self._empty = [held for _, dicts in self._dicts for held in dicts if not held]
        self._filled = [*self._parameters, *self._buffers, *self._children]
        self._sizes = list(map(len, self._filled))
        self._keys = list(chain.from_iterable(self._filled))
        self._known_parameters: list[Tensor | None] = _values(self._parameters)
        self._known_children: list[nn.Module | None] = _values(self._children)
        self._missing_buffers = [buffer is None for buffer in _values(self._buffers)]

    def places(self) -> dict[tuple[int, str], int]:
        """Maps each place, ``id()`` of the dict that holds a tensor and its key, to its number in ``read()``."""
        places = [(id(held), key) for held in self._parameters + self._buffers for key in dict.keys(held)]
        return {place: index for index, place in enumerate(places)}

    def read(self) -> list[Tensor | None] | None:
        """Returns all parameters and buffers, or None if there are others than there were. No host sync."""
        # In order of cost: the dicts are the same objects, then as long as they were, then with the same keys in the
        # same order (so that values can be compared place by place), then with the same values.
        if not all(all(map(operator.is_, map(read, self._modules), dicts)) for read, dicts in self._dicts):
            return None
        if any(self._empty) or list(map(len, self._filled)) != self._sizes:
            return None
        if list(chain.from_iterable(self._filled)) != self._keys:
            return None
        parameters, buffers, children = map(_values, (self._parameters, self._buffers, self._children))
        # Not ``!=``, which would compare tensors by what is in them.
        if not all(map(operator.is_, parameters, self._known_parameters)):
            return None
        if not all(map(operator.is_, children, self._known_children)):
            return None
        if [buffer is None for buffer in buffers] != self._missing_buffers:
            return None
        return parameters + buffers


def _values(dicts: Iterable[dict[str, Any]]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, dicts)))
