"""Files of torch.save, read with ``weights_only=True``: tensors and plain values, and no code of a file.

Real files also hold leftovers of their trainer (arguments, times, generators' states). A class on the list below
becomes an empty stand-in, so it is never imported and none of its code runs; a file that names others is refused.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from dist_ema.errors import CheckpointCorruptError, CheckpointError

#: Classes of values that no average needs.
LEFTOVERS = re.compile(
    r"(numpy|omegaconf|composer|lightning|lightning_fabric|pytorch_lightning|nemo|timm|datetime|pathlib|typing)\..+"
    r"|argparse\.Namespace|torch\.torch_version\.TorchVersion|collections\.defaultdict"
    r"|(builtins|__builtin__)\.(dict|list|tuple|set|int|float|str|bool|bytes|object)"
)
_ZIP = b"PK\x03\x04"
#: What torch says of a name that is not data, and not of a damaged pickle.
_NAMED = re.compile(r"[^\n]*(?:GLOBAL|Can only build|Can only create new object|Trying to call)[^\n]*")


class _Leftover:
    """Stands in for an object of a class that is not imported."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def load_file(path: Path) -> Any:
    """What is in a file; its tensors are mapped and not read, where the file is of the kind that can be (a zip file).

    Raises:
        CheckpointError: it cannot be read, or holds more than data.
        CheckpointCorruptError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(_ZIP)) == _ZIP
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _load(path, str(path), mapped)


def load_bytes(data: bytes, where: str) -> Any:
    """What torch.save wrote into the middle of a file. Raises as :func:`load_file`."""
    return _load(io.BytesIO(data), where, mapped=False)


def _load(source: Any, where: str, mapped: bool) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(source) if mapped else []
        with torch.serialization.safe_globals([_stand_in(name) for name in unknown if LEFTOVERS.fullmatch(name)]):
            return torch.load(source, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # damaged files make torch.load raise nearly anything
        named = _NAMED.search(str(error)) if isinstance(error, UnpicklingError) else None
        if named is None:
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), repr(error))
            raise CheckpointCorruptError(f"{where} is damaged, or not a file of torch.save: {reason[:200]}") from error
        # Without torch's advice to switch the protection off.
        reason = named[0].split(" Please use")[0].split(" was not an allowed")[0].strip()
        raise CheckpointError(
            f"{where} was not read, since it holds more than data, and no code of a file is run: {reason[:200]}. "
            "If you trust it, load it where its library is installed, and save only the dict that has the average"
        ) from error


def _stand_in(full_name: str) -> type:
    module, _, name = full_name.rpartition(".")
    return type(name, (_Leftover,), {"__module__": module, "__qualname__": name})
