"""The state dict that ``torch.distributed.checkpoint`` saves and loads, and what comes back from it.

::

    {"progress": <uint8>,                      the clocks, as JSON
     "schedules": {average: <uint8>},          as JSON
     "averages": {average: {name: <part>}},    what is averaged
     "buffers": {name: <part>},                what is copied, once for all averages
     "live": {name: <part>}}                   of both, what trains: only where that was asked for

Parts are :class:`~dist_ema.dcp.boxed.BoxedTensor`: of each full tensor what this rank holds. Nothing is anything but a
tensor, since DCP pickles all else, and loading that would run code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema.checkpoints.state_json import state_from_json, state_to_json
from dist_ema.checkpoints.strict_json import is_count, parse, shown
from dist_ema.dcp.boxed import BoxedTensor
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, EMAError, EMAStateError
from dist_ema.schedules import Schedule, from_dict
from dist_ema.shadow.device import Shadow
from dist_ema.shadow.view import View
from dist_ema.sharding.gather import LocalValues, full_tensors
from dist_ema.sharding.shares import Share
from dist_ema.sharding.writers import FullTensor
from dist_ema.state import EMAState

VERSION = 1
#: Bytes of a text, padded with blanks: what is loaded must have the size of what was saved.
TEXT_BYTES = 2048
#: Clocks and schedules, one of them, its values.
_DEPTH = 4


def write_state(state: EMAState) -> Tensor:
    """The clocks as text: what a state dict has under ``"progress"``."""
    return _write_text({"version": VERSION, **state_to_json(state)})


def read_state(text: object) -> EMAState:
    """Raises CheckpointCorruptError if ``write_state`` did not make it, CheckpointError if a later version did."""
    body = _read_text(text, "progress")
    version = body.get("version")
    if not is_count(version):
        raise CheckpointCorruptError(f"'progress' of the state dict is damaged: its version is {shown(version)}")
    if version != VERSION:
        raise CheckpointError(f"the state dict has version {version}; this library reads version {VERSION}")
    try:
        return state_from_json(body)
    except (KeyError, TypeError, ValueError, EMAError) as error:
        raise CheckpointCorruptError(f"'progress' of the state dict is damaged: {str(error)[:200]}") from error


def make_state_dict(
    ema_state: EMAState,
    schedules: Mapping[str, Schedule],
    averaged: Callable[[str], Sequence[Tensor | None]],
    shares: Sequence[Share],
    writes: Sequence[bool],
    spare: bool,
) -> dict[str, Any]:
    """The state dict of one rank; its tensors share the average's memory. Local.

    Args:
        ema_state: where the average stands.
        schedules: of each average.
        averaged: an average's flat tensor for each share, None where it is live.
        shares: what this rank keeps of each tensor.
        writes: for each of them, whether it is this rank that writes it.
        spare: whether reading may overwrite them, since it serves nothing else.
    """
    state = make_head(ema_state, schedules)
    is_writer = {share.spec.name: is_writer for share, is_writer in zip(shares, writes, strict=True)}
    for path, share, held in _parts(averaged, shares, tuple(schedules)):
        place = state
        for key in path:
            place = place.setdefault(key, {})
        name = share.spec.name
        place[name] = BoxedTensor(share.spec.shape, held, share.boxes, is_writer=is_writer[name], spare=spare)
    return state


def make_head(ema_state: EMAState, schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    """A state dict without tensors of the model: what is the same on every rank. Local."""
    texts = {name: _write_text(schedule.to_dict()) for name, schedule in schedules.items()}
    return {"progress": write_state(ema_state), "schedules": texts, "averages": {}, "buffers": {}}


def add_live(
    state: dict[str, Any], live: Sequence[Tensor | None], shares: Sequence[Share], writes: Sequence[bool]
) -> None:
    """Adds the live weights of what is averaged or copied: for each share the flat tensor of its elements. Local."""
    state["live"] = {
        share.spec.name: BoxedTensor(share.spec.shape, values, share.boxes, is_writer=is_writer, spare=False)
        for share, values, is_writer in zip(shares, live, writes, strict=True)
        if values is not None and share.numel
    }


def full_parts(
    view: View, names: Sequence[str], entries: Sequence[FullTensor], group: dist.ProcessGroup | None, live: bool
) -> dict[str, Any]:
    """The tensors of a state dict, whole and on rank 0; no tensors elsewhere. Collective; gathered one at a time.

    Args:
        view: what this rank holds.
        names: of the averages.
        entries: every full tensor of the model.
        group: the ranks.
        live: with the live weights of what is averaged or copied.
    """

    def gathered(held: Mapping[str, LocalValues], modes: Sequence[str], live: bool = False) -> dict[str, Tensor]:
        wanted = [
            replace(entry, aliases=(), dtype=entry.live_dtype if live else entry.dtype)
            for entry in entries
            if entry.mode in modes
        ]
        return full_tensors(wanted, held.get, None, group, "state_dict()")

    averages = {name: view.average(name, include_untracked=False) for name in names}
    parts: dict[str, Any] = {
        "averages": {name: gathered(held, ["average"]) for name, held in averages.items()},
        "buffers": gathered(averages[names[0]], ["copy"]),
    }
    if live:
        held = {values.share.spec.name: values for values in view.live() if values is not None}
        parts["live"] = gathered(held, ["average", "copy"], live=True)
    return parts


class LoadedStateDict:
    """What came back: all of it is checked at construction, then ``fill()`` writes it into a shadow. Local.

    Args:
        state: what ``make_state_dict`` made, or the same with full tensors in place of parts.
        shares: what this rank keeps of each tensor.
        names: of the averages.
        known: every tensor that is averaged or copied, on any rank.

    Raises:
        CheckpointMismatchError: lists what is missing, unexpected or misshapen, or not this rank's part.
        CheckpointCorruptError, CheckpointError: it is damaged, or of a later version.
    """

    def __init__(
        self, state: Mapping[str, Any], shares: Sequence[Share], names: Sequence[str], known: Container[str]
    ) -> None:
        if not isinstance(state, Mapping):
            raise EMAStateError(f"load_state_dict() of a {type(state).__name__}: pass what state_dict() returned")
        problems = [f"missing {key!r}" for key in ("progress", "schedules", "averages") if key not in state]
        problems += [f"{key!r} is a {type(found).__name__}, not a dict" for key, found in _no_dicts(state)]
        if problems:
            raise CheckpointMismatchError(f"the state dict is not one of a ShardedEMA: {'; '.join(problems)}")
        self.state = read_state(state["progress"])
        self.schedules = {name: _read_schedule(text, name) for name, text in state["schedules"].items()}
        self._dict = state
        self._shares, self._names = shares, names
        problems = [f"unexpected average {name!r}" for name in state["averages"] if name not in names]
        for path, share in _wanted(shares, names):
            problems += _problems(_look(state, path).get(share.spec.name), share, "/".join(path))
        places: list[tuple[str, ...]] = [*(("averages", name) for name in names), ("buffers",)]
        if "live" in state:
            places.append(("live",))
            for share in shares:
                if share.numel and share.mode != "live":
                    problems += _problems(_look(state, ("live",)).get(share.spec.name), share, "live")
        for path in places:
            problems += [f"unexpected {name!r} in {'/'.join(path)}" for name in _look(state, path) if name not in known]
        if problems:
            raise CheckpointMismatchError(f"the state dict does not fit this model: {'; '.join(problems)}")

    @torch.no_grad()
    def fill(self, shadow: Shadow) -> None:
        """Copies the values into the shadow, which has its memory. Local."""
        for path, share, out in _parts(shadow.tensors, self._shares, self._names):
            _copy(_look(self._dict, path)[share.spec.name], share, out)

    @torch.no_grad()
    def live(self, sources: Sequence[Tensor]) -> list[Tensor | None] | None:
        """This rank's live elements of each share, flat and as its source is; None where the dict has none. Local."""
        if "live" not in self._dict:
            return None
        values: list[Tensor | None] = []
        for share, source in zip(self._shares, sources, strict=True):
            if share.mode == "live":
                values.append(None)
                continue
            out = torch.empty(share.numel, dtype=source.dtype, device=source.device)
            if share.numel:
                _copy(self._dict["live"][share.spec.name], share, out)
            values.append(out)
        return values


