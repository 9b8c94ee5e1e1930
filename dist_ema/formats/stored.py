"""Tensors and files as the manifest describes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from dist_ema.formats.dtypes import DTYPES
from dist_ema.formats.strict_json import is_shape, shown

_DIGEST = re.compile(r"[0-9a-f]{16}")
_TENSOR_FIELDS = {"file", "dtype", "shape", "digest", "aliases"}


@dataclass(frozen=True)
class StoredTensor:
    """One full tensor in a file.

    Attributes:
        file: path of the file in the data folder.
        dtype: safetensors' name of it.
        shape: of the full tensor.
        digest: its fingerprint, 64 bits.
        aliases: other names of the same (tied) tensor.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: int
    aliases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Returns the bytes in the file."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file: its size in bytes, and the checksum of its first bytes up to the tensors."""

    size: int
    header: str


def is_tensor_name(name: str) -> bool:
    """Returns whether a tensor can be stored under this name: any text of one line but ``__metadata__``, which is
    safetensors'.

    It may hold control characters: escape them before a name is printed.

    >>> is_tensor_name("layers.0.weight"), is_tensor_name("two" + chr(10) + "lines"), is_tensor_name("")
    (True, False, False)
    """
    try:
        name.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return name != "__metadata__" and name.splitlines() == [name]


def tensors_to_json(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, Any]]:
    """Returns the entries of tensors in the manifest, by the name of the tensor."""
    return {name: {**asdict(tensor), "digest": f"{tensor.digest:016x}"} for name, tensor in tensors.items()}


def tensors_from_json(
    found: Mapping[str, Any], folder: str, files: Mapping[str, StoredFile]
) -> dict[str, StoredTensor]:
    """Reads what :func:`tensors_to_json` wrote. Raises ValueError, KeyError, TypeError, AttributeError otherwise.

    Args:
        found: by the name of the tensor.
        folder: where the files of these tensors lie, in the data folder.
        files: all files of the checkpoint.
    """
    tensors: dict[str, StoredTensor] = {}
    names: set[str] = set()
    for name, entry in found.items():
        shape = entry["shape"]
        aliases = entry["aliases"]
        if entry.keys() != _TENSOR_FIELDS or not isinstance(shape, list) or not isinstance(aliases, list):
            raise ValueError(
                f"invalid description of tensor {shown(name)}; expected {', '.join(sorted(_TENSOR_FIELDS))}"
            )
        if entry["dtype"] not in DTYPES or not is_shape(shape, DTYPES[entry["dtype"]].itemsize):
            sizes = f"shape {shape}" if len(shape) <= 8 else f"{len(shape)} sizes"
            raise ValueError(f"tensor {shown(name)}: invalid dtype {shown(entry['dtype'])} or {sizes}")
        stored = StoredTensor(entry["file"], entry["dtype"], tuple(shape), 0, tuple(aliases))
        # A name that stands there twice, be it as an alias, would make it a matter of chance which tensor is loaded.
        for known in (name, *stored.aliases):
            if known in names or not isinstance(known, str) or not is_tensor_name(known):
                raise ValueError(f"tensor name {shown(known)} is invalid, or stands there twice")
            names.add(known)
        if stored.file not in files or stored.file.rpartition("/")[0] != folder:
            raise ValueError(
                f"tensor {shown(name)}: invalid file {shown(stored.file)}; expected a listed one in {folder}/"
            )
        if not _DIGEST.fullmatch(entry["digest"]):
            raise ValueError(f"tensor {shown(name)}: invalid fingerprint; expected 16 hex digits")
        tensors[name] = StoredTensor(stored.file, stored.dtype, stored.shape, int(entry["digest"], 16), stored.aliases)
    return tensors
