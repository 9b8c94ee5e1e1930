"""Reads files of torch.save by ``torch.load(weights_only=True)``: tensors and plain values. No code in the file is run.

A file is read twice. The first reading does not execute the pickle (:mod:`.torch_pickles`). It finds the names of
classes that need a stand-in (:mod:`.torch_stand_ins`), and refuses what torch would trust: tensors with more bytes than
the file has. The second reading is done by torch. If torch does not read the protocol of the pickle,
:mod:`.torch_mapped` builds the values from the first reading.

Files that torch has written since 1.6 are zip files, and mapped. Older ones are read into memory.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.file_part import FilePart
from dist_ema.formats.torch_archive import CompressedError, Member, members
from dist_ema.formats.torch_inert import Record, RefusedError
from dist_ema.formats.torch_mapped import MappedValues
from dist_ema.formats.torch_pickles import TorchUnpickler, View
from dist_ema.formats.torch_stand_ins import safe_globals
from dist_ema.storage.local import open_plain

#: Bytes of a pickle at most. It has some hundred bytes a tensor, and takes about as many microseconds to read.
_MAX_PICKLE = 1 << 25
_PICKLE = "/data.pkl"
#: The protocol of torch.save, and the only one that torch.load(weights_only=True) reads.
_PROTOCOL = 2
#: The first value in files of torch before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C
#: Modules of which torch allows no name, not even for a stand-in; and names that no file of tensors has a reason for.
_BLOCKED = {"sys", "os", "posix", "nt", "subprocess", "socket", "shutil", "runpy", "importlib"}
_BLOCKED_NAMES = {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open")}
_SHARDED = "torch.distributed.tensor.DTensor"


@dataclass(frozen=True)
class _Checked:
    """Holds the result of the first reading.

    Attributes:
        value: the value; tensors in it are views, and other objects records.
        protocol: the protocol of the pickle.
        records: the classes that need a stand-in, by their names in the pickle.
        storages: where the bytes of each storage are in a zip file; None for a file of torch before 1.6.
    """

    value: Any
    protocol: int
    records: Mapping[str, type[Record]]
    storages: Mapping[str, Member] | None = None


def load_file(path: Path) -> Any:
    """Reads a file. The tensors of a zip file are mapped, and their bytes not read yet.

    Raises:
        CheckpointError: it cannot be read, torch.save did not write it, it is compressed, or uses a forbidden name.
        CheckpointCorruptError: it is damaged.
    """
    try:
        file = open_plain(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    with file:
        checked = _check(file, file.seek(0, io.SEEK_END), str(path))
    if checked.protocol == _PROTOCOL:
        return _load(str(path), checked, str(path), mmap=checked.storages is not None)
    if checked.storages is None:
        raise _other_protocol(checked, str(path))
    try:
        return MappedValues(path, checked.storages).build(checked.value)
    except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:  # RecursionError is a RuntimeError
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointCorruptError(f"{path} is damaged: {reason[0][:200]}") from error


def load_bytes(data: bytes, where: str) -> Any:
    """Reads what torch.save wrote into a part of a larger file. Raises as :func:`load_file` does."""
    checked = _check(io.BytesIO(data), len(data), where)
    if checked.protocol != _PROTOCOL:
        raise _other_protocol(checked, where)
    return _load(io.BytesIO(data), checked, where, mmap=False)


def locate(path: Path, begin: int, length: int, where: str) -> tuple[View, int]:
    """Finds the one tensor that torch.save wrote into a part of a larger file, without reading it.

    Returns:
        The tensor, and the position in the file of the first byte of its storage.

    Raises:
        CheckpointError, CheckpointCorruptError: as :func:`load_file`.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        checked = _check(FilePart(file, begin, length), length, where)
    view = checked.value
    if not isinstance(view, View) or checked.storages is None:
        raise CheckpointCorruptError(f"{where} holds no tensor")
    member = checked.storages.get(view.storage.key)
    return view, begin + (member.begin if member is not None else 0)


# The first reading.


def _check(file: Any, size: int, where: str) -> _Checked:
    """Reads what the file says about its contents. Raises as :func:`load_file`."""
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
    storages = {name.removeprefix(f"{folder}data/"): held for name, held in found.items()}
    file.seek(member.begin)
    nothing = Member(0, -1)
    unpickler = TorchUnpickler(io.BytesIO(file.read(member.size)), lambda key: storages.get(key, nothing).size)
    value = unpickler.load()
    if unpickler.protocol != _PROTOCOL:
        _check_byte_order(file, found.get(folder + "byteorder"), where)
    return _Checked(value, unpickler.protocol, unpickler.records, storages)


def _check_byte_order(file: BinaryIO, member: Member | None, where: str) -> None:
    """Raises CheckpointError for a file of a machine that stores the last byte of a number first."""
    if member is None:  # torch before 2.1 does not state it
        return
    file.seek(member.begin)
    if (found := file.read(min(member.size, 16))) != b"little":
        raise CheckpointError(
            f"{where} has the byte order {found!r}, and only files of the order 'little' are mapped: torch.save() what "
            "torch.load() reads of it, on a machine like this one"
        )


def _check_legacy(file: BinaryIO, size: int, where: str) -> _Checked:
    """Reads the pickles of a file of torch before 1.6: some, one after the other; the bytes of tensors follow."""
    file.seek(0)
    unpickler = TorchUnpickler(io.BytesIO(file.read(_MAX_PICKLE)), lambda key: size)
    try:
        magic = unpickler.load()
    except Exception:  # any file may be here
        magic = None
    if magic != _MAGIC and isinstance(file, (io.BytesIO, FilePart)):
        raise ValueError("torch.save did not write this part of a file")
    if magic != _MAGIC:
        raise CheckpointError(
            f"{where} cannot be imported: torch.save did not write it. If it is a pickle that you trust, load it where "
            "its library is installed, and torch.save() the state dict that is wanted"
        )
    for _ in range(2):  # the version, and facts about the machine
        unpickler.load()
    value = unpickler.load()
    if sum(storage.nbytes for storage in unpickler.storages.values()) > size:
        raise ValueError("its tensors claim more bytes than the file has")
    return _Checked(value, unpickler.protocol, unpickler.records)


def _check_names(records: Mapping[str, type[Record]], where: str) -> None:
    """Raises RefusedError for a name that no file of tensors has a reason for; CheckpointError for DTensors."""
    for name in (record.name for record in records.values()):
        if name.partition(".")[0] in _BLOCKED or name in _BLOCKED_NAMES:
            raise RefusedError(name)
    if _SHARDED in records:
        raise CheckpointError(
            f"{where} holds DTensors, each a part of a tensor: save full tensors (get_model_state_dict with "
            "full_state_dict=True), or all parts with dcp.save()"
        )


def _other_protocol(checked: _Checked, where: str) -> CheckpointError:
    return CheckpointError(
        f"{where} was saved with pickle_protocol={checked.protocol}, which torch.load(weights_only=True) does not "
        "read. If you trust it, torch.save() what torch.load(FILE, weights_only=False) reads of it: that writes the "
        "default protocol, 2"
    )


# The second reading.


def _load(source: str | io.BytesIO, checked: _Checked, where: str, *, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(safe_globals(checked.records.items())):  # type: ignore[arg-type]
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointCorruptError(f"{where} is damaged, or torch.load cannot read it: {reason[0][:200]}") from error
    except (EOFError, zipfile.BadZipFile, RecursionError, AssertionError) as error:
        raise CheckpointCorruptError(f"{where} is damaged: {error or type(error).__name__}") from error
