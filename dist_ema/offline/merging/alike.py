"""Gives the sources of one model the same names: removes prefixes, and finds tied tensors that some sources
leave out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dist_ema.errors import CheckpointError, CheckpointMismatchError
from dist_ema.formats.strict_json import parse
from dist_ema.formats.tensors import ReadableTensor
from dist_ema.kernels.fingerprint import partial_digest
from dist_ema.offline.merging.sources import Source
from dist_ema.storage.local import open_plain
from dist_ema.storage.paths import is_remote, local_path

#: Elements that are read at a time to compare two tensors.
_PIECE = 1 << 18
#: Tied tensors of one model at most: where more are missing, it is another model.
_TIES = 64
_CONFIG_BYTES = 1 << 24
_CONFIG_DEPTH = 32


# Prefixes.


def under_common_names(sources: Sequence[Source]) -> list[Source]:
    """Removes a prefix from the names of a source if they then are exactly those of the others.

    ``{"model": ...}`` in a directory of torch.distributed.checkpoint gives every name the prefix ``model.``. The notes
    of the source say that a prefix was removed, and what was left out with it.

    Raises CheckpointError if two prefixes of one source are possible.
    """
    for reference in reversed(sources):
        found = [source if _same_names(source, reference) else _cut_alike(source, reference) for source in sources]
        if all(source is not None for source in found):
            return [source for source in found if source is not None]
    return list(sources)  # check_alike() says what differs


def _same_names(a: Source, b: Source) -> bool:
    return not _lacking(a, b) and not _lacking(b, a)


def _is_alike(a: Source, b: Source) -> bool:
    """Returns whether names and shapes are the same. A short list of names alone may belong to another module by
    chance.
    """
    return _same_names(a, b) and all(
        (other := b.get(name, tensor.aliases)) is not None and other.shape == tensor.shape
        for name, tensor in a.tensors.items()
    )


def _lacking(source: Source, other: Source) -> list[str]:
    """Returns the names in ``other`` that a source does not have under any name."""
    return [name for name, tensor in other.tensors.items() if source.get(name, tensor.aliases) is None]


def _cut_alike(source: Source, reference: Source) -> Source | None:
    """Returns the source without the prefix that makes its names those of the reference; None if there is no such
    prefix.
    """
    if not reference.tensors:
        return None
    # The longest name of the reference is rarely the end of an unrelated name, so few prefixes have to be tried.
    longest = max(reference.tensors, key=len)
    prefixes = [name.removesuffix(longest) for name in source.tensors if name.endswith(f".{longest}")]
    fitting = {prefix: cut for prefix in prefixes if _is_alike(cut := source.cut(prefix), reference)}
    if len(fitting) > 1:
        choices = " or ".join(f"--prefix {prefix.removesuffix('.')}" for prefix in fitting)
        raise CheckpointError(
            f"{source} has the names of {reference} under {', '.join(map(repr, fitting))}: give {choices}"
        )
    if not fitting:
        return None
    ((prefix, cut),) = fitting.items()
    left = len(source.tensors) - len(cut.tensors)
    others = f"; left out are {left} other tensors" if left else ""
    note = (
        f"{source.path}: taken are the {len(cut.tensors)} tensors under {prefix!r}, whose names are those of the others"
    )
    return replace(cut, notes=(*source.notes, note + others))


# Ties.


def with_ties(sources: Sequence[Source]) -> list[Source]:
    """Finds tensors that a source leaves out because they are tied: ``save_pretrained`` writes a tied tensor once.

    A name that one source lacks counts as tied there if every source that has it holds the same elements, bit for bit,
    under a second name, which the first source has. Only tensors of two or more dimensions with different elements are
    regarded as tied: vectors of zeros or ones are often equal by chance.
    """
    found = list(sources)
    digests: dict[tuple[int, str], tuple[int, bool]] = {}
    for number, source in enumerate(sources):
        wanted = {name: tensor for other in sources for name, tensor in other.tensors.items() if not source.get(name)}
        missing = {name: tensor for name, tensor in wanted.items() if source.get(name, tensor.aliases) is None}
        if not 0 < len(missing) <= _TIES or _says_untied(source):
            continue
        tied = {}
        for name, tensor in missing.items():
            holders = [other for other in sources if other.get(name) is not None]
            equal = [set(_equal_names(other, name, tensor, digests, id(other))) for other in holders]
            names = [known for known in source.names if all(known in one for one in equal)]
            if len({source.names[known] for known in names}) == 1:
                tied[name] = source.names[names[0]]
        if tied:
            some = ", ".join(f"{name!r} is {other!r}" for name, other in list(tied.items())[:4])
            note = f"{source.path} lacks {len(tied)} tensors that are tied, as their elements in the others say: {some}"
            found[number] = replace(source, tied={**source.tied, **tied}, notes=(*source.notes, note))
    return found


def _equal_names(
    source: Source, name: str, tensor: ReadableTensor, digests: dict[tuple[int, str], tuple[int, bool]], owner: int
) -> list[str]:
    """Returns further names of tensors of a source that have the same elements as one of its tensors."""

    def digest(own: str) -> tuple[int, bool]:
        key = (owner, source.names[own])
        if key not in digests:
            digests[key] = _digest(source.tensors[source.names[own]])
        return digests[key]

    held = source.tensors[source.names[name]]
    if len(held.shape) < 2 or held.shape != tensor.shape or not held.numel:
        return []
    alike = [
        known
        for known, own in source.names.items()
        if known != name and (source.tensors[own].shape, source.tensors[own].dtype) == (held.shape, held.dtype)
    ]
    # Digests are read only if another tensor has this shape and dtype. Constant tensors do not count as tied.
    if not alike or not digest(name)[1]:
        return []
    return [known for known in alike if digest(known)[0] == digest(name)[0]]


def _digest(tensor: ReadableTensor) -> tuple[int, bool]:
    """Returns the fingerprint of a tensor, and whether its elements differ from each other."""
    total = 0
    varied = False
    buffer = torch.empty(min(_PIECE, tensor.numel), dtype=tensor.dtype)
    bits = torch.empty(0, dtype=torch.uint8)
    for start in range(0, tensor.numel, _PIECE):
        values = buffer[: min(_PIECE, tensor.numel - start)]
        tensor.read(start, start + values.numel(), values)
        total += partial_digest(values, ((start, values.numel()),))
        rows = values.view(torch.uint8).view(-1, values.itemsize)
        bits = bits if bits.numel() else rows[0].clone()
        varied = varied or bool((rows != bits).any())
    return total % (1 << 64), varied


def _says_untied(source: Source) -> bool:
    """Returns whether the configuration beside a source says that nothing is tied."""
    if source.kind != "pretrained" or is_remote(source.path):
        return False
    place = local_path(source.path)
    try:
        with open_plain((place if place.is_dir() else place.parent) / "config.json") as file:
            config = parse(file.read(_CONFIG_BYTES), depth=_CONFIG_DEPTH)
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("tie_word_embeddings") is False


# What has to be alike.


def check_alike(sources: Sequence[Source]) -> None:
    """Raises CheckpointMismatchError, listing all, unless every source has the tensors of the last one, in its shapes.

    Floating-point dtypes may differ. Raises CheckpointError for a source without tensors.
    """
    newest = sources[-1]
    for source in sources:
        if not source.tensors:
            raise CheckpointError(f"{source} has no tensors")
    problems = []
    for source in sources[:-1]:
        for name, tensor in newest.tensors.items():
            other = source.get(name, tensor.aliases)
            if other is None:
                problems.append(f"{source} has no {name!r}")
            elif other.shape != tensor.shape:
                problems.append(f"{name!r} is {other.shape} in {source} and {tensor.shape} in {newest}")
            elif _kind(other.dtype) != _kind(tensor.dtype):
                problems.append(f"{name!r} is {other.dtype} in {source} and {tensor.dtype} in {newest}")
        unknown = [name for name in source.tensors if newest.get(name, source.tensors[name].aliases) is None]
        problems += [f"{newest} has no {name!r}, which {source} has" for name in unknown]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointMismatchError(f"these are not checkpoints of one model (see also --prefix, --key): {shown}")


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex
