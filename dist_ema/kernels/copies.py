"""Lists tensors of another dtype that follow an average: the weights of a bf16 teacher."""

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
        tensors: the given tensors.
        addresses: for each tensor its address if the compiled kernel writes it (contiguous bf16 in the CPU's memory);
            else 0.
    """

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = list(tensors)
        self.addresses = array("q", [tensor.data_ptr() if _is_plain(tensor) else 0 for tensor in self.tensors])

    def left(self, by_kernel: bool, others: Sequence[int]) -> list[int]:
        """Returns the indices of tensors that the kernel has not written, given the indices ``others`` that it did not
        take.
        """
        skipped = set(others)
        return [
            number
            for number, tensor in enumerate(self.tensors)
            if tensor is not None and not (by_kernel and self.addresses[number] and number not in skipped)
        ]


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and tensor.is_cpu and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
