"""Builds the values of a torch.save file from its pickle. The tensors are mapped, and not read yet.

``torch.load(weights_only=True)`` reads pickles of protocol 2, which torch.save writes by default.
``torch.save(..., pickle_protocol=4)`` occurs in real files too, and is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_ema.formats.torch_archive import Member
from dist_ema.formats.torch_inert import Record
from dist_ema.formats.torch_pickles import View
from dist_ema.formats.torch_stand_ins import stand_in


class MappedValues:
    """Makes tensors, dicts, lists and stand-ins from the result of the first reading.

    Args:
        path: the zip file.
        members: where the bytes of each storage are in it, by the storage's key.
    """

    def __init__(self, path: Path, members: Mapping[str, Member]) -> None:
        self._bytes = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        self._members = members
        self._built: dict[int, Any] = {}  # by id(): a value may occur at many places, or contain itself

    def build(self, value: Any) -> Any:
        """Returns the value. One that occurs twice is built once, so tied tensors stay one tensor."""
        if id(value) in self._built:
            return self._built[id(value)]
        if isinstance(value, View):
            return self._built.setdefault(id(value), self._tensor(value))
        if isinstance(value, Record):
            return self._object(value)
        if isinstance(value, dict):
            return self._dict(value, value)
        if isinstance(value, list):
            return self._list(value, value)
        if isinstance(value, tuple):
            return self._built.setdefault(id(value), tuple(map(self.build, value)))
        return value

    def _object(self, record: Record) -> Any:
        if record.used_as == "dict":
            return self._dict(record, record.entries)
        if record.used_as == "list":
            return self._list(record, record.items)
        return self._built.setdefault(id(record), stand_in(type(record))())

    def _dict(self, owner: object, entries: Mapping[Any, Any]) -> dict[Any, Any]:
        found = self._built[id(owner)] = {}
        found.update((key, self.build(value)) for key, value in entries.items())
        return found

    def _list(self, owner: object, items: list[Any]) -> list[Any]:
        found = self._built[id(owner)] = []
        found.extend(map(self.build, items))
        return found

    def _tensor(self, view: View) -> Tensor:
        if 0 in view.shape:
            return torch.empty(view.shape, dtype=view.dtype)
        begin = self._members[view.storage.key].begin
        storage = self._bytes[begin : begin + view.storage.nbytes]
        return torch.empty(0, dtype=view.dtype).set_(storage, view.offset, view.shape, view.stride)
