"""Trainers resume from checkpoints that an earlier version of the library wrote, with the same average bit for bit."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

from support import written, written_trainers

import pytest


def resume(kind: str, file: str, folder: Path) -> None:
    import torch.distributed as dist

    found = written_trainers.read(kind, folder)
    if dist.get_rank() == 0:
        wanted = written.expected()[file]
        assert found == wanted, (found, wanted)


@pytest.mark.parametrize("file", written_trainers.FILES)
def test_a_trainer_resumes_with_its_average(file: str, on_ranks: Callable[..., None], tmp_path: Path) -> None:
    """The average lies beside the trainer's own checkpoint, under a name that the trainer's resume has to find."""
    kind, ranks = written_trainers.FILES[file]
    if importlib.util.find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed")
    shutil.copytree(written.FOLDER / file, tmp_path / file)
    on_ranks(resume, ranks, kind=kind, file=file, folder=tmp_path / file)
