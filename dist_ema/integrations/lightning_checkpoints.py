"""Places the average of a Lightning checkpoint, and orders the two writes.

The average of ``run.ckpt`` is ``run.ckpt.ema``. The average of a checkpoint that is a directory is ``ema`` in it.
A save takes three steps:

1. Write the average under a name of its own: ``.dist_ema-next-<hash of the checkpoint's name>``.
2. Write the checkpoint. The state of the callback in it says at which clock its average is.
3. Rename the average to its place.

A process that is killed after step 1 leaves the old checkpoint with its average. A process that is killed after step 2
leaves the new checkpoint, whose average :func:`find` takes from its first name. That name does not contain the name of
the checkpoint: on Slurm, Lightning takes every name that contains ``hpc_ckpt_`` for a checkpoint (lightning 2.6.6).

An object store has no renames. There the checkpoint is written first and its average second.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

import fsspec

from dist_ema.checkpoints.versions import read_manifest
from dist_ema.errors import CheckpointError
from dist_ema.schedules.clock import Progress
from dist_ema.storage.local import remove_tree
from dist_ema.storage.paths import is_remote, local_path
from dist_ema.storage.staging import name_hash, remove_leftovers, replace_directory

_NEXT = ".dist_ema-next-"
#: Seconds after which an average that belongs to no checkpoint is removed. Until then a run may still be writing it.
_OLD = 3600.0


def describe(clock: Progress, updates: int) -> str:
    """Returns a name for one moment of an average. The checkpoint and its average both have it."""
    return f"{clock}, {updates} updates"


def first_place(checkpoint: str) -> str | None:
    """Returns the path to which an average is written before its checkpoint; None at a URL, where it is written
    afterwards.
    """
    return None if is_remote(checkpoint) else os.fspath(_next_of(checkpoint))


def place(checkpoint: str) -> str:
    """Returns the path of the average of an existing checkpoint."""
    return f"{checkpoint}/ema" if _is_directory(checkpoint) else f"{checkpoint}.ema"


def settle(checkpoint: str) -> None:
    """Renames an average from its first path to its final one. On one rank. Raises CheckpointError."""
    first = _next_of(checkpoint)
    last = place(checkpoint)
    try:
        replace_directory(first, local_path(last))
    except OSError as error:
        raise CheckpointError(
            f"the average of {checkpoint} cannot be renamed to {last} and stays at {first}, "
            f"where ckpt_path={checkpoint!r} finds it: {error}"
        ) from error


def find(checkpoint: str, moment: str | None) -> str | None:
    """Returns the average of a checkpoint, or None if it has none.

    Args:
        checkpoint: a file or a directory. A symbolic link, as ``save_last="link"`` makes it, leads to another one.
        moment: what the checkpoint says of its average, by :func:`describe`; None if it says nothing.
    """
    if os.path.islink(checkpoint):  # noqa: PTH114 - or a URL
        checkpoint = os.path.realpath(checkpoint)
    places = [f"{checkpoint}/ema", f"{checkpoint}.ema"]
    if not is_remote(checkpoint):
        places.append(os.fspath(_next_of(checkpoint)))
    found = [path for path in places if _is_directory(path)]
    fitting = [path for path in found if moment is not None and _moment(path) == moment]
    return next(iter(fitting + found), None)


def remove(checkpoint: str) -> None:
    """Removes the average of a checkpoint that was removed. On one rank."""
    system, path = fsspec.url_to_fs(f"{checkpoint}.ema")
    if system.isdir(path):
        system.rm(path, recursive=True)
    if not is_remote(checkpoint):
        remove_tree(_next_of(checkpoint))


def clean(folders: Iterable[str]) -> None:
    """Removes what killed processes left in folders of checkpoints. On one rank.

    These are unfinished averages, and averages that wait for a checkpoint that was never written.
    """
    for folder in {local_path(folder) for folder in folders if not is_remote(folder)}:
        if not folder.is_dir():
            continue
        remove_leftovers(folder)
        known = {_NEXT + name_hash(found) for found in folder.iterdir()}
        for found in folder.glob(f"{_NEXT}*"):
            if found.name not in known and time.time() - found.stat().st_mtime > _OLD:
                remove_tree(found)


def _next_of(checkpoint: str) -> Path:
    path = local_path(checkpoint)
    return path.parent / f"{_NEXT}{name_hash(path)}"


def _moment(path: str) -> str | None:
    """Returns the moment of the average at ``path``; None if it cannot be read. Loading it will raise the reason."""
    try:
        state = read_manifest(path).state
    except CheckpointError:
        return None
    return describe(state.training, state.averaged.updates)


def _is_directory(path: str) -> bool:
    system, inner = fsspec.url_to_fs(path)
    return bool(system.isdir(inner))
