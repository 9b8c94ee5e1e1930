"""Files of torch.save, read without torch.load: tensors and plain values, and no code that a file names.

Real files also hold other objects of their trainer (arguments, times, states of random generators). If the class of
such an object is on the list below, an empty stand-in takes its place: the class is not imported and none of its code
runs. A file that names any other class is refused.

Both formats are read: zip files, which torch.save writes since 1.6, and the format before that. Tensors are mapped, so
they are views of the file. The size that a tensor claims is checked against the bytes that the file has for it.
``torch.load`` believes the claim, and maps what lies behind the member, reads memory behind the buffer, or allocates
that much (read in torch 2.13).
"""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dist_ema.checkpoints.storage.local import open_plain
from dist_ema.checkpoints.strict_json import is_count, is_shape
from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.importers.archive import CompressedError, Member, members
from dist_ema.importers.region import Region
from dist_ema.importers.unpickling import MAX_BYTES, Bounded, Function, RefusedError, Unpickler, loads, stand_in

#: Classes of objects that no average needs.
LEFTOVERS = re.compile(
    r"(numpy|omegaconf|composer|lightning|lightning_fabric|pytorch_lightning|nemo|timm|datetime|pathlib|typing)\..+"
    r"|argparse\.Namespace|torch\.torch_version\.TorchVersion|collections\.(defaultdict|Counter|deque)|_codecs\.encode"
    r"|(builtins|__builtin__)\.(dict|list|tuple|set|frozenset|int|float|complex|str|bool|bytes|bytearray|object|slice)"
    r"|torch\.(Tensor|Size|device|layout|memory_format|Generator|per_\w+)|torch\.nn\.parameter\.\w+"
    r"|torch\._utils\._rebuild_\w+|torch\.serialization\._get_layout"
)
_ZIP = b"PK\x03\x04"
_PICKLE = "/data.pkl"
#: The first two values of the format before zip files.
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
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
#: A tensor is read in place if its first byte is a multiple of this; else it is copied.
_ALIGNMENT = 16
#: Gives the bytes ``[begin, begin + size)`` of a file.
_Bytes = Callable[[int, int], torch.UntypedStorage]


class _Storage:
    """Bytes of the file, or None while their place is not known; and the dtype that they were saved as."""

    def __init__(self, data: torch.UntypedStorage | None, dtype: torch.dtype) -> None:
        self.data = data
        self.dtype = dtype


class _StorageType:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


#: Finds the bytes of a storage, by its key, size in bytes and dtype.
_Find = Callable[[str, int, torch.dtype], "torch.UntypedStorage | None"]


