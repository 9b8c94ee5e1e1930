"""An average as a Hugging Face directory, written in place by all ranks, or through rank 0 where they share no disk."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.checkpoints.arrangement import Arrangement, UnknownOperationError
from dist_ema.checkpoints.folder import Folder
from dist_ema.checkpoints.hub import STEMS, check_layout, conversion, has_config, write_adapter_config, write_config
from dist_ema.checkpoints.layout import FilePlan, TensorPlan, index_json, parse_size
from dist_ema.checkpoints.storage.local import write_text
from dist_ema.checkpoints.storage.paths import check_path, is_url, local_path
from dist_ema.checkpoints.storage.staging import Staging
from dist_ema.checkpoints.trace import trace
from dist_ema.collectives import agreed, broadcast_object, gather_objects, rank_in
from dist_ema.engines.unwrapped import unwrapped
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.sharding.gather import LocalValues, check_readable
from dist_ema.sharding.writers import FullTensor

logger = logging.getLogger(__name__)
_CONFIG_SUFFIXES = {".json", ".txt", ".model", ".jinja"}


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
) -> None:
    """Writes full tensors to ``path``; see :meth:`ShardedEMA.export`. Collective.

    ``entries`` are all of the model's. ``model`` is the target without wrappers, for its names and its configuration.
    """
    first = rank_in(group) == 0
    operation = f"export to {path}"
    dtypes = {entry.name: entry.live_dtype if dtype is None else entry.cast(dtype) for entry in entries}

    left_out = set() if include_untracked else {entry.name for entry in entries if entry.mode == "live"}
    with agreed(group, operation) as round_:
        _check(path, gather, layout, model)
        arrangement = _arrange(model, layout, entries, dtypes, left_out) if first else None
        round_.send((gather, Staging.new_token(), arrangement is not None))
    gather, token, arranged = round_.received[0]
    if arranged:  # one rank's, since it may come from what others do not see
        arrangement = broadcast_object(arrangement, group)
    with agreed(group, operation):
        limit = parse_size(max_shard_size)
        if layout == "peft":  # which reads one file
            limit = sys.maxsize
        wanted = [entry for entry in entries if entry.name not in left_out]
        folder = Folder(wanted, held, dtypes, limit, tied=True, stem=STEMS[layout], arrangement=arrangement)
        check_readable(mine for entry in folder.written if (mine := held(entry.name)) is not None)
        plans = folder.plans
    staging = Staging(local_path(path), token)
    try:
        with agreed(group, operation):
            if first:
                _prepare(staging, plans, STEMS[layout])
                written = next((dtypes[entry.name] for entry in entries if dtypes[entry.name].is_floating_point), None)
                _Configuration(model, layout, dtype or written, staging.content).write(config_from)
        shared = all(gather_objects(staging.is_visible(), group))
        if gather is False and not shared:
            raise CheckpointError(f"{operation}: gather=False, but not all ranks see {staging.target.parent} of rank 0")
        with staging.writer("", plans) as writer:
            in_place = shared and not gather
            if not in_place:
                folder.write_gathered(writer, group, operation)
            with agreed(group, operation):
                if in_place:
                    folder.write_own(writer, group)
                writer.sync()
                writer.close()  # some file systems say only now that there was no room
        with agreed(group, operation):
            if first:
                _commit(staging)
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


def _arrange(
    model: nn.Module | None,
    layout: str | None,
    entries: Sequence[FullTensor],
    dtypes: Mapping[str, torch.dtype],
    left_out: set[str],
) -> Arrangement | None:
    """What is written in place of the module's own tensors; None if those are. Local."""
    convert = None if model is None else conversion(model, layout)
    if convert is None:
        return None
    tensors = [(entry.names, TensorPlan(entry.name, dtypes[entry.name], entry.shape)) for entry in entries]
    try:
        arrangement = trace(convert, tensors)
        if left_out and not arrangement.is_trivial:  # after all has been seen: halves are joined without a word
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


def _prepare(staging: Staging, plans: Sequence[FilePlan], stem: str) -> None:
    _refuse_existing(staging.target)
    staging.create()
    staging.create_files("", plans)
    if len(plans) > 1:
        write_text(staging.content / f"{stem}.safetensors.index.json", index_json(plans))


def _commit(staging: Staging) -> None:
    staging.sync()
    _refuse_existing(staging.target)  # an empty directory too, which a rename would replace
    staging.put_in_place()


def _refuse_existing(target: Path) -> None:
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already: give a path that does not, or remove it first")


@dataclass(frozen=True)
class _Configuration:
    """What is written beside the weights. One rank.

    Attributes:
        model: whose weights they are; None if that is not known.
        layout: of the export.
        dtype: of the weights.
        directory: to write to.
    """

    model: nn.Module | None
    layout: str | None
    dtype: torch.dtype | None
    directory: Path

    def write(self, config_from: object) -> None:
        """Writes all that ``config_from`` names."""
        if self.layout == "peft" and self.model is not None:
            write_adapter_config(self.model, self.directory)
        if config_from is None:
            if self.layout != "peft" and self.model is not None and has_config(self.model):
                write_config(self.model, self.directory, self.dtype)
            return
        for source in config_from if isinstance(config_from, (list, tuple)) else [config_from]:
            self._write_one(source)

    def _write_one(self, source: object) -> None:
        own = getattr(self.model, "config", None)
        if self.model is not None and own is not None and source is own and has_config(self.model):
            write_config(self.model, self.directory, self.dtype)
        elif isinstance(source, nn.Module) and has_config(unwrapped(source)):
            write_config(unwrapped(source), self.directory, self.dtype)
        elif hasattr(source, "save_pretrained") and not isinstance(source, nn.Module):
            source.save_pretrained(str(self.directory))
        elif isinstance(source, (str, os.PathLike)) and os.fspath(source):  # an empty one is not the current directory
            self._copy(Path(source))
        else:
            raise EMAConfigError(
                f"config_from={source!r:.200}: allowed is a file, a directory, or an object with save_pretrained, such "
                "as a transformers config or tokenizer; or a model that has such a config, or a list of these"
            )

    def _copy(self, source: Path) -> None:
        if source.is_file():
            files = [source]
        elif source.is_dir():
            files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in _CONFIG_SUFFIXES]
            files = [file for file in files if not file.name.endswith(".index.json")]
        else:
            raise EMAConfigError(f"config_from={str(source)!r}: there is no such file or directory")
        for file in files:
            if (self.directory / file.name).exists():
                raise EMAConfigError(f"config_from={str(file)!r}: the export writes a file of this name itself")
            shutil.copyfile(file, self.directory / file.name)
