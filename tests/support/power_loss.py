"""What a power failure may leave of a directory: the calls on it are recorded, and what was not synced is dropped.

A model of a file system that promises no more than POSIX does. What is on disk for certain is

- the bytes of a file as they were at its last ``fsync()``, and none of a file that was never synced;
- the names in a directory as they were at the last ``fsync()`` of that directory.

Anything later may be on disk or not, for each file and each name by itself. So recorded calls lead to several states::

    calls:   write a   sync a   rename a to b   |  failure
    states:  {}   {a: its bytes}   {b: its bytes}

Nothing is intercepted but ``fsync()``: before each call that changes a name or opens a file to write, and before each
sync, the directory is looked at. A call is therefore seen whatever function of Python makes it.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from support.killing import CHANGES

from dist_ema.storage import staging

#: The names in a directory, each with the number of what it leads to; or the bytes of a file.
Node: TypeAlias = "dict[str, int] | bytes"
#: What a failure leaves: the bytes of each file by its relative path, and None for each directory.
Tree: TypeAlias = "frozenset[tuple[str, bytes | None]]"


@dataclass(frozen=True)
class Moment:
    """One at which the power may fail.

    Attributes:
        newest: each file and directory as the running process sees it; of what is removed, as it was last.
        synced: each that was synced, as it was then.
        done: how many operations had returned.
    """

    newest: Mapping[int, Node]
    synced: Mapping[int, Node]
    done: int


class Recorder:
    """Records what happens in a directory. It cannot be switched off: for a process that ends soon.

    Args:
        root: the directory; all in it at the start is on disk.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers: dict[tuple[int, bool], int] = {}  # of the inodes that there are; a system uses inodes again
        self._fresh = itertools.count()
        self._newest: dict[int, Node] = {}
        self._lock = threading.RLock()
        self._done = 0
        self._look()
        self._synced = dict(self._newest)
        self.moments: list[Moment] = []
        self._keep()
        os.fsync = self._sync  # the disk itself is left alone, which makes this fast
        sys.addaudithook(self._hook)
        exchange = staging.exchange
        staging.exchange = lambda *paths: (self._keep(), exchange(*paths))[1]  # type: ignore[func-returns-value]

    def mark(self) -> None:
        """An operation has returned: what it wrote has to last."""
        with self._lock:
            self._done += 1
            self._keep()

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in CHANGES:
            self._keep()

    def _sync(self, descriptor: int) -> None:
        with self._lock:
            self._keep()
            facts = os.fstat(descriptor)
            number = self._numbers.get((facts.st_ino, os.path.isdir(f"/proc/self/fd/{descriptor}")))  # noqa: PTH112
            if number is not None:  # else it is elsewhere, or was removed
                self._synced[number] = self._newest[number]
                self._keep(look=False)

    def _keep(self, look: bool = True) -> None:
        with self._lock:
            if look:
                self._look()
            self.moments.append(Moment(dict(self._newest), dict(self._synced), self._done))

    def _look(self) -> None:
        """Brings ``_newest`` up to date."""
        numbers: dict[tuple[int, bool], int] = {}
        for number, node in self._newest.items():
            if isinstance(node, dict):
                self._newest[number] = {}  # only an empty directory can be removed
        self._visit(self._root, numbers)
        self._numbers = numbers

    def _visit(self, path: Path, numbers: dict[tuple[int, bool], int]) -> int:
        is_directory = path.is_dir()
        key = (path.stat().st_ino, is_directory)
        number = numbers[key] = self._numbers[key] if key in self._numbers else next(self._fresh)
        if not is_directory:
            self._newest[number] = path.read_bytes()
            return number
        names: dict[str, int] = {}
        for child in sorted(path.iterdir()):
            with suppress(FileNotFoundError):  # removed by another thread since
                names[child.name] = self._visit(child, numbers)
        self._newest[number] = names
        return number

    @property
    def root(self) -> int:
        """The number of the directory that is recorded."""
        return self._numbers[self._root.stat().st_ino, True]

    def trees(self, thorough: bool) -> Iterator[tuple[Tree, int]]:
        """What the failures leave, each once for each number of operations that had returned, which comes with it."""
        known = set()
        for moment in self.moments:
            for kept in _losses(moment, thorough):
                tree = _tree(moment, self.root, kept)
                if (tree, moment.done) not in known:
                    known.add((tree, moment.done))
                    yield tree, moment.done


def _losses(moment: Moment, thorough: bool) -> Iterator[Mapping[int, Node]]:
    """What may be on disk: of each file and directory that was changed since its sync, the newest or an older one."""
    dirty = [number for number, node in moment.newest.items() if moment.synced.get(number) != node]
    directories = [number for number in dirty if isinstance(moment.newest[number], dict)]
    names = {number: moment.newest[number] for number in directories}
    contents = {number: moment.newest[number] for number in dirty if number not in names}
    for kept in ({}, names):
        yield kept
        yield kept | contents
    for number in directories:
        for listing in _listings(moment, number):
            yield {number: listing}
            yield names | {number: listing}
    if thorough:
        draw = random.Random(len(dirty))
        for _ in range(64):
            kept = {number: draw.choice(list(_listings(moment, number))) for number in directories}
            yield kept | {number: node for number, node in contents.items() if draw.random() < 0.5}


def _listings(moment: Moment, number: int) -> Iterator[Node]:
    """The names that a changed directory may have: the old ones, the new ones, or the old ones with one change made."""
    before = moment.synced.get(number, {})
    after = moment.newest[number]
    assert isinstance(before, dict) and isinstance(after, dict)
    yield before
    yield after
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    # Two names of one thing were a rename, which any file system makes in one step.
    for moved in sorted({before.get(name, after.get(name)) for name in changed}, key=str):
        names = {name for name in changed if moved in (before.get(name), after.get(name))}
        kept = {name: child for name, child in before.items() if name not in names}
        yield kept | {name: after[name] for name in names if name in after}


def _tree(moment: Moment, root: int, kept: Mapping[int, Node]) -> Tree:
    """The files of a moment, where what is not in ``kept`` is as it was synced."""
    found: set[tuple[str, bytes | None]] = set()

    def visit(number: int, path: str) -> None:
        if isinstance(moment.newest[number], bytes):
            content = kept.get(number, moment.synced.get(number, b""))
            assert isinstance(content, bytes)
            found.add((path, content))
            return
        listing = kept.get(number, moment.synced.get(number, {}))
        assert isinstance(listing, dict)
        found.add((path, None))
        for name, child in listing.items():
            visit(child, f"{path}/{name}".lstrip("/"))

    visit(root, "")
    return frozenset(found)


def lay_out(tree: Tree, root: Path) -> None:
    """Makes the files of a tree in a directory that is not there."""
    for path, content in sorted(tree, key=lambda one: one[0]):
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)


def record(root: Path, play: Callable[[Path, Callable[[], None]], None], thorough: bool) -> list[tuple[Tree, int]]:
    """What failures leave of a directory in which ``play`` works. In a process that ends soon.

    Args:
        root: the directory, which must be there.
        play: is called with it, and with a function to call whenever an operation has returned.
        thorough: draw combinations of losses too, instead of all, none, all but one name, and of one directory only.
    """
    recorder = Recorder(root)
    play(root, recorder.mark)
    return list(recorder.trees(thorough))
