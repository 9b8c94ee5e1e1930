"""An average as a Hugging Face directory, written in place by all ranks, or through rank 0 where they share no disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.collectives import agree, gather_objects, rank_in
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.gather import Entry, Held, gather_each, speaks
from dist_ema.geometry import chunks, count
from dist_ema.storage import (
    FilePlan,
    RunWriter,
    Staging,
    TensorPlan,
    create_file,
    index_json,
    parse_size,
    plan_files,
    write_text,
)

INDEX = "model.safetensors.index.json"
#: Elements that are converted and written at a time.
_CHUNK = 1 << 20
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
    targets = {entry.name: _target(entry, dtype) for entry in entries}
    tensors = [TensorPlan(name, targets[entry.name], entry.shape) for entry in entries for name in entry.names]
    plans = agree(lambda: _plan(path, tensors, max_shard_size, gather), group, doing)
    gather, token = gather_objects((gather, Staging.new_token()), group)[0]
    staging = Staging(Path(path).absolute(), token)
    try:
        agree(lambda: _prepare(staging, plans, config_from) if first else None, group, doing)
        shared = all(gather_objects(staging.is_visible(), group))
        if gather is False and not shared:
            raise CheckpointError(f"{doing}: gather=False, but not all ranks see {staging.target.parent} of rank 0")
        if shared and not gather:
            agree(lambda: _write_own(staging.path, plans, entries, held, group, targets), group, doing)
        else:
            _write_gathered(staging.path, plans, entries, held, group, targets, doing)
        agree(lambda: staging.commit() if first else None, group, doing)
    except BaseException:
        if first:
            staging.discard()
        raise


def _target(entry: Entry, dtype: torch.dtype | None) -> torch.dtype:
    return entry.live_dtype if dtype is None else entry.cast(dtype)


def _plan(
    path: object, tensors: Sequence[TensorPlan], max_shard_size: int | str, gather: bool | None
) -> list[FilePlan]:
    if not isinstance(path, (str, os.PathLike)):
        raise EMAConfigError(f"path={path!r}: allowed is a str or a path of the directory to make")
    if gather not in (None, True, False):
        raise EMAConfigError(f"gather={gather!r}: allowed are None, True and False")
    return plan_files(tensors, parse_size(max_shard_size))


def _prepare(staging: Staging, plans: Sequence[FilePlan], config_from: object) -> None:
    staging.create()
    for plan in plans:
        create_file(staging.path, plan)
    if len(plans) > 1:
        write_text(staging.path / INDEX, index_json(plans))
    _copy_config(config_from, staging.path)


def _write_own(
    directory: Path,
    plans: Sequence[FilePlan],
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    group: dist.ProcessGroup | None,
    targets: Mapping[str, torch.dtype],
) -> None:
    """Each rank writes the elements that it speaks for, run by run. Local."""
    with RunWriter(directory, plans) as writer:
        for entry in entries:
            mine = held(entry.name)
            if mine is None or not speaks(entry, mine.share, group):
                continue
            scratch = torch.empty(min(_CHUNK, mine.share.numel), dtype=targets[entry.name])
            low = 0
            for runs in chunks(mine.runs, _CHUNK):
                size = count(runs)
                mine.read(low, low + size, scratch[:size])
                for name in entry.names:
                    writer.write(name, runs, scratch[:size])
                low += size


def _write_gathered(
    directory: Path,
    plans: Sequence[FilePlan],
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    group: dist.ProcessGroup | None,
    targets: Mapping[str, torch.dtype],
    doing: str,
) -> None:
    """Rank 0 writes what the others send, one window at a time. Collective."""
    writer = RunWriter(directory, plans)

    def take(entry: Entry, start: int, values: Tensor) -> None:
        for name in entry.names:
            writer.write(name, ((start, values.numel()),), values.cpu())

    try:
        gather_each(entries, held, targets, group, take, doing)
        agree(writer.sync, group, doing)
    finally:
        writer.close()


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
