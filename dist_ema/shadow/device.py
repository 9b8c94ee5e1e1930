"""Holds averaged values in memory on the devices of the weights: one allocation per average, dtype and device.

``host.py`` has the shadow in host memory (``offload="cpu"``), ``beside.py`` the updates on a second stream, and
``teacher/shadow.py`` the shadow that is a teacher's weights. The arithmetic itself is in ``kernels/``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_ema import kernels
from dist_ema.errors import EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.kernels.copies import Copies
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key
from dist_ema.runtime import memory
from dist_ema.shadow import lent
from dist_ema.shadow.beside import Beside

if TYPE_CHECKING:
    from dist_ema.engines.counterpart import Counterpart

logger = logging.getLogger(__name__)


class Shadow:
    """Holds the averages of one model on this rank, and the last copy of its buffers, which all averages share.

    Memory is allocated at the first update, because a model may be on the meta device before. Lists of tensors follow
    the order of ``_averaged`` (averages) and ``_copied`` (buffers), which hold indices into ``shares``::

        shares       0 average   1 live   2 copy   3 average
        _averaged   [0, 3]       _averages[name] = [shadow of 0, shadow of 3]
        _copied     [2]          _buffers        = [copy of 2]

    Args:
        names: the names of the averages.
        shares: what this rank averages of each tensor.
        skip_nonfinite: leave a shadow element unchanged where its source is NaN or Inf.
        seed: the seed for stochastic rounding of bf16 shadows; None rounds to nearest.
    """

    def __init__(
        self, names: Iterable[str], shares: Sequence[Share], skip_nonfinite: bool, seed: int | None = None
    ) -> None:
        self.seed = seed
        self._positions: ElementPositions | None = None
        self.guard = kernels.Guard() if skip_nonfinite else None
        self.scratch = kernels.Scratch()
        self._names = tuple(names)
        self._averaged = [index for index, share in enumerate(shares) if share.mode == "average"]
        self._copied = [index for index, share in enumerate(shares) if share.mode == "copy"]
        self._shares = shares
        self._complex = _complex_shares(shares)  # indices of shares whose average is complex
        self._averages: dict[str, list[Tensor]] = {}
        self._spans: list[tuple[int, int]] | None = None  # range of each averaged share in its source; None: to compute
        self._buffers: list[Tensor] = []
        self._copies: Copies | None = None  # further tensors that an update writes (teacher/shadow.py)
        # Counts of NaN and Inf elements in the first copy, on each device, until they are logged.
        self._unreported: dict[torch.device, Tensor] = {}
        self._tainted: set[int] = set()  # places in _averaged of the CPU tensors that had such elements
        self._beside: Beside | None = None  # runs updates on second streams; None on the current one
        self._new: list[int] = []  # shares to which follow() gave memory that fill_new() has to fill

    @property
    def started(self) -> bool:
        """Returns whether there is an average yet."""
        return bool(self._averages)

    def run_beside(self, wanted: bool = True) -> None:
        """Sets whether updates run beside the next forward pass (:mod:`dist_ema.shadow.beside`). Local."""
        self.drain()
        if wanted and self._beside is None:
            self._beside = Beside()
        elif not wanted and not self.failed:
            self._beside = None

    def allocate(self, sources: Sequence[Tensor]) -> None:
        """Allocates uninitialised memory on the devices of the sources. Local."""
        averages = {name: self._allocate(sources, self._averaged) for name in self._names}
        self._buffers = self._allocate(sources, self._copied)
        self._averages = averages
        self._spans = None

    def start(self, sources: Sequence[Tensor]) -> None:
        """Allocates memory, and copies the sources into every average. Local."""
        self.allocate(sources)
        self.fill(sources)

    def first_copy(self, sources: Sequence[Tensor]) -> None:
        """Does what ``start()`` does, and logs NaN and Inf weights that are on the CPU. Local, no host sync."""
        self.start(sources)
        self.report_nonfinite(wait=False)

    def fill(self, sources: Sequence[Tensor]) -> None:
        """Copies the sources into every average. Local."""
        rounding = self._rounding(1)  # the first copy is update number 1
        # The guard only counts here: the first copy has no earlier value to keep, so it takes NaN and Inf as well.
        guard = kernels.Guard() if self.guard is None else self.guard
        operands = list(self._averages.values()), self._pick(sources), self._ranges(self._averaged)
        kernels.copy(*self._in_reals(self._averaged, *operands), guard, rounding)
        self._unreported = guard.snapshot()
        self._tainted = set(guard.tainted)
        self._copy_buffers(sources)

    def report_nonfinite(self, wait: bool) -> None:
        """Logs once that weights were NaN or Inf at the first copy. Local.

        Args:
            wait: also read counts that are on an accelerator, which waits for the device. Only calls that wait for the
                device anyway set it.
        """
        self._join()
        ready = [device for device in self._unreported if wait or device.type == "cpu"]
        found = sum(int(self._unreported.pop(device)) for device in ready)
        if found:
            names = [self._shares[self._averaged[index]].spec.name for index in sorted(self._tainted)]
            logger.warning(
                "%d elements of the weights were NaN or Inf when the average began%s. %s",
                found,
                f" ({names[0]!r}" + (f" and {len(names) - 1} more tensors)" if names[1:] else ")") if names else "",
                "With skip_nonfinite=False they stay NaN or Inf."
                if self.guard is None
                else "Each is replaced by the first finite value that training gives it.",
            )

    def loaded(self) -> None:
        """Forgets what the first copy found, after the shadows were filled from a checkpoint.

        A loaded average may have NaN, so the next update looks at every shadow element.
        """
        self._join()
        self._unreported = {}
        if self.guard is not None:
            self.guard = kernels.Guard()
            self.guard.tainted.update(range(len(self._averaged)))

    def follow(
        self,
        shares: Sequence[Share],
        places: Sequence[int],
        new: Sequence[int],
        sources: Sequence[Tensor],
        counterpart: Counterpart | None = None,
    ) -> None:
        """Changes to other shares, when tensors join the average or buffers are resized. Local.

        The memory of the other tensors stays where it is. The memory of new shares is uninitialised until ``update()``
        or ``fill_new()`` copies their sources. If this raises, nothing has changed.

        Args:
            shares: the shares from now on.
            places: for each previous share its index among ``shares``; -1 if it had no shadow and is gone.
            new: indices in ``shares`` of those that join or were resized.
            sources: the live tensors, one for each of ``shares``.
            counterpart: the teacher's tensors in the order of ``shares``, if there is a teacher.
        """
        averaged, copied = self._numbers_after(shares, places, new)
        self._join()
        if self.started:
            # Allocate everything before anything is changed, so that running out of memory changes nothing.
            fresh = {mode: [index for index in new if shares[index].mode == mode] for mode in ("average", "copy")}
            previous_shares = self._shares
            self._shares = shares  # _allocate() reads it
            try:
                allocated = [self._allocate(sources, fresh["average"]) for _ in self._names]
                buffers = self._allocate(sources, fresh["copy"])
            except BaseException:
                self._shares = previous_shares
                raise
            for average, tensors in zip(self._averages.values(), allocated, strict=True):
                _put(average, averaged, dict(zip(fresh["average"], tensors, strict=True)))
            _put(self._buffers, copied, dict(zip(fresh["copy"], buffers, strict=True)))
            self._new = list(new)
        self._shares = shares
        self._averaged = averaged
        self._copied = copied
        self._complex = _complex_shares(shares)
        # Both depend on the shares; the next update computes them again.
        self._spans = None
        self._positions = None

    def _numbers_after(
        self, shares: Sequence[Share], places: Sequence[int], new: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Returns ``_averaged`` and ``_copied`` for the new shares. Shares that join come last."""
        averaged = [places[index] for index in self._averaged]
        copied = [places[index] for index in self._copied]
        known = set(averaged)
        averaged += [index for index in new if shares[index].mode == "average" and index not in known]
        return averaged, copied

    @property
    def has_new(self) -> bool:
        """Returns whether ``fill_new()`` has anything to do."""
        return bool(self._new)

    def fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        """Copies the sources of new shares into every average. Local.

        Args:
            sources: the live tensors.
            number: the number of the update that this is part of, on which stochastic rounding depends.
        """
        self._join()
        self._fill_new(sources, number)

    def _fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        """Does what ``fill_new()`` does; called where nothing else works on the averages."""
        averaged = [index for index in self._new if self._shares[index].mode == "average"]
        place_of = {index: place for place, index in enumerate(self._averaged)}
        places = [place_of[index] for index in averaged]
        rounding = self._rounding(number)
        if rounding is not None:
            # The positions of all averaged shares are known; this copy needs those of the new shares only.
            shares = [self._shares[index] for index in averaged]
            positions = ElementPositions([share.spec.name for share in shares], [share.runs for share in shares])
            rounding = Rounding(positions, rounding.keys)
        targets = [[average[place] for place in places] for average in self._averages.values()]
        taken = [sources[index] for index in averaged]
        kernels.copy(*self._in_reals(averaged, targets, taken, self._ranges(averaged)), None, rounding)
        if self.guard is not None:
            # They were copied without a guard, so any of their shadow elements may be NaN or Inf. The next update
            # looks at each of them.
            self.guard.tainted.update(places)
        copied = [index for index in self._new if self._shares[index].mode == "copy"]
        buffer_of = dict(zip(self._copied, self._buffers, strict=True))
        buffers = [buffer_of[index] for index in copied]
        kernels.copy([buffers], [sources[index] for index in copied], self._ranges(copied), None)
        self._new = []

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """Moves every average by its weight. Local; no host sync, no memory beyond the scratch.

        Args:
            sources: the live tensors.
            weights: the weight of the sources in each average.
            number: the number of this update, on which stochastic rounding depends; the first copy is number 1.
        """
        if self._beside is None:
            self._update(sources, weights, number)
        else:
            self._beside.run(self._shares, sources, lambda taken: self._update(taken, weights, number))

    def _update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """Does what ``update()`` does, on the current streams."""
        if self._new:
            self._fill_new(sources, number)
        if self._spans is None:
            self._spans = self._ranges(self._averaged)
        averages = list(self._averages.values())
        rounding = self._rounding(number)
        copies = self._copies
        operands = averages, self._pick(sources), self._spans
        if self._complex:
            # The kernel sees pairs of reals. It cannot write the further tensors, which are complex.
            operands = self._in_reals(self._averaged, *operands)
            copies = None
        kernels.lerp(*operands, weights, self.scratch, self.guard, rounding, copies)
        if self._copies is not None and copies is None:
            kernels.write_copies(averages[0], self._copies, range(len(averages[0])))
        self._copy_buffers(sources)

    def _in_reals(
        self,
        indices: Sequence[int],
        averages: Sequence[Sequence[Tensor]],
        sources: Sequence[Tensor],
        spans: Sequence[tuple[int, int]],
    ) -> tuple[list[list[Tensor]], list[Tensor], list[tuple[int, int]]]:
        """Returns kernel arguments in which views as pairs of reals replace complex tensors. Local; copies nothing.

        NaN and Inf are therefore left out and counted separately in real and imaginary parts.

        Args:
            indices: the share of each source.
            averages, sources, spans: as for :func:`kernels.lerp`.
        """
        targets = [list(tensors) for tensors in averages]
        taken = list(sources)
        doubled = list(spans)
        for place, index in enumerate(indices):
            if index in self._complex:
                taken[place] = torch.view_as_real(sources[place])
                doubled[place] = 2 * spans[place][0], 2 * spans[place][1]
                for tensors in targets:
                    tensors[place] = kernels.flat_reals(tensors[place])
        return targets, taken, doubled

    def _rounding(self, update: int) -> Rounding | None:
        """Returns the stochastic rounding of update number ``update``; None if the shadows round to nearest."""
        if self.seed is None:
            return None
        if self._positions is None:
            # An element's random bits depend on its place in the full tensor, so that the sharding does not matter.
            shares = [self._shares[index] for index in self._averaged]
            self._positions = ElementPositions([share.spec.name for share in shares], [share.runs for share in shares])
        return Rounding(self._positions, [average_key(self.seed, update, name) for name in self._names])

    def tensors(self, name: str) -> list[Tensor | None]:
        """Returns the shadow of every share, 1D; None for a live share.

        Raises:
            EMAStateError: an update has failed.
        """
        self._join()
        self._raise_failure()
        tensors: list[Tensor | None] = [None] * len(self._shares)
        for index, tensor in zip(self._averaged, self._averages[name], strict=True):
            tensors[index] = tensor
        for index, tensor in zip(self._copied, self._buffers, strict=True):
            tensors[index] = tensor
        return tensors

    def release_parts(self) -> None:
        """Separates the averages from parts of a ``state_dict()`` that are still referenced, before a write. Local.

        The parts keep the memory, and these shadows move to new memory. See ``lent.py``.
        """
        if not lent.outstanding():  # the usual case
            return
        self._join()
        # Wait for all parts at once: separate() below would wait for those of each average in turn.
        lent.wait(self._all())
        self._averages = {name: lent.separate(tensors, self._copy_of) for name, tensors in self._averages.items()}
        self._buffers = lent.separate(self._buffers, self._copy_of)

    def _all(self) -> list[Tensor]:
        """Returns every shadow of every average."""
        averaged = [tensor for tensors in self._averages.values() for tensor in tensors]
        return averaged + self._buffers

    def _copy_of(self, tensor: Tensor) -> Tensor:
        """Returns a copy of one shadow, in memory of the same kind."""
        return memory.empty(tensor.numel(), tensor.dtype, tensor.device).copy_(tensor)

    def nbytes(self) -> dict[torch.device, int]:
        """Returns the bytes held, by device, scratch included."""
        sizes: dict[torch.device, int] = {}
        lists = [*self._averages.values(), self._buffers]
        for tensor in (tensor for tensors in lists for tensor in tensors):
            sizes[tensor.device] = sizes.get(tensor.device, 0) + tensor.nbytes
        return sizes

    # Hooks for shadows that are a teacher's weights (teacher/shadow.py). A shadow of its own has nothing to do in them.

    @property
    def fixed(self) -> frozenset[int]:
        """Returns the indices of shares whose shadow has to stay in its memory, so it cannot be exchanged in a swap."""
        return frozenset()

    def install(self) -> None:
        """Makes this shadow the active one. Local."""
        return

    def write_teacher(self) -> None:
        """Brings the teacher up to date after something else than ``update()`` has written the shadow. Local."""
        return

    # Updates may run beside training: on the device (beside.py), or in a thread (host.py), which overrides these.

    def _join(self) -> None:
        """Makes later work of the device wait for an update beside training. Local; the host does not wait."""
        if self._beside is not None:
            self._beside.join()

    def _raise_failure(self) -> None:
        """Raises EMAStateError if an update beside training has failed."""
        if self._beside is not None and self._beside.failure is not None:
            raise self._beside.failure

    @property
    def failed(self) -> bool:
        """Returns whether a failed update has left the averages unusable."""
        return self._beside is not None and self._beside.failure is not None

    def check(self, sources: Sequence[Tensor]) -> None:
        """Raises EMAStateError if the previous update failed, or the next one cannot take these sources. Local."""
        self._join()
        self._raise_failure()

    def drain(self) -> None:
        """Waits for updates beside training. Local; raises nothing.

        For an update on a device only later work of the device waits, not the host.
        """
        self._join()

    def raise_failure(self) -> None:
        """Raises EMAStateError if work on the averages has failed. Local; does not wait."""
        self._raise_failure()

    def wait(self) -> None:
        """Waits for updates beside training, and raises EMAStateError if one has failed. Local."""
        self.drain()
        self.raise_failure()

    def close(self) -> None:
        """Releases what only updates need. Local. Raises a failure that no call has raised yet."""
        self.wait()

    def discard(self) -> None:
        """Ends work on averages that are no longer needed. Local; raises nothing."""
        self._join()

    def notes(self) -> list[str]:
        """Returns lines for ``memory_report()``; none here."""
        return []

    def _pick(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Returns the sources of the averaged shares, in the order of the shadows."""
        return list(map(sources.__getitem__, self._averaged))

    def _ranges(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """Returns for each share the range of its elements in its flattened source."""
        return [(self._shares[index].start, self._shares[index].stop) for index in indices]

    def _copy_buffers(self, sources: Sequence[Tensor]) -> None:
        """Copies the buffers that are not averaged."""
        kernels.copy([self._buffers], [sources[index] for index in self._copied], self._ranges(self._copied), None)

    def _allocate(self, sources: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        """Returns one flat tensor per share, views of one allocation per dtype and device."""
        # Count the elements of each allocation, allocate, and hand out consecutive views.
        totals: dict[tuple[torch.dtype, torch.device], int] = {}
        for index in indices:
            share = self._shares[index]
            device = sources[index].device
            if device.type == "meta":
                raise EMAStateError(f"{share.spec.name!r} is on the meta device: materialize the model before update()")
            key = (share.dtype, device)
            totals[key] = totals.get(key, 0) + _room(share.numel)
        flats = {key: memory.empty(total, *key) for key, total in totals.items()}
        used = dict.fromkeys(flats, 0)
        views = []
        for index in indices:
            share = self._shares[index]
            key = (share.dtype, sources[index].device)
            views.append(flats[key][used[key] : used[key] + share.numel])
            used[key] += _room(share.numel)
        return views


def _complex_shares(shares: Sequence[Share]) -> frozenset[int]:
    """Returns the indices of the shares whose average is complex."""
    return frozenset(i for i, share in enumerate(shares) if share.mode == "average" and share.dtype.is_complex)


def _put(tensors: list[Tensor], indices: Sequence[int], new: Mapping[int, Tensor]) -> None:
    """Puts new tensors into a list of shadows: at their present place, or at the end if they had none.

    Args:
        tensors: the list, which is changed.
        indices: the share of each place of the list from now on; those that join come last.
        new: the new tensors, by the index of their share.
    """
    for place, index in enumerate(indices):
        if index not in new:
            continue
        if place < len(tensors):
            tensors[place] = new[index]
        else:
            tensors.append(new[index])


def _room(numel: int) -> int:
    """Returns the number of elements to reserve for a tensor: ``numel`` rounded up to a multiple of 16.

    Every tensor then begins at a multiple of at least 16 bytes, as wide loads want it.
    """
    return -(-numel // 16) * 16
