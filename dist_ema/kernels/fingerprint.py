"""A digest of a full tensor that does not see how it is sharded. Knows no process group.

The digest is ``sum(bits(x[i]) * key(i)) mod 2**64`` over the elements of the full tensor, flattened row-major, where
``bits`` are the element's own bits as an integer (signed where it has two bytes or more; the 16 bytes of a complex128
are low + ``COMPLEX`` * high) and ``key(i)`` is an odd number made from the position. A sum can be taken in any order
and in parts: each rank adds up its elements, and the totals are added. Keys are odd, so invertible modulo 2**64, so a
flipped bit, and any change of a single element of up to 8 bytes, always changes the digest. It detects errors; it is
not a signature: whoever wants to can make two tensors with one digest.

A key is the product of two: one for the place inside a block of ``BLOCK`` elements, from a table that is made once,
and one for the block: ``(mix(i % BLOCK) | 1) * (mix(i // BLOCK ^ SALT) | 1)``, where ``mix`` is SplitMix64. So a block
costs one multiplication and one addition an element. ``digest.cpp`` computes the same in one pass.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dist_ema.kernels import native, pieces
from dist_ema.sharding.runs import Runs

BLOCK = 1 << 16
_MASK = (1 << 64) - 1
SALT = 0x5851F42D4C957F2D
COMPLEX = 0x2545F4914F6CDD1D
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def partial_digest(values: Tensor, runs: Runs, dtype: torch.dtype | None = None, start: int = 0) -> int:
    """This rank's share of a digest, in ``[0, 2**64)``. Local; waits for the device.

    Args:
        values: holds the elements of ``runs``, in their order when flattened row-major.
        runs: their positions in the full tensor.
        dtype: digest the values as converted to this dtype; None means their own.
        start: the first element of ``values`` that counts.
    """
    if _is_plain(values, dtype) and (library := native.choice()) is not None:
        address = values.data_ptr() + start * values.itemsize
        return library.digest(address, values.itemsize, runs, _keys(values.device))
    total = 0
    local = start
    for position, length in runs:
        stop = position + length
        while position < stop:
            block, inside = divmod(position, BLOCK)
            size = min(BLOCK - inside, stop - position)
            part = _block_sum(values, local, local + size, inside, dtype)
            total += part * _signed(_mix(block ^ SALT) | 1)
            position += size
            local += size
    return total & _MASK


def _is_plain(values: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether the compiled kernel can take them: as they are, one after the other in the CPU's memory."""
    own = dtype is None or dtype == values.dtype
    return own and values.is_cpu and values.is_contiguous() and values.itemsize in _BITS and not values.is_conj()


def _block_sum(values: Tensor, start: int, stop: int, inside: int, dtype: torch.dtype | None) -> int:
    table = _keys(values.device)
    total: int | Tensor = 0
    for offset, piece in pieces(values, start, stop, BLOCK):
        flat = piece.reshape(-1).to(dtype or piece.dtype)
        low = inside + offset
        keys = table[low : low + flat.numel()]
        if flat.device.type == "cpu":  # numpy widens, multiplies and adds in one pass
            total += int(np.einsum("i,i->", _bits(flat).numpy(), keys.numpy()))
        else:
            total += (_bits(flat).to(torch.int64) * keys).sum()
    return int(total)


def _bits(flat: Tensor) -> Tensor:
    """Each element's bits as an integer; int64 for the widest."""
    if flat.element_size() == 16:
        low, high = flat.resolve_conj().contiguous().view(torch.int64).view(-1, 2).unbind(1)
        return low + high * COMPLEX
    bits = _BITS[flat.element_size()]
    return flat.resolve_conj().contiguous().view(bits)


@lru_cache(maxsize=8)
def _keys(device: torch.device) -> Tensor:
    """Odd keys of the places inside a block, as int64."""
    keys = [_signed(_mix(place) | 1) for place in range(BLOCK)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def _mix(value: int) -> int:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the input reaches every bit of the output."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
