"""A shadow in host memory, which a thread keeps up to date while training goes on.

An update asks for copies of the weights and returns; the thread waits for them and averages. Weights that are in host
memory already are not copied: the thread reads them in place.

The weights have to stay as they are until they have been read. Whoever writes them waits for that, by
:func:`dist_ema.shadow.reading.wait_for_reads`: every optimizer step, and every average that goes into the model. A
write by other hands is noticed where torch counts it, and logged. What a forward pass writes (buffers) is copied before
``update`` returns, or in the order of the device's work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dist_ema.engines.base import write_count
from dist_ema.errors import EMAStateError
from dist_ema.geometry.shares import Share
from dist_ema.runtime import memory
from dist_ema.runtime.worker import Worker
from dist_ema.shadow.device import Shadow
from dist_ema.shadow.reading import announce
from dist_ema.shadow.staging import LINKS, CopyRequest, HostLink, Link, carve, pageable

if TYPE_CHECKING:
    from dist_ema.engines.counterpart import Counterpart

logger = logging.getLogger(__name__)


class HostShadow(Shadow):
    """A :class:`Shadow` in host memory, pinned where a device copies to it.

    Everything that reads or changes the averages waits for the thread, and raises EMAStateError if it has failed.

    Args:
        threads: of the worker; see :class:`Worker`.
        seed: see :class:`Shadow`.
    """

    def __init__(
        self,
        names: Iterable[str],
        shares: Sequence[Share],
        skip_nonfinite: bool,
        threads: int | None,
        seed: int | None = None,
    ) -> None:
        super().__init__(names, shares, skip_nonfinite, seed)
        self._worker = Worker(threads)
        self._kept = [*self._averaged, *self._copied]
        self._links: dict[torch.device, Link] = {}
        self._staging: dict[int, Tensor] = {}
        self._origins: dict[int, tuple[torch.dtype, torch.device]] = {}
        self._read: dict[int, tuple[Tensor, int]] = {}
        self._released = True
        self._warned = False
        self._pins = False

    # As of Shadow, with the arithmetic in the thread.

    def allocate(self, sources: Sequence[Tensor]) -> None:
        """Takes memory for the averages and for copies of their sources. Local."""
        self._pins = any(sources[index].device.type == "cuda" for index in self._kept)
        super().allocate(sources)
        self._origins = {}
        self._stage(sources, self._kept)

    def _stage(self, sources: Sequence[Tensor], indices: Sequence[int]) -> None:
        """Takes memory for copies of the sources of these shares, where they are copied. Local."""
        self._origins |= {index: (sources[index].dtype, sources[index].device) for index in indices}
        wanted = set(indices)
        for link, routed in self._routes():
            new = [index for index in routed if index in wanted]
            sizes = [(self._shares[index].numel, sources[index].dtype) for index in new]
            self._staging.update(zip(new, carve(sizes, link.empty), strict=True))

    def follow(
        self,
        shares: Sequence[Share],
        places: Sequence[int],
        new: Sequence[int],
        sources: Sequence[Tensor],
        counterpart: Counterpart | None = None,
    ) -> None:
        """See :meth:`Shadow.follow`. Waits for the thread."""
        self._worker.wait()
        super().follow(shares, places, new, sources, counterpart)
        self._kept = [*self._averaged, *self._copied]
        self._staging = {places[index]: tensor for index, tensor in self._staging.items()}
        self._origins = {places[index]: origin for index, origin in self._origins.items()}
        if self.started:
            self._pins = self._pins or any(sources[index].device.type == "cuda" for index in new)
            self._stage(sources, new)

    def fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        """See :meth:`Shadow.fill_new`; in the thread. Local; does not wait."""
        self._submit(sources, lambda taken: self._fill_new(taken, number))

    def start(self, sources: Sequence[Tensor]) -> None:
        """Takes memory, and has the sources copied into every average. Local; does not wait."""
        self.allocate(sources)
        self._submit(sources, self.fill)

    def first_copy(self, sources: Sequence[Tensor]) -> None:
        """``start()``; the thread logs NaN and Inf weights, since they are in host memory there. Local."""

        def work(taken: Sequence[Tensor]) -> None:
            self.fill(taken)
            self.report_nonfinite(wait=False)

        self.allocate(sources)
        self._submit(sources, work)

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """Has every average moved by its weight. Local; waits for the update before, not for this one."""
        update = super().update
        self._submit(sources, lambda taken: update(taken, weights, number))

    def tensors(self, name: str) -> list[Tensor | None]:
        """Returns the flat shadow of every share, None where it is live. Waits for the thread."""
        self._worker.wait()
        return super().tensors(name)

    def check(self, sources: Sequence[Tensor]) -> None:
        """Waits for the update before; raises EMAStateError if it failed, or a source moved or was converted since.

        A source that has more bits now gets new memory for its copies: where an optimizer keeps fp32 masters, these
        take the place of bf16 parameters at its first step.
        """
        self._worker.wait()
        widened = []
        for index, origin in self._origins.items():
            dtype = sources[index].dtype
            device = sources[index].device
            if (dtype, device) == origin:
                continue
            if device != origin[1] or dtype.itemsize <= origin[0].itemsize:
                raise EMAStateError(
                    f"{self._shares[index].spec.name!r} was {origin[0]} on {origin[1]} when the average started and is "
                    f"{dtype} on {device} now. Call reset() to start a new average of the model as it is now"
                )
            widened.append(index)
        if widened:
            self._stage(sources, widened)

    def _submit(self, sources: Sequence[Tensor], work: Callable[[Sequence[Tensor]], None]) -> None:
        announce(self)
        self._worker.wait()
        taken = list(sources)
        for link, indices in self._routes():
            takes = []
            for index in indices:
                share = self._shares[index]
                is_soon = share.spec.kind == "buffer"
                takes.append(CopyRequest(sources[index], share.start, share.stop, self._staging[index], is_soon))
                taken[index] = self._staging[index]
            link.copy(takes)
        self._read = {
            index: (sources[index], write_count(sources[index]))
            for index in self._kept
            if self._shares[index].spec.kind != "buffer"
        }
        self._released = False
        self.scratch.touched = True
        self._worker.start(lambda: self._work(taken, work))

    def _work(self, taken: Sequence[Tensor], work: Callable[[Sequence[Tensor]], None]) -> None:
        """Runs in the thread."""
        for link in self._links.values():
            link.join()
        self._look_for_writes(self._staging)
        work(taken)
        self._look_for_writes(self._read.keys() - self._staging)
        self._read = {}  # weights may be freed now

    # Order: see the table in dist_ema/runtime/__init__.py.

    def wait_for_reads(self) -> None:
        """Before the weights are written: waits until they have been read, the device's copies in the device's order.

        Raises nothing: a failure is for the next call to this library.
        """
        if not self._worker.busy:
            return
        self._look_for_writes(self._read)
        self._released = True
        for link in self._links.values():
            link.wait_for_reads()
        if self._read.keys() - self._staging:
            self._worker.drain()

    def _look_for_writes(self, indices: Iterable[int]) -> None:
        """Logs, once, a write to weights that were still being read."""
        read = self._read
        written = [index for index in indices if index in read and write_count(read[index][0]) != read[index][1]]
        # In this order: an optimizer writes after it has released the weights, which may be just now.
        if written and not self._released and not self._warned:
            self._warned = True
            logger.warning(
                "%r and %d more were written while an offloaded average was still reading them, and not by a torch "
                "optimizer's step(): the average may have taken some elements from before and some from after. Call "
                "wait() before writing weights by hand, or update() after it.",
                self._shares[written[0]].spec.name,
                len(written) - 1,
            )

    def drain(self) -> None:
        """Waits for the thread; raises nothing."""
        self._worker.drain()

    def raise_failure(self) -> None:
        """Raises EMAStateError if the thread has failed; does not wait."""
        self._worker.raise_failure()

    def close(self) -> None:
        """Ends the thread, which starts again when it is needed. Raises what nobody has seen yet."""
        self._worker.close()

    def discard(self) -> None:
        """Ends the thread. What failed in it is not reported any more."""
        self._worker.discard()

    @property
    def failed(self) -> bool:
        """Returns whether every call raises what failed."""
        return self._worker.failed

    # Memory.

    def notes(self) -> list[str]:
        """Returns what the shadow costs beside the averages, for a report."""
        staged = sum(tensor.nbytes for tensor in self._staging.values()) / 2**20
        pins = any(tensor.is_pinned() for tensor in self._staging.values()) if self._pins else False
        kind = "pinned" if pins else "pageable"
        return [f"offloaded to the host, {kind} memory; copies of weights on their way: {staged:.1f} MiB"]

    def _routes(self) -> list[tuple[Link, list[int]]]:
        """Returns which sources are copied, and by which link."""
        routes: dict[torch.device, list[int]] = {}
        for index, (_, device) in self._origins.items():
            in_place = device.type == "cpu" and "cpu" not in LINKS and self._shares[index].spec.kind != "buffer"
            if not in_place:
                routes.setdefault(device, []).append(index)
        for device in routes.keys() - self._links:
            self._links[device] = LINKS.get(device.type, HostLink)(device)
        return [(self._links[device], indices) for device, indices in routes.items()]

    def _ranges(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """Of what the thread reads: a copy begins with the first element that is kept."""
        shares = {index: self._shares[index] for index in indices}
        return [
            (0, share.numel) if index in self._staging else (share.start, share.stop) for index, share in shares.items()
        ]

    def release_parts(self) -> None:
        """See :meth:`Shadow.release_parts`. Waits for the thread, which writes the averages."""
        self._worker.drain()
        super().release_parts()

    def _copy_of(self, tensor: Tensor) -> Tensor:
        (copy,) = carve([(tensor.numel(), tensor.dtype)], memory.pinned if self._pins else pageable)
        return copy.copy_(tensor)

    def _allocate(self, sources: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        for index in indices:
            if sources[index].is_meta:
                name = self._shares[index].spec.name
                raise EMAStateError(f"{name!r} is on the meta device: materialise the model before update()")
        sizes = [(self._shares[index].numel, self._shares[index].dtype) for index in indices]
        return carve(sizes, memory.pinned if self._pins else pageable)
