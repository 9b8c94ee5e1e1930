"""An average as a Hugging Face directory, written in place by all ranks, or through rank 0 where they share no disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dist_ema.collectives import Window, agree, gather_objects, rank_in
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.gather import Entry, Held, speaks, windows
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
    path: str,
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
    targets = {entry.name: _target(entry, dtype) for entry in entries}
    tensors = [TensorPlan(name, targets[entry.name], entry.shape) for entry in entries for name in entry.names]
    plans = plan_files(tensors, parse_size(max_shard_size))
    token = gather_objects(Staging.new_token(), group)[0]
    staging = Staging(Path(path).absolute(), token)
    first = rank_in(group) == 0
    doing = f"export to {path}"
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
    targets: dict[str, torch.dtype],
) -> None:
    """Each rank writes the elements that it speaks for, run by run. Local."""
    with RunWriter(directory, plans) as writer:
        for entry in entries:
            mine = held(entry.name)
            if mine is None or not speaks(entry, mine.share, group):
                continue
            target = targets[entry.name]
            scratch = torch.empty(min(_CHUNK, mine.share.numel), dtype=target)
            local = 0
            for start, length in mine.runs:
                for low in range(0, length, _CHUNK):
                    size = min(_CHUNK, length - low)
                    mine.read(local + low, local + low + size, scratch[:size])
                    for name in entry.names:
                        writer.write(name, start + low, scratch[:size])
                local += length


def _write_gathered(
    directory: Path,
    plans: Sequence[FilePlan],
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    group: dist.ProcessGroup | None,
    targets: dict[str, torch.dtype],
    doing: str,
) -> None:
    """Rank 0 writes what the others send, one window at a time. Collective.

    When rank 0 cannot write it goes on receiving, so that no rank waits for it, and the error is raised on all at the
    end.
    """
    window = Window(group)
    failure: Exception | None = None
    writer = RunWriter(directory, plans) if rank_in(group) == 0 else None
    for entry in entries:
        for start, values in windows(entry, held(entry.name), targets[entry.name], group, window):
            if writer is not None and failure is None:
                try:
                    for name in entry.names:
                        writer.write(name, start, values.cpu())
                except Exception as error:
                    failure = error

    def finish() -> None:
        if writer is not None:
            writer.__exit__(type(failure) if failure else None, failure, None)
        if failure is not None:
            raise failure

    agree(finish, group, doing)


def _copy_config(config_from: object, directory: Path) -> None:
    if config_from is None:
        return
    if isinstance(config_from, nn.Module):
        config_from = getattr(config_from, "config", config_from)
    if hasattr(config_from, "save_pretrained") and not isinstance(config_from, nn.Module):
        config_from.save_pretrained(str(directory))
        return
    if not isinstance(config_from, (str, Path)):
        raise EMAConfigError(
            f"config_from={type(config_from).__name__}: allowed is a file, a directory, or what has save_pretrained"
        )
    source = Path(config_from)
    if source.is_file():
        shutil.copy(source, directory / source.name)
    elif source.is_dir():
        for file in sorted(source.iterdir()):
            if file.is_file() and file.suffix in _CONFIG_SUFFIXES and not file.name.endswith(".index.json"):
                shutil.copy(file, directory / file.name)
    else:
        raise EMAConfigError(f"config_from={str(config_from)!r}: there is no such file or directory")
