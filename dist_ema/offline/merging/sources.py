"""Opens checkpoints of four kinds as named tensors of which ranges can be read."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dist_ema.checkpoints.reader import RunReader
from dist_ema.checkpoints.versions import checkpoints_in, reread
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats import dcp_directory as dcp
from dist_ema.formats.manifest import NAME, Manifest
from dist_ema.formats.strict_json import is_count, parse
from dist_ema.formats.tensors import Content, ReadableTensor
from dist_ema.importers.files import open_foreign
from dist_ema.importers.folders import choose_files
from dist_ema.importers.foreign import ties
from dist_ema.importers.pretrained import open_pretrained
from dist_ema.importers.state_dicts import choose
from dist_ema.storage.local import open_plain
from dist_ema.storage.paths import StrPath, check_path, is_remote, local_path

#: Entries of a training file with the number of optimizer steps.
_STEPS = ("global_step", "step", "iteration")
#: What the first part of an average's names in a directory of torch.distributed.checkpoint looks like.
_AVERAGE = re.compile(r"(^|_)(ema|swa|averaged?)(_|$)", re.IGNORECASE)
#: Bytes of ``trainer_state.json`` at most, and levels of its JSON. It has the whole history of the losses.
_STATE_BYTES = 1 << 28
_STATE_DEPTH = 32


@dataclass(frozen=True)
class Source:
    """Describes an open checkpoint.

    Attributes:
        path: the path as the user gave it.
        kind: "average", "pretrained", "dcp" or "file".
        tensors: the tensors by name.
        average: which average of the checkpoint; None for the other kinds.
        manifest: the manifest of an average's checkpoint; None for the other kinds.
        step: the number of optimizer steps, if the source states it.
        notes: one sentence for each choice that was made when several things could be meant.
        tied: further names of tensors. They serve to find a tensor, and are not written.
    """

    path: str
    kind: str
    tensors: Mapping[str, ReadableTensor]
    average: str | None = None
    manifest: Manifest | None = None
    step: int | None = None
    notes: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        names = {known: name for name, tensor in self.tensors.items() for known in (name, *tensor.aliases)}
        object.__setattr__(self, "names", {**self.tied, **names})

    def __str__(self) -> str:
        return self.path if self.average is None else f"{self.path} ({self.average})"

    def get(self, name: str, others: Sequence[str] = ()) -> ReadableTensor | None:
        """Returns the tensor of a name, or of one of its aliases."""
        found = next((self.names[known] for known in (name, *others) if known in self.names), None)
        return None if found is None else self.tensors[found]

    def cut(self, prefix: str) -> Source:
        """Returns the source with only the tensors whose names begin with ``prefix``, which is removed. There may be
        none.
        """
        tensors = {}
        for name, tensor in self.tensors.items():
            kept = [known.removeprefix(prefix) for known in (name, *tensor.aliases) if known.startswith(prefix)]
            if kept:
                tensors[kept[0]] = replace(tensor, aliases=tuple(kept[1:]))
        return replace(self, tensors=tensors, tied={})


@dataclass(frozen=True)
class Selection:
    """Selects the tensors of each source.

    Attributes:
        name: the average of a checkpoint; None means the only one.
        key: a dict of tensors inside a file, a file of a folder, or a part of the names of a DCP directory; in a
            checkpoint an average, as ``name``.
        prefix: only tensors whose names begin with this prefix.
    """

    name: str | None = None
    key: str | None = None
    prefix: str | None = None


@contextmanager
def open_sources(paths: Sequence[StrPath], wanted: Selection) -> Iterator[list[Source]]:
    """Opens checkpoints, and closes them at the end of the block.

    Args:
        paths: each is a directory or URL that :meth:`ShardedEMA.save` wrote, a directory of safetensors files, a
            directory of torch.distributed.checkpoint, or a file of torch.save or safetensors.
        wanted: which tensors in them.

    Raises:
        EMAConfigError: no paths, or there is no such average.
        CheckpointError: a path is none of these, several things could be meant, or a pickle names code.
        CheckpointCorruptError: one of them is damaged.
    """
    if isinstance(paths, (str, os.PathLike)) or not paths:
        raise EMAConfigError(f"sources={paths!r}: allowed is a list of paths")
    with ExitStack() as stack:
        yield [open_source(path, wanted, stack) for path in paths]


def open_source(path: StrPath, wanted: Selection, stack: ExitStack) -> Source:
    """Opens one checkpoint until ``stack`` is closed. Raises as :func:`open_sources` does."""
    check_path(path)
    if is_remote(path) or (local_path(path) / NAME).exists():
        # A save may replace the checkpoint between the manifest and the files.
        opened = reread(path, lambda manifest: open_average(path, manifest, wanted.name or wanted.key, stack))
        return _within(opened, wanted.prefix)
    place = local_path(path)
    if place.is_dir() and not (place / dcp.METADATA).exists():
        return _within(_open_folder(path, place, wanted.key, stack), wanted.prefix)
    if place.suffix == ".safetensors" and place.is_file():
        found = _open_files(path, {place: None}, stack)
        return _within(found if wanted.key is None else found.cut(f"{wanted.key}."), wanted.prefix)
    return open_named(path, place, wanted.key, wanted.prefix)


def open_named(path: StrPath, place: Path, key: str | None, prefix: str | None) -> Source:
    """Opens a file of torch.save, or a directory of torch.distributed.checkpoint. Raises as
    :func:`open_sources` does.
    """
    content = open_foreign(place)
    averaged = None if key is not None or prefix is not None else average_in_dcp(content)
    choice = choose(content, str(place), key=key or averaged, prefix=prefix)
    notes = choice.notes
    if averaged is not None:
        notes = (f"{place}: taken is {averaged!r}, the average, and not the live weights beside it", *notes)
    taken = {**choice.live, **choice.tensors}
    others = {group[0]: group[1:] for group in ties(taken)}
    aliases = {name for group in others.values() for name in group}
    tensors = {}
    for name, lazy in taken.items():
        if name not in aliases:
            is_live = name in choice.live
            own = others.get(name, ())
            tensors[name] = ReadableTensor(lazy.shape, lazy.dtype, lazy.read_range, own, untracked=is_live)
    step = trainer_step(place.parent)
    if step is None and content.kind == "file":
        step = next((content.values[word] for word in _STEPS if is_count(content.values.get(word))), None)
    return Source(os.fspath(path), content.kind, tensors, step=step, notes=notes)


def average_in_dcp(content: Content) -> str | None:
    """Returns the prefix of the names of an average that is stored beside live weights of the same names; None if there
    is none.
    """
    groups: dict[str, set[str]] = {}
    for name in content.tensors if content.kind == "dcp" else ():
        first, dot, rest = name.partition(".")
        if dot:
            groups.setdefault(first, set()).add(rest)
    averages = [first for first in groups if _AVERAGE.search(first)]
    others = [names for first, names in groups.items() if first not in averages]
    found = [first for first in averages if any(groups[first] <= names for names in others)]
    return found[0] if len(found) == 1 else None


def trainer_step(place: Path) -> int | None:
    """Returns the step that transformers' trainer has written beside a checkpoint; None if there is none."""
    try:
        with open_plain(place / "trainer_state.json") as file:
            found = parse(file.read(_STATE_BYTES), depth=_STATE_DEPTH)
    except (OSError, ValueError):
        return None
    step = found.get("global_step") if isinstance(found, dict) else None
    return step if is_count(step) else None


