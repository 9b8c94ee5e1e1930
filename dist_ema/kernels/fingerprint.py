"""Computes a digest of a full tensor that does not depend on its sharding. Does not use torch.distributed.

The digest is ``sum(bits(x[i]) * key(i)) mod 2**64`` over the elements of the full tensor, flattened row-major.
``bits`` are the element's own bits as an integer (signed if it has two bytes or more; the 16 bytes of a complex128 are
low + ``COMPLEX`` * high), and ``key(i)`` is an odd number made from the position. A sum can be computed in any order
and in parts: each rank adds up its elements, and the totals are added. Keys are odd, so invertible modulo 2**64. So a
flipped bit, and any change of a single element of up to 8 bytes, always changes the digest. It detects errors. It is
not
a signature: two tensors with one digest can be constructed.

A key is the product of two: one for the place inside a block of ``BLOCK`` elements, from a table that is made once, and
one for the block: ``(mix(i % BLOCK) | 1) * (mix(i // BLOCK ^ SALT) | 1)``, where ``mix`` is SplitMix64. So a block
costs one multiplication and one addition per element. ``digest.cpp`` computes the same in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_ema.geometry.runs import Runs, chunks, flattened
from dist_ema.kernels import native
from dist_ema.kernels.elements import pieces

BLOCK_BITS = 16
BLOCK = 1 << BLOCK_BITS
#: Elements of one launch on a device.
DEVICE_CHUNK = 1 << 22
_MASK = (1 << 64) - 1
SALT = 0x5851F42D4C957F2D
_GAMMA = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
COMPLEX = 0x2545F4914F6CDD1D
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Part(NamedTuple):
    """Describes what a rank has of one full tensor.

    Attributes:
        values: holds the elements of ``runs``, in their order when flattened row-major.
        runs: the positions of the elements in the full tensor.
        dtype: digest the values as converted to this dtype; None means their own.
        start: the index in the flattened ``values`` of the first element of ``runs``.
    """

    values: Tensor
    runs: Runs
    dtype: torch.dtype | None = None
    start: int = 0


def partial_digest(values: Tensor, runs: Runs, dtype: torch.dtype | None = None, start: int = 0) -> int:
    """Returns this rank's share of one digest, in ``[0, 2**64)``, of a :class:`Part`. Local; waits for the device."""
    (digest,) = partial_digests([Part(values, runs, dtype, start)])
    return digest


@torch.no_grad()
def partial_digests(parts: Sequence[Part]) -> list[int]:
    """Returns this rank's share of each digest, in ``[0, 2**64)``. Local; waits once for each device."""
    totals: list[int] = []
    waiting: dict[torch.device, dict[int, Tensor]] = {}  # sums that are still on a device
    for index, part in enumerate(parts):
        totals.append(0)
        if not part.values.is_cpu:
            waiting.setdefault(part.values.device, {})[index] = device_digest(part)
        elif _is_plain(part.values, part.dtype) and (library := native.choice()) is not None:
            address = part.values.data_ptr() + part.start * part.values.itemsize
            totals[-1] = library.digest(address, part.values.itemsize, part.runs, _keys(part.values.device))
        else:
            totals[-1] = _host_digest(part)
    for sums in waiting.values():
        for index, found in zip(sums, torch.stack(list(sums.values())).tolist(), strict=True):
            totals[index] = found & _MASK
    return totals


def _host_digest(part: Part) -> int:
    """Computes the digest by numpy, block by block, for values that the compiled kernel does not take."""
    total = 0
    local = part.start
    for position, length in part.runs:
        stop = position + length
        while position < stop:
            block, inside = divmod(position, BLOCK)
            size = min(BLOCK - inside, stop - position)
            found = _block_sum(part.values, local, local + size, inside, part.dtype)
            total += found * _signed(_mix(block ^ SALT) | 1)
            position += size
            local += size
    return total & _MASK


