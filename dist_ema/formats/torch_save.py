"""Files of torch.save, read by ``torch.load(weights_only=True)``: tensors and plain values, and no code of the file.

Real files also hold other objects of their trainer: arguments, configurations, states of random generators. An empty
stand-in takes the place of each. Its class is not imported, so the package that wrote the file need not be there.

Before torch sees a file, its pickle is read once without doing what it says (:mod:`.torch_inert`). That tells the names
that need a stand-in, and refuses what torch would believe: a tensor or a storage that claims more bytes than the file
has for it. torch would map what lies behind, or make room for it.

Files that torch has written since 1.6 are zip files, and mapped. Older ones are read into memory.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.strict_json import is_count, is_shape
from dist_ema.formats.torch_archive import CompressedError, Member, members
from dist_ema.formats.torch_inert import InertUnpickler, Record, RefusedError
from dist_ema.storage.local import open_plain

#: Bytes of a pickle at most. It has some hundred bytes a tensor, and takes about as many microseconds to read.
_MAX_PICKLE = 1 << 25
_PICKLE = "/data.pkl"
#: The first value of the format before zip files.
_MAGIC = 0x1950A86A20F9469CFC6C
#: Modules of which torch allows no name, not even for a stand-in; and what no file of tensors has a reason to name.
_BLOCKED = {"sys", "os", "posix", "nt", "subprocess", "socket", "shutil", "runpy", "importlib"}
_BLOCKED_NAMES = {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open")}
_SHARDED = "torch.distributed.tensor.DTensor"
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
}


@dataclass(frozen=True)
class Storage:
    """The bytes of a tensor in a file, as the pickle claims them."""

    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class View:
    """A tensor as the pickle describes it: which elements of its storage it is."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in the order of the tensor."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != step:
                return 0 in self.shape
            step *= size
        return True


class StandIn:
    """An object of the file whose class is not imported. It keeps nothing but the name of its class.

    Attributes:
        name: of the class.
    """

    name: str

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Forgets the state."""


def load_file(path: Path) -> Any:
    """Reads a file. The tensors of a zip file are mapped, and their bytes not read yet.

    Raises:
        CheckpointError: it cannot be read, torch.save did not write it, it is compressed, or names what it may not.
        CheckpointCorruptError: it is damaged.
    """
    try:
        file = open_plain(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
        checked = _check(file, file.seek(0, io.SEEK_END), str(path))
    return _load(str(path), checked, str(path), mmap=checked.archive is not None)


def load_bytes(data: bytes, where: str) -> Any:
    """Reads what torch.save wrote into a part of a larger file. Raises as :func:`load_file`."""
    return _load(io.BytesIO(data), _check(io.BytesIO(data), len(data), where), where, mmap=False)


def locate(path: Path, begin: int, length: int, where: str) -> tuple[View, int]:
    """Finds the one tensor that torch.save wrote into a part of a larger file, and reads none of it.

    Returns:
        The tensor, and where in the file the bytes of its storage begin.

    Raises:
        CheckpointError, CheckpointCorruptError: as :func:`load_file`.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        checked = _check(_Part(file, begin, length), length, where)
    view = checked.value
    if not isinstance(view, View) or checked.archive is None:
        raise CheckpointCorruptError(f"{where} holds no tensor")
    member = checked.archive.get(f"{checked.folder}data/{view.storage.key}")
    return view, begin + (member.begin if member is not None else 0)


@dataclass(frozen=True)
class _Checked:
    """What the first reading found: the value without tensors, the stand-ins, and the members of a zip file."""

    value: Any
    records: Mapping[str, type[Record]]
    archive: Mapping[str, Member] | None = None
    folder: str = ""