def _within(source: Source, prefix: str | None) -> Source:
    """Returns the part of a source under a prefix. Raises CheckpointError if there is none."""
    if prefix is None:
        return source
    found = source.cut(prefix.removesuffix(".") + ".")
    if not found.tensors:
        begins = sorted({name.partition(".")[0] for name in source.tensors})
        some = ", ".join(begins[:8]) + (", ..." if len(begins) > 8 else "")
        raise CheckpointError(f"{source}: --prefix {prefix} begins no name; names begin with {some}")
    return found


def _open_folder(path: StrPath, place: Path, key: str | None, stack: ExitStack) -> Source:
    try:
        weights = choose_files(place, key)
    except CheckpointError as error:
        if inside := checkpoints_in(place):
            raise CheckpointError(f"{error}. There is an average of this library in {inside[0]}: give that") from error
        raise
    notes = [f"{place}: {weights.note}"] if weights.note else []
    if key is None and (inside := checkpoints_in(place, levels=1)):
        notes.append(f"{place}: taken is {weights.taken}; the average beside it is {inside[0]}")
    opened = _open_files(path, weights.files, stack)
    return replace(opened, notes=tuple(notes), step=trainer_step(place))


def _open_files(path: StrPath, files: Mapping[Path, Collection[str] | None], stack: ExitStack) -> Source:
    return Source(os.fspath(path), "pretrained", stack.enter_context(open_pretrained(files)))


def open_average(path: StrPath, manifest: Manifest, name: str | None, stack: ExitStack) -> Source:
    """Opens one average of a checkpoint, with the tensors that are not averaged. Raises as :func:`open_sources`
    does.
    """
    average = manifest.choose(name)
    stored = manifest.tensors(average)
    reader = stack.enter_context(RunReader.of(path, manifest, stored))
    tensors = {key[1]: reader.tensor(key) for key in stored}
    return Source(os.fspath(path), "average", tensors, average, manifest, manifest.clock.batches)
