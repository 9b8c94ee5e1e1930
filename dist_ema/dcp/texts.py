"""Stores clocks and schedules in a state dict, as tensors of text.

A state dict holds nothing but tensors: DCP pickles everything else, and loading a pickle runs code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_ema.errors import CheckpointCorruptError, CheckpointError, EMAError, EMAStateError
from dist_ema.formats.state_json import state_from_json, state_to_json
from dist_ema.formats.strict_json import is_count, parse, shown
from dist_ema.schedules import Schedule, from_file
from dist_ema.schedules.state import EMAState

VERSION = 1
#: Bytes of every text, which is padded with blanks: DCP loads into a tensor of the size that was saved.
TEXT_BYTES = 2048
#: Levels of JSON: the state or a schedule, a clock, its values.
_DEPTH = 4


def write_state(state: EMAState, averaged: int | None = None) -> Tensor:
    """Returns the text of the clocks, for the entry ``"progress"`` of a state dict.

    Args:
        state: the clocks.
        averaged: number of tensors of the model, on all ranks together, in each average; None if it is not known.
    """
    body = {"version": VERSION, **state_to_json(state)}
    return _write(body if averaged is None else body | {"averaged": averaged})


def read_averaged(text: object) -> int | None:
    """Reads how many tensors each average had; None if the text does not say. Raises as `read_state`."""
    count = _read(text, "progress").get("averaged")
    if count is not None and not is_count(count):
        raise CheckpointCorruptError(f"'progress' of the state dict is damaged: averaged={shown(count)}")
    return count


def read_state(text: object) -> EMAState:
    """Returns the clocks of a text.

    Raises CheckpointCorruptError if :func:`write_state` did not make it, CheckpointError if a later version did.
    """
    body = _read(text, "progress")
    version = body.get("version")
    if not is_count(version):
        raise CheckpointCorruptError(f"'progress' of the state dict is damaged: its version is {shown(version)}")
    if version != VERSION:
        raise CheckpointError(f"the state dict has version {version}; this library reads version {VERSION}")
    try:
        return state_from_json(body)
    except (KeyError, TypeError, ValueError, EMAError) as error:
        raise CheckpointCorruptError(f"'progress' of the state dict is damaged: {str(error)[:200]}") from error


def write_schedule(schedule: Schedule) -> Tensor:
    """Returns the text of a schedule."""
    return _write(schedule.to_dict())


def read_schedule(text: object, name: str) -> Schedule:
    """Returns the schedule of the average ``name`` from a text. Raises CheckpointCorruptError."""
    try:
        return from_file(_read(text, f"schedules/{name}"))
    except CheckpointError:
        raise
    except EMAError as error:
        raise CheckpointCorruptError(f"'schedules/{name}' of the state dict is damaged: {error}") from error


def _write(body: Mapping[str, Any]) -> Tensor:
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode()
    if len(text) > TEXT_BYTES:
        raise EMAStateError(f"a text of a state dict has at most {TEXT_BYTES} bytes; {len(text)} needed for {body}")
    # Blanks are JSON, too: what is read need not know where the text ended.
    return torch.frombuffer(bytearray(text.ljust(TEXT_BYTES)), dtype=torch.uint8)


def _read(text: object, what: str) -> dict[str, Any]:
    try:
        if not isinstance(text, Tensor) or text.dtype != torch.uint8 or text.numel() > TEXT_BYTES:
            raise ValueError(f"expected a uint8 tensor of at most {TEXT_BYTES} bytes")
        body = parse(bytes(text.tolist()), depth=_DEPTH)
        if not isinstance(body, dict):
            raise ValueError("expected a JSON object")
        return body
    except ValueError as error:
        raise CheckpointCorruptError(f"{what!r} of the state dict is damaged: {error}") from error
