"""Finds the checkpoint that is at a path now, and reads again if a save replaces it meanwhile."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.manifest import MAX_BYTES, NAME, Manifest
from dist_ema.storage import storage_reader
from dist_ema.storage.paths import StrPath, is_remote, local_path

T = TypeVar("T")
#: How many times a reader starts over because a save has replaced the checkpoint.
REREADS = 2


def read_manifest(path: StrPath) -> Manifest:
    """Returns the manifest of the checkpoint at ``path``, a directory or a URL. Local.

    Raises:
        CheckpointError: there is none, or it cannot be read, or it has another format version.
        CheckpointCorruptError: it is damaged.
    """
    return Manifest.from_bytes(read_manifest_bytes(path))


def read_manifest_bytes(path: StrPath) -> bytes:
    """Returns the text of a manifest, unparsed. Local. Raises as :func:`read_manifest` does."""
    try:
        file = storage_reader(path).file(NAME)
    except FileNotFoundError as error:
        raise CheckpointError(_nothing_at(path)) from error
    except NotADirectoryError as error:
        # Lightning's average of run.ckpt is run.ckpt.ema.
        beside = f". There is one at {path}.ema" if local_path(f"{path}.ema").is_dir() else ""
        raise CheckpointError(
            f"{path} is no checkpoint: it is a file, and a checkpoint is a directory{beside}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{NAME} of {path} cannot be read: {error.strerror or error}") from error
    try:
        if file.size > MAX_BYTES:  # before memory of that size is allocated
            raise CheckpointCorruptError(f"{NAME} of {path} has {file.size} bytes; the limit is {MAX_BYTES}")
        text = bytearray(file.size)
        if not file.read([(0, memoryview(text))]):
            raise CheckpointCorruptError(f"{NAME} of {path} became shorter while it was read")
    except OSError as error:
        raise CheckpointError(f"{NAME} of {path} cannot be read: {error.strerror or error}") from error
    finally:
        file.close()
    return bytes(text)


def _nothing_at(path: StrPath) -> str:
    """Returns the error text for a path without a checkpoint. It says where there is one, if one is near."""
    if is_remote(path):
        return f"{path} is no checkpoint: it has no {NAME}"
    place = local_path(path)
    if not place.exists():
        return f"{path} does not exist"
    inside = checkpoints_in(place)
    # The folder of a trainer has the average beside its own files.
    some = ", ".join(inside[:4]) + (f" and {len(inside) - 4} older ones" if inside[4:] else "")
    found = f"; there {'is one' if len(inside) == 1 else 'are some'} in it: {some}" if inside else ""
    return f"{path} is no checkpoint: it has no {NAME}{found or _other_kind(place)}"


def _other_kind(place: Path) -> str:
    """Returns which function reads a folder that holds weights in another form."""
    if (place / ".metadata").is_file():
        return ". It looks like a directory of torch.distributed.checkpoint: dcp.load reads it"
    if place.is_dir() and any(place.glob("*.safetensors")):
        return ". It looks like an export: from_pretrained reads it, and `dist-ema diff` compares it with a checkpoint"
    return ""


def checkpoints_in(place: Path, levels: int = 2) -> list[str]:
    """Returns the checkpoints of this library in a local folder, the newest first by the numbers in their names.

    They are directly in it (``checkpoint-100/ema``) or, if ``levels`` is 2, one folder further down
    (``run/checkpoint-100/ema``).
    """
    for pattern in (f"*/{NAME}", f"*/*/{NAME}")[:levels]:
        found = [file.parent for file in place.glob(pattern)]
        visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(place).parts)]
        if visible:
            return [str(path) for path in sorted(visible, key=_numbers_in, reverse=True)]
    return []


def _numbers_in(path: Path) -> tuple[list[int], str]:
    """Returns a sort key that puts ``checkpoint-200`` before ``checkpoint-1000``."""
    return [int(digits) for digits in re.findall(r"\d+", str(path))], str(path)


class Version(Protocol):
    """Represents a checkpoint as it was at one moment."""

    def was_replaced(self) -> bool:
        """Returns whether a save has replaced it since."""


V = TypeVar("V", bound=Version)


def read_anew_if_replaced(look: Callable[[], V], read: Callable[[V], T]) -> T:
    """Returns ``read(look())``, and calls both again, up to :data:`REREADS` times, if a save caused damage that was
    found.

    A save removes the data of the checkpoint that it replaces, so a reader may find files missing. Collective if
    ``was_replaced()`` is: ``read`` then raises CheckpointCorruptError on all ranks or on none.

    Raises what the two functions raise: CheckpointCorruptError for damage of a checkpoint that was not replaced. Raises
    CheckpointError if it was replaced each time.
    """
    attempts = REREADS + 1
    while True:
        version = look()
        attempts -= 1
        try:
            return read(version)
        except CheckpointCorruptError as error:
            # Damage and replacement look alike until the manifest is read again.
            if not version.was_replaced():
                raise
            if not attempts:
                raise CheckpointError(
                    f"a save replaced the checkpoint each of the {REREADS + 1} times that it was read: read a copy, or "
                    f"wait until nothing saves to it ({error})"
                ) from error


class _LocalVersion:
    """Implements :class:`Version` by the manifest that this process has read."""

    def __init__(self, path: StrPath) -> None:
        self._path = path
        self.text = read_manifest_bytes(path)

    def was_replaced(self) -> bool:
        """Implements :meth:`Version.was_replaced`. Raises CheckpointError if there is no checkpoint any more."""
        return read_manifest_bytes(self._path) != self.text


def reread(path: StrPath, read: Callable[[Manifest], T]) -> T:
    """Returns ``read(manifest)``, called again as in :func:`read_anew_if_replaced`. One process. Raises as
    :func:`read_manifest` does.
    """
    return read_anew_if_replaced(lambda: _LocalVersion(path), lambda version: read(Manifest.from_bytes(version.text)))
