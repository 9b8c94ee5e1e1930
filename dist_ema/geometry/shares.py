"""Decides which elements of each tensor this rank averages, and which it writes. Local; does not depend on wrappers.

An engine says which elements of a tensor a rank holds (``spec.runs``). A share says which of these the rank averages.
They are the same unless several ranks hold the same elements. Such *replicas* (DDP, HSDP, ZeRO-0) split the work,
unless ``shard_replicas=False``. All tensors of a set of replicas are laid end to end and cut into parts of equal bytes.
HSDP with 2 copies of 2 shards, and two parameters of 8 elements each::

                 w: 0 1 2 3            b: 0 1 2 3
    shard 0     [ . . . . ]           [ . . . . ]          ranks 0 and 2 hold all 8 elements
                 rank 0 averages w     rank 2 averages b

                 w: 4 5 6 7            b: 4 5 6 7
    shard 1     [ . . . . ]           [ . . . . ]          ranks 1 and 3
                 rank 1 averages w     rank 3 averages b

So every element is averaged once, ``update()`` sends nothing, and the shadow takes half of the memory. In calls that
need whole shards (``average_parameters()``, under HSDP) replicas send each other their parts.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from dist_ema.errors import EMAConfigError, EMAEngineError
from dist_ema.geometry.runs import Box, Runs, boxes, cut, split_evenly, split_for_all, whole
from dist_ema.geometry.spec import Replicas, TensorSpec
from dist_ema.options import Options

Mode = Literal["average", "copy", "live"]


@dataclass(frozen=True)
class Share:
    """Describes this rank's part of one tensor.

    Attributes:
        spec: the tensor, as the engine describes it.
        mode: ``"average"``; ``"copy"`` for a buffer that is copied at every update; ``"live"`` for a tensor without a
            shadow.
        start, stop: the range of local elements, in the order of ``spec.runs``, that this rank keeps a shadow of.
        dtype: the dtype of the shadow; of the tensor itself if it is live.
        split: whether other replicas keep the other elements.
        first_replica: whether this rank writes the elements, among all ranks that keep the same ones. For unpartitioned
            tensors every holder is marked, and the lowest rank writes.
        joined: the number of the update at which it became averaged; 0 for tensors that are averaged from the first
            copy on. Replicas split the tensors of one update between them, so existing shares never move.

    >>> spec = TensorSpec("w", torch.Size([4, 6]), torch.float32, runs=((6, 12),))
    >>> share = Share(spec, "average", 0, 6, torch.float32, split=True, first_replica=True)  # of two replicas the first
    >>> share.runs, share.boxes
    (((6, 6),), (((1, 0), (1, 6)),))
    """

    spec: TensorSpec
    mode: Mode
    start: int
    stop: int
    dtype: torch.dtype
    split: bool
    first_replica: bool
    joined: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Returns all names of the tensor."""
        return (self.spec.name, *self.spec.aliases)

    @property
    def numel(self) -> int:
        """Returns the number of elements that this rank keeps a shadow of."""
        return self.stop - self.start

    @property
    def runs(self) -> Runs:
        """Returns the runs of these elements in the full tensor."""
        return cut(self.spec.runs, self.start, self.stop)

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Returns these elements as boxes of the full tensor; one box may replace a thousand runs."""
        return tuple(boxes(self.runs, self.spec.shape))


def assign_shares(
    specs: Sequence[TensorSpec], options: Options, averaged: Container[str] = (), joined: int = 0
) -> list[Share]:
    """Returns one share for each spec, in order. Local.

    Args:
        specs: the tensors.
        options: the options of the average.
        averaged: names of parameters that are averaged although they are frozen now.
        joined: the number of the update at which these tensors become averaged; 0 for the first copy.

    Raises:
        EMAConfigError: the dtype of a trained parameter cannot be averaged.
        EMAEngineError: the elements of a trained parameter cannot be read.

    >>> (share,) = assign_shares([TensorSpec.unsharded("w", torch.zeros(2, 3))], Options.parse())
    >>> share.mode, share.dtype, share.runs
    ('average', torch.float32, ((0, 6),))
    """
    # 1. Decide which tensors are averaged, which are copied, and which have no shadow. A tensor whose memory does not
    # hold its elements (a quantized weight) can have none.
    modes = [_mode(spec, options, averaged) for spec in specs]
    for spec, mode in zip(specs, modes, strict=True):
        if spec.hidden and mode != "live":
            advice = "buffers='ignore'" if spec.kind == "buffer" else f"exclude={spec.name!r}, or freeze it"
            raise EMAEngineError(
                f"{spec.kind} {spec.name!r} is a {spec.hidden}, whose memory does not hold its elements as they are: "
                f"it cannot be averaged. Give {advice}"
            )
    dtypes = [_dtype(spec, mode, options) for spec, mode in zip(specs, modes, strict=True)]
    # 2. Decide which local elements this rank keeps: the whole local shard, unless replicas split it.
    ranges = [(0, spec.local_numel) for spec in specs]
    split = []
    for spec, mode in zip(specs, modes, strict=True):
        split.append(options.shard_replicas and mode == "average" and spec.replicas is not None)
    # All tensors of a replica set are laid end to end and cut together. If each tensor were cut for itself, the
    # rounding of hundreds of small tensors would add up, and most ranks would hold a few elements of every one.
    for members in _replica_groups([spec if is_split else None for spec, is_split in zip(specs, split, strict=True)]):
        replicas = specs[members[0]].replicas
        if replicas is not None:
            parts = split_over([specs[i] for i in members], [dtypes[i] for i in members], replicas, replicas.index)
            for index, part in zip(members, parts, strict=True):
                ranges[index] = part
    # 3. Decide which rank writes them. Each replica is the only one that has its part of a split tensor, so each of
    # them writes. Otherwise replicas have the same elements, and the first one writes.
    shares = []
    for spec, mode, (start, stop), dtype, is_split in zip(specs, modes, ranges, dtypes, split, strict=True):
        writes = spec.primary and (is_split or _first(spec.replicas))
        shares.append(Share(spec, mode, start, stop, dtype, is_split, writes, joined))
    return shares


def assign_joined(
    specs: Sequence[TensorSpec], options: Options, averaged: Container[str], joined: Sequence[int]
) -> list[Share]:
    """Does what :func:`assign_shares` does, for tensors that became averaged at different updates (``joined``)."""
    # Each set of tensors that joined together was split together at that time, so it is split alone here as well.
    shares: dict[int, Share] = {}
    for number in sorted(set(joined)):
        members = [index for index, joined_at in enumerate(joined) if joined_at == number]
        found = assign_shares([specs[index] for index in members], options, averaged, number)
        shares |= zip(members, found, strict=True)
    return [shares[index] for index in range(len(specs))]


def may_join(share: Share, options: Options) -> bool:
    """Returns whether a tensor that is not averaged joins the average once it is trained. Local."""
    return share.mode == "live" and share.spec.kind == "frozen" and options.selects(share.spec.name)


def is_ignored(options: Options, name: str, is_buffer: bool) -> bool:
    """Returns whether the options leave a tensor out of every average. Pure.

    Implements :data:`~dist_ema.engines.binding.Ignored`.
    """
    return not options.selects(name) or (is_buffer and options.buffer_mode(name) == "ignore")


def follow_specs(shares: Sequence[Share], specs: Sequence[TensorSpec], options: Options) -> list[Share]:
    """Returns the shares of a model in which ignored tensors have changed. Local.

    Tensors that are averaged or copied keep their share. The others get a new one.

    Args:
        shares: the present shares, in any order.
        specs: the specs of the model as it is now.
        options: the options of the average.
    """
    kept = {name: share for share in shares if share.mode != "live" for name in share.names}
    found = []
    for share in assign_shares(specs, options):
        # Any of its names identifies a tensor: tied weights may be listed under another one now.
        known = next((kept[name] for name in share.names if name in kept), None)
        # A tensor that is new in the model has no shadow.
        found.append(as_live(share) if known is None else known)
    return found


def follow_shapes(shares: Sequence[Share], specs: Sequence[TensorSpec], options: Options) -> list[Share]:
    """Returns the shares of a model in which tensors were resized. Tensors that are not averaged get the new shape.
    Local.

    The arguments are those of :func:`follow_specs`; the specs are in the order of the shares.
    """
    found = []
    for share, spec in zip(shares, specs, strict=True):
        is_resized = share.mode == "live" and share.spec.shape != spec.shape
        found.append(as_live(replace(share, spec=spec)) if is_resized else share)
    return found


def as_live(share: Share) -> Share:
    """Returns the share that the same tensor has if it is not averaged. Local."""
    # A parameter without a shadow counts as frozen, so that may_join() finds it.
    spec = share.spec if share.spec.kind == "buffer" else replace(share.spec, kind="frozen")
    first = spec.primary and _first(spec.replicas)
    return Share(spec, "live", 0, spec.local_numel, spec.dtype, split=False, first_replica=first)


def was_resized(share: Share, spec: TensorSpec) -> bool:
    """Returns whether a buffer of the average has another shape in the model now, as ``spec`` describes it. Pure."""
    return share.mode != "live" and spec.kind == "buffer" and share.spec.shape != spec.shape


def resized(share: Share, shape: Sequence[int]) -> Share:
    """Returns the share of an unpartitioned buffer for another shape. Pure."""
    full = torch.Size(shape)
    spec = replace(share.spec, shape=full, runs=whole(full.numel()))
    return replace(share, spec=spec, start=0, stop=full.numel())


def averaged_names(shares: Sequence[Share]) -> set[str]:
    """Returns the names of the parameters that are averaged, including those that are frozen now. Pure."""
    return {share.spec.name for share in shares if share.mode == "average" and share.spec.kind != "buffer"}


def shares_to_load(
    shares: list[Share],
    joining: Container[str],
    shapes: Mapping[str, Sequence[int]],
    options: Options,
    joined: Mapping[str, int] = MappingProxyType({}),
) -> list[Share]:
    """Returns the shares of an average that will be loaded; the given list itself if they are the same. Local.

    Args:
        shares: the shares of the present average.
        joining: names of parameters that are averaged in the checkpoint and frozen here.
        shapes: shapes of buffers that have another shape in the checkpoint, by name.
        options: the options of the average.
        joined: numbers of the updates at which tensors joined, by name, where the checkpoint has another number.
    """
    names = [name for share in shares for name in share.names]
    if not shapes and not joined and not any(name in joining for name in names):
        return shares
    specs = []
    for share in shares:
        shape = shapes.get(share.spec.name)
        specs.append(share.spec if shape is None else resized(share, shape).spec)
    averaged = averaged_names(shares).union(name for name in names if name in joining)
    # Replicas split the tensors of one update between them, so the numbers decide which elements this rank has.
    numbers = [joined.get(share.spec.name, share.joined) for share in shares]
    return assign_joined(specs, options, averaged, numbers)


def in_shapes_of(shares: Sequence[Share], sources: Sequence[Tensor]) -> list[Tensor]:
    """Returns the live tensors, with zeros in place of each buffer that has another shape in the average. Local.

    A shadow is allocated on the devices, and with the shapes, of these tensors.
    """
    found = []
    for share, source in zip(shares, sources, strict=True):
        whole_buffer = share.spec.kind == "buffer" and not share.spec.partitioned
        if whole_buffer and source.shape != share.spec.shape:
            source = torch.zeros(share.spec.shape, dtype=source.dtype, device=source.device)
        found.append(source)
    return found


def replica_sets(shares: Sequence[Share]) -> list[list[int]]:
    """Returns the indices of the shares that replicas split, one list for each process group and update at which they
    joined.
    """
    # By identity: engines give the same group object to all its tensors, and two groups of the same ranks are rare
    # (then each set is split for itself, on all ranks alike).
    sets: dict[tuple[int, int], list[int]] = {}
    for index, share in enumerate(shares):
        if share.split and share.spec.replicas is not None:
            sets.setdefault((id(share.spec.replicas.group), share.joined), []).append(index)
    return list(sets.values())


def _replica_groups(specs: Sequence[TensorSpec | None]) -> list[list[int]]:
    """Returns the indices of the specs that have replicas, one list for each process group.

    Does for specs what :func:`replica_sets` does for shares. None stands for a tensor that is not split.
    """
    sets: dict[int, list[int]] = {}
    for index, spec in enumerate(specs):
        if spec is not None and spec.replicas is not None:
            sets.setdefault(id(spec.replicas.group), []).append(index)
    return list(sets.values())


def split_over(
    specs: Sequence[TensorSpec], dtypes: Sequence[torch.dtype], replicas: Replicas, index: int
) -> list[tuple[int, int]]:
    """Returns the range of local elements of each tensor of one replica set that replica ``index`` keeps.

    The result is the same on all replicas.
    """
    sizes = [spec.local_numel for spec in specs]
    return split_evenly(sizes, [dtype.itemsize for dtype in dtypes], replicas.size, index)


def parts_of_replicas(shares: Sequence[Share], replicas: Replicas) -> list[list[tuple[int, int, int]]]:
    """Returns what each replica keeps of the tensors of one replica set: ranges ``(place in shares, start, stop)``.

    The ranges are of local elements, and the same on all replicas. Empty ranges are left out.
    """
    sizes = [share.spec.local_numel for share in shares]
    return split_for_all(sizes, [share.dtype.itemsize for share in shares], replicas.size)


def _mode(spec: TensorSpec, options: Options, averaged: Container[str]) -> Mode:
    """Returns whether a tensor is averaged, copied or left live; ``averaged`` as for :func:`assign_shares`."""
    if is_ignored(options, spec.name, spec.kind == "buffer"):
        return "live"
    if spec.kind == "parameter" or (spec.kind == "frozen" and spec.name in averaged):
        return "average"
    if spec.kind == "frozen":
        return "live"
    # Counters and masks (integers, bools) have no mean, so they are copied even with buffers="average".
    is_averaged = options.buffer_mode(spec.name) == "average" and spec.dtype.is_floating_point
    return "average" if is_averaged else "copy"


def _dtype(spec: TensorSpec, mode: Mode, options: Options) -> torch.dtype:
    """Returns the dtype of a tensor's shadow. Raises EMAConfigError if tensors of its dtype cannot be averaged."""
    if mode != "average":
        return spec.dtype
    if not spec.dtype.is_floating_point and spec.dtype not in (torch.complex64, torch.complex128):
        raise EMAConfigError(
            f"parameter {spec.name!r} is {spec.dtype}, which cannot be averaged: "
            f"give exclude={spec.name!r}, or freeze it"
        )
    dtype = shadow_dtype(spec.dtype, options.dtype)
    if dtype.is_complex and dtype != torch.complex64:
        # torch.float16 makes complex32, for which torch lacks most operations; safetensors has complex64 only.
        raise EMAConfigError(
            f"dtype={options.dtype}: parameter {spec.name!r} is {spec.dtype}, and complex averages are kept as "
            f"torch.complex64. Give dtype=torch.float32, or exclude={spec.name!r}"
        )
    return dtype


def shadow_dtype(live: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of the average of a live tensor. Pure.

    Args:
        live: the dtype of the tensor. A complex tensor is averaged as pairs of real numbers.
        wanted: the dtype of each real number in the average; None keeps that of the tensor.
    """
    if wanted is None:
        return live
    if not live.is_complex:
        return wanted
    # torch has no complex counterpart of bf16. _dtype() refuses every complex dtype except complex64.
    return {torch.float32: torch.complex64}.get(wanted, torch.complex128)


def _first(replicas: Replicas | None) -> bool:
    """Returns whether this rank is the first of the replicas, or the only holder."""
    return replicas is None or replicas.index == 0
