"""Where checkpoints lie, for reading: a directory, or a URL of any kind that fsspec knows (``s3://``, ``gs://``).

With :mod:`dist_ema.checkpoints.storage` and what writes to these places, the only modules that open files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from dist_ema.errors import CheckpointCorruptError, CheckpointError, EMAConfigError

#: Bytes that are read and thrown away rather than asking an object store once more.
_GAP = 1 << 20
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")


#: A directory, or a URL as a str.
StrPath: TypeAlias = "str | os.PathLike[str]"


class OpenFile(Protocol):
    """A file that can be read at any place, by several threads at a time."""

    size: int

    def read(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """Fills every part from its position on. False if the file ends before that."""

    def close(self) -> None:
        """Closes it."""


class Place(Protocol):
    """A directory or what stands for one."""

    def file(self, name: str) -> OpenFile:
        """Opens a file of this place. Raises OSError; FileNotFoundError if it is not there."""

    def __truediv__(self, name: str) -> Place: ...


def is_url(path: object) -> bool:
    """Whether ``path`` is a URL; one of ``file://`` is one too."""
    return isinstance(path, str) and _URL.match(path) is not None


def local_path(path: StrPath) -> Path:
    """The directory that is meant, by its path or by a ``file://`` URL, absolute, with a name unless it is the root."""
    found = Path(os.fspath(path).removeprefix("file://")).absolute()
    return found.resolve() if found.name == ".." else found


def is_remote(path: object) -> bool:
    """Whether ``path`` is a URL of anything but this machine's file system."""
    return is_url(path) and not str(path).startswith("file://")


def place(path: StrPath) -> Place:
    """The place that a path or a URL names. Raises EMAConfigError for neither, and where fsspec cannot open it."""
    check_path(path)
    if is_remote(path):
        return Remote(*file_system(os.fspath(path)))
    return Directory(local_path(path))


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
        raise EMAConfigError(f"path={url!r}: {error}. Allowed is what fsspec opens with what is installed") from error
    except Exception as error:  # no credentials, no network: every file system has its own
        raise CheckpointError(f"{url} cannot be reached: {type(error).__name__}: {error}") from error
    return system, str(root).rstrip("/")


class Directory:
    """A directory of this machine's file system. Nothing is read through a symbolic link, or from what is no file.

    Args:
        path: of the directory; what lies above it may be a link.
        name: of the place in it.
    """

    def __init__(self, path: Path, name: str = "") -> None:
        self._path = path
        self._name = name

    def __truediv__(self, name: str) -> Directory:
        return Directory(self._path, f"{self._name}/{name}".lstrip("/"))

    def __str__(self) -> str:
        return str(self._path / self._name)

    def file(self, name: str) -> LocalFile:
        """Opens a plain file. Raises OSError, or CheckpointCorruptError for a symbolic link."""
        inside = Path(self._name) / name
        for parent in list(inside.parents)[:-1]:
            if (self._path / parent).is_symlink():
                raise CheckpointCorruptError(f"{self._path / parent} is a symbolic link: not followed")
        return LocalFile(self._path / inside)


class LocalFile:
    """A plain file that is read by position. Never opened through a symbolic link, nor waits for a pipe."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        facts = os.fstat(self._descriptor)
        self.size = facts.st_size
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise OSError(f"{path} is not a plain file")

    def read(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """As :meth:`OpenFile.read`."""
        for position, out in parts:
            while out:
                count = os.preadv(self._descriptor, [out], position)
                if count == 0:
                    return False
                out, position = out[count:], position + count
        return True

    def close(self) -> None:
        """As :meth:`OpenFile.close`."""
        os.close(self._descriptor)


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file that a user has named, also through links. Raises OSError for a pipe, which would block."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a plain file")
    return os.fdopen(descriptor, "rb")


class Remote:
    """A prefix in a file system of fsspec.

    Args:
        system: the file system.
        root: the path in it.
    """

    def __init__(self, system: Any, root: str) -> None:
        self._system = system
        self._root = root

    def __truediv__(self, name: str) -> Remote:
        return Remote(self._system, f"{self._root}/{name}")

    def __str__(self) -> str:
        return str(self._system.unstrip_protocol(self._root))

    def file(self, name: str) -> RemoteFile:
        """Looks for an object. Raises OSError whatever the file system raises."""
        path = f"{self._root}/{name}"
        try:
            self._system.invalidate_cache(path.rpartition("/")[0])  # others write too
            facts = self._system.info(path)
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{path}: {type(error).__name__}: {error}") from error
        if facts["type"] != "file":
            raise OSError(f"{path} is not a file")
        if facts.get("size") is None:
            raise OSError(f"{path}: nobody says how many bytes it has")
        return RemoteFile(self._system, path, int(facts["size"]))


class RemoteFile:
    """An object that is read by ranges; ranges that lie close together are asked for at once."""

    def __init__(self, system: Any, path: str, size: int) -> None:
        self.size = size
        self._system = system
        self._path = path

    def read(self, parts: Sequence[tuple[int, memoryview]]) -> bool:
        """As :meth:`OpenFile.read`. Raises OSError whatever the file system raises."""
        for together in _neighbours(parts):
            start, stop = together[0][0], together[-1][0] + len(together[-1][1])
            try:
                data = memoryview(self._system.cat_file(self._path, start=start, end=stop))
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{self._path}: {type(error).__name__}: {error}") from error
            if len(data) < stop - start:
                return False
            for position, out in together:
                out[:] = data[position - start : position - start + len(out)]
        return True

    def close(self) -> None:
        """Nothing is open."""


def _neighbours(parts: Sequence[tuple[int, memoryview]]) -> list[list[tuple[int, memoryview]]]:
    """Parts, which ascend, in lists between which there are gaps."""
    groups: list[list[tuple[int, memoryview]]] = []
    end = 0
    for position, out in parts:
        if not out:
            continue
        if not groups or position - end > _GAP:
            groups.append([])
        groups[-1].append((position, out))
        end = position + len(out)
    return groups
