"""Describes file tensors that are renamed, sliced, joined or transposed tensors of the module.

transformers 5 keeps the experts of a layer in one tensor, and saves one tensor for each expert. So an export may need
other tensors than the module has, whose elements are those of the module in other places. An arrangement says where
each element goes, so that every rank can write the elements that it holds, and no full tensor is ever made::

    module    experts.w  [ e0 e0 e1 e1 e2 e2 ]           one memory
                            |     |     |                links
    files                 [e0 e0][e1 e1][e2 e2]          three targets

:mod:`dist_ema.checkpoints.trace` finds out the arrangement.

Terms: a *memory* is the storage of one tensor, and has a number. A *link* says which elements of one memory are at
which places of another. Memories with numbers below zero are tensors of the files, -1 is the first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import gcd, prod

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_ema.errors import CheckpointError
from dist_ema.formats.layout import TensorPlan
from dist_ema.geometry.runs import Runs

Indices = npt.NDArray[np.int64]


class UnknownOperationError(CheckpointError):
    """Raised if the links cannot express an operation on elements, or an arrangement cannot be cut as asked."""


@dataclass(frozen=True)
class View:
    """Describes elements of a memory, as a strided tensor does."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> View:
        return cls(int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())

    @classmethod
    def row_major(cls, shape: Sequence[int]) -> View:
        return cls(0, tuple(shape), tuple(prod(shape[dim + 1 :]) for dim in range(len(shape))))


@dataclass(frozen=True)
class Link:
    """Describes elements of one memory that are also in a second memory.

    Attributes:
        goal: number of the second memory.
        start, goal_start: place of the first element in the first memory, and in the second.
        dims: of each dimension its size, its stride in the first memory and in the second. The widest comes first; the
            last one is contiguous in both memories.
    """

    goal: int
    start: int
    goal_start: int
    dims: tuple[tuple[int, int, int], ...]

    @classmethod
    def between(cls, source: View, target: View, goal: int) -> Link | None:
        """Returns the link of two views of one shape, element for element; None if they are empty."""
        if 0 in source.sizes:
            return None
        pairs = zip(source.sizes, source.strides, target.strides, strict=True)
        dims = sorted((dim for dim in pairs if dim[0] > 1), key=lambda dim: dim[1])
        # Dimensions that are contiguous in both memories become one: the elements that can be moved at once.
        run = 1
        while dims and dims[0][1] == dims[0][2] == run:
            run *= dims.pop(0)[0]
        whole = [(run, 1, 1)]
        room = run
        for size, stride, goal_stride in dims:
            if stride < room:  # rows overlap: an expanded or unfolded tensor
                raise UnknownOperationError("it reads a tensor whose elements overlap in memory")
            whole.insert(0, (size, stride, goal_stride))
            room = stride * size
        return cls(goal, source.offset, target.offset, tuple(whole))

    @property
    def grain(self) -> int:
        """Returns the size of the blocks of elements that stay together: it divides all places and lengths of
        the link.
        """
        *outer, (run, _, _) = self.dims
        return reduce(gcd, (stride for dim in outer for stride in dim[1:]), gcd(run, self.start, self.goal_start))

    def follow(self, blocks: Indices, grain: int) -> tuple[npt.NDArray[np.bool_], Indices]:
        """Selects the blocks of ``grain`` elements that the link copies, and says where it puts them.

        Args:
            blocks: numbers of blocks in the first memory.
            grain: elements of a block; divides the grain of the link.

        Returns:
            A mask over ``blocks``, and numbers of blocks in the second memory for those where it is True.
        """
        # The strides descend, so dividing by one after the other gives the indices of a block in each dimension.
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
        """Returns the place after the last element, in the first memory."""
        return self.start + 1 + sum((size - 1) * stride for size, stride, _ in self.dims)


