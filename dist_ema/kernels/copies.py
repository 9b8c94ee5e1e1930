"""Tensors of another dtype that follow an average: the weights of a bf16 teacher."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor


class Copies:
    """Lists further tensors that an average is written to, element by element.

    Args:
        tensors: one for each shadow, in any dtype and layout; None for a shadow that has none.

    Attributes:
        tensors: they.
        addresses: of those that the compiled kernel writes on its way: bf16 that lies together in the CPU's memory; 0
            for the others.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = list(tensors)
        self.addresses = array("q", [tensor.data_ptr() if _is_plain(tensor) else 0 for tensor in self.tensors])

    def left(self, by_kernel: bool, others: Sequence[int]) -> list[int]:
        """Returns the numbers of those that the kernel has not written, where it was asked and did not take
        ``others``.
        """
        skipped = set(others)
        return [
            number
            for number, tensor in enumerate(self.tensors)
            if tensor is not None and not (by_kernel and self.addresses[number] and number not in skipped)
        ]


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.is_cpu and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