def _copy(value: Tensor, share: Share, out: Tensor) -> None:
    """This rank's part, or what belongs to it of the full tensor, into a flat tensor. Local."""
    if isinstance(value, BoxedTensor):
        out.copy_(value.held)
        return
    low, flat = 0, value.reshape(-1)
    for start, length in share.runs:
        out[low : low + length].copy_(flat[start : start + length])
        low += length


def _wanted(shares: Sequence[Share], names: Sequence[str]) -> Iterator[tuple[tuple[str, ...], Share]]:
    """Where the parts of this rank lie in a state dict. What it holds no element of is not there."""
    for share in shares:
        if share.numel and share.mode == "average":
            yield from ((("averages", name), share) for name in names)
        elif share.numel and share.mode == "copy":
            yield ("buffers",), share


def _parts(
    averaged: Callable[[str], Sequence[Tensor | None]], shares: Sequence[Share], names: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], Share, Tensor]]:
    """The same with the average of each."""
    held = {
        (name, share.spec.name): tensor for name in names for share, tensor in zip(shares, averaged(name), strict=True)
    }
    for path, share in _wanted(shares, names):
        average = path[1] if path[0] == "averages" else names[0]
        tensor = held[average, share.spec.name]
        if tensor is not None:
            yield path, share, tensor