def device_digest(part: Part) -> Tensor:
    """Returns the sum, modulo 2**64, as a scalar int64 on the device of the values. Does not wait for the device.

    It takes a few launches for each 4 M elements, whatever the number of runs.
    """
    values = part.values
    device = part.values.device
    total = torch.zeros((), dtype=torch.int64, device=device)
    table = _keys(device)  # int64, (BLOCK,)
    local = part.start
    for runs in chunks(part.runs, DEVICE_CHUNK):
        positions = _positions(runs, device)
        blocks = _mix_each((positions >> BLOCK_BITS) ^ SALT) | 1
        keys = table[positions & (BLOCK - 1)].mul_(blocks)
        for offset, piece in pieces(values, local, local + keys.numel(), DEVICE_CHUNK):
            flat = piece.reshape(-1).to(part.dtype or piece.dtype)
            total += (_bits(flat).to(torch.int64) * keys[offset : offset + flat.numel()]).sum()
        local += keys.numel()
    return total


def _positions(runs: Runs, device: torch.device) -> Tensor:
    """Returns the positions of the elements of runs, in order: int64, 1D."""
    if len(runs) == 1:
        ((start, length),) = runs
        return torch.arange(start, start + length, device=device)
    starts, lengths = np.frombuffer(flattened(runs), dtype=np.int64).reshape(-1, 2).T
    shifts = starts - np.cumsum(lengths) + lengths  # from an element's number to its position
    sent = torch.from_numpy(np.stack([shifts, lengths]))
    if device.type == "cuda":
        sent = sent.pin_memory()
    count = int(lengths.sum())
    spread = torch.repeat_interleave(*sent.to(device, non_blocking=True).unbind(), output_size=count)
    return spread + torch.arange(count, device=device)


def _mix_each(values: Tensor) -> Tensor:
    """Does what :func:`_mix` does, for each int64. Products wrap around; right shifts bring in zeros."""
    values = values + _signed(_GAMMA)
    values = (values ^ ((values >> 30) & (1 << 34) - 1)) * _signed(_FACTORS[0])
    values = (values ^ ((values >> 27) & (1 << 37) - 1)) * _signed(_FACTORS[1])
    return values ^ ((values >> 31) & (1 << 33) - 1)


def _is_plain(values: Tensor, dtype: torch.dtype | None) -> bool:
    """Returns whether the compiled kernel can take the values: unconverted and contiguous in the CPU's memory."""
    own = dtype is None or dtype == values.dtype
    return own and values.is_cpu and values.is_contiguous() and values.itemsize in _BITS and not values.is_conj()


def _block_sum(values: Tensor, start: int, stop: int, inside: int, dtype: torch.dtype | None) -> int:
    table = _keys(values.device)
    total = 0
    for offset, piece in pieces(values, start, stop, BLOCK):
        flat = piece.reshape(-1).to(dtype or piece.dtype)
        low = inside + offset
        keys = table[low : low + flat.numel()]
        # numpy widens, multiplies and adds in one pass
        total += int(np.einsum("i,i->", _bits(flat).numpy(), keys.numpy()))
    return total


def _bits(flat: Tensor) -> Tensor:
    """Returns each element's bits as an integer; int64 for the widest."""
    if flat.element_size() == 16:
        low, high = flat.resolve_conj().contiguous().view(torch.int64).view(-1, 2).unbind(1)
        return low + high * COMPLEX
    bits = _BITS[flat.element_size()]
    return flat.resolve_conj().contiguous().view(bits)


@lru_cache(maxsize=8)
def _keys(device: torch.device) -> Tensor:
    """Returns the odd keys of the places inside a block, as int64."""
    keys = [_signed(_mix(place) | 1) for place in range(BLOCK)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def _mix(value: int) -> int:
    """Returns SplitMix64's finalizer (Steele, Lea, Flood 2014): every bit of the input affects every bit of the
    output.
    """
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """Returns the int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value
