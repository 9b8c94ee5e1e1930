"""Full tensors from what the ranks hold: which there are, and bringing them to rank 0 one window at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema.arithmetic import kernels
from dist_ema.collectives import Window, agree, gather_objects, rank_in
from dist_ema.errors import EMAEngineError, EMAStateError
from dist_ema.geometry import Runs, overlap
from dist_ema.shares import Mode, Share


@dataclass(frozen=True)
class Held:
    """Values that this rank holds of one full tensor.

    Attributes:
        share: the share that they belong to.
        values: a shadow, or a live tensor in any layout.
        start: the first element of ``values`` that counts; there are ``share.numel``.
    """

    share: Share
    values: Tensor
    start: int

    @property
    def runs(self) -> Runs:
        """Where they lie in the full tensor."""
        return self.share.runs

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Puts kept elements ``[start, stop)`` into the flat ``out``, converted. Local."""
        kernels.read(self.values, self.start + start, self.start + stop, out)

    def flat(self) -> Tensor:
        """All of them, flat; a view where they lie together. Local."""
        return self.values.detach().reshape(-1)[self.start : self.start + self.share.numel]

    def chunk(self, start: int, stop: int, scratch: Tensor) -> Tensor:
        """Kept elements ``[start, stop)``, flat, on the CPU and in the dtype of ``scratch``. Local.

        They are a view where that is how they lie, and else converted into ``scratch``.
        """
        values = self.values.detach()
        first, last = self.start + start, self.start + stop
        lies_there = values.is_cpu and values.numel() >= last and values.is_contiguous()  # else read() finds it
        if lies_there and values.dtype == scratch.dtype:
            return values.view(-1)[first:last]
        self.read(start, stop, scratch[: stop - start])
        return scratch[: stop - start]


def check_readable(held: Iterable[Held]) -> None:
    """Raises EMAStateError for a tensor that is more, or something else, than its elements one after the other. Local.

    Such are the quantised weights under an adapter: their class computes as if it had the elements of the shape.
    """
    for one in held:
        if one.share.spec.hidden or not _is_readable(one.values):
            raise EMAStateError(
                f"{one.share.spec.name!r} is not averaged and is a {type(one.values).__name__}, which cannot be read "
                "by ranges of its elements: pass include_untracked=False, which leaves out what is not averaged"
            )


def _is_readable(values: Tensor) -> bool:
    if type(values) in (Tensor, nn.Parameter):
        return values.layout == torch.strided and not values.is_quantized
    # bitsandbytes (0.49) keeps the scales of its packed weights in these attributes.
    scales = (getattr(values, name, None) for name in ("quant_state", "SCB"))
    if values.layout != torch.strided or values.is_quantized or any(scale is not None for scale in scales):
        return False
    try:
        values.untyped_storage().data_ptr()
    except RuntimeError:  # of a class that keeps other tensors in place of memory (torchao)
        return False
    return True


