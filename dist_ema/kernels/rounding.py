"""Rounds averages to bf16 stochastically: up or down at random, such that the expectation is the unrounded value.

A bf16 average that is rounded to nearest stops moving: the steps of a slow average are smaller than half of its last
bit, and are lost. Rounded stochastically, a step of a thousandth of the last bit moves it by one bit once in a thousand
times, and the average follows that of an fp32 shadow, with noise of about the last bit.

The random bits of an element depend on the seed, the number of the update, the names of average and tensor, and the
element's position in the full tensor, and on nothing else. So the bits of an average do not depend on how it is
sharded, in which order and by which kernel it is computed, or whether the run was interrupted. They are a hash of these
(counter-based, as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), by two rounds of the 32-bit
finalizer "lowbias32" of C. Wellons' hash-prospector (2018), with 32 bits of a key before each. ``fused.cpp`` has the
same.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema.geometry.runs import Runs

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rounding:
    """Provides the random bits for one update of a list of tensors.

    Attributes:
        positions: the positions of the tensors' elements.
        keys: the key of each average; see :func:`average_key`.
    """

    positions: ElementPositions
    keys: Sequence[int]

    def apply(self, average: int, tensor: int, low: int, values: Tensor) -> Tensor:
        """Rounds ``values``, 1D fp32, to bf16. They are the elements from ``low`` on of a tensor's shadow."""
        positions = self.positions.of(tensor, low, values.numel(), values.device)
        return rounded(values, draws(positions, element_key(self.positions.names[tensor], self.keys[average])))


class ElementPositions:
    """Describes the places of the elements of shadows in their full tensors.

    Args:
        names: the names of the tensors.
        runs: the runs of each tensor.

    Attributes:
        names: hashes of the names.
        first: for each tensor the index of its first run; and the number of all runs.
        local: for each run the element of the shadow at which it starts.
        full: for each run the element of the full tensor at which it starts.
    """

    def __init__(self, names: Sequence[str], runs: Sequence[Runs]) -> None:
        self.names = array("Q", [_hash(name) for name in names])
        self.first = array("q", [0])
        self.local = array("q")
        self.full = array("q")
        for found in runs:
            position = 0
            for start, length in found:
                self.local.append(position)
                self.full.append(start)
                position += length
            self.first.append(len(self.local))

    def of_tensor(self, tensor: int) -> tuple[Sequence[int], Sequence[int]]:
        """Returns where the runs of a tensor start, in its shadow and in the full tensor."""
        runs = slice(self.first[tensor], self.first[tensor + 1])
        return self.local[runs], self.full[runs]

    def of(self, tensor: int, low: int, count: int, device: torch.device) -> Tensor:
        """Returns the positions of ``count`` >= 1 elements of a shadow from ``low`` on: int64. No host sync."""
        # The runs that contain these elements are those from ``begin`` to ``end``.
        begin = self.first[tensor]
        end = self.first[tensor + 1]
        begin = bisect_right(self.local, low, begin, end) - 1
        end = bisect_right(self.local, low + count - 1, begin, end)

        # Within a run, position and element differ by a constant. So the positions are the elements plus a shift, which
        # is repeated for each element of its run.
        elements = torch.arange(low, low + count, device=device)
        if end - begin == 1:
            return elements.add_(self.full[begin] - self.local[begin])
        local = torch.tensor(self.local[begin:end], dtype=torch.int64, device="cpu")
        shifts = torch.tensor(self.full[begin:end], dtype=torch.int64, device="cpu") - local
        bounds = [max(self.local[begin], low), *self.local[begin + 1 : end], low + count]
        lengths = torch.tensor(bounds, dtype=torch.int64, device="cpu").diff()
        spread = torch.repeat_interleave(shifts, lengths, output_size=count)
        if device.type == "cuda":
            spread = spread.pin_memory().to(device, non_blocking=True)
        return elements.add_(spread.to(device))


# The random bits.


def average_key(seed: int, update: int, average: str) -> int:
    """Returns the 64-bit key of one update of one average."""
    return _hash(f"{seed}/{update}/{average}")


def element_key(tensor: int, average: int) -> int:
    """Returns the key of one update of a tensor, from its name's hash and the average's key (SplitMix64)."""
    key = (tensor + average) & _MASK
    key = ((key ^ key >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    key = ((key ^ key >> 27) * 0x94D049BB133111EB) & _MASK
    return key ^ key >> 31


def draws(positions: Tensor, key: int) -> Tensor:
    """Returns 16 random bits for each position (int64), as int32."""
    bits = _mix(positions.to(torch.int32) ^ _signed(key))
    bits = _mix((bits + (positions >> 32).to(torch.int32)) ^ _signed(key >> 32))
    return (bits >> 16) & 0xFFFF


def rounded(values: Tensor, draws: Tensor) -> Tensor:
    """Rounds fp32 to bf16: up in magnitude with the probability that the dropped bits stand for.

    Values that bf16 has, including Inf, stay as they are, NaN stays NaN, and no finite value becomes Inf.

    >>> value = torch.full((4,), 1.0 + 2**-9)  # a quarter of the way from 1 to the next bf16 number
    >>> rounded(value, torch.tensor([0, 20000, 50000, 65535], dtype=torch.int32)).tolist()
    [1.0, 1.0, 1.0078125, 1.0078125]
    """
    # bf16 is the upper half of fp32. Adding 16 random bits to the lower half carries into the upper half with the
    # probability lower / 2**16.
    bits = values.view(torch.int32)
    up = (bits + draws) >> 16
    down = bits >> 16
    keeps = ~values.isfinite() | (up & 0x7F80 == 0x7F80)
    quiet = values.isnan().to(torch.int32) << 6  # a NaN whose upper bits are those of Inf
    return torch.where(keeps, down | quiet, up).to(torch.int16).view(torch.bfloat16)


def _mix(bits: Tensor) -> Tensor:
    """Hashes int32 in place. Products wrap around; right shifts bring in zeros."""
    bits = bits.bitwise_xor_((bits >> 16) & 0xFFFF).mul_(0x7FEB352D)
    bits = bits.bitwise_xor_((bits >> 15) & 0x1FFFF).mul_(_signed(0x846CA68B))
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def _signed(bits: int) -> int:
    """Returns the lower 32 bits as an int32."""
    bits &= 0xFFFFFFFF
    return bits - (1 << 32) if bits >> 31 else bits


def _hash(text: str) -> int:
    """Returns a 64-bit hash, the same in every process and version."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
