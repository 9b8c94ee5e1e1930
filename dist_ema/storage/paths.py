"""Interprets a user's path: a directory of this machine, or a URL that fsspec opens (``s3://``, ``gs://``)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, TypeAlias

from dist_ema.errors import CheckpointError, EMAConfigError

#: A directory; or a URL, which is a str.
StrPath: TypeAlias = "str | os.PathLike[str]"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


def is_url(path: object) -> bool:
    """Returns whether ``path`` is a URL, one of ``file://`` among them.

    >>> is_url("s3://bucket/run/ema"), is_url("file:///scratch/ema"), is_url("runs/ema")
    (True, True, False)
    """
    return isinstance(path, str) and _URL.match(path) is not None


def is_remote(path: object) -> bool:
    """Returns whether ``path`` is a URL of anything but this machine's file system.

    >>> is_remote("s3://bucket/run/ema"), is_remote("file:///scratch/ema"), is_remote("runs/ema")
    (True, False, False)
    """
    return is_url(path) and not str(path).startswith("file://")


def local_path(path: StrPath) -> Path:
    """Returns the absolute path of a directory that is given by its path or by a ``file://`` URL.

    It ends with the directory's name (``runs/..`` does not), since a new one is written under a name made of it.

    >>> local_path("file:///scratch/ema").as_posix()
    '/scratch/ema'
    """
    found = Path(os.fspath(path).removeprefix("file://")).absolute()
    return found.resolve() if found.name == ".." else found


def check_path(path: object) -> None:
    """Raises EMAConfigError unless ``path`` can name a checkpoint. An empty one would mean the current directory."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.removeprefix("file://").strip() or "\0" in text:
        raise EMAConfigError(f"path={path!r}: allowed is a str or a path of a directory, not empty, or a URL")


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Raises EMAConfigError, CheckpointError."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise EMAConfigError(
            f"path={url!r}: {error}. Allowed are URLs that the installed fsspec packages open"
        ) from error
    except Exception as error:  # no credentials, no network: every file system raises classes of its own
        raise CheckpointError(f"{url} cannot be reached: {type(error).__name__}: {error}") from error
    return system, str(root).rstrip("/")
