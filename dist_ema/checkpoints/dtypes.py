"""The dtypes that a safetensors file can hold. Pure Python, so that a manifest is read without torch."""

from __future__ import annotations

#: By safetensors' name: torch's name, and bytes an element.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "U16": ("uint16", 2),
    "U32": ("uint32", 4),
    "U64": ("uint64", 8),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
}
#: Bytes an element, by safetensors' name.
ITEM_SIZES = {name: size for name, (_, size) in _DTYPES.items()}
#: Attributes of ``torch``, by safetensors' name.
TORCH_NAMES = {name: attribute for name, (attribute, _) in _DTYPES.items()}
