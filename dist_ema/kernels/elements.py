"""Reads and writes elements of local tensors of any layout, a chunk at a time.

Work in several steps runs over chunks of at most ``CACHE_CHUNK`` elements, so that the result of one step is still in
the cache for the next, and no temporary is larger than a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

#: Elements at a time: 1 MiB of fp32, which stays in the cache. On an accelerator a launch has to be worth its cost.
CACHE_CHUNK = 1 << 18
ACCELERATOR_CHUNK = 1 << 22
_WITHOUT_FLOAT64 = {"mps"}


def chunk_size(device: torch.device) -> int:
    """Returns the number of elements of one chunk on ``device``."""
    return CACHE_CHUNK if device.type == "cpu" else ACCELERATOR_CHUNK


def pieces(tensor: Tensor, start: int, stop: int, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Yields views of elements ``[start, stop)`` of ``tensor``, flattened row-major, of at most ``limit`` elements
    each.

    Each item is ``(offset, view)``, with ``offset`` counted from ``start``. Views of a contiguous tensor have one
    dimension. Other tensors (channels_last, a transposed weight) are split along their first dimensions, so that every
    view can be written to.
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
        # Not contiguous: whole rows along the first dimension at a time, as many as fit into ``limit``; a row that is
        # cut or too large is split along its own first dimension.
        row = tensor.numel() // tensor.shape[0]
        index = start // row
        while index * row < stop:
            low = max(start - index * row, 0)
            high = min(stop - index * row, row)
            whole_rows = min(stop // row - index, limit // row) if low == 0 else 0
            if whole_rows > 1:
                yield index * row - start, tensor[index : index + whole_rows]
                index += whole_rows
                continue
            for offset, view in pieces(tensor[index], low, high, limit):
                yield index * row + low - start + offset, view
            index += 1


@torch.no_grad()
def write(source: Tensor, start: int, stop: int, values: Tensor) -> None:
    """Sets elements ``[start, stop)`` of the flattened ``source`` to the 1D ``values``, converted. Local."""
    for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
        piece.copy_(values[offset : offset + piece.numel()].view(piece.shape))


@torch.no_grad()
def read(source: Tensor, start: int, stop: int, out: Tensor, non_blocking: bool = False) -> None:
    """Copies elements ``[start, stop)`` of the flattened ``source`` into the 1D ``out``, converted. Local."""
    for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
        out[offset : offset + piece.numel()].view(piece.shape).copy_(piece, non_blocking=non_blocking)


@torch.no_grad()
def squared_distance(shadow: Tensor, source: Tensor, start: int, stop: int) -> Tensor:
    """Returns the sum of ``(shadow - source)**2`` in float64, as a scalar on the source's device if that has float64.
    Local.
    """
    if source.is_complex():  # |a - b|**2 is the sum over both parts
        shadow, source, (start, stop) = flat_reals(shadow), torch.view_as_real(source), (2 * start, 2 * stop)
    device = torch.device("cpu") if source.device.type in _WITHOUT_FLOAT64 else source.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for offset, piece in pieces(source, start, stop, chunk_size(source.device)):
        target = shadow[offset : offset + piece.numel()].view(piece.shape).to(device)
        total += (target.double() - piece.to(device).double()).square_().sum()
    return total


def flat_reals(values: Tensor) -> Tensor:
    """Returns the memory of a 1D complex tensor as real numbers: real part, imaginary part, and so on. Local,
    no copy.
    """
    return torch.view_as_real(values).view(-1)
