"""Finds out how a function on state dicts arranges elements, by running it once on tensors without memory.

The function belongs to another library, such as ``revert_weight_conversion`` of transformers. Views are followed by
their strides; copies, ``cat`` and ``stack`` become links from one memory to another. A function that computes values
cannot be followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# "Extending PyTorch" names it for seeing every operation; its module has no public name (torch 2.13).
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ema.checkpoints.arrangement import Arrangement, Link, UnknownOperationError, View
from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import TensorPlan

#: A function on state dicts.
Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def trace(convert: Convert, tensors: Iterable[tuple[Sequence[str], TensorPlan]]) -> Arrangement:
    """Traces what ``convert`` makes of a state dict of these tensors. Local; allocates no memory.

    Args:
        convert: the function. It may change the dict that it gets, but no tensor.
        tensors: all names of each tensor, and the tensor.

    Raises:
        UnknownOperationError: the function fails, or does more than move elements. The text says what.

    >>> halves = lambda state: {"top": state["w"][:1].clone(), "bottom": state["w"][1:].clone()}
    >>> arrangement = trace(halves, [(("w",), TensorPlan("w", torch.float32, (2, 3)))])
    >>> moved = arrangement.place("w", ((2, 2),), torch.tensor([2.0, 3.0]))
    >>> [(name, runs, values.tolist()) for name, runs, values in moved]
    [('top', ((2, 1),), [2.0]), ('bottom', ((0, 1),), [3.0])]
    """
    recorder = _Recorder()
    state: dict[str, Tensor] = {}
    for names, plan in tensors:
        tensor = torch.empty(plan.shape, dtype=plan.dtype, device="meta")
        recorder.add(tensor, plan.name)
        state.update(dict.fromkeys(names, tensor))
    try:
        with torch.no_grad(), recorder:
            converted = dict(convert(dict(state)))
    except CheckpointError:
        raise
    except Exception as error:  # the other library may not know a model of this kind
        raise UnknownOperationError(f"{type(error).__name__}: {error}") from error
    same = converted.keys() == state.keys() and all(state[name] is tensor for name, tensor in converted.items())
    return recorder.arrangement(converted, same)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercepts every operation on meta tensors, and records how elements get from one memory to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: dict[int, int] = {}  # the number of each memory, by the id of its storage
        self._storages: list[
            tuple[torch.UntypedStorage, torch.dtype]
        ] = []  # keeps the storages alive, so that no id is used twice
        self._links: list[list[Link]] = []  # the links from each memory
        self._names: dict[int, str] = {}  # the names of the module's tensors, by memory
        self._made_by: dict[int, str] = {}  # the operation that made a memory whose elements cannot be followed

    def add(self, tensor: Tensor, name: str) -> None:
        """Adds a tensor of the module."""
        number = self._number(tensor)
        self._names[number] = name
        del self._made_by[number]

    def _number(self, tensor: Tensor) -> int:
        """Returns the number of a tensor's memory. All views of one memory have one storage object."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._numbers:
            number = self._numbers[id(storage)] = len(self._storages)
            self._storages.append((storage, tensor.dtype))
            self._links.append([])
            self._made_by[number] = "a tensor that is not in the state dict"  # add() or _record() may change this
        return self._numbers[id(storage)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # A memory that changes would need two sets of links, for its elements before and after the change.
        if func._schema.is_mutable:
            raise UnknownOperationError(f"it changes a tensor in place, by {func}")
        found = result if isinstance(result, (list, tuple)) else [result]
        for out in (out for out in found if isinstance(out, Tensor)):
            if id(out.untyped_storage()) not in self._numbers:  # otherwise it is a view, which its strides describe
                self._record(str(func.overloadpacket), out, args)
        return result

    def _record(self, operation: str, out: Tensor, args: Sequence[Any]) -> None:
        """Records an operation that has made a new memory: the links to it, if it only moves elements."""
        number = self._number(out)
        # Views of meta tensors have strides, too, so a part of the new memory is described by a view of it.
        if operation == "aten.clone":
            parts = [(args[0], out)]
        elif operation == "aten.cat":
            dim = args[1] if len(args) > 1 else 0
            pieces = torch.split(out, [part.shape[dim] for part in args[0]], dim)
            parts = list(zip(args[0], pieces, strict=True))
        elif operation == "aten.stack":
            parts = list(zip(args[0], out.unbind(args[1] if len(args) > 1 else 0), strict=True))
        else:
            self._made_by[number] = operation
            return
        makers = [self._made_by.get(self._number(part)) for part, _ in parts]
        if any(part.dtype != out.dtype for part, _ in parts):
            makers = [f"{operation} of several dtypes"]  # a conversion changes the elements
        self._made_by.pop(number)
        if (maker := next(filter(None, makers), None)) is not None:
            self._made_by[number] = maker
            return
        for part, place in parts:
            self._link(part, View.of(place), number)

    def _link(self, tensor: Tensor, target: View, goal: int) -> None:
        number = self._number(tensor)
        if tensor.dtype != self._storages[number][1]:
            raise UnknownOperationError(f"it takes elements of {self._storages[number][1]} for {tensor.dtype}")
        if link := Link.between(View.of(tensor), target, goal):
            self._links[number].append(link)

    def arrangement(self, converted: Mapping[str, Tensor], is_trivial: bool) -> Arrangement:
        """Returns the arrangement of everything recorded. Raises UnknownOperationError."""
        targets = []
        for place, (name, tensor) in enumerate(converted.items()):
            if (maker := self._made_by.get(self._number(tensor))) is not None:
                raise UnknownOperationError(f"{name!r} comes from {maker}, which does not just move elements")
            targets.append(TensorPlan(name, tensor.dtype, tuple(tensor.shape)))
            self._link(tensor, View.row_major(tensor.shape), -1 - place)
        all_links = {number: tuple(links) for number, links in enumerate(self._links)}
        used: set[int] = set()
        for number in sorted(
            all_links, reverse=True
        ):  # a memory has a higher number than the memories that it is made of
            links = tuple(link for link in all_links[number] if link.goal < 0 or link.goal in used)
            all_links[number] = links
            used |= {number} if links else set()
        sources = {name: number for number, name in self._names.items() if number in used}
        return Arrangement(tuple(targets), sources, {number: all_links[number] for number in used}, is_trivial)
