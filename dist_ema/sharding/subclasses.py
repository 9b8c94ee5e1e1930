"""Tensor subclasses that keep their elements elsewhere: quantised weights, float8 weights and the like.

Such a class overrides ``__torch_dispatch__``, and may have no memory of its own: a kernel that is given its address
reads whatever lies there. A DTensor is one too, which its engine knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from dist_ema.errors import EMAStateError


def is_hidden(tensor: Tensor) -> bool:
    """Whether the elements may lie elsewhere than at the tensor's address."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def plain(tensor: Tensor) -> Tensor | None:
    """The tensor in whose memory the elements lie, one by one as they are; None if there is none. Local, no copy.

    A subclass around nothing but one tensor of its shape and dtype is looked through (as torchao's weights for float8
    all-gathers are built): the average of what is inside is the average of the whole.
    """
    inner: Any = tensor
    while is_hidden(inner):
        if not hasattr(inner, "__tensor_flatten__"):
            return None
        parts = [getattr(inner, name) for name in inner.__tensor_flatten__()[0]]
        if len(parts) != 1 or (parts[0].shape, parts[0].dtype) != (inner.shape, inner.dtype):
            return None
        inner = parts[0]
    found: Tensor = inner
    return found


def hidden_type(tensor: Tensor) -> str:
    """The name of the class of a tensor that has no plain one; "" where it has."""
    return type(tensor).__name__ if is_hidden(tensor) and plain(tensor) is None else ""


class Described(Protocol):
    """What is asked of a spec here."""

    @property
    def name(self) -> str: ...

    @property
    def hidden(self) -> str: ...


def look_through(tensors: Sequence[Tensor], specs: Sequence[Described]) -> list[Tensor]:
    """The plain tensors inside; those that were known to have none as they are. Local, no copy.

    Raises EMAStateError if one has none any more.
    """
    found = []
    for tensor, spec in zip(tensors, specs, strict=True):
        inner = plain(tensor)
        if inner is None and not spec.hidden:
            raise EMAStateError(
                f"{spec.name!r} is a {type(tensor).__name__} that held nothing but its elements when the average was "
                f"made, and holds more now: it cannot be averaged. Give exclude={spec.name!r}"
            )
        found.append(tensor if inner is None else inner)
    return found
