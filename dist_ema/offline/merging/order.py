"""Finds the order of training of several sources: by steps that they state, else by numbers at the end of their
names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import PurePath

from dist_ema.errors import EMAConfigError
from dist_ema.offline.merging.sources import Source

#: The number at the end of one part of a path: ``checkpoint-1000``, ``step_200.pt``, ``epoch=3-step=400.ckpt``.
_TRAILING = re.compile(r"(?<![\d.])(\d+)((?:\.[A-Za-z]\w*)*)$")


def in_order_of_training(sources: Sequence[Source]) -> list[int] | None:
    """Returns the indices of the sources, the oldest first; None if their order is not stated.

    A source states its step by the clock of a checkpoint of this library, by ``trainer_state.json``, or in a training
    file. If not all do, or several state the same step, numbers at the end of otherwise equal names are used. Steps and
    numbers must not contradict each other.
    """
    steps = [source.step for source in sources]
    known = [(step, number) for number, step in enumerate(steps) if step is not None]
    if len(known) == len(sources) and _is_strict(sources, [step for step, _ in known]):
        return [number for _, number in sorted(known)]
    numbers = _trailing_numbers([source.path for source in sources])
    if numbers is None:
        return None
    order = sorted(range(len(sources)), key=lambda number: numbers[number])
    stated = [steps[number] for number in order if steps[number] is not None]
    return order if stated == sorted(stated) else None  # type: ignore[type-var]


def _is_strict(sources: Sequence[Source], steps: Sequence[int]) -> bool:
    """Returns whether any two different sources have different steps."""
    paths: dict[int, set[str]] = {}
    for source, step in zip(sources, steps, strict=True):
        paths.setdefault(step, set()).add(str(source))
    return all(len(found) == 1 for found in paths.values())


def _trailing_numbers(paths: Sequence[str]) -> list[int] | None:
    """Returns the number in each path by which it differs from the others; None if they differ by anything else."""
    parts = [PurePath(path).parts for path in paths]
    if len(set(map(len, parts))) > 1:
        return None
    differing = [column for column in zip(*parts, strict=True) if len(set(column)) > 1]
    if len(differing) != 1:
        return None
    matches = [_TRAILING.search(name) for name in differing[0]]
    numbers = [int(match[1]) for match in matches if match is not None]
    rests = [name[: match.start(1)] + match[2] for name, match in zip(differing[0], matches, strict=True) if match]
    if len(numbers) < len(paths) or len(set(numbers)) < len(numbers):
        return None
    # Numbers before the last one may differ too, as in epoch=3-step=400: they must not contradict it.
    if len({re.sub(r"\d+", "0", rest) for rest in rests}) > 1:
        return None
    before = [[int(found) for found in re.findall(r"\d+", rest)] for rest in rests]
    ordered = [before[place] for place in sorted(range(len(numbers)), key=lambda place: numbers[place])]
    for one, next_one in itertools.pairwise(ordered):
        if any(a > b for a, b in zip(one, next_one, strict=True)):
            return None
    return numbers


def check_order_matters(sources: Sequence[Source], weights: Sequence[float], scheme: str) -> None:
    """Raises EMAConfigError for a scheme that counts from the oldest source, if it is not known which one that is."""
    if len(set(weights)) < 2:
        return
    steps = "; ".join(f"{source} is at step {source.step}" for source in sources if source.step is not None)
    given = ",".join(f"{weight:.9g}" for weight in weights)
    some = ", ".join(map(str, sources[:4])) + (", ..." if len(sources) > 4 else "")
    raise EMAConfigError(
        f"scheme={scheme!r} counts from the oldest source, and nothing states the order of {some}: neither clocks, "
        f"trainer_state.json nor numbers at the end of otherwise equal names{f' ({steps})' if steps else ''}. "
        f"--weights {given} takes them in the order given"
    )
