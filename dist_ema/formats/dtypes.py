"""The dtypes that a safetensors file can hold."""

from __future__ import annotations

import torch

#: By safetensors' names.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
#: safetensors' names, by dtype.
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Bytes of the widest element.
WIDEST = max(dtype.itemsize for dtype in DTYPES.values())


def is_convertible(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Returns whether elements of a file may be converted to another dtype: real to real, or complex to complex.

    A step count is never made of weights, nor a real weight of a complex one.

    >>> is_convertible(torch.bfloat16, torch.float32), is_convertible(torch.int64, torch.float32)
    (True, False)
    """
    kinds = [(dtype.is_floating_point, dtype.is_complex) for dtype in (stored, wanted)]
    return kinds[0] == kinds[1]
