"""Parses JSON of unknown origin. It is measured first, so that a hostile text costs little. Pure Python.

A parser makes an object of every two bytes of ``[],[],[]``: gigabytes from some megabytes of text. So brackets and
commas are counted first, and a text with more of them than a description of tensors needs is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn

#: Dimensions of a tensor at most, as in torch.
MAX_DIMENSIONS = 64
#: Digits of a whole number at most: 2**63 has 19.
_DIGITS = 20
#: Lists, objects, commas and quotes (each) that any text may have. For more of them the text must be longer in
#: proportion, as descriptions of tensors are.
_FREE = 100_000
_BYTES_A_CONTAINER = 24
_BYTES_A_COMMA = 8
_BYTES_A_QUOTE = 3
_STRING = re.compile(rb'"[^"]*"?')  # after escapes are removed; linear, as no byte is looked at twice
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse(text: bytes, *, depth: int) -> Any:
    """Parses a text.

    Args:
        text: in UTF-8.
        depth: levels of nested lists and objects at most; a list in an object may count as one level with it.

    Raises:
        ValueError: it is not JSON, or has NaN or Infinity, one key twice, a whole number of more than 20 digits, or
            more brackets, commas or quotes than a description of tensors of that length; says which.

    >>> parse(b'{"shape": [3, 2]}', depth=2)
    {'shape': [3, 2]}
    >>> parse(b'[[[3, 2]]]', depth=2)
    Traceback (most recent call last):
    ValueError: lists and objects are nested more than 2 deep, or not closed
    """
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    _limit("quotes", plain.count(b'"'), text, _BYTES_A_QUOTE)
    frame = _STRING.sub(b"", plain)  # brackets and commas inside strings do not count
    _limit("lists and objects", frame.count(b"[") + frame.count(b"{"), text, _BYTES_A_CONTAINER)
    _limit("commas", frame.count(b","), text, _BYTES_A_COMMA)
    brackets = frame.translate(None, _NO_BRACKETS)
    for _ in range(depth):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")  # the innermost level
    if brackets:
        raise ValueError(f"lists and objects are nested more than {depth} deep, or not closed")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_count(value: object, bits: int = 62) -> bool:
    """Returns whether it is a whole number from 0 to 2**bits - 1, and not a bool.

    >>> is_count(3), is_count(-1), is_count(True), is_count(3.0)
    (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits


def is_shape(sizes: Sequence[Any], itemsize: int) -> bool:
    """Returns whether torch could have a tensor of these sizes: at most 64 of them, and less than 2**62 bytes.

    Sizes of 0 count as 1: torch computes the strides of an empty tensor from the other sizes, and they may overflow.

    >>> is_shape([3, 2], itemsize=4), is_shape([2**40, 2**40], itemsize=4), is_shape([0, 2**62], itemsize=4)
    (True, False, False)
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
    """Returns a value of a file as an error shows it: shortened, and of a container its type only.

    >>> shown("weight"), shown([1, 2, 3])
    ("'weight'", 'a list')
    """
    if isinstance(value, (str, bytes)):
        return repr(value[:80]) + ("..." if len(value) > 80 else "")
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and value.bit_length() < 256):
        return repr(value)
    return f"a {type(value).__name__}"


def _limit(what: str, found: int, text: bytes, bytes_each: int) -> None:
    if found > _FREE + len(text) // bytes_each:
        raise ValueError(f"{found} {what} in {len(text)} bytes: too many for a description of tensors")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)  # json would keep the last one, and other readers the first
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:  # int() takes quadratic time
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
