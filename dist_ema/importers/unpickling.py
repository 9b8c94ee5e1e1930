"""An unpickler that reads data and nothing else: no class or function that a file names is ever imported or called.

A name in a pickle becomes what :meth:`Unpickler.named` makes of it: a function of ours, or a stand-in. Two more attacks
work on Python's own unpickler. It allocates as much memory as a few bytes ask for. And it hashes the keys of dicts: a
pair of twice the same pair of twice the same pair, forty levels deep, takes some bytes to write and years to hash.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

#: Bytes of a pickle at most. It has some hundred bytes a tensor, and takes about as many microseconds to read.
MAX_BYTES = 1 << 25


class RefusedError(Exception):
    """A pickle names something that is not data; the message is that name."""


class Reader(Protocol):
    """What a pickle is read from: an open file, or a part of it."""

    def read(self, size: int, /) -> bytes: ...

    def readline(self) -> bytes: ...


class StandIn:
    """Takes the place of an object whose class is not imported: its arguments and its state, and no code."""

    def __init__(self, *args: object) -> None:
        self.args = args
        self.state: Any = {}


@dataclass(frozen=True)
class Function:
    """Takes the place of a function that a pickle calls."""

    call: Callable[..., object]


def stand_in(name: str) -> type[StandIn]:
    """A class of that name."""
    return type(name, (StandIn,), {})


class Bounded:
    """A file of which at most ``left`` bytes are read. Raises ValueError beyond them."""

    def __init__(self, file: Reader, left: int = MAX_BYTES) -> None:
        self._file = file
        self._left = left

    def read(self, size: int, /) -> bytes:
        """As a file's; allocates no more than the bytes that are left."""
        self._take(size)
        return self._file.read(size)

    def readline(self) -> bytes:
        """As a file's."""
        line = self._file.readline()
        self._take(len(line))
        return line

    def _take(self, size: int) -> None:
        if size > self._left:
            raise ValueError(f"its pickle has more than {MAX_BYTES} bytes, or is cut off")
        self._left -= size


class Unpickler(pickle._Unpickler):  # the one in C allocates as many memo entries as a file of ten bytes asks for
    """Accepts the names that :meth:`named` accepts. Each file gets stand-in classes of its own, which it may spoil."""

    stack: list[Any]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Reader) -> None:
        super().__init__(file, encoding="bytes")
        self._known: dict[str, Any] = {}

    def named(self, name: str) -> object:
        """What a dotted name in the pickle becomes. Raises RefusedError for a name that is not data."""
        raise RefusedError(name)

    def find_class(self, module: str, name: str) -> Any:
        """As :meth:`named`, which is asked once a name."""
        full = f"{module}.{name}"
        if full not in self._known:
            if full == "collections.OrderedDict":
                self._known[full] = Function(_ordered)
            else:
                self._known[full] = self.named(full)
        return self._known[full]

    def _load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack.append(self._call(self.stack.pop(), args))

    def _load_newobj_ex(self) -> None:
        self.stack.pop()
        self._load_newobj()

    @staticmethod
    def _call(function: object, args: tuple[object, ...]) -> object:
        if isinstance(function, Function):
            return function.call(*args)
        if isinstance(function, type) and issubclass(function, StandIn):
            return function(*args)
        raise ValueError("a pickle calls something that is not a function")

    def _load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], StandIn):
            self.stack[-1].state = state

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _put(self.stack[-1], [key, value])

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], items)

    def _load_dict(self) -> None:
        items = self.pop_mark()
        found: dict[Any, Any] = {}
        _put(found, items)
        self.append(found)

    def _load_append(self) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def _load_appends(self) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def _load_list_of_items(self) -> None:  # a set is data, but no average is in one: a list does
        self.append(self.pop_mark())

    def _load_empty_list(self) -> None:
        self.append([])

    def _refuse(self) -> None:
        raise ValueError("it has an instruction that no pickle of tensors needs")


for _code, _method in {
    pickle.REDUCE: Unpickler._load_reduce,
    pickle.NEWOBJ: Unpickler._load_newobj,
    pickle.NEWOBJ_EX: Unpickler._load_newobj_ex,
    pickle.BUILD: Unpickler._load_build,
    pickle.SETITEM: Unpickler._load_setitem,
    pickle.SETITEMS: Unpickler._load_setitems,
    pickle.DICT: Unpickler._load_dict,
    pickle.APPEND: Unpickler._load_append,
    pickle.APPENDS: Unpickler._load_appends,
    pickle.EMPTY_SET: Unpickler._load_empty_list,
    pickle.ADDITEMS: Unpickler._load_appends,
    pickle.FROZENSET: Unpickler._load_list_of_items,
    **dict.fromkeys((pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID), Unpickler._refuse),
    # These allocate as many bytes as they ask for.
    **dict.fromkeys((pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER), Unpickler._refuse),
}.items():
    Unpickler.dispatch[_code[0]] = _method


def loads(data: bytes, kind: type[Unpickler]) -> Any:
    """Reads a pickle. Raises RefusedError, and nearly anything for a damaged one."""
    return kind(io.BytesIO(data)).load()


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    found: OrderedDict[Any, Any] = OrderedDict()
    for key, value in items:
        _put(found, [key, value])
    return found


def _put(target: object, items: list[Any]) -> None:
    if isinstance(target, StandIn):
        return
    if not isinstance(target, dict):
        raise ValueError("a pickle puts entries into something that is not a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not _is_key(key):
            raise ValueError("a dict in it has a key that is not a plain value")
        target[key] = value


def _extend(target: object, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, StandIn):
        raise ValueError("a pickle appends to something that is not a list")


def _is_key(key: object, inner: bool = False) -> bool:
    """Whether hashing it is quick. The hash of nested tuples takes exponential time, so tuples of plain values only."""
    if isinstance(key, tuple):
        return not inner and all(_is_key(value, inner=True) for value in key)
    return key is None or isinstance(key, (str, bytes, int, float, StandIn))
