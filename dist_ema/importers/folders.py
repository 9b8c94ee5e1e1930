"""Finds the safetensors files of a folder that are the model.

A folder may hold more than one thing: the same weights under other names (``consolidated.safetensors``), variants
(``*.fp16.*``, ``*.non_ema.*``), an average beside the live weights, an optimizer's state, a file that corrects another.
The first of these rules that applies decides:

1. what ``key`` names;
2. what the index names, ``model.safetensors.index.json`` or ``diffusion_pytorch_model.safetensors.index.json``: each
   tensor from the file to which the index points, and nothing else;
3. ``model.safetensors`` or ``diffusion_pytorch_model.safetensors``;
4. the only file, or the only set of files ``...-00001-of-0000n.safetensors``.

Everything else is refused, with a list of what there is and the option that selects each.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dist_ema.errors import CheckpointCorruptError, CheckpointError
from dist_ema.formats.strict_json import parse, shown
from dist_ema.storage.local import open_plain

_SUFFIX = ".safetensors"
#: Names that readers of such folders look for, without suffix.
_STEMS = ("model", "diffusion_pytorch_model")
#: ``model.safetensors.index.json``, or with a variant ``model.safetensors.index.fp16.json``.
_INDEX = re.compile(r".*\.safetensors\.index(\.[^.]+)?\.json")
_SHARD = re.compile(r"(.*)-(\d{2,})-of-(\d{2,})(.*)\.safetensors")
#: Bytes of an index at most, and levels of its JSON: the index, its map, a name.
_INDEX_BYTES = 1 << 27
_INDEX_DEPTH = 8
_LISTED = 12
#: Number of shards above which the missing files of a set are not looked for.
_MOST_SHARDS = 100_000


@dataclass(frozen=True)
class Weights:
    """Lists the files of one model in a folder.

    Attributes:
        taken: the file or index that represents them.
        files: the names of the tensors to take from each file; None means all of its tensors.
        others: other files in the folder that could have been meant.
    """

    taken: str
    files: Mapping[Path, Collection[str] | None]
    others: tuple[str, ...] = ()

    @property
    def note(self) -> str | None:
        """Returns one sentence on what was taken; None if there was no choice."""
        if not self.others:
            return None
        return f"taken is {self.taken}; not taken: {_listed(self.others)} (--key takes another)"


def choose_files(folder: Path, key: str | None = None) -> Weights:
    """Finds the model's files in a folder. Reads the index, if there is one, and no tensor.

    Args:
        folder: the folder. Folders inside it are not searched.
        key: name of a file, with or without ``.safetensors``, or of an index.

    Raises:
        CheckpointError: there is nothing to take, or more than one possibility, or a file that belongs to it is
            missing.
        CheckpointCorruptError: the index cannot be parsed.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    indexes = [name for name in names if _INDEX.fullmatch(name)]
    files = [name for name in names if name.endswith(_SUFFIX) and not name.startswith(".")]
    if key is not None:
        return _named(folder, key, indexes, files)
    # First choice: an index of the usual name, or the only index where no file has a usual name. It stands for the
    # files that it names. Only the chosen index is read.
    main = [name for name in indexes if name.removesuffix(".safetensors.index.json") in _STEMS]
    if len(main) == 1 or (len(indexes) == 1 and not _plain(files)):
        return _indexed(folder, (main or indexes)[0], [*indexes, *_grouped(files)])
    # Second choice: the one file or set of shards of a usual name, or the only thing in the folder. Several indexes of
    # usual names rule out the first: each of them may be the model.
    groups = _grouped(files)
    plain = [] if main else _plain(groups)
    if len(plain) == 1 or len(groups) + len(indexes) == 1:
        return _files(folder, (plain or [*groups])[0], groups, indexes)
    # Nothing decides: list what there is.
    if not groups and not indexes:
        raise CheckpointError(f"{folder} has no safetensors files{_instead(folder, names)}")
    offered = _listed([f"{name} (--key {name})" for name in (*indexes, *groups)])
    raise CheckpointError(f"{folder} has several models, and nothing says which to take: {offered}")


def _named(folder: Path, key: str, indexes: list[str], files: list[str]) -> Weights:
    """Returns the index, the set of shards or the file that ``key`` names. Raises CheckpointError if none does."""
    groups = _grouped(files)
    for name in (key, f"{key}{_SUFFIX}.index.json", f"{key}{_SUFFIX}"):
        if name in indexes:
            return _indexed(folder, name, [])
        if name in groups:
            return _files(folder, name, groups, [])
        if name in files:
            # One shard of a set was asked for, so only that one is taken.
            return Weights(name, {folder / name: None})
    offered = _listed([f"{name} (--key {name})" for name in (*indexes, *groups)]) or "no safetensors files"
    raise CheckpointError(f"{folder}: there is no file for --key {key}; it has {offered}")


