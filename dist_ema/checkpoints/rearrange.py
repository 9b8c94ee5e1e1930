"""Tensors as other names, slices, joins and transposes of the tensors that ranks hold: where each element goes.

Exports may have to be cut otherwise than the module is: transformers keeps the experts of a layer in one tensor, and
other readers expect one tensor an expert. What the files have is said by a function on state dicts, of another
library. It is run once on tensors without memory, and what it does to them is followed: views by their strides, copies
and joins as links from one memory to another. Afterwards any elements of a tensor can be sent to their places in the
files, by whoever holds them, without a full tensor anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import gcd, prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# What "Extending PyTorch" names for seeing every operation; its module has no public name (torch 2.13).
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ema.checkpoints.layout import TensorPlan
from dist_ema.errors import CheckpointError
from dist_ema.sharding.runs import Runs

Indices = npt.NDArray[np.int64]
#: A function on state dicts, such as ``revert_weight_conversion`` of transformers.
Convert = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


class UnknownOperationError(CheckpointError):
    """The function does what cannot be followed."""


@dataclass(frozen=True)
class _View:
    """Elements of a flat memory, ordered as a box."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _View:
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    @classmethod
    def row_major(cls, shape: Sequence[int]) -> _View:
        return cls(0, tuple(shape), tuple(prod(shape[dim + 1 :]) for dim in range(len(shape))))


