"""Reads a pickle without executing it: nothing is imported, and no code that it names is called.

Names in a pickle become empty classes (:class:`Record`). torch's own ``weights_only`` unpickler does the same for names
that it does not know. DCP's ``.metadata`` is read only by this one. A pickle can also make Python's unpickler take
memory or time without any code, so two more things are refused:

- keys of dicts that are nested tuples. A pair of twice the same pair of twice the same pair, forty levels deep, takes
  some bytes to write and years to hash;
- instructions that no pickle of tensors needs, some of which allocate as many bytes as they ask for.
"""

from __future__ import annotations

import _compat_pickle
import io
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import torch


class RefusedError(Exception):
    """Raised if a pickle uses a forbidden name; the message is that name."""


class Record:
    """Represents an object of the file: the values that the pickle puts into it, and no code.

    Attributes:
        name: the name of its class.
        used_as: how the pickle uses objects of the class: it puts entries into them, appends to them, or neither.
        args: the arguments of its constructor.
        state: the argument of its ``__setstate__``.
        entries, items: what was put into it as into a dict, and as into a list.
    """

    name: ClassVar[str] = ""
    used_as: ClassVar[Literal["dict", "list", "object"]] = "object"
    args: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]
    items: list[Any]

    def __new__(cls, *args: Any, **_: Any) -> Record:
        found = super().__new__(cls)
        found.args, found.state, found.entries, found.items = args, {}, {}, []
        return found

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *_: object) -> None:
        """Refuses to be called: what a call gives is no data."""
        raise RefusedError(f"it calls what {self.name} gives")

    def __setitem__(self, key: object, value: object) -> None:
        type(self).used_as = "dict"
        self.entries[key] = value

    def append(self, value: object) -> None:
        """Adds an item, as a list does."""
        type(self).used_as = "list"
        self.items.append(value)

    def extend(self, values: Iterable[object]) -> None:
        """Adds items, as a list does."""
        type(self).used_as = "list"
        self.items.extend(values)


class _Ordered(OrderedDict[Any, Any]):
    def __init__(self, items: Iterable[Any] = ()) -> None:
        pairs = [tuple(item) for item in items]
        _check_keys(key for key, _ in pairs)
        super().__init__(pairs)

    def __setstate__(self, state: Any) -> None:
        # A state dict has its _metadata as an attribute. Others could take the place of methods.
        if not isinstance(state, dict) or not state.keys() <= {"_metadata"}:
            raise ValueError("a dict in it has attributes")


class InertUnpickler(pickle._Unpickler):  # the one in C allocates as many memo entries as a file of ten bytes asks for
    """Reads one pickle, or several one after the other.

    Attributes:
        records: the classes that replace names, by the name in the pickle.
        protocol: the highest protocol among the pickles.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    proto: int

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")
        self.records: dict[str, type[Record]] = {}
        self.protocol = 0

    def load(self) -> Any:
        """Reads the next pickle. Raises RefusedError; a damaged pickle may raise almost any exception."""
        self.memo: dict[int, Any] = {}  # each pickle counts its own objects from 0
        found = super().load()
        self.protocol = max(self.protocol, self.proto)
        return found

    def named(self, name: str) -> object:
        """Returns the replacement of a dotted name in the pickle, if it is not a :class:`Record`. May raise
        RefusedError.
        """
        return None

    def find_class(self, module: str, name: str) -> Any:
        """Overrides Python's method, and imports nothing."""
        written = f"{module}.{name}"
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"  # of Python 3: torch.save writes the names of Python 2
        if full == "collections.OrderedDict":
            return _Ordered
        if full == "builtins.set":
            return _checked_set
        if full == "torch.Size":
            return tuple
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if written not in self.records:
            found = self.named(full)
            if found is not None:
                return found
            self.records[written] = type(name.rpartition(".")[2], (Record,), {"name": full})
        return self.records[written]

    def get_extension(self, code: int) -> None:
        """Refuses classes that a pickle names by their number in this process's registry."""
        self._refuse()

    def _load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()  # type: ignore[misc]

    def _load_setitems(self) -> None:
        _check_keys(self.stack[::2])  # what was pushed since the mark
        super().load_setitems()  # type: ignore[misc]

    def _load_additems(self) -> None:
        _check_keys(self.stack)  # what was pushed since the mark
        super().load_additems()  # type: ignore[misc]

    def _load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()  # type: ignore[misc]

    def _load_bytearray8(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(min(size, sys.maxsize)))  # Python's would allocate the size first

    def _refuse(self) -> None:
        raise ValueError("it has an instruction that no pickle of tensors needs")


InertUnpickler.dispatch[pickle.SETITEM[0]] = InertUnpickler._load_setitem
InertUnpickler.dispatch[pickle.SETITEMS[0]] = InertUnpickler._load_setitems
InertUnpickler.dispatch[pickle.ADDITEMS[0]] = InertUnpickler._load_additems
InertUnpickler.dispatch[pickle.FROZENSET[0]] = InertUnpickler._load_frozenset
InertUnpickler.dispatch[pickle.BYTEARRAY8[0]] = InertUnpickler._load_bytearray8
for _code in (pickle.DICT, pickle.INST, pickle.OBJ, pickle.PERSID, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
    InertUnpickler.dispatch[_code[0]] = InertUnpickler._refuse


def _checked_set(items: Iterable[Any] = ()) -> list[Any]:
    found = list(items)
    _check_keys(found)
    return found


def _check_keys(keys: Iterable[Any]) -> None:
    """Raises ValueError unless hashing each key is quick: tuples may hold plain values only."""
    for key in keys:
        if not all(map(_is_plain, key)) if isinstance(key, tuple) else not _is_plain(key):
            raise ValueError("a dict in it has a key that is not a plain value")


def _is_plain(value: object) -> bool:
    kinds = (str, bytes, int, float, complex, Record, torch.dtype)
    return value is None or isinstance(value, kinds) or (isinstance(value, type) and issubclass(value, Record))
