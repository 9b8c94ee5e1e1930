"""Weights and optimizer states in files, by each engine's own means: torch.distributed.checkpoint, or DeepSpeed's."""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def save(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Writes a checkpoint that DDP, FSDP and tensor parallelism read, at any world size. Collective."""
    with _quiet():
        # One thread a process: with two, a full disk is reported as success.
        dcp.save(_state(model, optimizer), storage_writer=dcp.FileSystemWriter(path, thread_count=1))


def load(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Reads what :func:`save` has written. Collective. Such files are pickles: read only your own."""
    with _quiet():
        state = _state(model, optimizer)  # a fresh optimizer's states are made here, and filled
        dcp.load(state, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": states}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's advice to itself: it calls, under FSDP1, what it asks others not to call any more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def to_universal(source: Path, target: Path) -> None:
    """Turns DeepSpeed's checkpoint of one world size into its universal one, of any. For one process."""
    from deepspeed.checkpoint.ds_to_universal import main

    target.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # in this process: a fork of one that has process groups is no safe thing
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # what else the calling script would have to put into every checkpoint
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(options)
