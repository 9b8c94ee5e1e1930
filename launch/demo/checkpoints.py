"""A run's checkpoints as directories: which are whole, which is the newest, what becomes of the others. No torch.

``OUT/checkpoints/step-00000100/`` holds ``model/`` (weights and optimizer), ``ema/`` and ``run.json``, the record. It
is written under a name that begins with a dot and put in its place by one rename; the record lists every file with its
size, so that a directory which was damaged, or copied in part, is not taken for a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"  # inside the output folder
MODEL, EMA, RECORD = "model", "ema", "run.json"  # inside a checkpoint
_NAME = re.compile(r"step-\d{8,}")
_TEMPORARY = re.compile(r"\.step-\d{8,}\.(saving|deleting|universal)")

# What a resumed run must have in common with the one that was interrupted, so that the two end alike. Engine and number
# of processes are not among them, and steps may grow. The learning rate is, as the optimizer's saved one would win.
SAME = (
    "layers",
    "width",
    "heads",
    "context",
    "batch",
    "lr",
    "seed",
    "precision",
    "half_life",
    "update_interval",
    "ema_start",
)


@dataclass(frozen=True)
class Record:
    """What ``run.json`` says.

    Attributes:
        step: optimizer steps made.
        engine: that saved it.
        world_size: processes that saved it.
        options: those of :data:`SAME`.
        data: checksum of the training text.
        curves: step, live and averaged validation loss of each evaluation.
        files: sizes of all other files, by path inside the checkpoint.
    """

    step: int
    engine: str
    world_size: int
    options: dict[str, Any]
    data: int
    curves: list[tuple[int, float, float]]
    files: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the checkpoint's directory."""
        return f"step-{self.step:08}"


def latest(out: Path) -> Record | None:
    """The newest whole checkpoint of a run. Those that are not whole are passed over."""
    return next((record for path in reversed(_paths(out)) if (record := _read(path)) is not None), None)


def differences(record: Record, options: Mapping[str, Any]) -> str:
    """Says why a run with these options, by name, cannot go on from the checkpoint; empty if it can."""
    found = []
    for name in SAME:
        before, now = record.options.get(name), options[name]
        if before != now:
            found.append(f"{name} was {before!r} and is {now!r}")
    if _family(record.engine) != _family(options["engine"]):
        found.append(f"engine was {record.engine}, whose optimizer states {options['engine']} cannot read")
    if record.step > options["steps"]:
        found.append(f"it has made {record.step} steps already, and steps is {options['steps']}")
    return "; ".join(found)


def _family(engine: str) -> str:
    """Engines of one family read each other's weights and optimizer states; each ZeRO stage has files of its own."""
    return engine if engine.startswith("zero") else "torch"


# What one process does to the folder, while the others wait.


def begin(out: Path, record: Record) -> Path:
    """Makes the directory to write the checkpoint into, after removing what killed runs have left."""
    clean(out)
    staging = temporary(out, record, "saving")
    staging.mkdir(parents=True)
    return staging


def temporary(out: Path, record: Record, purpose: str) -> Path:
    """A name that is no checkpoint's: ``saving``, ``deleting`` or ``universal``."""
    return out / FOLDER / f".{record.name}.{purpose}"


def commit(out: Path, record: Record, keep: int) -> None:
    """Puts a fully written directory in its place, on disk; only then removes all older than ``keep`` whole ones."""
    staging, target = temporary(out, record, "saving"), out / FOLDER / record.name
    files = {str(file.relative_to(staging)): file.stat().st_size for file in staging.rglob("*") if file.is_file()}
    (staging / RECORD).write_text(json.dumps(asdict(record) | {"files": files}, indent=1))
    for directory, _, names in os.walk(staging, topdown=False):
        for path in (*(Path(directory) / name for name in names), Path(directory)):
            _sync(path)
    if target.exists():  # not whole, or this run would have begun after it
        _discard(target, temporary(out, record, "deleting"))
    staging.rename(target)
    _sync(target.parent)
    older = [path for path in _paths(out) if _step(path) <= record.step]
    kept = [path for path in older if _read(path) is not None][-keep:]
    for path in older:
        if path not in kept:
            _discard(path, path.with_name(f".{path.name}.deleting"))


def clean(out: Path) -> None:
    """Removes what saves and removals that were killed have left behind."""
    folder = out / FOLDER
    for path in folder.iterdir() if folder.is_dir() else ():
        if _TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path)


def _discard(path: Path, away: Path) -> None:
    """Removes a directory such that a kill on the way leaves no half of it under its name."""
    path.rename(away)
    shutil.rmtree(away)


def _paths(out: Path) -> Sequence[Path]:
    """All directories with a checkpoint's name, oldest first."""
    folder = out / FOLDER
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read(path: Path) -> Record | None:
    """The record of a checkpoint; None if it is not whole."""
    try:
        record = Record(**json.loads((path / RECORD).read_text()))
        sizes = {name: (path / name).stat().st_size for name in record.files}
    except (OSError, ValueError, TypeError):
        return None
    return record if sizes == record.files and path.name == record.name else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
