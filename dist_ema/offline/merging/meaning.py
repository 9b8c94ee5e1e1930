"""Refuses sums that mean nothing: of integers that stand for something else, and of float8 values with scales."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch

from dist_ema.comm.catalogue import FullTensor
from dist_ema.errors import CheckpointMismatchError, EMAConfigError
from dist_ema.formats.tensors import ReadableTensor
from dist_ema.offline.merging.sources import Source

#: Elements that are compared at a time.
_PIECE = 1 << 18
#: A single integer of such a name is part of a quantisation, and no counter.
_QUANTISED = re.compile(r"(zero_?point|zeros|scale)", re.IGNORECASE)
_LISTED = 6

IsSummed = Callable[[FullTensor], bool]


def is_float8(dtype: torch.dtype) -> bool:
    """Returns whether elements of this dtype may have their scale in another tensor."""
    return dtype.is_floating_point and dtype.itemsize == 1


def pattern_of(newest: str | None) -> re.Pattern[str] | None:
    """Returns the option as a compiled pattern. Raises EMAConfigError if it is no regular expression."""
    try:
        return None if newest is None else re.compile(newest)
    except re.error as error:
        raise EMAConfigError(f"newest={newest!r} is not a regular expression: {error}") from error


def check_scales(entries: Sequence[FullTensor], sources: Sequence[Source], is_summed: IsSummed) -> None:
    """Raises CheckpointMismatchError if float8 values would be summed that have a scale beside them.

    Such a value stands for value times scale, and each source has its own scales.
    """
    for source in sources:
        scales: dict[str, str] = {}
        for name in source.names:
            module, _, last = name.rpartition(".")
            if "scale" in last.lower():
                scales.setdefault(module, name)
        for entry in entries:
            held = source.get(entry.name, entry.aliases)
            if held is None or not is_summed(entry) or not is_float8(held.dtype):
                continue
            # Beside it, or below it where the values are a module's parameter: "w" and "w.scale".
            beside = scales.get(entry.name.rpartition(".")[0]) or scales.get(entry.name)
            if beside is not None:
                raise CheckpointMismatchError(
                    f"{entry.name!r} of {source} is {held.dtype}, and its scale is {beside!r}: a sum of such values "
                    f"means nothing. Merge the weights before they were quantised; or --newest REGEX takes the tensors "
                    f"whose names it matches from the newest source, such as "
                    f"--newest '{re.escape(entry.name.rpartition('.')[0] or entry.name)}'"
                )


def check_integers(
    entries: Sequence[FullTensor], sources: Sequence[Source], skip: re.Pattern[str] | None, rank: int, ranks: int
) -> None:
    """Raises CheckpointMismatchError if integers that are no counters differ between sources.

    Counters are single integers, such as BatchNorm's; those of the newest source are right. A matrix of integers that
    differ is a packed quantization. Its sum means nothing, and the newest values fit no other tensor.

    Args:
        entries: the tensors of the output.
        sources: the sources that are part of a sum, the newest one last.
        skip: matches the names of tensors that the user takes from the newest source.
        rank, ranks: this rank compares its share of the tensors.
    """
    newest = sources[-1]
    problems = []
    integers = [entry for entry in entries if not (entry.dtype.is_floating_point or entry.dtype.is_complex)]
    for entry in integers[rank::ranks]:
        counts = entry.numel == 1 and not _QUANTISED.search(entry.name)
        if counts or (skip is not None and skip.search(entry.name)):
            continue
        ours = newest.get(entry.name, entry.aliases)
        for source in sources[:-1]:
            theirs = source.get(entry.name, entry.aliases)
            if ours is not None and theirs is not None and not _are_equal(ours, theirs):
                problems.append((entry.name, source))
                break
        if len(problems) >= _LISTED:  # enough to know what they are
            break
    if problems:
        first, source = problems[0]
        some = ", ".join(repr(name) for name, _ in problems)
        raise CheckpointMismatchError(
            f"integers differ between {source} and {newest}, and are no counters: {some}. A sum of them means nothing, "
            "as of packed quantised weights. Merge the weights before they were quantised; or --newest REGEX takes the "
            f"tensors whose names it matches from the newest source, such as --newest '{re.escape(first)}'"
        )


def _are_equal(a: ReadableTensor, b: ReadableTensor) -> bool:
    if a.dtype != b.dtype:
        return False
    if a.digest is not None and b.digest is not None:
        return a.digest == b.digest
    left, right = (torch.empty(min(_PIECE, a.numel), dtype=a.dtype) for _ in range(2))
    for start in range(0, a.numel, _PIECE):
        size = min(_PIECE, a.numel - start)
        a.read(start, start + size, left[:size])
        b.read(start, start + size, right[:size])
        if not torch.equal(left[:size], right[:size]):
            return False
    return True