class _TensorUnpickler(Unpickler):
    """Makes tensors of what torch.save writes, none larger than the bytes that the file has for it."""

    find: _Find

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self._storages: dict[str, _Storage] = {}

    def named(self, name: str) -> object:
        """As :meth:`Unpickler.named`."""
        module, _, last = name.rpartition(".")
        if (call := _REBUILD.get(name)) is not None:
            return Function(call)
        if module in ("torch", "torch.storage") and last in _STORAGES:
            return _StorageType(_STORAGES[last])
        if module == "torch" and isinstance(dtype := getattr(torch, last, None), torch.dtype):
            return dtype
        if LEFTOVERS.fullmatch(name):
            return stand_in(last)
        raise RefusedError(name)

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage."""
        kind, saved, key, _, count, *rest = (_text(value) for value in pid)
        if kind != "storage" or not isinstance(saved, _StorageType) or not isinstance(key, str) or any(rest):
            raise ValueError("it has a storage that torch.save since 0.4 does not write")
        if key not in self._storages:
            if not is_count(count):
                raise ValueError(f"the storage {key[:80]!r} has an invalid size")
            data = self.find(key, count * saved.dtype.itemsize, saved.dtype)
            self._storages[key] = _Storage(data, saved.dtype)
        return self._storages[key]


def load_file(path: Path) -> Any:
    """Reads a file; its tensors are mapped, and their bytes not read yet.

    Raises:
        CheckpointError: it cannot be read, torch.save did not write it, it is compressed, or holds more than data.
        CheckpointCorruptError: it is damaged.
    """
    try:
        file = open_plain(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
        size = file.seek(0, io.SEEK_END)
        whole = torch.UntypedStorage.from_file(str(path), False, size) if size else _nothing()
        return _load(file, size, str(path), lambda begin, length: whole[begin : begin + length])


def load_bytes(data: bytes, where: str) -> Any:
    """Reads what torch.save wrote into a part of a larger file. Raises as :func:`load_file`."""
    whole = torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage() if data else _nothing()
    return _load(io.BytesIO(data), len(data), where, lambda begin, length: whole[begin : begin + length])


def locate(path: Path, begin: int, length: int, where: str) -> tuple[Any, list[int]]:
    """What torch.save wrote into a part of a larger file, with its tensors on the meta device.

    Returns:
        That, and where in the file the bytes of each of its storages begin, in the order in which they were met.

    Raises:
        CheckpointError, CheckpointCorruptError: as :func:`load_file`.
        OSError: it cannot be read.
    """
    places: list[int] = []

    def read(start: int, size: int) -> torch.UntypedStorage:
        places.append(begin + start)
        return torch.UntypedStorage(size, device="meta")  # type: ignore[no-untyped-call]

    with open_plain(path) as file:
        return _load(Region(file, begin, length), length, where, read), places


def _load(file: Any, size: int, where: str, read: _Bytes) -> Any:
    try:
        file.seek(0)
        if file.read(len(_ZIP)) == _ZIP:
            return _load_zip(file, size, where, read)
        return _load_legacy(file, size, where, read)
    except CheckpointError:
        raise
    except RefusedError as error:
        raise CheckpointError(
            f"{where} was not read, since it holds more than data, and no code of a file is run: {str(error)[:200]}. "
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


def _load_zip(file: BinaryIO, size: int, where: str, read: _Bytes) -> Any:
    found = members(file, size)
    pickles = [name for name in found if name.endswith(_PICKLE) and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(f"{where} is a zip file, but not one of torch.save: it has no data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    # TorchScript's own reader would be needed, which builds the program.
    if folder + "constants.pkl" in found:
        raise CheckpointError(f"{where} is a TorchScript archive, which holds a program: save its state dict instead")
    _check_order(_member(file, found.get(folder + "byteorder")) or b"little", where)

    class Zipped(_TensorUnpickler):
        def find(self, key: str, size: int, dtype: torch.dtype) -> torch.UntypedStorage:
            member = found.get(f"{folder}data/{key}")
            if member is None or size > member.size:
                raise ValueError(f"{key[:80]!r} claims {size} bytes, more than the file holds for it")
            return _aligned(read, member.begin, size)

    return loads(_member(file, found[pickles[0]]), Zipped)


def _member(file: BinaryIO, member: Member | None) -> bytes:
    if member is None:
        return b""
    if member.size > MAX_BYTES:
        raise ValueError(f"its pickle has {member.size} bytes; the limit is {MAX_BYTES}")
    file.seek(member.begin)
    return file.read(member.size)


def _load_legacy(file: BinaryIO, size: int, where: str, read: _Bytes) -> Any:
    """Some pickles, one after the other, and then the bytes of the storages.

    The fourth pickle holds the tensors and refers to storages whose places are known only when all that follows it has
    been read. So it is read twice: first for the storages that it refers to, then for the tensors.
    """
    file.seek(0)
    magic: object = None
    with suppress(Exception):
        magic = Unpickler(Bounded(file)).load()
    if magic != _MAGIC and isinstance(file, (io.BytesIO, Region)):
        raise ValueError("torch.save did not write this part of a file")
    if magic != _MAGIC:
        raise CheckpointError(f"{where} cannot be imported: torch.save did not write it")
    if Unpickler(Bounded(file)).load() != _PROTOCOL:
        raise ValueError("it has another version of the format")
    facts = Unpickler(Bounded(file)).load()
    if not isinstance(facts, Mapping):
        raise ValueError("it does not say in which order the bytes of a number lie")
    _check_order(b"little" if facts.get("little_endian", facts.get(b"little_endian", True)) else b"big", where)
    begin, claims, places = file.tell(), dict[str, tuple[int, torch.dtype]](), dict[str, int]()

    class Claims(_TensorUnpickler):
        def find(self, key: str, size: int, dtype: torch.dtype) -> None:
            claims[key] = size, dtype

    class Found(_TensorUnpickler):
        def find(self, key: str, size: int, dtype: torch.dtype) -> torch.UntypedStorage:
            return _aligned(read, places[key], size)

    Claims(Bounded(file)).load()
    position = size
    for key in map(_text, Unpickler(Bounded(file)).load()):
        position = file.tell() if not places else position
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        length, dtype = claims[key]
        if count * dtype.itemsize != length or position + 8 + length > size or key in places:
            raise ValueError(f"{key[:80]!r} claims {length} bytes; the file holds {count * dtype.itemsize} for it")
        places[key] = position + 8
        position += 8 + length
    file.seek(begin)
    return Found(Bounded(file)).load()


def _check_order(order: bytes, where: str) -> None:
    if order.decode("ascii", "replace") != sys.byteorder:
        raise CheckpointError(f"{where} was written on a machine with another byte order: torch.load() converts it")


def _aligned(read: _Bytes, begin: int, size: int) -> torch.UntypedStorage:
    """Bytes of the file, mapped; copied where they do not lie at a multiple of :data:`_ALIGNMENT`."""
    if not size:
        return _nothing()
    found = read(begin, size)
    if found.device.type == "meta":
        return found
    return found if found.data_ptr() % _ALIGNMENT == 0 else found.clone()  # type: ignore[no-untyped-call]


def _nothing() -> torch.UntypedStorage:
    return torch.UntypedStorage(0)  # type: ignore[no-untyped-call]


def _text(value: Any) -> Any:
    """Strings are bytes in old pickles."""
    return value.decode("ascii") if isinstance(value, bytes) else value


def _tensor(storage: object, offset: Any, size: Any, stride: Any, *_: object) -> Tensor | None:
    return _tensor_of(storage, getattr(storage, "dtype", None), offset, size, stride)


def _tensor_of_dtype(storage: object, offset: Any, size: Any, stride: Any, *rest: object) -> Tensor | None:
    _, _, dtype, *_ = rest  # requires_grad, hooks, dtype
    return _tensor_of(storage, dtype, offset, size, stride)


def _tensor_of(storage: object, dtype: object, offset: Any, size: Any, stride: Any) -> Tensor | None:
    """The tensor of this view of a storage. Raises ValueError where the storage is smaller than the view."""
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor in it has no storage")
    sizes, strides = tuple(size), tuple(stride)
    fits = is_shape(sizes, dtype.itemsize) and len(strides) == len(sizes) and all(map(is_count, (offset, *strides)))
    if not fits:
        raise ValueError("a tensor in it has an invalid shape, strides or offset")
    if storage.data is None:
        return None
    # One more than the place of the last element; the storage has to reach so far.
    last = offset + sum((length - 1) * step for length, step in zip(sizes, strides, strict=True)) + 1
    if 0 not in sizes and last * dtype.itemsize > storage.data.nbytes():
        raise ValueError(f"a tensor of the shape {sizes[:8]} in it has more elements than the file holds for it")
    if 0 in sizes:
        offset = 0
    return torch.empty(0, dtype=dtype, device=storage.data.device).set_(storage.data, offset, sizes, strides)


def _first(value: object, *_: object) -> object:
    return value


def _inner(function: Any, kind: object, args: Any, *_: object) -> object:
    """The plain tensor that an instance of a tensor subclass is made of."""
    if not isinstance(function, Function):
        raise ValueError("a tensor of a subclass is made by something else than a function")
    return function.call(*args)


_REBUILD: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _inner,
    "torch.Size": lambda sizes=(): tuple(sizes),
}