@dataclass(frozen=True)
class Entry:
    """One full tensor of an average; the same on every rank.

    Attributes:
        name: canonical name.
        aliases: other names of the same tensor.
        shape: of the full tensor.
        dtype: of the average; where there is none, of the live tensor.
        live_dtype: of the live tensor.
        mode: whether it is averaged, copied or live.
        partitioned: whether its elements are spread over several ranks.
        team: the lowest of the ranks that are heard; where the tensor is not partitioned, the only one.
        buffer: whether it is a buffer.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    live_dtype: torch.dtype
    mode: Mode
    partitioned: bool
    team: int = 0
    buffer: bool = False

    @property
    def numel(self) -> int:
        """Elements of the full tensor."""
        return torch.Size(self.shape).numel()

    @property
    def names(self) -> tuple[str, ...]:
        """All names."""
        return (self.name, *self.aliases)

    def cast(self, dtype: torch.dtype | None) -> torch.dtype:
        """``dtype`` for floating-point tensors, their own for others and where ``dtype`` is None."""
        return dtype if dtype is not None and self.dtype.is_floating_point else self.dtype


def catalogue(shares: Sequence[Share], group: dist.ProcessGroup | None) -> list[Entry]:
    """Every full tensor of the model, in an order that all ranks share: rank 0's, then what the next ranks add.

    Collective. Ranks first compare a hash of what they hold, and exchange the lists only where they differ (pipeline
    stages). Raises EMAEngineError, on all ranks, if two of them disagree on a tensor.
    """
    mine = [_entry(share) for share in shares]
    common = [replace(entry, team=share.spec.team) for entry, share in zip(mine, shares, strict=True)]
    digest = hashlib.blake2b(repr(common).encode(), digest_size=16).digest()
    if len(set(gather_objects(digest, group))) == 1:
        return common  # one team each; and where everyone holds a tensor whole, rank 0 does, which is heard
    teams = [_team(share, group) for share in shares]
    entries: dict[str, Entry] = {}
    for rank, found in enumerate(gather_objects(list(zip(mine, teams, strict=True)), group)):
        for entry, team in found:
            known = entries.setdefault(entry.name, replace(entry, team=team))
            if replace(known, team=0) != entry:
                raise EMAEngineError(
                    f"ranks must hold parts of one model, but rank {rank} has {entry} and a lower rank {known}"
                )
            entries[entry.name] = replace(known, team=min(known.team, team))
    return list(entries.values())


def _entry(share: Share) -> Entry:
    spec = share.spec
    return Entry(
        spec.name,
        spec.aliases,
        tuple(spec.shape),
        share.dtype,
        spec.dtype,
        share.mode,
        spec.partitioned,
        buffer=spec.kind == "buffer",
    )


def _team(share: Share, group: dist.ProcessGroup | None) -> int:
    return share.spec.team if share.spec.partitioned else rank_in(group)


def speaks(entry: Entry, share: Share, group: dist.ProcessGroup | None) -> bool:
    """Whether what this rank holds goes into collective output."""
    return share.owned and _team(share, group) == entry.team


def gather_each(
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    dtypes: Mapping[str, torch.dtype],
    group: dist.ProcessGroup | None,
    take: Callable[[Entry, int, Tensor], None],
    doing: str,
    everywhere: bool = False,
) -> None:
    """Brings full tensors to rank 0, or to every rank, one window at a time. Collective.

    A rank that fails, be it in reading or in ``take``, goes on to send and to receive, so that no other rank waits for
    it, and its error is raised on every rank at the end.

    Args:
        entries: the tensors.
        held: what this rank has of each, if anything.
        dtypes: of each result, by name; conversion happens before anything is sent.
        group: the ranks.
        take: called on rank 0 with a tensor, the first element of a window, and the values there.
        doing: for the error.
        everywhere: call ``take`` on every rank.
    """
    window = agree(lambda: Window(group), group, doing)
    failure: Exception | None = None
    for entry in entries:
        dtype = dtypes[entry.name]
        for start in range(0, entry.numel, window.capacity(dtype)):
            stop = min(start + window.capacity(dtype), entry.numel)
            values = window.clear(stop - start, dtype)
            try:
                if failure is None:
                    _read_window(entry, held(entry.name), start, stop, values, group)
            except Exception as error:
                failure = error
            if everywhere or entry.partitioned or entry.team != 0:  # else rank 0 has it, and all ranks know that
                window.collect(everywhere)
            try:
                if failure is None and (everywhere or rank_in(group) == 0):
                    take(entry, start, values)
            except Exception as error:
                failure = error

    def finish() -> None:
        if failure is not None:
            raise failure

    agree(finish, group, doing)


def _read_window(
    entry: Entry, held: Held | None, start: int, stop: int, out: Tensor, group: dist.ProcessGroup | None
) -> None:
    """Puts this rank's elements of the window ``[start, stop)`` of a full tensor into their places in ``out``."""
    if held is None or not speaks(entry, held.share, group):
        return
    for local, inside, length in overlap(held.runs, start, stop):
        held.read(local, local + length, out[inside : inside + length])


def full_tensors(
    entries: Sequence[Entry],
    held: Callable[[str], Held | None],
    dtype: torch.dtype | None,
    group: dist.ProcessGroup | None,
    doing: str,
) -> dict[str, Tensor]:
    """Full CPU tensors by name on rank 0, ``{}`` elsewhere; tied names share one tensor. Collective."""
    dtypes = {entry.name: entry.cast(dtype) for entry in entries}
    state: dict[str, Tensor] = {}

    def allocate() -> None:  # before anything is sent: where memory may be short
        if rank_in(group) == 0:
            for entry in entries:
                state.update(dict.fromkeys(entry.names, torch.empty(entry.shape, dtype=dtypes[entry.name])))

    def take(entry: Entry, start: int, values: Tensor) -> None:
        state[entry.name].view(-1)[start : start + values.numel()].copy_(values)

    agree(allocate, group, doing)
    gather_each(entries, held, dtypes, group, take, doing)
    return state
