"""Replaces objects in a file that are neither tensors nor plain values.

Training files also hold arguments, configurations and states of random generators. Their classes are not imported, so
the package that wrote the file need not be installed, and none of its code runs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from dist_ema.formats.torch_inert import Record


class StandIn:
    """Represents an object of the file. It keeps the name of its class and nothing else.

    Attributes:
        name: the name of the class.
    """

    name: str

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Drops the state of the object."""


def safe_globals(records: Iterable[tuple[str, type[Record]]]) -> list[tuple[type, str]]:
    """Returns what ``torch.serialization.safe_globals`` takes: a class in place of each name in the pickle.

    Args:
        records: the name in the pickle and the record of each class that the first reading found.
    """
    # torch looks some names of Python 2 up under those of Python 3, and others not.
    names = {name: record for written, record in records for name in (written, record.name)}
    return [(stand_in(record), name) for name, record in names.items()]


def stand_in(record: type[Record]) -> type:
    """Returns the class that replaces one in the file.

    torch lets a pickle put entries only into plain dicts and lists. If this pickle puts entries into objects of the
    class, the class makes plain dicts or lists.
    """
    name = record.__name__
    if record.used_as == "dict":
        return type(name, (), {"__new__": lambda cls, *args, **kwargs: OrderedDict()})
    if record.used_as == "list":
        return type(name, (), {"__new__": lambda cls, *args, **kwargs: []})
    return type(name, (StandIn,), {"name": record.name})
