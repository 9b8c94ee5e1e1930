"""An average as a Hugging Face directory, written in place by all ranks, or through rank 0 where they share no disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.checkpoints.places import is_url
from dist_ema.checkpoints.storage import FilePlan, RunWriter, Staging, create_file, index_json, parse_size, write_text
from dist_ema.checkpoints.writing import Folder
from dist_ema.collectives import agree, gather_objects, rank_in
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.gather import Entry, Held

INDEX = "model.safetensors.index.json"
_CONFIG_SUFFIXES = {".json", ".txt", ".model", ".jinja"}


def export(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    group: dist.ProcessGroup | None,
    *,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    config_from: object,
    gather: bool | None,
) -> None:
    """Writes full tensors to ``path``; see :meth:`ShardedEMA.export`. Collective."""
    first = rank_in(group) == 0
    doing = f"export to {path}"
    folder, plans = agree(lambda: _plan(path, entries, held, dtype, max_shard_size, gather), group, doing)
    gather, token = gather_objects((gather, Staging.new_token()), group)[0]
    staging = Staging(Path(path).absolute(), token)
    try:
        agree(lambda: _prepare(staging, plans, config_from) if first else None, group, doing)
        shared = all(gather_objects(staging.is_visible(), group))
        if gather is False and not shared:
            raise CheckpointError(f"{doing}: gather=False, but not all ranks see {staging.target.parent} of rank 0")
        with RunWriter(staging.path, plans) as writer:

            def fill() -> None:
                folder.write(writer, plans, group, True, False, doing)
                writer.sync()

            if shared and not gather:
                agree(fill, group, doing)
            else:
                folder.write(writer, plans, group, False, False, doing)
                agree(writer.sync, group, doing)
        agree(lambda: staging.commit() if first else None, group, doing)
    except BaseException:
        if first:
            staging.discard()
        raise


def _plan(
    path: object,
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    gather: bool | None,
) -> tuple[Folder, list[FilePlan]]:
    if not isinstance(path, (str, os.PathLike)):
        raise EMAConfigError(f"path={path!r}: allowed is a str or a path of the directory to make")
    if is_url(path):
        raise EMAConfigError(f"path={path!r}: an export is a directory of this machine; save() takes URLs")
    if gather not in (None, True, False):
        raise EMAConfigError(f"gather={gather!r}: allowed are None, True and False")
    dtypes = {entry.name: entry.live_dtype if dtype is None else entry.cast(dtype) for entry in entries}
    folder = Folder(entries, held, dtypes, parse_size(max_shard_size), tied=True)
    return folder, folder.plan()


def _prepare(staging: Staging, plans: Sequence[FilePlan], config_from: object) -> None:
    staging.create()
    for plan in plans:
        create_file(staging.path, plan)
    if len(plans) > 1:
        write_text(staging.path / INDEX, index_json(plans))
    _copy_config(config_from, staging.path)


def _copy_config(config_from: object, directory: Path) -> None:
    if config_from is None:
        return
    if isinstance(config_from, nn.Module):
        config_from = getattr(config_from, "config", config_from)
    if hasattr(config_from, "save_pretrained") and not isinstance(config_from, nn.Module):
        config_from.save_pretrained(str(directory))
        return
    if not isinstance(config_from, (str, os.PathLike)):
        raise EMAConfigError(
            f"config_from={config_from!r:.200}: allowed is a file, a directory, or an object with save_pretrained, "
            "such as a transformers config or tokenizer"
        )
    source = Path(config_from)
    if source.is_file():
        files = [source]
    elif source.is_dir():
        files = [file for file in sorted(source.iterdir()) if file.is_file() and file.suffix in _CONFIG_SUFFIXES]
        files = [file for file in files if not file.name.endswith(".index.json")]
    else:
        raise EMAConfigError(f"config_from={str(config_from)!r}: there is no such file or directory")
    for file in files:
        if (directory / file.name).exists():
            raise EMAConfigError(f"config_from={str(file)!r}: the export writes a file of this name itself")
        shutil.copyfile(file, directory / file.name)
