"""Imports averages that other libraries saved: one module for each format, and one for any dict of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats.strict_json import shown
from dist_ema.formats.tensors import Content
from dist_ema.importers import composer, diffusers, ema_pytorch, generic, lightning, nemo, timm, torchtitan
from dist_ema.importers.foreign import Foreign, Model

AUTO = "auto"


@dataclass(frozen=True)
class Format:
    """Describes one library's way of saving an average.

    Attributes:
        matches: returns whether a file has this format.
        read: reads the average of such a file. If the file has no names, they come from the model's state dict. None
            for ``state-dict``, whose :func:`dist_ema.importers.generic.read` takes a key and a prefix as well.
    """

    matches: Callable[[Content], bool]
    read: Callable[[Content, Model | None], Foreign] | None


FORMATS = {
    "composer": Format(composer.matches, composer.read),
    "diffusers": Format(diffusers.matches, diffusers.read),
    "timm": Format(timm.matches, timm.read),
    "ema-pytorch": Format(ema_pytorch.matches, ema_pytorch.read),
    "lightning": Format(lightning.matches, lightning.read),
    "nemo": Format(nemo.matches, nemo.read),
    "torchtitan": Format(torchtitan.matches, torchtitan.read),
    generic.NAME: Format(lambda content: False, None),
}
#: Formats of which some files look like any state dict, so that only the user can tell.
_PLAIN = {"timm"}


def recognise(content: Content, name: str, where: str, key: str | None = None) -> str:
    """Returns the name of a file's format; ``state-dict`` for a file of no library that is known here.

    Args:
        content: the opened file.
        name: the format that the caller named, or ``"auto"``.
        where: the file, for errors.
        key: the dict inside the file that the caller named; the other contents of the file are then ignored.

    Raises:
        EMAConfigError: there is no format of that name, or it takes no key.
        CheckpointError: the file has another format than the caller named. The text says what is in it.
    """
    if name != AUTO and name not in FORMATS:
        raise EMAConfigError(f"format={name!r}: allowed are {AUTO}, {', '.join(FORMATS)}")
    if key is not None and name not in (AUTO, generic.NAME):
        raise EMAConfigError(f"key={key!r} goes with --format {generic.NAME}, and the format is {name}")
    if key is not None or name == generic.NAME:
        return generic.NAME
    found = next((known for known, format_ in FORMATS.items() if format_.matches(content)), None)
    if name != AUTO and name != found and not (name in _PLAIN and content.kind == "file"):
        raise CheckpointError(f"{where} is not a file of {name}{f', but of {found}' if found else ''}: {_has(content)}")
    return found or (generic.NAME if name == AUTO else name)


def _has(content: Content) -> str:
    keys = [shown(key) for key in (*content.values, *content.tensors)]
    return f"it has {', '.join(keys[:8]) or 'nothing'}" + (", ..." if len(keys) > 8 else "")