def _plain(names: Collection[str]) -> list[str]:
    """Lists the files that readers of such folders look for: single files first, then sets of shards."""
    single = [f"{stem}{_SUFFIX}" for stem in _STEMS if f"{stem}{_SUFFIX}" in names]
    return single or [name for name in names if "*" in name and name.partition("-")[0] in _STEMS]


def _grouped(files: list[str]) -> dict[str, list[str]]:
    """Groups the files: a single file by its own name, a set of shards by ``model-*-of-00002.safetensors``."""
    groups: dict[str, list[str]] = {}
    for name in files:
        match = _SHARD.fullmatch(name)
        label = f"{match[1]}-*-of-{match[3]}{match[4]}{_SUFFIX}" if match else name
        groups.setdefault(label, []).append(name)
    return groups


def _files(folder: Path, label: str, groups: Mapping[str, list[str]], indexes: list[str]) -> Weights:
    """Returns the files of a group of :func:`_grouped`. Raises CheckpointError if a shard of the set is missing."""
    others = (*indexes, *(name for name in groups if name != label))
    if match := _SHARD.fullmatch(groups[label][0]):
        width = len(match[2])
        wanted = [f"{match[1]}-{number:0{width}d}-of-{match[3]}{match[4]}{_SUFFIX}" for number in _numbers(match[3])]
        missing = [name for name in wanted if name not in groups[label]]
        if missing:
            raise CheckpointError(
                f"{folder} has no {_listed(missing)}, and has {len(groups[label])} of the {len(wanted)} files of this "
                "model: fetch what is missing"
            )
    return Weights(label, {folder / name: None for name in groups[label]}, others)


def _numbers(count: str) -> range:
    """Returns the numbers of the shards of a set, from 1. Bounded, since a file's name may claim any count."""
    return range(1, min(int(count), _MOST_SHARDS) + 1)


def _indexed(folder: Path, index: str, candidates: list[str]) -> Weights:
    """Returns the files that an index names. Raises CheckpointError if one is missing.

    Args:
        folder: the folder of the index.
        index: its name.
        candidates: the indexes and groups of files that could have been chosen, for the note on what was left out.
    """
    wanted: dict[str, list[str]] = {}
    for name, file in _weight_map(folder / index).items():
        wanted.setdefault(file, []).append(name)
    missing = [file for file in wanted if not (folder / file).exists()]
    if missing:
        lost = [name for file in missing for name in wanted[file]]
        raise CheckpointError(
            f"{folder} has no {_listed(missing)}, which {index} names for {len(lost)} tensors ({_listed(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}): fetch what is missing"
        )
    covered = _grouped(list(wanted)).keys() | wanted.keys()
    others = tuple(name for name in candidates if name != index and name not in covered)
    return Weights(index, {folder / file: names for file, names in wanted.items()}, others)


def _weight_map(path: Path) -> dict[str, str]:
    """Returns the file of each tensor. Raises CheckpointCorruptError, also for a file outside of the folder."""
    try:
        with open_plain(path) as opened:
            text = opened.read(_INDEX_BYTES + 1)
        if len(text) > _INDEX_BYTES:
            raise ValueError(f"it has more than {_INDEX_BYTES} bytes")
        found = parse(text, depth=_INDEX_DEPTH)["weight_map"]
        for name, file in found.items():
            place = PurePosixPath(file)
            if not isinstance(name, str) or place.is_absolute() or ".." in place.parts or not file.endswith(_SUFFIX):
                raise ValueError(f"{shown(file)} is not a safetensors file of this folder")
        if not found:
            raise ValueError("its weight_map is empty")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"{path} is not an index of safetensors files: {str(error)[:200]}") from error
    return dict(found)


def _instead(folder: Path, names: list[str]) -> str:
    """Returns what could be meant in a folder without safetensors files, for the error."""
    inside = [name for name in names if (folder / name).is_dir() and any((folder / name).glob(f"*{_SUFFIX}"))]
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if inside:
        return f"; there are some in {_listed([str(folder / name) for name in inside])}: give one of these"
    if pickled:
        return f"; give the file that is meant: {_listed([str(folder / name) for name in pickled])}"
    return ""


def _listed(names: Collection[str]) -> str:
    shown_names = list(names)[:_LISTED]
    return ", ".join(shown_names) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
