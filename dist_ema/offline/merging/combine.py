"""Reads every range of every tensor from all sources once, and writes the sums into all outputs.

::

    source 0   | range 0 | range 1 | ...      thread 1 takes range 0 of all sources,
    source 1   | range 0 | range 1 | ...      adds them up for each output, and writes;
               --------------------------     thread 2 takes range 1, ...
    output 0   | range 0 | range 1 | ...
    output 1   | range 0 | range 1 | ...

Sums are in float64, with one multiplication and one addition for each source, in their order: no bit depends on
threads, ranks or ranges. The result is rounded to the output's dtype; to a 16-bit dtype by way of fp32. Its error is
half of its last bit plus about 2^-52 of the sum of absolute terms. Integers and bools are those of the newest source
that has a weight. One source with the weight 1 is copied, bit for bit.

Memory: for each thread one range of every source and of every output, some MiB.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.file_values import Advance
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import gather_objects, rank_in, size_of, sum_integers
from dist_ema.formats.tensors import ReadableTensor
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.offline.merging.outputs import Output
from dist_ema.offline.merging.sources import Source
from dist_ema.runtime.threads import work_through
from dist_ema.storage.base import TensorWriter

#: Bytes that a thread holds of all sources, at most, and elements of one range.
_HELD = 1 << 23
_MOST = 1 << 18
_LEAST = 1 << 14
#: Elements that are added up at a time: they stay in the cache, and torch takes no further threads for so few.
_ADDED = 1 << 15

Range = tuple[FullTensor, int, int]


@dataclass
class Sums:
    """Sums the fingerprints of what the pass reads and writes on this rank; :meth:`total` adds up all ranks.

    Attributes:
        sources: sums by index of the source and name of the tensor.
        outputs: sums by index of the output and name of the tensor.
        nonfinite: counts of NaN and infinite elements of sources that are part of a sum, by index of the source and
            name.
        overflown: counts of finite sums that the dtype of an output cannot hold, by index of the output and name.
    """

    sources: dict[tuple[int, str], int] = field(default_factory=dict)
    outputs: dict[tuple[int, str], int] = field(default_factory=dict)
    nonfinite: dict[tuple[int, str], int] = field(default_factory=dict)
    overflown: dict[tuple[int, str], int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, sums: dict[tuple[int, str], int], key: tuple[int, str], value: int) -> None:
        """Adds to a sum, from any thread."""
        with self.lock:
            sums[key] = sums.get(key, 0) + value

    def count(self, counts: dict[tuple[int, str], int], key: tuple[int, str], value: int) -> None:
        """Adds to a count, which is created by the first element that counts."""
        if value:
            self.add(counts, key, value)

    def total(self, group: dist.ProcessGroup | None) -> None:
        """Adds up the sums of all ranks. Collective; every rank has the same keys."""
        for sums in (self.sources, self.outputs):
            keys = sorted(sums)
            sums.update(zip(keys, sum_integers([sums[key] for key in keys], group), strict=True))
        # These two are empty nearly always, and have other keys on every rank.
        for number, counts in enumerate((self.nonfinite, self.overflown)):
            total: dict[tuple[int, str], int] = {}
            for found in gather_objects(dict(counts), group):
                for key, count in found.items():
                    total[key] = total.get(key, 0) + count
            setattr(self, ("nonfinite", "overflown")[number], total)


class Combination:
    """Combines sources with weights into outputs.

    Args:
        entries: every tensor of the outputs, by the names of the newest source.
        sources: the sources, the oldest first.
        weights: for each output the weight of each source.
        outputs: the outputs to write to.
        newest: matches the names of tensors that are taken from the newest source, and not summed.
    """

    def __init__(
        self,
        entries: Sequence[FullTensor],
        sources: Sequence[Source],
        weights: Sequence[Sequence[float]],
        outputs: Sequence[Output],
        newest: re.Pattern[str] | None = None,
    ) -> None:
        self._entries = entries
        self._weights = weights
        self._outputs = outputs
        self._pattern = newest
        self._used = [number for number in range(len(sources)) if any(given[number] for given in weights)]
        self._tensors = {entry.name: _held(entry, sources) for entry in entries}
        per_range = max(1, len(self._used) * 8)
        self._range = min(_MOST, max(_LEAST, _HELD // per_range // _LEAST * _LEAST))
        self.sums = Sums()
        self.sums.sources = {(number, entry.name): 0 for entry in entries for number in self._read(entry)}
        self.sums.outputs = {(number, entry.name): 0 for entry in entries for number in range(len(outputs))}

    @property
    def nbytes(self) -> int:
        """Returns the number of bytes that all ranks read."""
        tensors = [self._tensors[entry.name][number] for entry in self._entries for number in self._read(entry)]
        return sum(tensor.nbytes for tensor in tensors)

    def is_summed(self, entry: FullTensor) -> bool:
        """Returns whether the elements of a tensor are added up; otherwise the newest source's are taken."""
        return is_summed(entry.dtype) and (self._pattern is None or not self._pattern.search(entry.name))

    def _read(self, entry: FullTensor) -> list[int]:
        """Returns the indices of the sources that are read for a tensor."""
        if self.is_summed(entry):
            return self._used
        return sorted({self._newest(weights) for weights in self._weights})

    @staticmethod
    def _newest(weights: Sequence[float]) -> int:
        """Returns the index of the newest source that has a weight."""
        return max(number for number, weight in enumerate(weights) if weight)

    def run(self, group: dist.ProcessGroup | None, advance: Advance, threads: int) -> None:
        """Combines this rank's share and syncs it to disk. Local. Raises the failure of any thread."""
        own = threading.local()  # memory and open files of each thread
        made: list[_WorkerState] = []

        def work(one: Range) -> None:
            if not hasattr(own, "hands"):
                own.hands = _WorkerState(self._outputs)
                made.append(own.hands)
            self._combine(one, own.hands, advance)

        try:
            work_through(self._share(rank_in(group), size_of(group)), work, threads, "dist_ema merge")
            for hands in made:
                hands.sync()
        finally:
            for hands in made:
                hands.close()

    def _share(self, rank: int, ranks: int) -> Iterator[Range]:
        """Yields the ranges of one rank: an equal part of the sequence of all ranges."""
        counts = [-(-max(entry.numel, 1) // self._range) for entry in self._entries]
        # All ranges of all tensors are numbered in order; this rank has those from low to high.
        low, high = (sum(counts) * edge // ranks for edge in (rank, rank + 1))
        number = 0  # of the first range of the tensor
        for entry, count in zip(self._entries, counts, strict=True):
            for index in range(max(low - number, 0), min(high - number, count)):
                start = index * self._range
                yield entry, start, min(start + self._range, entry.numel)
            number += count

    def _combine(self, one: Range, hands: _WorkerState, advance: Advance) -> None:
        """Combines one range of one tensor."""
        entry, start, stop = one
        if start == stop:
            return
        tensors = self._tensors[entry.name]
        runs = ((start, stop - start),)
        raw: dict[int, Tensor] = {}  # the elements of the range, by index of the source
        # Each source is read and digested once, whatever the number of outputs.
        for slot, number in enumerate(self._read(entry)):
            values = hands.buffer(slot, stop - start, tensors[number].dtype)
            tensors[number].read(start, stop, values)
            self.sums.add(self.sums.sources, (number, entry.name), partial_digest(values, runs))
            advance(values.nbytes)
            raw[number] = values
        for index, (weights, output) in enumerate(zip(self._weights, self._outputs, strict=True)):
            dtype = output.dtypes[entry.name]
            if self.is_summed(entry):
                result = hands.buffer(-1, stop - start, dtype)
                self._sum(index, entry, raw, weights, result, hands)
            else:
                taken = raw[self._newest(weights)]
                result = taken if taken.dtype == dtype else taken.to(dtype)
            self.sums.add(self.sums.outputs, (index, entry.name), partial_digest(result, runs))
            writer, names = hands.writers[index][entry.name]
            for name in names:
                writer.write(name, runs, result)

    def _sum(
        self,
        index: int,
        entry: FullTensor,
        raw: Mapping[int, Tensor],
        weights: Sequence[float],
        result: Tensor,
        hands: _WorkerState,
    ) -> None:
        """Computes the weighted sum for one output into ``result``, and counts its elements that are not finite."""
        used = [number for number in self._used if weights[number]]
        copied = raw[used[0]] if len(used) == 1 and weights[used[0]] == 1 else None
        for low in range(0, result.numel(), _ADDED):
            part = slice(low, low + _ADDED)
            total = hands.sum([(raw[number][part], weights[number]) for number in used])
            # A sum of zeros would lose the sign of -0.0, and the bits of a NaN.
            result[part] = copied[part] if copied is not None and copied.dtype == result.dtype else total
            # In the usual case the extremes show that nothing is to be counted, with one pass over the sums.
            least, most = _extremes(total)
            if math.isfinite(least) and math.isfinite(most):
                if max(-least, most) >= torch.finfo(result.dtype).max:
                    lost = (total.isfinite() & ~result[part].to(total.dtype).isfinite()).sum()
                    self.sums.count(self.sums.overflown, (index, entry.name), int(lost))
                continue
            # Count which sources have NaN or Inf here, and which finite sums the dtype cannot hold.
            for number in used:
                bad = (~raw[number][part].to(total.dtype).isfinite()).sum()
                # An element that several outputs are made of is counted for the first of them.
                if index == next(place for place, given in enumerate(self._weights) if given[number]):
                    self.sums.count(self.sums.nonfinite, (number, entry.name), int(bad))
            inside = torch.stack([raw[number][part].to(total.dtype).isfinite() for number in used]).all(0)
            lost = (inside & ~result[part].to(total.dtype).isfinite()).sum()
            self.sums.count(self.sums.overflown, (index, entry.name), int(lost))


def _extremes(values: Tensor) -> tuple[float, float]:
    """Returns the smallest and the largest value, NaN if one is NaN; for complex numbers of their real and imaginary
    parts.
    """
    real = torch.view_as_real(values) if values.is_complex() else values
    least, most = torch.aminmax(real)
    return float(least), float(most)


def is_summed(dtype: torch.dtype) -> bool:
    """Returns whether elements are added up; of all others the newest source's are taken."""
    return dtype.is_floating_point or dtype.is_complex


def _held(entry: FullTensor, sources: Sequence[Source]) -> list[ReadableTensor]:
    """Returns the tensor in every source. :func:`check_alike` has checked that each has it."""
    found = [source.get(entry.name, entry.aliases) for source in sources]
    return [tensor for tensor in found if tensor is not None]


class _WorkerState:
    """Holds the memory and the files of one thread."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.writers = [output.writers() for output in outputs]
        self._buffers: dict[int, Tensor] = {}

    def sum(self, terms: Sequence[tuple[Tensor, float]]) -> Tensor:
        """Returns the weighted sum, in float64 or complex128, until the next one. 1D.

        Its memory is kept, since the system would have to clear new pages for every sum.
        """
        numel = len(terms[0][0])
        dtype = torch.complex128 if terms[0][0].is_complex() else torch.float64
        total = self.buffer(-2, numel, dtype).zero_()
        term = self.buffer(-3, numel, dtype)
        for values, weight in terms:
            if weight:
                # Not add_(alpha=): some elements would be multiplied and added in one rounding, and some in two.
                total.add_(term.copy_(values).mul_(weight))
        return total

    def buffer(self, slot: int, numel: int, dtype: torch.dtype) -> Tensor:
        """Returns 1D memory of this thread for the source of an index; indices below 0 are for results."""
        nbytes = numel * dtype.itemsize
        if slot not in self._buffers or len(self._buffers[slot]) < nbytes:
            self._buffers[slot] = torch.empty(nbytes, dtype=torch.uint8)
        return self._buffers[slot][:nbytes].view(dtype)

    def _each(self) -> Iterator[TensorWriter]:
        yield from {id(writer): writer for writers in self.writers for writer, _ in writers.values()}.values()

    def sync(self) -> None:
        """Waits until this thread's bytes are on disk."""
        for writer in self._each():
            writer.sync()

    def close(self) -> None:
        """Closes the files."""
        for writer in self._each():
            writer.close()


def digests_of(sums: Mapping[tuple[int, str], int], number: int) -> dict[str, int]:
    """Returns the fingerprints of one source or output, by name."""
    return {name: value % (1 << 64) for (owner, name), value in sums.items() if owner == number}
