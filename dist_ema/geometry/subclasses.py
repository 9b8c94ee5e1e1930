"""Handles tensor subclasses that keep their elements elsewhere: quantized weights, float8 weights and similar ones.

Such a class overrides ``__torch_dispatch__``, and may have no memory of its own: a kernel that gets its address would
read whatever is there. DTensor is such a class too, and has an engine of its own.

torchao's weights for float8 all-gathers hold their elements, and beside them a scale that is computed from the elements
after each optimizer step. The scale is no part of the weight. It has to be dropped whenever anything but the optimizer
changes the elements, because the next all-gather would divide by the old scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from dist_ema.errors import EMAStateError

#: Attributes of torchao's WeightWithDynamicFloat8CastTensor (0.18): the elements, and the scale, or None.
_ELEMENTS = "_tensor"
_CACHED_SCALE = "_precomputed_scale"


@dataclass(frozen=True, eq=False)
class CachedScale:
    """Holds a scale that a tensor has computed from its elements for the next forward pass.

    Attributes:
        holder: the tensor that keeps the scale.
        value: the scale; None if none was computed.
    """

    holder: Tensor
    value: Tensor | None

    def drop(self) -> None:
        """Makes the next forward pass compute the scale from the elements. Local; may be repeated."""
        setattr(self.holder, _CACHED_SCALE, None)

    def restore(self) -> None:
        """Puts the earlier scale back. Local; may be repeated."""
        setattr(self.holder, _CACHED_SCALE, self.value)


def is_hidden(tensor: Tensor) -> bool:
    """Returns whether the elements may be elsewhere than at the tensor's address."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def plain(tensor: Tensor) -> Tensor | None:
    """Returns the plain tensor whose memory holds the elements; None if there is none. Local, no copy.

    For a subclass that holds nothing but one tensor of its shape and dtype, that tensor is returned; also if it caches
    a scale beside it. The average of the inner tensor is the average of the whole.
    """
    inner = tensor
    while is_hidden(inner):
        found = _inside(inner)
        if found is None:
            return None
        inner = found
    return inner


def _inside(tensor: Tensor) -> Tensor | None:
    """Returns the one tensor in which a subclass holds its elements; None if there is none, or if there are several."""
    if _caches_a_scale(tensor):
        # Not by __tensor_flatten__(), which asks whether the scale is zero, and so waits for the device.
        parts = [getattr(tensor, _ELEMENTS)]
    elif hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    else:
        return None
    if len(parts) != 1 or (parts[0].shape, parts[0].dtype) != (tensor.shape, tensor.dtype):
        return None
    found: Tensor = parts[0]
    return found


def _caches_a_scale(tensor: Tensor) -> bool:
    attributes: dict[str, Any] = vars(tensor)
    return _CACHED_SCALE in attributes and _ELEMENTS in attributes


def cached_scales(tensors: Sequence[Tensor]) -> list[CachedScale]:
    """Returns the scales that these tensors cache beside their elements, including those not computed yet. Local."""
    found = []
    for tensor in tensors:
        inner: Tensor | None = tensor
        while inner is not None and is_hidden(inner):
            if _caches_a_scale(inner):
                found.append(CachedScale(inner, getattr(inner, _CACHED_SCALE)))
            inner = _inside(inner)
    return found


def hidden_type(tensor: Tensor) -> str:
    """Returns the name of the class that keeps the elements out of the tensor's memory; "" if the memory holds them."""
    if is_hidden(tensor):
        return "" if plain(tensor) is not None else type(tensor).__name__
    if tensor.is_conj() or tensor.is_neg():  # lazily: the memory holds the elements before that (torch 2.13)
        return "view that torch has conjugated or negated lazily (resolve_conj(), resolve_neg())"
    return ""


class Described(Protocol):
    """Declares the attributes of a spec that are used here."""

    @property
    def name(self) -> str: ...

    @property
    def hidden(self) -> str: ...


def look_through(tensors: Sequence[Tensor], specs: Sequence[Described]) -> list[Tensor]:
    """Returns the plain tensor inside of each tensor; a tensor that was known to have none is returned itself. Local,
    no copy.

    Raises EMAStateError if a tensor that had one no longer has one.
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
