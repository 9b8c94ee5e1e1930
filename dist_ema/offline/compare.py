"""Compares two checkpoints, or a checkpoint and its export, tensor by tensor: one process and bounded memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema.checkpoints.file_values import Advance, no_advance
from dist_ema.checkpoints.reader import RunReader, damaged_error
from dist_ema.checkpoints.versions import reread
from dist_ema.errors import CheckpointMismatchError, EMAConfigError
from dist_ema.formats.manifest import LIVE, NAME, Key, Manifest
from dist_ema.formats.stored import StoredTensor
from dist_ema.formats.tensors import ReadableTensor
from dist_ema.offline.merging.sources import Selection, Source, open_source
from dist_ema.offline.verify import VerifiedTensor, verified
from dist_ema.storage.paths import StrPath, check_path, is_remote, local_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """Describes how one tensor differs between two checkpoints, A and B. Norms are Euclidean and computed in float64.

    Attributes:
        average: the name of the average; None for a tensor that is not averaged.
        name: the name of the tensor in A.
        equal: whether dtype and every bit are the same. (0.0 and -0.0 are equal values with different bits.)
        norm: the norm of A.
        distance: the norm of A - B.
        largest: the largest absolute difference of one element.
    """

    average: str | None
    name: str
    equal: bool
    norm: float
    distance: float
    largest: float

    @property
    def relative(self) -> float:
        """Returns ``distance / norm``: 0 if both are 0, infinite if only the norm is 0.

        >>> Difference(None, "weight", equal=False, norm=2.0, distance=0.5, largest=0.25).relative
        0.25
        """
        if not self.distance:
            return 0.0
        return self.distance / self.norm if self.norm else math.inf * self.distance


def compare(
    a: StrPath, b: StrPath, *, name: str | None = None, begin: Callable[[int], Advance] | None = None
) -> list[Difference]:
    """Compares the tensors of two checkpoints, but not their clocks and schedules. One process.

    Tensors are paired by name, tied ones by any of their names, and checked against their fingerprints. Tensors that
    one of the checkpoints was saved without (``Manifest.lacking``) are not compared.

    Args:
        a, b: paths of the checkpoints. Each may also be anything that :func:`dist_ema.merge` reads: an export or
            another Hugging Face folder, a training file.
        name: compare only this average, with the tensors that are not averaged; None means all averages, or the only
            one if a checkpoint is compared with something else.
        begin: called with the number of bytes to read; returns the function that is called with the progress.

    Returns:
        One entry for each tensor, in descending order of the distance relative to the norm.

    Raises:
        CheckpointMismatchError: the two differ in names or shapes. Lists all missing and mismatched tensors.
        CheckpointError, CheckpointCorruptError: one of them is no checkpoint, or is damaged.
        EMAConfigError: one of them has no average ``name``.

    >>> import tempfile
    >>> from dist_ema import ShardedEMA
    >>> model = torch.nn.Linear(3, 2)
    >>> ema = ShardedEMA(model, decay=0.9)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ema.save(f"{folder}/before")
    ...     with torch.no_grad():
    ...         _ = model.bias.add_(0.5)
    ...     ema.save(f"{folder}/after")
    ...     found = compare(f"{folder}/before", f"{folder}/after")
    >>> [(difference.name, difference.equal, round(difference.largest, 4)) for difference in found]
    [('bias', False, 0.5), ('weight', True, 0.0)]
    """
    if not (is_checkpoint(a) and is_checkpoint(b)):
        return _compare_sources(a, b, name, begin)
    return reread(a, lambda first: reread(b, lambda second: _compare((a, b), first, second, name, begin)))


def is_checkpoint(path: StrPath) -> bool:
    """Returns whether a path is a checkpoint of this library, or nothing that could be anything else."""
    check_path(path)
    if is_remote(path):
        return True
    place = local_path(path)
    return (place / NAME).exists() or not place.exists()


# Of which one is something else.


def _compare_sources(
    a: StrPath, b: StrPath, name: str | None, begin: Callable[[int], Advance] | None
) -> list[Difference]:
    """Does what :func:`compare` does if one of the two is no checkpoint of this library."""
    with ExitStack() as stack:
        try:
            left, right = (open_source(path, Selection(name=name), stack) for path in (a, b))
        except EMAConfigError as error:
            raise EMAConfigError(f"{error}; one of them is compared with an export (--name)") from error
        for source in (left, right):
            for note in source.notes:
                logger.warning("%s", note)
        pairs = _pairs(left, right)
        advance = begin(sum(tensor.nbytes for _, tensor, _ in pairs)) if begin else no_advance
        found = []
        for own, ours, theirs in pairs:
            average = None if ours.untracked or theirs.untracked else left.average or right.average
            found.append(
                _compare_chunks(average, own, _verified(left, own, ours), _verified(right, own, theirs), advance)
            )
    return sorted(found, key=_order)


def _pairs(left: Source, right: Source) -> list[tuple[str, ReadableTensor, ReadableTensor]]:
    """Returns the tensors of two sources by the name in the first. Raises CheckpointMismatchError, which lists all
    differences.
    """
    lacking = {name for source in (left, right) if source.manifest for name in source.manifest.lacking}
    pairs = []
    problems = []
    for one, other in ((left, right), (right, left)):
        for name, tensor in one.tensors.items():
            found = other.get(name, tensor.aliases)
            if found is None and lacking.isdisjoint((name, *tensor.aliases)):
                problems.append(f"{name!r} is missing in {other}")
            elif found is not None and found.shape != tensor.shape:
                problems.append(f"{name!r} has the shapes {tensor.shape} in {one} and {found.shape}")
            elif found is not None and one is left:
                pairs.append((name, tensor, found))
    if problems:
        some = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointMismatchError(f"{left} and {right} do not hold the same tensors: {some}")
    return pairs


def _verified(source: Source, name: str, tensor: ReadableTensor) -> VerifiedTensor:
    """Returns a tensor of a source, which is verified if the source has a fingerprint of it."""
    return VerifiedTensor(tensor, damaged_error(source.path, [repr(name)]))


# Of checkpoints of this library.


def _compare(
    paths: tuple[StrPath, StrPath],
    first: Manifest,
    second: Manifest,
    name: str | None,
    begin: Callable[[int], Advance] | None,
) -> list[Difference]:
    ours, theirs = (manifest.tensors(name and manifest.choose(name)) for manifest in (first, second))
    pairs = _match(paths, ours, theirs, {*first.lacking, *second.lacking})
    with RunReader.of(paths[0], first, ours) as left, RunReader.of(paths[1], second, theirs) as right:
        advance = begin(sum(tensor.nbytes for tensor in ours.values())) if begin else no_advance
        found = [
            _compare_chunks(
                None if key[0] == LIVE else key[0].removeprefix("averages/"),
                key[1],
                verified(left, key, ours[key]),
                verified(right, other, theirs[other]),
                advance,
            )
            for key, other in pairs.items()
        ]
    return sorted(found, key=_order)


def _match(
    paths: tuple[StrPath, StrPath],
    ours: dict[Key, StoredTensor],
    theirs: dict[Key, StoredTensor],
    lacking: set[str],
) -> dict[Key, Key]:
    """Returns the key in B of each tensor in A. Live tensors that one checkpoint was saved without are left out."""
    by_name = {(key[0], known): key for key, tensor in theirs.items() for known in (key[1], *tensor.aliases)}
    pairs: dict[Key, Key] = {}
    problems: list[str] = []
    for key, tensor in ours.items():
        other = next(
            (by_name[key[0], known] for known in (key[1], *tensor.aliases) if (key[0], known) in by_name), None
        )
        # Either checkpoint may have been saved without live tensors, which its manifest then lists.
        if other is None and key[0] == LIVE and not lacking.isdisjoint((key[1], *tensor.aliases)):
            continue
        if other is None:
            problems.append(f"{_shown(key)} is missing in {paths[1]}")
            continue
        pairs[key] = other
        if theirs[other].shape != tensor.shape:
            problems.append(f"{_shown(key)} has the shapes {tensor.shape} and {theirs[other].shape}")
    # Tensors of B without a partner in A.
    met = set(pairs.values())
    unmet = {key: tensor for key, tensor in theirs.items() if key not in met}
    for key, tensor in unmet.items():
        if key[0] != LIVE or lacking.isdisjoint((key[1], *tensor.aliases)):
            problems.append(f"{_shown(key)} is missing in {paths[0]}")
    if problems:
        raise CheckpointMismatchError(f"{paths[0]} and {paths[1]} do not hold the same tensors: {'; '.join(problems)}")
    return pairs


def _shown(key: Key) -> str:
    return f"{key[1]!r} ({key[0]})"


def _compare_chunks(
    average: str | None, name: str, a: VerifiedTensor, b: VerifiedTensor, advance: Advance
) -> Difference:
    equal = a.dtype == b.dtype
    norm = 0.0
    distance = 0.0
    largest = 0.0
    # Chunk by chunk in float64, where sums of squares of fp32 values lose nothing that matters.
    for x, y in zip(a.chunks(), b.chunks(), strict=True):
        left = _real(x)
        norm += float(left.square().sum())
        # Equal bits are at no distance, even where they are NaN or infinite.
        if a.dtype != b.dtype or not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
            equal = False
            apart = left.sub_(_real(y)).abs_()
            largest = _larger(largest, float(apart.max()))
            distance += float(apart.square_().sum())
        advance(x.nbytes)
    return Difference(average, name, equal, math.sqrt(norm), math.sqrt(distance), largest)


def _real(values: Tensor) -> Tensor:
    """Returns a copy in float64; complex numbers as pairs."""
    return (torch.view_as_real(values) if values.is_complex() else values).to(torch.float64, copy=True)


def _larger(one: float, other: float) -> float:
    """Returns the larger of the two, and NaN if either is."""
    return math.nan if math.isnan(one) or math.isnan(other) else max(one, other)


def _order(found: Difference) -> tuple[bool, float]:
    """Returns a sort key: NaN first, then the largest relative distance, equal tensors last."""
    relative = math.inf if math.isnan(found.relative) else found.relative
    return found.equal, -relative
