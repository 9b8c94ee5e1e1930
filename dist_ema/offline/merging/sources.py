"""Checkpoints of four kinds as named tensors of which ranges can be read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dist_ema.checkpoints.dtypes import DTYPES
from dist_ema.checkpoints.manifest import LIVE, NAME, Manifest
from dist_ema.checkpoints.reader import RunReader
from dist_ema.checkpoints.storage.paths import StrPath, check_path, is_remote, local_path
from dist_ema.checkpoints.versions import read_manifest
from dist_ema.errors import CheckpointError, CheckpointMismatchError, EMAConfigError
from dist_ema.importers import dcp
from dist_ema.importers.foreign import LazyTensor, ties
from dist_ema.importers.pretrained import open_pretrained
from dist_ema.offline.merging.directories import open_dcp, open_pickle

#: ``read(start, stop, out)``: elements of the flattened tensor into a flat CPU tensor of the tensor's own dtype.
Read = Callable[[int, int, Tensor], None]


@dataclass(frozen=True)
class SourceTensor:
    """A full tensor of a source; several threads may read it at a time.

    Attributes:
        shape, dtype: of the full tensor.
        read: reads a range.
        aliases: other names of it, where it is tied.
        digest: its fingerprint, where the source has one to be held against.
        untracked: the source is an average, of which this is no part.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Read
    aliases: tuple[str, ...] = ()
    digest: int | None = None
    untracked: bool = False

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened.

    Attributes:
        path: as the user named it.
        kind: "average", "pretrained", "dcp" or "file".
        tensors: by name.
        average: which average of the checkpoint; None for the other kinds.
        manifest: of an average's checkpoint.
    """

    path: str
    kind: str
    tensors: Mapping[str, SourceTensor]
    average: str | None = None
    manifest: Manifest | None = None
    names: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = {known: name for name, tensor in self.tensors.items() for known in (name, *tensor.aliases)}
        object.__setattr__(self, "names", names)

    def __str__(self) -> str:
        return self.path if self.average is None else f"{self.path} ({self.average})"

    def get(self, name: str, others: Sequence[str] = ()) -> SourceTensor | None:
        """The tensor of a name, or of one of its aliases."""
        found = next((self.names[known] for known in (name, *others) if known in self.names), None)
        return None if found is None else self.tensors[found]


@contextmanager
def open_sources(paths: Sequence[StrPath], name: str | None, prefix: str | None) -> Iterator[list[Source]]:
    """Opens checkpoints; closes them at the end of the block.

    Args:
        paths: a directory or URL that :meth:`ShardedEMA.save` wrote; a directory of safetensors files; a directory of
            torch.distributed.checkpoint; or a file of torch.save.
        name: which average of the first kind; None means the only one.
        prefix: of the model's names in the last two, such as ``"model."``; the others are left out.

    Raises:
        EMAConfigError: no paths, or there is no such average.
        CheckpointError: there is none of these, or it is damaged; a pickle names code.
    """
    if isinstance(paths, (str, os.PathLike)) or not paths:
        raise EMAConfigError(f"sources={paths!r}: allowed is a list of paths")
    with ExitStack() as stack:
        yield [_open(path, name, prefix, stack) for path in paths]


def _open(path: StrPath, name: str | None, prefix: str | None, stack: ExitStack) -> Source:
    check_path(path)
    if is_remote(path):
        return open_average(path, read_manifest(path), name, stack)
    place = local_path(path)
    if (place / NAME).exists():
        return open_average(path, read_manifest(path), name, stack)
    if (place / dcp.METADATA).exists():
        return _source(path, "dcp", {name: _lazy(tensor) for name, tensor in open_dcp(place, prefix).items()})
    if place.is_dir():
        ranges = stack.enter_context(open_pretrained(place))
        if not ranges.tensors:
            raise CheckpointError(f"{place} has no checkpoint: neither {NAME}, {dcp.METADATA} nor safetensors files")
        found = {
            name: SourceTensor(shape, dtype, _range(ranges.read, name))
            for name, (shape, dtype) in ranges.tensors.items()
        }
        return _source(path, "pretrained", found)
    lazy = open_pickle(place, prefix)
    others = {group[0]: group[1:] for group in ties(lazy)}
    aliases = {name for group in others.values() for name in group}
    tensors = {name: _lazy(tensor, others.get(name, ())) for name, tensor in lazy.items() if name not in aliases}
    return _source(path, "file", tensors)


def _source(path: StrPath, kind: str, tensors: Mapping[str, SourceTensor]) -> Source:
    return Source(os.fspath(path), kind, tensors)


def open_average(path: StrPath, manifest: Manifest, name: str | None, stack: ExitStack) -> Source:
    """One average of a checkpoint, with what is not averaged. Raises as :func:`open_sources`."""
    average = manifest.choose(name)
    stored = manifest.tensors(average)
    reader = stack.enter_context(RunReader.of(path, manifest, stored))
    tensors = {}
    for key, tensor in stored.items():
        folder, own = key
        dtype = DTYPES[tensor.dtype]

        def read(start: int, stop: int, out: Tensor, key: tuple[str, str] = key) -> None:
            reader.read(key, ((start, stop - start),), out)

        tensors[own] = SourceTensor(tensor.shape, dtype, read, tensor.aliases, tensor.digest, folder == LIVE)
    return Source(os.fspath(path), "average", tensors, average, manifest)


def _range(read: Callable[[str, int, int, Tensor], None], name: str) -> Read:
    return lambda start, stop, out: read(name, start, stop, out)


def _lazy(tensor: LazyTensor, aliases: tuple[str, ...] = ()) -> SourceTensor:
    return SourceTensor(tensor.shape, tensor.dtype, tensor.read_range, aliases)


def check_alike(sources: Sequence[Source]) -> None:
    """Raises CheckpointMismatchError, listing all, unless every source has the tensors of the last one, in its shapes.

    What the last one has not is left out, which an older source may well have; floating-point dtypes may differ.
    """
    newest = sources[-1]
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
        raise CheckpointMismatchError(f"these are not checkpoints of one model (see also prefix=): {shown}")


def _kind(dtype: torch.dtype) -> tuple[bool, bool]:
    return dtype.is_floating_point, dtype.is_complex


def check_order(sources: Sequence[Source]) -> None:
    """Raises EMAConfigError if two averages, whose progress is known, are given the newer one first."""
    known = [(source, source.manifest.clock.batches) for source in sources if source.manifest is not None]
    for (before, earlier), (after, later) in itertools.pairwise(known):
        if later < earlier:
            raise EMAConfigError(
                f"{before} was saved at {earlier}ba and {after} at {later}ba: give the oldest first, as weights and "
                "schemes count from it"
            )
