"""Converts chunks of tensors in memory that is kept, exchanges live weights with an average, or blends them.

Everything here works chunk by chunk, so it needs memory for one chunk, whatever the size of the tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_ema.kernels import cpu, cuda
from dist_ema.kernels.elements import chunk_size, read, write
from dist_ema.kernels.rounding import ElementPositions


class Scratch:
    """Keeps one chunk of memory per dtype and device, allocated at first use.

    Attributes:
        touched: set to True before the first shadow is written. The caller sets it to False before an update, to learn
            afterwards whether a failed update has changed anything.
    """

    def __init__(self) -> None:
        self.touched = False
        self._tables: dict[bool, tuple[ElementPositions | None, cpu.Table, cuda.Table]] = {}
        self._buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, values: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """Returns uninitialised memory of the shape of ``values``, which have at most one chunk of elements.

        Args:
            values: give the shape.
            dtype: the dtype of the memory.
            device: where it lies; None means on the device of ``values``.
        """
        key = (dtype, values.device if device is None else device)
        if key not in self._buffers or self._buffers[key].numel() < values.numel():
            size = max(chunk_size(key[1]), values.numel())
            # Tensors made in inference mode cannot be used outside of it later.
            with torch.inference_mode(False):
                self._buffers[key] = torch.empty(size, dtype=dtype, device=key[1])
        return self._buffers[key][: values.numel()].view(values.shape)

    def cast(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns ``values`` if they have this dtype, else a converted copy in the scratch."""
        return values if values.dtype == dtype else self.like(values, dtype).copy_(values)

    def tables(self, positions: ElementPositions | None) -> tuple[cpu.Table, cuda.Table]:
        """Returns cached kernel arguments for the CPU and for GPUs. Checking them is cheaper than building them.

        Args:
            positions: the positions for stochastic rounding, the same object for the same tensors; None without it.
        """
        known = self._tables.get(positions is None)
        if known is None or known[0] is not positions:
            known = self._tables[positions is None] = positions, cpu.table(positions), cuda.table(positions)
        return known[1:]

    def nbytes(self) -> int:
        """Returns the bytes held."""
        return sum(buffer.nbytes for buffer in self._buffers.values())


class Exchange:
    """Exchanges a shadow with elements ``[start, stop)`` of a source of the same dtype, one chunk at a time.

    An exception, such as KeyboardInterrupt, may be raised between any two lines here: the next call continues where
    this one stopped. ``_at`` says how far the exchange has come and changes after each copy, so a copy that was
    interrupted is made once more, from memory that still holds its values. One chunk takes three copies::

        1. source -> scratch     2. shadow -> source     3. scratch -> shadow

    Args:
        shadow: 1D, ``stop - start`` elements.
        start, stop: the range in the flattened source.
        scratch: memory for one chunk. Nothing else may use it until an interrupted call was repeated.
    """

    def __init__(self, shadow: Tensor, start: int, stop: int, scratch: Scratch) -> None:
        self._shadow = shadow
        self._start = start
        self._stop = stop
        self._scratch = scratch
        # (a, copies, b): the first a elements are exchanged; after three copies the first b will be. b < a on the way
        # back.
        self._at = (0, 0, 0)

    @torch.no_grad()
    def move(self, source: Tensor, inside: bool) -> None:
        """Moves the average into the source and the source's elements into the shadow (``inside``), or back. Local."""
        size = chunk_size(source.device)
        goal = self._stop - self._start if inside else 0
        while self._at != (goal, 0, goal):
            here, copies, there = self._at
            if copies == 0:  # a new chunk; on the way back, the chunk that ends at ``here``
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
    in the source's dtype. As in :class:`Exchange`, an interrupted call may be repeated: it continues where it stopped,
    and no element is moved twice. For this, a chunk is computed in the scratch first and then written.

    Args:
        shadow: 1D, ``stop - start`` elements.
        start, stop: the range in the flattened source.
        fraction: 0 leaves the source unchanged, 1 would copy the shadow.
        scratch: memory for one chunk. Nothing else may use it until an interrupted call was repeated.
    """

    def __init__(self, shadow: Tensor, start: int, stop: int, fraction: float, scratch: Scratch) -> None:
        self._shadow = shadow
        self._start = start
        self._stop = stop
        self._scratch = scratch
        self._fraction = fraction
        # (a, blended): the first a elements have been moved; blended says whether the scratch has the next chunk.
        self._at = (0, False)

    @torch.no_grad()
    def move(self, source: Tensor) -> None:
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
