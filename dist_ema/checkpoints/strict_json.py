"""JSON of unknown origin: bounded before it is parsed, so that a refusal takes neither time nor memory. Pure Python.

A parser makes an object of every two bytes of ``[],[],[]``, and Python counts them again and again while it does. How
much a text amounts to is therefore counted in its brackets and commas before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

#: torch has no tensor of more dimensions.
MAX_DIMENSIONS = 64
#: No size, offset or clock has more digits; 2**63 has 19.
_DIGITS = 20
#: So many lists, objects, commas and quotes are taken in any text; more of them take some bytes each in texts of ours.
_FREE = 100_000
_BYTES_A_CONTAINER = 24
_BYTES_A_COMMA = 8
_BYTES_A_QUOTE = 3
_STRING = re.compile(rb'"[^"]*"?')  # where there is no escape: never looks at a byte twice
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse(text: bytes, *, depth: int) -> Any:
    """What the text says.

    Args:
        text: in UTF-8.
        depth: of lists and objects in each other, at most.

    Raises:
        ValueError: it is not JSON, or has NaN or Infinity, one key twice, a whole number of more than 20 digits, or
            more in it than a description of tensors of that length; says what.
    """
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    _limit("quotes", plain.count(b'"'), text, _BYTES_A_QUOTE)
    frame = _STRING.sub(b"", plain)
    _limit("lists and objects", frame.count(b"[") + frame.count(b"{"), text, _BYTES_A_CONTAINER)
    _limit("commas", frame.count(b","), text, _BYTES_A_COMMA)
    brackets = frame.translate(None, _NO_BRACKETS)
    for _ in range(depth):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")  # the innermost ones
    if brackets:
        raise ValueError(f"lists and objects lie more than {depth} deep in each other, or are not closed")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_count(value: object, bits: int = 62) -> bool:
    """Whether it is a whole number from 0 to 2**62, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits


def is_shape(sizes: Sequence[Any], itemsize: int) -> bool:
    """Whether torch could have a tensor of these sizes: up to 64 of them, and less than 2**62 bytes.

    An empty tensor is measured without the sizes that make it empty, since torch computes its strides from the rest.
    """
    if len(sizes) > MAX_DIMENSIONS or not all(is_count(size) for size in sizes):
        return False
    total = itemsize
    for size in sizes:
        total *= max(size, 1)
        if total >= 1 << 62:
            return False
    return True


def shown(value: object) -> str:
    """A value of a file for a message: short, and of a container no more than its type."""
    if isinstance(value, (str, bytes)):
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < 256):
        return repr(value)
    return f"a {type(value).__name__}"


def _limit(what: str, found: int, text: bytes, bytes_each: int) -> None:
    if found > _FREE + len(text) // bytes_each:
        raise ValueError(f"{found} {what} in {len(text)} bytes: it describes no tensors")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
