"""Implements the two operations of an update: move the averages towards the sources, or copy the sources.

A source is read from memory once, whatever the number of averages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dist_ema.kernels import cpu, cuda
from dist_ema.kernels.copies import Copies
from dist_ema.kernels.elements import CACHE_CHUNK, chunk_size, pieces, write
from dist_ema.kernels.rounding import Rounding
from dist_ema.kernels.scratch import Scratch


class Guard:
    """Keeps NaN and Inf of the sources out of the averages, and counts them.

    The count is a tensor on the sources' device, so nothing waits for an accelerator.

    Attributes:
        tainted: indices of CPU tensors whose first source had NaN or Inf, so that their shadow has them, too. They use
            the slow route until the shadow is finite. The compiled kernel looks at every element and needs no such
            list.
        skipped: number of elements that the compiled kernel has left out.
    """

    def __init__(self) -> None:
        self.tainted: set[int] = set()
        self.skipped = 0
        self._counts: dict[torch.device, Tensor] = {}

    def passes(self, values: Tensor) -> bool:
        """Returns True if a chunk needs no guard. On an accelerator it is always False, because asking would wait for
        it.
        """
        return values.device.type == "cpu" and looks_finite(values)

    def count(self, finite: Tensor) -> None:
        """Adds the number of False elements of ``finite`` to the count."""
        self.counter(finite.device).add_(finite.numel()).sub_(finite.sum())

    def counter(self, device: torch.device) -> Tensor:
        """Returns the count on this device, int64."""
        if device not in self._counts:
            with torch.inference_mode(False):
                self._counts[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._counts[device]

    def snapshot(self) -> dict[torch.device, Tensor]:
        """Returns copies of the present counts, one element for each device. Does not wait for the device."""
        return {device: count.clone() for device, count in self._counts.items()}

    def total(self) -> int:
        """Returns the number of elements skipped so far. Waits for the device."""
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
    """Computes ``shadow += weight * (source - shadow)``, in the shadow's dtype, for every average and tensor. Local.

    Tensors that a compiled kernel takes are computed by it in one pass; the others chunk by chunk. Both give the same
    bits. With ``rounding`` shadows are bf16: the blend is computed in fp32, then rounded stochastically.

    Args:
        averages: for each average its shadows, one for each source: 1D, contiguous, with ``stop - start`` elements.
        sources: the local tensors, in any dtype and layout.
        ranges: the range ``(start, stop)`` of each source that its shadow belongs to.
        weights: for each average the weight of the source, in [0, 1].
        scratch: memory for conversions; one for each list of sources.
        guard: leaves shadow elements unchanged where the source is NaN or Inf; None uses all values. A shadow element
            that is NaN or Inf itself (because its first source was) takes the first finite source.
        rounding: the stochastic rounding of this update of these tensors; None if shadows are not rounded so.
        copies: further tensors that receive the first average, rounded to nearest. bf16 copies on the CPU of fp32
            shadows are written in the same pass.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` asks for a kernel that is not available.
        EMAStateError: with ``rounding`` while a CUDA graph is captured. Nothing has changed.
    """
    if not averages:
        return
    if rounding is not None:
        cuda.refuse_capture(sources)
    scratch.touched = True  # from here on a failure may leave some tensors updated
    # Three routes in order: compiled on the CPU, compiled on a GPU, and torch's operations for what is left.
    on_host, on_device = scratch.tables(None if rounding is None else rounding.positions)
    copies_in_kernel = copies if rounding is None else None
    skipped, left = cpu.lerp(averages, sources, ranges, weights, on_host, guard is not None, rounding, copies_in_kernel)
    if guard is not None:
        guard.skipped += skipped
    if left:
        counter = guard.counter if guard is not None else None
        left_by_cuda = cuda.lerp(averages, sources, ranges, weights, on_device, counter, rounding)
        for index in sorted(set(left).intersection(left_by_cuda)):
            shadows = [average[index] for average in averages]
            _eager_lerp(shadows, sources[index], ranges[index], weights, scratch, guard, index, rounding)
    if copies is not None:  # those that the CPU's kernel has not written
        write_copies(averages[0], copies, copies.left(copies_in_kernel is not None, left))


@torch.no_grad()
def write_copies(average: Sequence[Tensor], copies: Copies, numbers: Iterable[int]) -> None:
    """Writes the shadows of these indices into their copies, converted. Local."""
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
    """Updates one tensor by torch's operations. Tensors that no compiled kernel takes use it, and tests compare with
    it.
    """
    dtype = shadows[0].dtype if rounding is None else torch.float32
    one_step = guard is None and rounding is None and source.dtype == dtype and len(shadows) == 1
    limit = max(source.numel(), 1) if one_step else chunk_size(source.device)
    for offset, piece in pieces(source, *span, limit):
        values = scratch.cast(piece, dtype)
        targets = [shadow[offset : offset + piece.numel()].view(piece.shape) for shadow in shadows]
        # The guard's slow route only for chunks that may have NaN or Inf, or whose shadow has some.
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


@torch.no_grad()
def copy(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    guard: Guard | None,
    rounding: Rounding | None = None,
) -> None:
    """Sets every shadow to its source, converted.

    NaN and Inf are counted, but still copied, because there is no earlier value. With ``rounding`` shadows are bf16,
    and values that do not fit are rounded stochastically.
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


def looks_finite(values: Tensor) -> bool:
    """Returns False if a CPU tensor has a NaN or an Inf; also if its sum of squares overflows. Local.

    That sum is the cheapest reduction in which every NaN and Inf shows (measured: a third of ``aminmax``, a hundredth
    of ``isfinite``). If it overflows by itself, only the slow route is used. ``item()`` on the CPU waits for nothing.
    """
    if values.dtype in (torch.float32, torch.float64) and values.is_contiguous():
        flat = values.view(-1)
        return math.isfinite(torch.dot(flat, flat).item())
    return math.isfinite(values.sum(dtype=torch.float32).item())  # dot takes milliseconds in bf16


def is_finite(shadow: Tensor) -> bool:
    """Returns whether a shadow on the CPU has no NaN and no Inf; True on other devices, where asking would
    wait. Local.
    """
    if shadow.device.type != "cpu":
        return True
    parts = (piece for _, piece in pieces(shadow, 0, shadow.numel(), CACHE_CHUNK))
    return all(looks_finite(part) or bool(torch.isfinite(part).all()) for part in parts)
