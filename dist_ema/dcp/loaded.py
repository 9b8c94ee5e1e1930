"""Checks a state dict that ``torch.distributed.checkpoint`` has filled, and copies it into a shadow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_ema.comm.catalogue import FullTensor
from dist_ema.dcp.boxed import BoxedTensor
from dist_ema.dcp.stateful import parts_with_averages, wanted_parts
from dist_ema.dcp.texts import read_averaged, read_schedule, read_state
from dist_ema.errors import CheckpointMismatchError, EMAStateError
from dist_ema.formats.dtypes import is_convertible
from dist_ema.geometry.shares import Share
from dist_ema.shadow.device import Shadow

logger = logging.getLogger(__name__)


class Unlike(NamedTuple):
    """Describes how one rank's state dict differs from the model.

    Attributes:
        joining: names of averaged parameters that are frozen in the model.
        shapes: buffers of another shape, with that shape.
        joined: averaged tensors that joined at another update, with its number.
    """

    joining: list[str]
    shapes: list[tuple[str, tuple[int, ...]]]
    joined: list[tuple[str, int]]


def unlike(state: Mapping[str, Any], entries: Sequence[FullTensor], selects: Callable[[str], bool]) -> Unlike:
    """Finds how a state dict differs from the model, in ways that an average may. Local. The dict may be anything.

    Args:
        state: the state dict, with this rank's parts or full tensors.
        entries: every full tensor of the model.
        selects: returns whether ``include`` and ``exclude`` admit a name to the average.
    """
    # The dict is not checked yet: anything in it may be of any type, and LoadedStateDict will say so.
    places = [state.get("buffers"), *_values(state.get("averages"))] if isinstance(state, Mapping) else []
    found: dict[str, Tensor] = {}
    for place in places:
        if isinstance(place, Mapping):
            found |= {name: value for name, value in place.items() if isinstance(value, Tensor)}
    joining = []
    shapes = []
    joined = []
    for entry in entries:
        value = found.get(entry.name)
        if value is None:
            continue
        if entry.frozen and selects(entry.name):
            joining.append(entry.name)
        elif entry.buffer and entry.mode != "live" and not entry.partitioned and value.size() != entry.shape:
            shapes.append((entry.name, tuple(value.size())))
        if isinstance(value, BoxedTensor) and value.joined != entry.joined:
            joined.append((entry.name, value.joined))
    return Unlike(joining, shapes, joined)


def _values(found: object) -> list[object]:
    return list(found.values()) if isinstance(found, Mapping) else []


def check_complete(state: Mapping[str, Any], entries: Sequence[FullTensor], joining: Container[str]) -> None:
    """Raises CheckpointMismatchError if the checkpoint has averages that were not loaded. Pure.

    ``dcp.load`` reads what is in the state dict that it gets, and does not report what else there is.

    Args:
        state: a state dict whose structure has been checked.
        entries: every full tensor of the model.
        joining: names of frozen parameters of which the state dict has an average.
    """
    stored = read_averaged(state["progress"])  # no older version has written it
    averaged = sum(entry.mode == "average" or entry.name in joining for entry in entries)
    if stored is None or stored <= averaged or not read_state(state["progress"]).started:
        return
    frozen = [entry.name for entry in entries if entry.frozen and entry.name not in joining]
    others = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    here = f" (frozen are {', '.join(map(repr, frozen[:3]))}{others})" if frozen else ""
    raise CheckpointMismatchError(
        f"load_state_dict(): the checkpoint has the averages of {stored} tensors, and only {averaged} were read. The "
        f"others are frozen in this model, or include or exclude leave them out{here}. dcp.load() reads only what is "
        "averaged when it is called. Before it, let what was averaged be trained (requires_grad; under DeepSpeed, "
        "a group of the optimizer) and call reset(), or make the ShardedEMA anew; it may be frozen again afterwards. "
        "ShardedEMA.load() needs no such step"
    )


_ADVICE = (
    ". The dict has the parts that one rank held, as torch.save() writes them, and this rank holds others: another "
    "rank has saved it, or one of another world size or engine. Load on each rank what that rank has saved. For one "
    "file that rank 0 writes, call state_dict(full=True) on every rank; ShardedEMA.save() and "
    "torch.distributed.checkpoint write checkpoints that load on any number of ranks"
)


class LoadedStateDict:
    """Holds a filled state dict. The constructor checks all of it, then ``fill()`` copies it into a shadow. Local.

    Args:
        state: the result of ``make_state_dict``, or the same with full tensors in place of parts.
        shares: what this rank averages of each tensor.
        names: the names of the averages.
        known: names of all tensors that are averaged or copied, on any rank.

    Attributes:
        state: the clocks.
        schedules: the saved schedule of each average.

    Raises:
        CheckpointMismatchError: lists everything that is missing, unexpected, of another shape, or another rank's part.
        CheckpointCorruptError, CheckpointError: it is damaged, or of a later version.
    """

    def __init__(
        self, state: Mapping[str, Any], shares: Sequence[Share], names: Sequence[str], known: Container[str]
    ) -> None:
        if not isinstance(state, Mapping):
            raise EMAStateError(f"load_state_dict() of a {type(state).__name__}: pass what state_dict() returned")
        problems = [f"missing {key!r}" for key in ("progress", "schedules", "averages") if key not in state]
        problems += [f"{key!r} is a {type(found).__name__}, not a dict" for key, found in _not_dicts(state)]
        if problems:
            raise CheckpointMismatchError(f"the state dict is not one of a ShardedEMA: {'; '.join(problems)}")
        self.state = read_state(state["progress"])
        self.schedules = {name: read_schedule(text, name) for name, text in state["schedules"].items()}
        self._dict = state
        self._shares = shares
        self._names = names
        # All problems are collected first, so that a user sees all of them at once.
        problems = [f"unexpected average {name!r}" for name in state["averages"] if name not in names]
        for path, share in wanted_parts(shares, names):
            problems += _misfits(_at(state, path).get(share.spec.name), share, "/".join(path))
        places: list[tuple[str, ...]] = [*(("averages", name) for name in names), ("buffers",)]
        if "live" in state:
            places.append(("live",))
            live = _at(state, ("live",))
            for share in shares:
                if share.numel and share.mode != "live" and not (_may_lack(share) and share.spec.name not in live):
                    problems += _misfits(live.get(share.spec.name), share, "live")
        for path in places:
            problems += [f"unexpected {name!r} in {'/'.join(path)}" for name in _at(state, path) if name not in known]
        if problems:
            advice = _ADVICE if any(_has_parts(_at(state, path)) for path in places) else ""
            raise CheckpointMismatchError(f"the state dict does not fit this model: {'; '.join(problems)}{advice}")

    @torch.no_grad()
    def fill(self, shadow: Shadow) -> None:
        """Copies the values into a shadow that has been allocated. Local."""
        for path, share, out in parts_with_averages(shadow.tensors, self._shares, self._names):
            _copy(_at(self._dict, path)[share.spec.name], share, out)

    @torch.no_grad()
    def live(self, sources: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Returns this rank's live elements of each share, 1D, in the dtype and on the device of its source. Local.

        Returns None if the dict has no live weights. An element is None for a share that is not averaged or copied.
        """
        if "live" not in self._dict:
            return None
        values: list[Tensor | None] = []
        for share, source in zip(self._shares, sources, strict=True):
            if share.mode == "live":
                values.append(None)
                continue
            if _may_lack(share) and share.spec.name not in self._dict["live"]:
                logger.warning(
                    "The state dict has no live values of the buffer %r, which was resized after its last update. The "
                    "buffer keeps its present values.",
                    share.spec.name,
                )
                values.append(None)
                continue
            out = torch.empty(share.numel, dtype=source.dtype, device=source.device)
            if share.numel:
                _copy(self._dict["live"][share.spec.name], share, out)
            values.append(out)
        return values