@dataclass(frozen=True)
class Arrangement:
    """Lists the tensors of the files, and where the elements of each tensor of the module go. The same on every rank.

    Attributes:
        targets: the tensors of the files.
        sources: the memory of each tensor of the module that has elements in the files, by its name.
        links: the links from each memory.
        is_trivial: whether every tensor is written whole, under its own names.
    """

    targets: tuple[TensorPlan, ...]
    sources: dict[str, int]
    links: dict[int, tuple[Link, ...]]
    is_trivial: bool
    _grains: dict[int, int] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> Arrangement:
        """Returns the arrangement without these sources, and without the targets that are made of them.

        Raises UnknownOperationError if a target is made of such a source and of other ones.
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

    def targets_of(self, source: str) -> list[str]:
        """Returns the names of the file tensors that have elements of a tensor of the module, in the order of the
        files.
        """
        return [self.targets[number].name for number in sorted(self._targets_of(self.sources[source]))]

    def _targets_of(self, memory: int) -> set[int]:
        """Returns the numbers of the targets that have elements of a memory."""
        links = self.links.get(memory, ())
        found = {-1 - link.goal for link in links if link.goal < 0}
        return found.union(*(self._targets_of(goal) for goal in {link.goal for link in links if link.goal >= 0}))

    def place(self, source: str, runs: Runs, values: Tensor) -> Iterator[tuple[str, Runs, Tensor]]:
        """Puts elements of one source into their order in the files.

        Args:
            source: name of a tensor of the module.
            runs: which of its elements.
            values: these elements, 1D.

        Yields:
            The name of a target, runs of its elements, and the values for these runs, 1D.
        """
        memory = self.sources[source]
        grain = self._grain(memory)
        blocks, within, lengths, places = _cut(runs, grain)
        for target, goals, chosen in self._follow(memory, blocks, np.arange(len(blocks)), grain):
            starts = goals * grain + within[chosen]
            # Files are written in runs that are as long as possible: neighbours in the file are joined.
            order = np.argsort(starts, kind="stable")
            chosen = chosen[order]
            starts = starts[order]
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
        """Follows blocks of a memory into the targets.

        Args:
            memory: where ``blocks`` are.
            blocks: numbers of blocks there.
            chosen: for each of them, its index among the blocks that were there at first.
            grain: elements of a block.

        Yields:
            The number of a target, numbers of blocks there, and their indices as in ``chosen``.
        """
        if not len(blocks):
            return
        low = int(blocks.min()) * grain
        high = int(blocks.max()) * grain
        for link in self.links.get(memory, ()):
            if (
                link.start > high or link.stop <= low
            ):  # most links do not concern these blocks if one tensor is cut into many
                continue
            inside, goals = link.follow(blocks, grain)
            if link.goal < 0:
                if len(goals):
                    yield -1 - link.goal, goals, chosen[inside]
            else:
                yield from self._follow(link.goal, goals, chosen[inside], grain)


def _cut(runs: Runs, grain: int) -> tuple[Indices, Indices, Indices, Indices]:
    """Cuts ``runs`` where blocks of ``grain`` elements end.

    Returns:
        For each piece: the number of its block, its first element within the block, its length, and its place among the
        values.
    """
    pairs = np.array(list(runs), dtype=np.int64).reshape(-1, 2)
    begins = pairs[:, 0]
    sizes = pairs[:, 1]
    first = begins // grain
    numbers = (begins + sizes - 1) // grain - first + 1
    run = np.repeat(np.arange(len(pairs)), numbers)
    blocks = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(numbers) - numbers, numbers)
    lows = np.maximum(blocks * grain, begins[run])
    highs = np.minimum((blocks + 1) * grain, (begins + sizes)[run])
    places = (np.cumsum(sizes) - sizes)[run] + lows - begins[run]
    return blocks, lows - blocks * grain, highs - lows, places


def _join(starts: Indices, lengths: Indices, places: Indices, values: Tensor) -> tuple[Runs, Tensor]:
    """Joins pieces, given in the order of their target, into runs that do not touch, and puts the values in
    that order.
    """
    new = np.ones(len(starts), dtype=bool)
    new[1:] = starts[1:] != starts[:-1] + lengths[:-1]
    firsts = np.flatnonzero(new)
    runs = tuple(zip(starts[firsts].tolist(), np.add.reduceat(lengths, firsts).tolist(), strict=True))
    total = int(lengths.sum())
    if np.array_equal(places[1:], places[:-1] + lengths[:-1]):  # already in order: no copy
        return runs, values[int(places[0]) : int(places[0]) + total]
    order = np.repeat(places - (np.cumsum(lengths) - lengths), lengths) + np.arange(total)
    return runs, values[torch.from_numpy(order)]
