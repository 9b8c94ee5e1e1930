"""The directory of a zip file: where each member's bytes lie. Everything in it is checked before it is used.

torch.save does not compress its members, so they can be mapped. If a file was packed again with compression, mapping it
would give the compressed bytes, which look like weights and are garbage; and a member of a few bytes could inflate to
gigabytes. So compressed members are refused, by what the directory says, before any member is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

_END = struct.Struct("<4sHHHHIIH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
_LOCAL = struct.Struct("<4sHHHHHIIIHH")
_NONE = 0xFFFFFFFF
_ENCRYPTED = 1 | 1 << 6 | 1 << 13
#: The flag of a member whose sizes stand behind its data, and are 0 before them.
_SIZE_FOLLOWS = 1 << 3
#: Members at most; the largest files that one process saves have some ten thousand.
_MEMBERS = 1 << 18


class ArchiveError(ValueError):
    """Says what is wrong with the archive."""


class CompressedError(ArchiveError):
    """A member is compressed or encrypted."""


@dataclass(frozen=True)
class Member:
    """Where the bytes of a member lie."""

    begin: int
    size: int


def members(file: BinaryIO, size: int) -> dict[str, Member]:
    """The members of the archive by name. Reads the directory and the members' own headers, and none of their data.

    Args:
        file: the archive.
        size: its bytes.

    Raises:
        CompressedError: a member is compressed or encrypted.
        ArchiveError: it is damaged, or the directory and a member's own header do not say the same.
    """
    count, begin, length = _find_directory(file, size)
    if count > _MEMBERS or length < count * _CENTRAL.size or begin + length > size:
        raise ArchiveError(f"its directory is damaged: {count} members, {length} bytes at {begin}")
    directory = _read(file, begin, length)
    found: dict[str, Member] = {}
    headers: list[tuple[int, int]] = []
    position = 0
    for _ in range(count):
        name, header, stored, position = _entry(directory, position)
        if name in found:
            raise ArchiveError(f"it has two members {name[:80]!r}")
        found[name] = _locate(file, name, header, stored)
        headers.append((header, found[name].begin + stored))
    # Overlapping members would let a small file claim terabytes (a "zip bomb").
    end = 0
    for header, stop in sorted(headers):
        if header < end:
            raise ArchiveError("its members overlap")
        end = stop
    if end > begin:
        raise ArchiveError("a member overlaps the directory")
    return found


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """The directory: number of members, position of its first byte, number of bytes."""
    tail = _read(file, max(0, size - _END.size - 0xFFFF), min(size, _END.size + 0xFFFF))
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise ArchiveError("it has no directory: its end is missing")
    _, _, _, _, count, length, begin, _ = _END.unpack_from(tail, place)
    # Larger numbers stand in a second end record, which a locator before this one points to.
    if count != 0xFFFF and length != _NONE and begin != _NONE:
        return count, begin, length
    locator = size - len(tail) + place - _LOCATOR.size
    signature, _, where, _ = _LOCATOR.unpack(_read(file, locator, _LOCATOR.size))
    if signature != b"PK\6\7":
        return count, begin, length
    signature, _, _, _, _, _, _, count, length, begin = _END64.unpack(_read(file, where, _END64.size))
    if signature != b"PK\6\6":
        raise ArchiveError("its directory is not where its last bytes say")
    return count, begin, length


def _entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """Of a member: its name, the position of its header, its bytes, and the position of the next entry."""
    if position + _CENTRAL.size > len(directory):
        raise ArchiveError("its directory ends too early")
    facts = _CENTRAL.unpack_from(directory, position)
    signature, _, _, flags, method, _, _, _, packed, stored, names, extras, comments, _, _, _, header = facts
    position += _CENTRAL.size
    raw, extra = directory[position : position + names], directory[position + names : position + names + extras]
    if signature != b"PK\1\2" or len(raw) < names or len(extra) < extras:
        raise ArchiveError("its directory is damaged")
    name = raw.decode("utf-8", "replace")
    if flags & _ENCRYPTED:
        raise CompressedError(f"{name[:80]!r} in it is encrypted")
    stored, packed, header = _wide(extra, (stored, packed, header))
    if method or packed != stored:
        raise CompressedError(f"{name[:80]!r} in it is compressed")
    return name, header, stored, position + names + extras + comments


def _wide(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Replaces the numbers that do not fit into 32 bits by those of the extra field, where they stand in this order."""
    wide: list[int] = []
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            wide = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
        position += 4 + length
    if len(wide) < numbers.count(_NONE):
        raise ArchiveError("its directory lacks a number of more than 32 bits")
    rest = iter(wide)
    size, packed, header = (next(rest) if number == _NONE else number for number in numbers)
    return size, packed, header


def _locate(file: BinaryIO, name: str, header: int, stored: int) -> Member:
    """The bytes of a member. Checks that its own header agrees with the directory."""
    fixed = _read(file, header, _LOCAL.size)
    signature, _, flags, method, _, _, _, packed, size, names, extras = _LOCAL.unpack(fixed)
    raw = _read(file, header + _LOCAL.size, names)
    known = {(stored, stored), (_NONE, _NONE)} | ({(0, 0)} if flags & _SIZE_FOLLOWS else set())
    if signature != b"PK\3\4" or raw.decode("utf-8", "replace") != name:
        raise ArchiveError(f"{name[:80]!r} is not where the directory says")
    if method or flags & _ENCRYPTED or (packed, size) not in known:
        raise ArchiveError(f"the directory and the header of {name[:80]!r} do not agree")
    return Member(header + _LOCAL.size + names + extras, stored)


def _read(file: BinaryIO, begin: int, length: int) -> bytes:
    if begin < 0:
        raise ArchiveError("it is cut off")
    file.seek(begin)
    data = file.read(length)
    if len(data) < length:
        raise ArchiveError("it is cut off")
    return data