def _may_lack(share: Share) -> bool:
    """Returns whether a state dict may lack live values: those of a buffer that was resized after its last update."""
    return share.spec.kind == "buffer" and not share.spec.partitioned


def _copy(value: Tensor, share: Share, out: Tensor) -> None:
    """Copies this rank's part, or its elements of a full tensor, into a 1D tensor. Local."""
    if isinstance(value, BoxedTensor):
        out.copy_(value.held)
        return
    # A full tensor, as dcp_to_torch_save makes it: any engine's elements can be taken out of it.
    low = 0
    flat = value.reshape(-1)
    for start, length in share.runs:
        out[low : low + length].copy_(flat[start : start + length])
        low += length


def _not_dicts(state: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Returns values that should be dicts, and are not, with their paths."""
    for key in ("schedules", "averages", "buffers", "live"):
        if not isinstance(found := state.get(key, {}), Mapping):
            yield key, found
        elif key == "averages":
            yield from ((f"averages/{name}", one) for name, one in found.items() if not isinstance(one, Mapping))


def _at(state: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    """Returns the dict at a path of keys; an empty one if there is none."""
    for key in path:
        state = state.get(key, {})
    return state


def _has_parts(tensors: Mapping[str, Any]) -> bool:
    """Returns whether there are parts of tensors, not only whole ones."""
    return any(isinstance(value, BoxedTensor) for value in tensors.values())


def _misfits(value: object, share: Share, where: str) -> list[str]:
    """Returns why ``value`` is neither the part of this share nor the full tensor; "" if it is one of them."""
    name = share.spec.name
    shape = share.spec.shape
    if not isinstance(value, Tensor):
        return [f"missing {name!r} in {where}"]
    if value.size() != shape or not is_convertible(value.dtype, share.dtype):
        stored = f"{tuple(value.size())} {value.dtype}"
        wanted = f"{tuple(shape)} {share.dtype}"
        return [f"shape mismatch for {name!r}: checkpoint {stored}, model {wanted}"]
    if isinstance(value, BoxedTensor) and value.boxes != share.boxes:
        return [
            f"{name!r} is the part of another rank, or of another engine or world size: {value.boxes} instead of "
            f"{share.boxes}"
        ]
    return []
