"""Finds the members of a zip file. torch.save writes one, and torch.load maps its members in place.

torch.save does not compress them. If a file was packed again with compression, mapping it would give the compressed
bytes, which look like weights and are garbage. torch does not notice that, nor members that overlap.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from typing import BinaryIO

#: The header before a member's data: signature, flags, method, two sizes, and the lengths of its name and extra field.
_LOCAL = struct.Struct("<4s2xHH8xIIHH")
#: A size that stands in the extra field, since it has more than 32 bits.
_WIDE = 0xFFFFFFFF
#: The flag of a member whose sizes stand behind its data, and may be 0 before them.
_SIZE_FOLLOWS = 1 << 3
_ENCRYPTED = 1 | 1 << 6 | 1 << 13


class CompressedError(ValueError):
    """Raised for a member that is compressed or encrypted."""


@dataclass(frozen=True)
class Member:
    """Describes where the bytes of a member are."""

    begin: int
    size: int


def members(file: BinaryIO) -> dict[str, Member]:
    """Returns the members of an archive by name. Reads its directory and the members' own headers, and none of their
    data.

    Raises:
        CompressedError: a member is compressed or encrypted.
        ValueError, zipfile.BadZipFile: it is damaged, or the directory and a member's own header do not say the same.
    """
    found: dict[str, Member] = {}
    headers: list[tuple[int, int]] = []
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            name = info.orig_filename
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise CompressedError(f"{name[:80]!r} in it is compressed")
            if info.flag_bits & _ENCRYPTED:
                raise CompressedError(f"{name[:80]!r} in it is encrypted")
            if name in found:
                raise ValueError(f"it has two members {name[:80]!r}")
            begin = _data_begin(file, info)
            found[name] = Member(begin, info.file_size)
            headers.append((info.header_offset, begin + info.file_size))
        headers.append((archive.start_dir, archive.start_dir))
    # Overlapping members would let a small file claim terabytes.
    end = 0
    for header, stop in sorted(headers):
        if header < end:
            raise ValueError("its members overlap")
        end = stop
    return found


def _data_begin(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Returns the first byte of a member's data. Checks that its own header agrees with the directory."""
    file.seek(info.header_offset)
    fixed = file.read(_LOCAL.size)
    if len(fixed) < _LOCAL.size:
        raise ValueError("it is cut off")
    signature, flags, method, *sizes, names, extras = _LOCAL.unpack(fixed)
    name = file.read(names).decode("utf-8", "replace")
    if signature != b"PK\3\4" or name != info.orig_filename:
        raise ValueError(f"{info.orig_filename[:80]!r} is not where the directory says")
    known = ([info.file_size] * 2, [_WIDE] * 2, *([[0, 0]] if flags & _SIZE_FOLLOWS else []))
    if method or flags & _ENCRYPTED or sizes not in known:
        raise ValueError(f"the directory and the header of {info.orig_filename[:80]!r} do not agree")
    return info.header_offset + _LOCAL.size + int(names) + int(extras)
