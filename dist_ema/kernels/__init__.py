"""In-place arithmetic on lists of plain local tensors. Knows no process group and no wrapper.

What takes several steps runs over chunks of at most ``CACHE_CHUNK`` elements, so that what one step leaves behind is
still in the cache for the next, and no temporary is larger than a chunk. A source is read from memory once, whatever
the number of averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dist_ema.kernels import cpu, cuda
from dist_ema.kernels.copies import Copies
from dist_ema.kernels.rounding import ElementPositions, Rounding

#: Elements at a time: 1 MiB of fp32, which stays in the cache. On an accelerator a launch has to be worth its cost.
CACHE_CHUNK = 1 << 18
ACCELERATOR_CHUNK = 1 << 22
_WITHOUT_FLOAT64 = {"mps"}


def chunk_size(device: torch.device) -> int:
    """Elements of one chunk on ``device``."""
    return CACHE_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def pieces(tensor: Tensor, start: int, stop: int, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Views of elements ``[start, stop)`` of ``tensor``, flattened row-major, of at most ``limit`` elements each.

    Yields ``(offset, view)`` with ``offset`` counted from ``start``. Views of a contiguous tensor have one dimension;
    one that is not contiguous (channels_last, a transposed weight) is taken apart along its first dimensions, so that
    every view can be written to.
    """
    if start >= stop:
        return
    if tensor.is_contiguous():
        flat = tensor.view(-1)
        for low in range(start, stop, limit):
            yield low - start, flat[low : min(low + limit, stop)]
    elif start == 0 and stop == tensor.numel() <= limit:
        yield 0, tensor
    else:
        row = tensor.numel() // tensor.shape[0]
        index = start // row
        while index * row < stop:
            low, high = max(start - index * row, 0), min(stop - index * row, row)
            whole_rows = min(stop // row - index, limit // row) if low == 0 else 0
            if whole_rows > 1:
                yield index * row - start, tensor[index : index + whole_rows]
                index += whole_rows
                continue
            for offset, view in pieces(tensor[index], low, high, limit):
                yield index * row + low - start + offset, view
            index += 1


class Scratch:
    """One chunk of memory per dtype and device, made when it is first needed and then kept.

    Attributes:
        touched: set before the first shadow is written; whoever wants to know sets it back.
    """

    def __init__(self) -> None:
        self.touched = False
        self._tables: dict[bool, tuple[ElementPositions | None, cpu.Table, cuda.Table]] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, values: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Uninitialised memory of the shape of ``values``, at most a chunk of elements; beside them, if not said."""
        key = (dtype, values.device if device is None else device)
        if key not in self._buffers or self._buffers[key].numel() < values.numel():
            size = max(chunk_size(key[1]), values.numel())
            with torch.inference_mode(False):  # what is kept must serve outside of it too
                self._buffers[key] = torch.empty(size, dtype=dtype, device=key[1])
        return self._buffers[key][: values.numel()].view(values.shape)

    def cast(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """``values`` themselves if they have this dtype, else a converted copy in the scratch."""
        return values if values.dtype == dtype else self.like(values, dtype).copy_(values)

    def tables(self, positions: ElementPositions | None) -> tuple[cpu.Table, cuda.Table]:
        """Cached kernel arguments, on the CPU and on GPUs: rebuilding them costs more than checking them.

        ``positions`` are those of the rounding, always the same object for the same tensors; None without rounding.
        """
        known = self._tables.get(positions is None)
        if known is None or known[0] is not positions:
            known = self._tables[positions is None] = positions, cpu.table(positions), cuda.table(positions)
        return known[1:]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Guard:
    """Keeps elements whose source is NaN or Inf out of the averages, and counts them.

    The count is a tensor on the sources' device, so that nothing waits for an accelerator.

    Attributes:
        tainted: indices of CPU tensors whose first source was not finite everywhere, so that their shadow is not
            either: they take the slow route until it is. The compiled kernel looks at every element and needs none.
        skipped: elements that the compiled kernel left out.
    """

    def __init__(self) -> None:
        self.tainted: set[int] = set()
        self.skipped = 0
        self._counts: dict[torch.device, Tensor] = {}

    def passes(self, values: Tensor) -> bool:
        """True if nothing has to be done for this chunk. Always False on an accelerator: asking would wait for it."""
        return values.device.type == "cpu" and looks_finite(values)

    def count(self, finite: Tensor) -> None:
        """Adds the False elements of ``finite`` to the count."""
        self.counter(finite.device).add_(finite.numel()).sub_(finite.sum())

    def counter(self, device: torch.device) -> Tensor:
        """The count on this device, int64."""
        if device not in self._counts:
            with torch.inference_mode(False):
                self._counts[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._counts[device]

    def snapshot(self) -> dict[torch.device, Tensor]:
        """The counts as they are now, one element for each device. Does not wait for the device."""
        return {device: count.clone() for device, count in self._counts.items()}

    def total(self) -> int:
        """Elements skipped so far. Waits for the device."""
        return self.skipped + sum(int(count) for count in self._counts.values())


@torch.no_grad()
def lerp(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    weights: Sequence[float],
    scratch: Scratch,
    guard: Guard | None,
    rounding: Rounding | None = None,
    copies: Copies | None = None,
) -> None:
    """``shadow += weight * (source - shadow)``, in the shadow's dtype, for every average and tensor. Local.

    Tensors that a compiled kernel takes go through it, all in one pass; the others chunk by chunk. Both give the same
    bits. With ``rounding`` shadows are bf16: the blend is computed in fp32, then rounded stochastically.

    Args:
        averages: for each average its shadows, one per source: flat, contiguous, of ``stop - start`` elements.
        sources: the local tensors, in any dtype and layout.
        ranges: ``(start, stop)`` of each source that its shadow stands for.
        weights: one for each average: the fraction that is new.
        scratch: memory for conversions; one for each list of sources.
        guard: leaves shadow elements of NaN and Inf sources as they were; None takes sources as they are. A shadow
            element that is itself not finite (its first source was not) takes the first finite source.
        rounding: of this update of these tensors; None where shadows are not rounded stochastically.
        copies: what the first average is also written to, rounded to nearest; in the same pass where that is bf16 on
            the CPU, and shadows are fp32.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` asks for what is not there.
        EMAStateError: with ``rounding`` while a CUDA graph is captured; nothing has changed.
    """
    if not averages:
        return
    if rounding is not None:
        cuda.refuse_capture(sources)
    scratch.touched = True
    on_host, on_device = scratch.tables(None if rounding is None else rounding.positions)
    beside = copies if rounding is None else None
    skipped, left = cpu.lerp(averages, sources, ranges, weights, on_host, guard is not None, rounding, beside)
    if guard is not None:
        guard.skipped += skipped
    if left:
        counter = guard.counter if guard is not None else None
        remaining = set(left).intersection(cuda.lerp(averages, sources, ranges, weights, on_device, counter, rounding))
        for index in sorted(remaining):
            shadows = [average[index] for average in averages]
            _eager_lerp(shadows, sources[index], ranges[index], weights, scratch, guard, index, rounding)
    if copies is not None:
        write_copies(averages[0], copies, copies.left(beside is not None, left))


@torch.no_grad()
def write_copies(average: Sequence[Tensor], copies: Copies, numbers: Iterable[int]) -> None:
    """Writes flat shadows of these numbers into their copies, converted. Local."""
    pairs = [(average[number], tensor) for number in numbers if (tensor := copies.tensors[number]) is not None]
    flat = [(shadow, tensor.view(-1)) for shadow, tensor in pairs if tensor.is_contiguous()]
    if flat:
        shadows, tensors = zip(*flat, strict=True)
        torch._foreach_copy_(tensors, shadows)
    for shadow, tensor in pairs:
        if not tensor.is_contiguous():
            write(tensor, 0, tensor.numel(), shadow)


def _eager_lerp(
    shadows: Sequence[Tensor],
    source: Tensor,
    span: tuple[int, int],
    weights: Sequence[float],
    scratch: Scratch,
    guard: Guard | None,
    index: int,
    rounding: Rounding | None,
) -> None:
    """One tensor by torch's operations: what no compiled kernel takes, and what those are compared with."""
    dtype = shadows[0].dtype if rounding is None else torch.float32
    one_step = guard is None and rounding is None and source.dtype == dtype and len(shadows) == 1
    limit = max(source.numel(), 1) if one_step else chunk_size(source.device)
    for offset, piece in pieces(source, *span, limit):
        values = scratch.cast(piece, dtype)
        targets = [shadow[offset : offset + piece.numel()].view(piece.shape) for shadow in shadows]
        finite = None
        if guard is not None and (rounding is not None or index in guard.tainted or not guard.passes(values)):
            finite = torch.isfinite(values)
            guard.count(finite)
        for number, (target, weight) in enumerate(zip(targets, weights, strict=True)):
            if finite is None and rounding is None:
                target.lerp_(values, weight)
                continue
            start = target.to(dtype)
            blended = torch.lerp(start, values, weight)
            if finite is not None:  # an element that is not finite takes the first source that is
                blended = torch.where(start.isfinite(), blended, values)
            if rounding is not None:
                blended = rounding.apply(number, index, offset, blended.reshape(-1)).view(target.shape)
            target.copy_(blended if finite is None else torch.where(finite, blended, target))
    if guard is not None and index in guard.tainted and all(is_finite(shadow) for shadow in shadows):
        guard.tainted.discard(index)


def looks_finite(values: Tensor) -> bool:
    """False if a CPU tensor has a NaN or an Inf; also if its sum of squares overflows. Local.

    That sum is the cheapest reduction that shows every NaN and Inf (measured: a third of ``aminmax``, a hundredth of
    ``isfinite``); one that overflows by itself only costs the slow route. ``item()`` on the CPU waits for nothing.
    """
    if values.dtype in (torch.float32, torch.float64) and values.is_contiguous():
        flat = values.view(-1)
        return math.isfinite(torch.dot(flat, flat).item())
    return math.isfinite(values.sum(dtype=torch.float32).item())  # dot takes milliseconds in bf16


def is_finite(shadow: Tensor) -> bool:
    """Whether a shadow on the CPU has no NaN and no Inf; True elsewhere, where asking would wait. Local."""
    if shadow.device.type != "cpu":
        return True
    parts = (piece for _, piece in pieces(shadow, 0, shadow.numel(), CACHE_CHUNK))
    return all(looks_finite(part) or bool(torch.isfinite(part).all()) for part in parts)


@torch.no_grad()
def copy(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    guard: Guard | None,
    rounding: Rounding | None = None,
) -> None:
    """Sets every shadow to its source, converted.

    Elements that are not finite are counted, and still copied: there is no earlier value.

    With ``rounding`` shadows are bf16, and what does not fit is rounded stochastically.
    """
    for index, (source, (start, stop)) in enumerate(zip(sources, ranges, strict=True)):
        for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
            if guard is not None and piece.is_floating_point() and not guard.passes(piece):
                guard.count(torch.isfinite(piece))
                if piece.device.type == "cpu":
                    guard.tainted.add(index)
            for number, average in enumerate(averages):
                target = average[index][offset : offset + piece.numel()]
                if rounding is None or piece.dtype == target.dtype:
                    target.view(piece.shape).copy_(piece)
                else:
                    target.copy_(rounding.apply(number, index, offset, piece.float().reshape(-1)))


def flat_reals(values: Tensor) -> Tensor:
    """Returns a flat complex tensor's memory as real numbers: real part, imaginary part, and so on. Local, no copy."""
    return torch.view_as_real(values).view(-1)


class Exchange:
    """A shadow and elements ``[start, stop)`` of a source, of one dtype, that change places, a chunk at a time.

    It may be interrupted anywhere, also by an exception between any two lines here: the next call goes on where it was.
    Every copy may be made twice, and how far it has come is told by one attribute, which changes after each copy.

    Args:
        shadow: flat, ``stop - start`` elements.
        start, stop: of the source, flattened.
        scratch: for one chunk; nothing else may use it until a call that was interrupted has been repeated.
    """

    def __init__(self, shadow: Tensor, start: int, stop: int, scratch: Scratch) -> None:
        self._shadow, self._start, self._stop, self._scratch = shadow, start, stop, scratch
        # (a, copies, b): the first a elements have changed places; after three copies it will be the first b.
        self._at = (0, 0, 0)

    @torch.no_grad()
    def go(self, source: Tensor, inside: bool) -> None:
        """Afterwards the source holds what the shadow held before the first call (``inside``), or its own. Local."""
        size, goal = chunk_size(source.device), self._stop - self._start if inside else 0
        while self._at != (goal, 0, goal):
            here, copies, there = self._at
            if not copies:
                there = min(here + size, goal) if inside else max(here - 1, 0) // size * size
            low, high = min(here, there), max(here, there)
            target = self._shadow[low:high]
            held = self._scratch.like(target, source.dtype, source.device)
            if copies < 1:
                read(source, self._start + low, self._start + high, held)
                self._at = (here, 1, there)
            if copies < 2:
                write(source, self._start + low, self._start + high, target)
                self._at = (here, 2, there)
            target.copy_(held)
            self._at = (there, 0, there)


@torch.no_grad()
def write(source: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Sets elements ``[start, stop)`` of ``source``, flattened, to the flat ``values``, converted. Local."""
    for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
        piece.copy_(values[offset : offset + piece.numel()].view(piece.shape))


@torch.no_grad()
def read(source: Tensor, start: int, stop: int, out: Tensor, non_blocking: bool = False) -> None:
    """Sets the flat ``out`` to elements ``[start, stop)`` of ``source``, flattened, converted. Local."""
    for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
        out[offset : offset + piece.numel()].view(piece.shape).copy_(piece, non_blocking=non_blocking)


@torch.no_grad()
def squared_distance(shadow: Tensor, source: Tensor, start: int, stop: int) -> Tensor:
    """Sum of ``(shadow - source)**2`` in float64, as a scalar on the source's device, if that has float64. Local."""
    if source.is_complex():  # |a - b|**2 is the sum over both parts
        shadow, source, (start, stop) = flat_reals(shadow), torch.view_as_real(source), (2 * start, 2 * stop)
    device = torch.device("cpu") if source.device.type in _WITHOUT_FLOAT64 else source.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
        target = shadow[offset : offset + piece.numel()].view(piece.shape).to(device)
        total += (target.double() - piece.to(device).double()).square_().sum()
    return total