@dataclass(frozen=True)
class _Link:
    """The same elements in two memories.

    Attributes:
        goal: the number of the second memory.
        start, goal_start: of the first element in each.
        dims: size, stride in the first and stride in the second memory of each dimension, the widest first. The last
            is contiguous in both.
    """

    goal: int
    start: int
    goal_start: int
    dims: tuple[tuple[int, int, int], ...]

    @classmethod
    def between(cls, source: _View, target: _View, goal: int) -> _Link | None:
        """None if there is no element."""
        if 0 in source.sizes:
            return None
        pairs = zip(source.sizes, source.strides, target.strides, strict=True)
        dims = sorted((dim for dim in pairs if dim[0] > 1), key=lambda dim: dim[1])
        run = 1
        while dims and dims[0][1] == dims[0][2] == run:
            run *= dims.pop(0)[0]
        whole, room = [(run, 1, 1)], run
        for size, stride, goal_stride in dims:
            if stride < room:  # so elements of one row lie between those of another: an expanded or unfolded tensor
                raise UnknownOperationError("it reads elements of a tensor that overlap")
            whole.insert(0, (size, stride, goal_stride))
            room = stride * size
        return cls(goal, source.offset, target.offset, tuple(whole))

    @property
    def grain(self) -> int:
        """Elements that stay together: every place where this link cuts is a multiple of it."""
        *outer, (run, _, _) = self.dims
        return reduce(gcd, (stride for dim in outer for stride in dim[1:]), gcd(run, self.start, self.goal_start))

    def follow(self, blocks: Indices, grain: int) -> tuple[npt.NDArray[np.bool_], Indices]:
        """Which of the blocks of ``grain`` elements are in this link, and the goals of those that are."""
        rest = blocks - self.start // grain
        inside = rest >= 0
        goals = np.full_like(rest, self.goal_start // grain)
        *outer, (run, _, _) = self.dims
        for size, stride, goal_stride in outer:
            place, rest = np.divmod(rest, stride // grain)
            inside &= place < size
            goals += place * (goal_stride // grain)
        inside &= rest < run // grain
        goals += rest
        return inside, goals[inside]

    @property
    def stop(self) -> int:
        """Behind the last element in the first memory."""
        return self.start + 1 + sum((size - 1) * stride for size, stride, _ in self.dims)


@dataclass(frozen=True)
class Arrangement:
    """What is to be written, and where the elements of each source go.

    Attributes:
        targets: the tensors of the files.
        sources: the memory of each tensor that ranks hold and that is written, by its name.
        links: from each memory on; a goal below zero is a target, -1 the first.
        is_trivial: every tensor is written whole, under its own names.
    """

    targets: tuple[TensorPlan, ...]
    sources: dict[str, int]
    links: dict[int, tuple[_Link, ...]]
    is_trivial: bool
    _grains: dict[int, int] = field(default_factory=dict)

    @classmethod
    def trace(cls, convert: Convert, tensors: Iterable[tuple[Sequence[str], TensorPlan]]) -> Arrangement:
        """What ``convert`` makes of a state dict of these tensors, each under all of its names. Local; no memory.

        Raises UnknownOperationError, which says why, if the function fails or an element's value or way cannot be
        followed.
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
        except Exception as error:  # of another library, which may not know a model of this kind
            raise UnknownOperationError(f"{type(error).__name__}: {error}") from error
        same = converted.keys() == state.keys() and all(state[name] is tensor for name, tensor in converted.items())
        return recorder.arrangement(converted, same)

    def without(self, names: Collection[str]) -> Arrangement:
        """The same, but for the targets that are made of these sources.

        Raises UnknownOperationError if one is made of others as well.
        """
        reached = {name: self._targets_of(memory) for name, memory in self.sources.items()}
        dropped = set().union(*(targets for name, targets in reached.items() if name in names))
        kept = set().union(*(targets for name, targets in reached.items() if name not in names))
        if both := dropped & kept:
            name = self.targets[min(both)].name
            raise UnknownOperationError(f"{name!r} is made of tensors of which some are left out")
        numbers = [number for number in range(len(self.targets)) if number not in dropped]
        goals = {-1 - number: -1 - place for place, number in enumerate(numbers)}
        goals |= {memory: memory for memory in self.links if not self._targets_of(memory) <= dropped}
        links = {
            memory: tuple(replace(link, goal=goals[link.goal]) for link in links if link.goal in goals)
            for memory, links in self.links.items()
            if memory in goals
        }
        sources = {name: memory for name, memory in self.sources.items() if name not in names}
        return Arrangement(tuple(self.targets[number] for number in numbers), sources, links, is_trivial=False)

    def _targets_of(self, memory: int) -> set[int]:
        """The numbers of the targets that have elements of a memory."""
        links = self.links.get(memory, ())
        found = {-1 - link.goal for link in links if link.goal < 0}
        return found.union(*(self._targets_of(goal) for goal in {link.goal for link in links if link.goal >= 0}))

    def place(self, source: str, runs: Runs, values: Tensor) -> Iterator[tuple[str, Runs, Tensor]]:
        """Where elements go: names of targets, runs there, and the values for those runs.

        Args:
            source: the tensor.
            runs: of its elements.
            values: flat, as many.
        """
        memory = self.sources[source]
        grain = self._grain(memory)
        blocks, within, lengths, places = _cut(runs, grain)
        for target, goals, chosen in self._follow(memory, blocks, np.arange(len(blocks)), grain):
            starts = goals * grain + within[chosen]
            order = np.argsort(starts, kind="stable")
            chosen, starts = chosen[order], starts[order]
            yield self.targets[target].name, *_join(starts, lengths[chosen], places[chosen], values)

    def _grain(self, memory: int) -> int:
        if memory not in self._grains:
            links = self.links.get(memory, ())
            grains = [link.grain for link in links] + [self._grain(link.goal) for link in links if link.goal >= 0]
            self._grains[memory] = reduce(gcd, grains)
        return self._grains[memory]

    def _follow(
        self, memory: int, blocks: Indices, chosen: Indices, grain: int
    ) -> Iterator[tuple[int, Indices, Indices]]:
        """Number of a target, blocks of it, and which of the first blocks they are."""
        if not len(blocks):
            return
        low, high = int(blocks.min()) * grain, int(blocks.max()) * grain
        for link in self.links.get(memory, ()):
            if link.start > high or link.stop <= low:
                continue
            inside, goals = link.follow(blocks, grain)
            if link.goal < 0:
                if len(goals):
                    yield -1 - link.goal, goals, chosen[inside]
            else:
                yield from self._follow(link.goal, goals, chosen[inside], grain)


def _cut(runs: Runs, grain: int) -> tuple[Indices, Indices, Indices, Indices]:
    """``runs`` cut where blocks of ``grain`` elements end: block, first element in it, length, place in the values."""
    pairs = np.array(list(runs), dtype=np.int64).reshape(-1, 2)
    begins, sizes = pairs[:, 0], pairs[:, 1]
    first = begins // grain
    numbers = (begins + sizes - 1) // grain - first + 1
    run = np.repeat(np.arange(len(pairs)), numbers)
    blocks = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    lows = np.maximum(blocks * grain, begins[run])
    highs = np.minimum((blocks + 1) * grain, (begins + sizes)[run])
    places = (np.cumsum(sizes) - sizes)[run] + lows - begins[run]
    return blocks, lows - blocks * grain, highs - lows, places


def _join(starts: Indices, lengths: Indices, places: Indices, values: Tensor) -> tuple[Runs, Tensor]:
    """Pieces in the order of their target, as runs that do not touch, and the values in that order."""
    new = np.ones(len(starts), dtype=bool)
    new[1:] = starts[1:] != starts[:-1] + lengths[:-1]
    firsts = np.flatnonzero(new)
    runs = tuple(zip(starts[firsts].tolist(), np.add.reduceat(lengths, firsts).tolist(), strict=True))
    total = int(lengths.sum())
    if np.array_equal(places[1:], places[:-1] + lengths[:-1]):
        return runs, values[int(places[0]) : int(places[0]) + total]
    order = np.repeat(places - (np.cumsum(lengths) - lengths), lengths) + np.arange(total)
    return runs, values[torch.from_numpy(order)]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation on tensors without memory, and notes how elements get from one memory to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers: dict[int, int] = {}  # by the id of a storage, which is kept
        self._storages: list[tuple[torch.UntypedStorage, torch.dtype]] = []
        self._links: list[list[_Link]] = []
        self._names: dict[int, str] = {}
        self._made_by: dict[int, str] = {}  # memories whose elements are not known

    def add(self, tensor: Tensor, name: str) -> None:
        """A tensor to start from."""
        number = self._number(tensor)
        self._names[number] = name
        del self._made_by[number]

    def _number(self, tensor: Tensor) -> int:
        """Of the memory. Views of one memory have one storage object."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._numbers:
            number = self._numbers[id(storage)] = len(self._storages)
            self._storages.append((storage, tensor.dtype))
            self._links.append([])
            self._made_by[number] = "a tensor that is none of the state dict"  # until more is known
        return self._numbers[id(storage)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable:
            raise UnknownOperationError(f"it changes a tensor in place, by {func}")
        found = result if isinstance(result, (list, tuple)) else [result]
        for out in (out for out in found if isinstance(out, Tensor)):
            if id(out.untyped_storage()) not in self._numbers:
                self._note(str(func.overloadpacket), out, args)
        return result

    def _note(self, operation: str, out: Tensor, args: Sequence[Any]) -> None:
        """A new memory."""
        number = self._number(out)
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
            makers = [f"{operation} of several dtypes"]
        self._made_by.pop(number)
        if (maker := next(filter(None, makers), None)) is not None:
            self._made_by[number] = maker
            return
        for part, place in parts:
            self._link(part, _View.of(place), number)

    def _link(self, tensor: Tensor, target: _View, goal: int) -> None:
        number = self._number(tensor)
        if tensor.dtype != self._storages[number][1]:
            raise UnknownOperationError(f"it takes elements of {self._storages[number][1]} for {tensor.dtype}")
        if link := _Link.between(_View.of(tensor), target, goal):
            self._links[number].append(link)

    def arrangement(self, converted: Mapping[str, Tensor], is_trivial: bool) -> Arrangement:
        """What has become of the tensors that there were."""
        targets = []
        for place, (name, tensor) in enumerate(converted.items()):
            if (maker := self._made_by.get(self._number(tensor))) is not None:
                raise UnknownOperationError(f"{name!r} comes from {maker}, not from elements that were moved")
            targets.append(TensorPlan(name, tensor.dtype, tuple(tensor.shape)))
            self._link(tensor, _View.row_major(tensor.shape), -1 - place)
        ways = {number: tuple(links) for number, links in enumerate(self._links)}
        used: set[int] = set()
        for number in sorted(ways, reverse=True):  # a memory is made after those that it is made of
            links = tuple(link for link in ways[number] if link.goal < 0 or link.goal in used)
            ways[number] = links
            used |= {number} if links else set()
        sources = {name: number for number, name in self._names.items() if number in used}
        return Arrangement(tuple(targets), sources, {number: ways[number] for number in used}, is_trivial)