class _Checker(InertUnpickler):
    """Reads the pickle of a file and compares what its tensors claim with what the file has."""

    def __init__(self, file: io.BytesIO, room: Callable[[str], int]) -> None:
        super().__init__(file)
        self._room = room
        self.storages: dict[str, Storage] = {}

    def named(self, name: str) -> object:
        """As :meth:`InertUnpickler.named`."""
        return _REBUILD.get(name)

    def persistent_load(self, pid: Any) -> Storage:
        """A storage."""
        kind, saved, key, _, count, *rest = (_text(value) for value in pid)
        dtype = (
            _STORAGES.get(saved.name.rpartition(".")[2])
            if isinstance(saved, type) and issubclass(saved, Record)
            else None
        )
        if kind != "storage" or dtype is None or not isinstance(key, str) or any(rest):
            raise ValueError("it has a storage that torch.save since 0.4 does not write")
        if not is_count(count):
            raise ValueError(f"the storage {key[:80]!r} has an invalid size")
        found = self.storages.setdefault(key, Storage(key, dtype, count * dtype.itemsize))
        if found.nbytes != count * dtype.itemsize or found.nbytes > self._room(key):
            raise ValueError(f"{key[:80]!r} claims {found.nbytes} bytes, more than the file holds for it")
        return found


def _check(file: Any, size: int, where: str) -> _Checked:
    """The first reading. Raises as :func:`load_file`."""
    try:
        file.seek(0)
        checked = _check_zip(file, where) if file.read(4) == b"PK\3\4" else _check_legacy(file, size, where)
        _check_names(checked.records, where)
        return checked
    except CheckpointError:
        raise
    except RefusedError as error:
        raise CheckpointError(
            f"{where} was not read, since it holds more than data ({str(error)[:200]}), and no code of a file is run. "
            "If you trust it, load it where its library is installed, and save only the dict that has the average"
        ) from error
    except CompressedError as error:
        raise CheckpointError(
            f"{where} was not read: {error}, so its tensors cannot be mapped; torch.save does not do that. Unpack "
            "it and pack it again without compression (zip -0 -r), or torch.save() what torch.load() reads of it"
        ) from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error)[:200] or type(error).__name__
        raise CheckpointCorruptError(f"{where} is damaged, or not a file of torch.save: {reason}") from error


