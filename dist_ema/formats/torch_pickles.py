"""Reads what the pickle of a torch.save file says about its tensors, without torch.

A pickle describes each tensor as a view of a storage: which elements of which bytes. torch.load trusts the pickle: it
maps what follows a storage, or allocates a tensor of any size. So the descriptions are read here first, and compared
with the bytes that the file has.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dist_ema.formats.strict_json import is_count, is_shape
from dist_ema.formats.torch_inert import InertUnpickler, Record

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class Storage:
    """Describes the bytes of tensors in a file, according to the pickle.

    Attributes:
        key: the name of the member of the zip file that has the bytes.
        dtype: the dtype of its elements.
        nbytes: the number of bytes.
    """

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, eq=False)
class View:
    """Describes a tensor according to the pickle: some elements of a storage.

    Attributes:
        storage: the storage with the elements.
        dtype: the dtype of the tensor, which may differ from the storage's.
        offset: the first element, counted in elements of the tensor's dtype.
        shape, stride: those of the tensor.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Returns whether its elements lie one after the other, in the order of the tensor."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return 0 in self.shape
            step *= size
        return True


class TorchUnpickler(InertUnpickler):
    """Reads the pickle of a torch.save file. Tensors become :class:`View` objects.

    Args:
        file: the pickle, or several one after the other.
        room: returns how many bytes the file has for the storage of a key.

    Attributes:
        storages: by key.

    Raises ValueError, from ``load()``, for a tensor or a storage that has more bytes than the file.
    """

    def __init__(self, file: io.BytesIO, room: Callable[[str], int]) -> None:
        super().__init__(file)
        self._room = room
        self.storages: dict[str, Storage] = {}

    def named(self, name: str) -> object:
        """Returns what builds a :class:`View`, for the functions that torch names in a pickle."""
        return _BUILDERS.get(name)

    def persistent_load(self, pid: Any) -> Storage:
        """Returns a storage, which the pickle describes as ("storage", class, key, device, number of elements)."""
        kind, saved, key, _, count, *rest = (_text(value) for value in pid)
        is_class = isinstance(saved, type) and issubclass(saved, Record)
        dtype = _DTYPES.get(saved.name.rpartition(".")[2]) if is_class else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or any(rest):
            raise ValueError("it has a storage that torch.save since 0.4 does not write")
        if not is_count(count):
            raise ValueError(f"the storage {key[:80]!r} has an invalid size")
        nbytes = count * dtype.itemsize
        known = self.storages.setdefault(key, Storage(key, dtype, nbytes))
        if known.nbytes != nbytes or nbytes > self._room(key):
            raise ValueError(f"{key[:80]!r} claims {known.nbytes} bytes, more than the file holds for it")
        return known


def _text(value: Any) -> Any:
    """Decodes a string of Python 2, which is bytes here."""
    return value.decode("ascii") if isinstance(value, bytes) else value


# In place of torch's functions.


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> View:
    """Returns a tensor of the storage's dtype."""
    return _checked_view(storage, getattr(storage, "dtype", None), offset, size, stride)


def _view_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> View:
    """Returns a tensor of another dtype than the storage's."""
    _requires_grad, _hooks, dtype, *_ = rest
    return _checked_view(storage, dtype, offset, size, stride)


def _checked_view(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> View:
    """Raises ValueError unless the storage has all elements of the view."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor in it has no storage")
    shape = tuple(size)
    strides = tuple(stride)
    is_valid = is_shape(shape, dtype.itemsize) and len(strides) == len(shape) and all(map(is_count, (offset, *strides)))
    if not is_valid:
        raise ValueError("a tensor in it has an invalid shape, strides or offset")
    last = offset + sum((length - 1) * step for length, step in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise ValueError(f"a tensor of the shape {shape[:8]} in it has more elements than the file holds for it")
    return View(storage, dtype, offset, shape, strides)


def _encoded(text: object, encoding: object = "latin1") -> bytes:
    """Returns bytes that protocol 2 writes as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
        raise ValueError("it has bytes in an encoding that pickles do not use")
    return text.encode("latin1")


def _empty_bytes(content: object = b"", *_: object) -> bytes:
    """Returns an empty bytearray, because nothing needs its contents. ``bytearray(number)`` would allocate that many
    bytes.
    """
    if not isinstance(content, (bytes, str)):
        raise ValueError("it asks for an array of bytes and does not give them")
    return b""


def _first(value: object, *_: object) -> object:
    """Returns the tensor of a parameter."""
    return value


_BUILDERS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "builtins.bytearray": _empty_bytes,
    "_codecs.encode": _encoded,
}