def _no_dicts(state: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """What has the place of a dict of tensors or of texts and is none."""
    for key in ("schedules", "averages", "buffers", "live"):
        if not isinstance(found := state.get(key, {}), Mapping):
            yield key, found
        elif key == "averages":
            yield from ((f"averages/{name}", one) for name, one in found.items() if not isinstance(one, Mapping))


def _look(state: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for key in path:
        state = state.get(key, {})
    return state


def _problems(value: object, share: Share, where: str) -> list[str]:
    """Why ``value`` is not what belongs to a share: its part, or the full tensor."""
    name, shape = share.spec.name, share.spec.shape
    if not isinstance(value, Tensor):
        return [f"missing {name!r} in {where}"]
    if value.size() != shape or value.dtype.is_floating_point != share.dtype.is_floating_point:
        return [f"misshapen {name!r}: {tuple(value.size())} {value.dtype} instead of {tuple(shape)} {share.dtype}"]
    if isinstance(value, BoxedTensor) and value.boxes != share.boxes:
        return [
            f"{name!r} is the part of another rank, or of another engine or world size: {value.boxes} instead of "
            f"{share.boxes} (torch.distributed.checkpoint and ShardedEMA.save() reshard, torch.save() does not)"
        ]
    return []


def _read_schedule(text: object, name: str) -> Schedule:
    try:
        return from_dict(_read_text(text, f"schedules/{name}"))
    except CheckpointError:
        raise
    except EMAError as error:
        raise CheckpointCorruptError(f"'schedules/{name}' of the state dict is damaged: {error}") from error


def _write_text(body: Mapping[str, Any]) -> Tensor:
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True).encode()
    if len(text) > TEXT_BYTES:
        raise EMAStateError(f"a state dict has room for {TEXT_BYTES} bytes of text, and {len(text)} are needed: {body}")
    return torch.frombuffer(bytearray(text.ljust(TEXT_BYTES)), dtype=torch.uint8)


def _read_text(text: object, what: str) -> dict[str, Any]:
    try:
        if not isinstance(text, Tensor) or text.dtype != torch.uint8 or text.numel() > TEXT_BYTES:
            raise ValueError("not a text")
        body = parse(bytes(text.tolist()), depth=_DEPTH)
        if not isinstance(body, dict):
            raise ValueError("not a JSON object")
        return body
    except ValueError as error:
        raise CheckpointCorruptError(f"{what!r} of the state dict is damaged: {error}") from error