def _check_zip(file: BinaryIO, where: str) -> _Checked:
    found = members(file)
    pickles = [name for name in found if name.endswith(_PICKLE) and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{where} is a zip file, but not one of torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    # TorchScript's own reader would be needed, which builds the program.
    if folder + "constants.pkl" in found:
        raise CheckpointError(f"{where} is a TorchScript archive, which holds a program: save its state dict instead")
    member = found[pickles[0]]
    if member.size > _MAX_PICKLE:
        raise ValueError(f"its pickle has {member.size} bytes; the limit is {_MAX_PICKLE}")
    file.seek(member.begin)
    nothing = Member(0, -1)
    checker = _Checker(io.BytesIO(file.read(member.size)), lambda key: found.get(f"{folder}data/{key}", nothing).size)
    value = checker.load()
    if checker.protocol > 2:
        raise CheckpointError(
            f"{where} was saved with pickle_protocol={checker.protocol}, which torch.load(weights_only=True) does not "
            "read: torch.save() it again without that option"
        )
    return _Checked(value, checker.records, found, folder)


def _check_legacy(file: BinaryIO, size: int, where: str) -> _Checked:
    """Some pickles, one after the other, and then the bytes of the storages: torch before 1.6."""
    file.seek(0)
    checker = _Checker(io.BytesIO(file.read(_MAX_PICKLE)), lambda key: size)
    try:
        magic = checker.load()
    except Exception:  # any file may be here
        magic = None
    if magic != _MAGIC and isinstance(file, (io.BytesIO, _Part)):
        raise ValueError("torch.save did not write this part of a file")
    if magic != _MAGIC:
        raise CheckpointError(
            f"{where} cannot be imported: torch.save did not write it. If it is a pickle that you trust, load it where "
            "its library is installed, and torch.save() the state dict that is wanted"
        )
    for _ in range(2):  # the version, and facts about the machine
        checker.load()
    value = checker.load()
    if sum(storage.nbytes for storage in checker.storages.values()) > size:
        raise ValueError("its tensors claim more bytes than the file has")
    return _Checked(value, checker.records)


def _check_names(records: Mapping[str, type[Record]], where: str) -> None:
    for name in (record.name for record in records.values()):
        if name.partition(".")[0] in _BLOCKED or name in _BLOCKED_NAMES:
            raise RefusedError(name)
    if _SHARDED in records:
        raise CheckpointError(
            f"{where} holds DTensors, each a part of a tensor: save full tensors (get_model_state_dict with "
            "full_state_dict=True), or all parts with dcp.save()"
        )


def _load(source: str | io.BytesIO, checked: _Checked, where: str, *, mmap: bool) -> Any:
    """The second reading, by torch."""
    # torch knows some names of Python 2 by those of Python 3, and not others.
    names = {name: record for written, record in checked.records.items() for name in (written, record.name)}
    stand_ins = [(_stand_in(record), name) for name, record in names.items()]
    try:
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointCorruptError(f"{where} is damaged, or torch.load cannot read it: {reason[0][:200]}") from error
    except (EOFError, zipfile.BadZipFile, RecursionError, AssertionError) as error:
        raise CheckpointCorruptError(f"{where} is damaged: {error or type(error).__name__}") from error


def _stand_in(record: type[Record]) -> type:
    """What torch makes of a name.

    torch puts entries into plain dicts and lists alone. So where the file puts some into an object of the class, a
    plain dict or list takes its place.
    """
    name = record.__name__
    if record.used_as == "dict":
        return type(name, (), {"__new__": lambda cls, *args, **kwargs: OrderedDict()})
    if record.used_as == "list":
        return type(name, (), {"__new__": lambda cls, *args, **kwargs: []})
    return type(name, (StandIn,), {"name": record.name})


def _text(value: Any) -> Any:
    """Strings are bytes in old pickles."""
    return value.decode("ascii") if isinstance(value, bytes) else value


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> View:
    return _view_of(storage, getattr(storage, "dtype", None), offset, size, stride)


def _view_of_dtype(storage: Any, offset: Any, size: Any, stride: Any, *rest: object) -> View:
    _, _, dtype, *_ = rest  # requires_grad, hooks, dtype
    return _view_of(storage, dtype, offset, size, stride)


def _view_of(storage: Any, dtype: Any, offset: Any, size: Any, stride: Any) -> View:
    """The tensor of this view of a storage. Raises ValueError where the storage is smaller than the view."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor in it has no storage")
    shape, strides = tuple(size), tuple(stride)
    fits = is_shape(shape, dtype.itemsize) and len(strides) == len(shape) and all(map(is_count, (offset, *strides)))
    if not fits:
        raise ValueError("a tensor in it has an invalid shape, strides or offset")
    # One more than the place of the last element; the storage has to reach so far.
    last = offset + sum((length - 1) * step for length, step in zip(shape, strides, strict=True)) + 1
    if 0 not in shape and last * dtype.itemsize > storage.nbytes:
        raise ValueError(f"a tensor of the shape {shape[:8]} in it has more elements than the file holds for it")
    return View(storage, dtype, offset, shape, strides)


def _bytearray(content: object = b"", *_: object) -> bytes:
    if not isinstance(content, (bytes, str)):  # a number would be so many bytes of memory
        raise ValueError("it asks for an array of bytes and does not give them")
    return b""


def _first(value: object, *_: object) -> object:
    return value


_REBUILD: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": _view,
    "torch._utils._rebuild_tensor_v3": _view_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "builtins.bytearray": _bytearray,
    "torch._utils._rebuild_parameter_with_state": _first,
}


class _Part(io.RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, file: BinaryIO, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """As of any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = min(max(base + offset, 0), self._size)
        return self._at

    def tell(self) -> int:
        """As of any file."""
        return self._at

    def seekable(self) -> bool:
        """It is."""
        return True

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, out: Any, /) -> int:
        """As of any file."""
        self._file.seek(self._begin + self._at)
        data = self._file.read(min(len(out), self._size - self._at))
        out[: len(data)] = data
        self._at += len(data)
        return len(data)
