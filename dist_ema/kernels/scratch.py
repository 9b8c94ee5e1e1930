"""Memory that an average keeps for conversions, and how live weights change places with it or move toward it."""

from __future__ import annotations

import torch
from torch import Tensor

from dist_ema.kernels import cpu, cuda
from dist_ema.kernels.elements import chunk_size, read, write
from dist_ema.kernels.rounding import ElementPositions


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
        """Returns the bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Exchange:
    """A shadow and elements ``[start, stop)`` of a source, of one dtype, that change places, a chunk at a time.

    An exception may be raised between any two lines here: the next call continues where this one stopped. Every copy
    may be made twice. One attribute says how far the exchange has come, and changes after each copy.

    Args:
        shadow: flat, ``stop - start`` elements.
        start, stop: of the source, flattened.
        scratch: for one chunk; nothing else may use it until a call that was interrupted has been repeated.
    """

    def __init__(self, shadow: Tensor, start: int, stop: int, scratch: Scratch) -> None:
        self._shadow = shadow
        self._start = start
        self._stop = stop
        self._scratch = scratch
        # (a, copies, b): the first a elements have changed places; after three copies it will be the first b.
        self._at = (0, 0, 0)

    @torch.no_grad()
    def go(self, source: Tensor, inside: bool) -> None:
        """Afterwards the source holds what the shadow held before the first call (``inside``), or its own. Local."""
        size = chunk_size(source.device)
        goal = self._stop - self._start if inside else 0
        while self._at != (goal, 0, goal):
            here, copies, there = self._at
            if not copies:
                there = min(here + size, goal) if inside else max(here - 1, 0) // size * size
            low = min(here, there)
            high = max(here, there)
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


class Blend:
    """Moves elements ``[start, stop)`` of a source a fraction of the way toward a shadow, a chunk at a time.

    ``source += fraction * (shadow - source)`` is computed in fp32, or in float64 if either is, and rounded to nearest
    in the source's dtype. Like :class:`Exchange` it may be interrupted anywhere: the next call goes on where it was,
    and no element is moved twice.

    Args:
        shadow: flat, ``stop - start`` elements.
        start, stop: of the source, flattened.
        fraction: 0 leaves the source, 1 would make it the shadow.
        scratch: for one chunk; nothing else may use it until a call that was interrupted has been repeated.
    """

    def __init__(self, shadow: Tensor, start: int, stop: int, fraction: float, scratch: Scratch) -> None:
        self._shadow = shadow
        self._start = start
        self._stop = stop
        self._scratch = scratch
        self._fraction = fraction
        # (a, blended): the first a elements have been moved; whether the scratch holds what the next chunk becomes.
        self._at = (0, False)

    @torch.no_grad()
    def go(self, source: Tensor) -> None:
        """Moves the source. Local."""
        size = chunk_size(source.device)
        count = self._stop - self._start
        dtype = torch.promote_types(torch.promote_types(self._shadow.dtype, source.dtype), torch.float32)
        while self._at != (count, False):
            low, is_blended = self._at
            high = min(low + size, count)
            target = self._shadow[low:high]
            values = self._scratch.like(target, dtype, source.device)
            if not is_blended:
                read(source, self._start + low, self._start + high, values)
                values.lerp_(target.to(values), self._fraction)
                self._at = (low, True)
            write(source, self._start + low, self._start + high, values)
            self._at = (high, False)
