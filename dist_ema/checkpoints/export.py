"""Exports an average as a Hugging Face directory: in place by all ranks, or through rank 0 if they do not share
a disk.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.checkpoints.arrangement import Arrangement, UnknownOperationError
from dist_ema.checkpoints.configuration import Configuration
from dist_ema.checkpoints.folder import Folder
from dist_ema.checkpoints.hub import STEMS, check_layout, conversion
from dist_ema.checkpoints.model_card import ModelCard
from dist_ema.checkpoints.trace import trace
from dist_ema.comm.agreement import agreed
from dist_ema.comm.catalogue import FullTensor
from dist_ema.comm.collectives import broadcast_object, gather_objects, rank_in
from dist_ema.comm.gather import LocalValues, check_readable
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats.layout import TensorPlan, index_json, parse_size
from dist_ema.storage.local import write_text
from dist_ema.storage.paths import check_path, is_url, local_path
from dist_ema.storage.staging import Staging

logger = logging.getLogger(__name__)


def export(
    path: str | os.PathLike[str],
    entries: Sequence[FullTensor],
    held: Callable[[str], LocalValues | None],
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    config_from: object,
    gather: bool | None,
    layout: str | None = None,
    model: nn.Module | None = None,
    include_untracked: bool = True,
    card: ModelCard | None = None,
) -> None:
    """Writes full tensors to ``path``. Collective.

    Args:
        path, dtype, max_shard_size, config_from, gather, layout, include_untracked: as :meth:`ShardedEMA.export`.
        entries: every full tensor of the model.
        held: returns what this rank holds of the tensor of a name; None if nothing.
        group: the ranks.
        model: the target without wrappers, for its names and its configuration; None if there is none.
        card: describes the average, for ``README.md`` and the metadata of the files; that of rank 0 is used. None
            writes no card.

    Raises:
        CheckpointError, EMAConfigError, EMAStateError: on every rank; nothing is left behind.
    """
    first = rank_in(group) == 0
    operation = f"export to {path}"
    dtypes = {entry.name: entry.live_dtype if dtype is None else entry.cast(dtype) for entry in entries}
    left_out = set() if include_untracked else {entry.name for entry in entries if entry.mode == "live"}
    with agreed(group, operation) as round_:
        _check(path, gather, layout, model)
        round_.send((gather, Staging.new_token(), None if card is None else card.metadata()))
    # Headers must have the same bytes on every rank, so all take rank 0's metadata.
    gather, token, metadata = round_.received[0]
    arrangement = arranged(model, layout, entries, dtypes, group, operation, left_out)
    # Everything that can be wrong with the tensors is found before a file is made.
    with agreed(group, operation):
        limit = parse_size(max_shard_size)
        if layout == "peft":  # peft reads one file only
            limit = sys.maxsize
        wanted = [entry for entry in entries if entry.name not in left_out]
        folder = Folder(wanted, held, dtypes, limit, True, STEMS[layout], metadata, arrangement)
        check_readable(mine for entry in folder.written if (mine := held(entry.name)) is not None)
        plans = folder.plans
        # Inside the block, because a relative path cannot be resolved if the working directory of a rank was removed.
        staging = Staging(local_path(path), token)
    try:
        with agreed(group, operation):
            if first:
                _prepare(staging, folder)
                written = next((dtypes[entry.name] for entry in entries if dtypes[entry.name].is_floating_point), None)
                Configuration(model, layout, dtype or written, staging.content, dtype).write(config_from)
                if card is not None:
                    card.write(staging.content)
        # As in save(): the name of the directory has rank 0's token, so a rank that finds it shares rank 0's disk.
        in_place = all(gather_objects(staging.is_visible(), group)) and not gather
        if gather is False and not in_place:
            raise CheckpointError(f"{operation}: gather=False, but not all ranks see {staging.target.parent} of rank 0")
        with staging.writer("", plans) as writer:
            if not in_place:
                folder.write_gathered(writer, group, operation)
            # All bytes have to be on disk on all ranks before rank 0 gives the directory its name.
            with agreed(group, operation):
                if in_place:
                    folder.write_own(writer, group)
                writer.sync()
                writer.close()  # some file systems report a full disk only now
        with agreed(group, operation):
            if first:
                staging.sync()
                _refuse_existing(
                    staging.target
                )  # checked again: the rename would replace a directory that was made meanwhile, if it is empty
                staging.put_in_place()
    except BaseException:
        if first:
            staging.discard()
        raise


def _check(path: object, gather: object, layout: object, model: nn.Module | None) -> None:
    check_path(path)
    if is_url(path):
        raise EMAConfigError(f"path={path!r}: an export is a directory of this machine; save() takes URLs")
    if gather not in (None, True, False):
        raise EMAConfigError(f"gather={gather!r}: allowed are None, True and False")
    check_layout(layout, model)


def arranged(
    model: nn.Module | None,
    layout: str | None,
    entries: Sequence[FullTensor],
    dtypes: Mapping[str, torch.dtype],
    group: dist.ProcessGroup | None,
    operation: str,
    left_out: Collection[str] = (),
) -> Arrangement | None:
    """Returns how the tensors of ``save_pretrained`` are made of the module's; None if they are the same. Collective.

    Args:
        model: the target without wrappers; None if there is none.
        layout: as of :meth:`ShardedEMA.export`.
        entries: every full tensor of the model.
        dtypes: dtype of each in the files, by name.
        group: the ranks.
        operation: the call, for errors.
        left_out: names of tensors that are not written.

    Raises:
        CheckpointError: on every rank: ``layout`` was given and cannot be written by parts.
    """
    with agreed(group, operation) as round_:
        # Rank 0 decides, because the answer may follow from configurations that other ranks do not have.
        found = _arrange(model, layout, entries, dtypes, left_out) if rank_in(group) == 0 else None
        round_.send(found is not None)
    return broadcast_object(found, group) if round_.received[0] else None


def _arrange(
    model: nn.Module | None,
    layout: str | None,
    entries: Sequence[FullTensor],
    dtypes: Mapping[str, torch.dtype],
    left_out: Collection[str],
) -> Arrangement | None:
    """Returns how the file tensors are made of the module's own; None if they are the same. Local."""
    convert = None if model is None else conversion(model, layout)
    if convert is None:
        return None
    tensors = [(entry.names, TensorPlan(entry.name, dtypes[entry.name], entry.shape)) for entry in entries]
    try:
        arrangement = trace(convert, tensors)
        if (
            left_out and not arrangement.is_trivial
        ):  # the library needs all tensors, because it may join several into one
            arrangement = arrangement.without(left_out)
    except UnknownOperationError as error:
        if layout is not None:
            raise CheckpointError(
                f"layout={layout!r}: the names and shapes of save_pretrained cannot be written by parts: {error}. "
                "layout=None writes the module's own"
            ) from error
        logger.warning(
            "The export has the module's own names and shapes, not those of save_pretrained, which cannot be written "
            "by parts: %s.",
            error,
        )
        return None
    return None if arrangement.is_trivial else arrangement


def _prepare(staging: Staging, folder: Folder) -> None:
    """Makes the files, and the index if there are several. Rank 0."""
    _refuse_existing(staging.target)
    staging.create()
    staging.create_files("", folder.plans)
    if len(folder.plans) > 1:
        write_text(staging.content / f"{folder.stem}.safetensors.index.json", index_json(folder.plans))


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already: give a path that does not, or remove it first")
