"""Keeps a shadow in host memory and updates it in a thread while training continues (``offload="cpu"``).

An update starts copies of the weights to the host and returns. The thread waits for the copies and averages them.
Weights that are in host memory already are not copied: the thread reads them in place::

    training thread   step 1 | update() | forward, backward ........ | step 2
    device's stream          | copies of the weights ....|           ^ waits until the copies are made
    worker thread                                        | average ................|
                                                                                   ^ the next update() waits for this

Weights must not change until they have been read. Every optimizer step, and every average that is put into the model,
therefore calls :func:`dist_ema.shadow.reading.wait_for_reads` first. Any other write is logged if torch has counted it.
Buffers, which a forward pass may write, are copied before ``update()`` returns, or in order with the device's work.
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
    """Implements :class:`Shadow` in host memory, which is pinned if a device copies to it.

    Every method that reads or changes the averages waits for the thread, and raises EMAStateError if it has failed.

    Args:
        names, shares, skip_nonfinite, seed: as for :class:`Shadow`.
        threads: number of threads that average; see :class:`Worker`.
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
        self._kept = [*self._averaged, *self._copied]  # indices of the shares that have a shadow
        self._links: dict[torch.device, Link] = {}
        self._staging: dict[int, Tensor] = {}  # host memory for the copies of each share's source
        self._origins: dict[int, tuple[torch.dtype, torch.device]] = {}  # of the sources at the first update
        self._read: dict[int, tuple[Tensor, int]] = {}  # weights that are being read, with their write counts
        self._released = True  # whether a writer has waited for the reads of the last update
        self._warned = False
        self._pins = False  # whether host memory is pinned

    # The methods of Shadow. The arithmetic runs in the thread.

    def allocate(self, sources: Sequence[Tensor]) -> None:
        """Allocates the averages, and the memory for copies of their sources. Local."""
        self._pins = any(sources[index].device.type == "cuda" for index in self._kept)
        super().allocate(sources)
        self._origins = {}
        self._stage(sources, self._kept)

    def _stage(self, sources: Sequence[Tensor], indices: Sequence[int]) -> None:
        """Allocates memory for copies of the sources of these shares, unless they are read in place. Local."""
        # _routes() reads _origins, so they come first.
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
        """Implements :meth:`Shadow.follow`. Waits for the thread."""
        self._worker.wait()
        super().follow(shares, places, new, sources, counterpart)
        self._kept = [*self._averaged, *self._copied]
        self._staging = {places[index]: tensor for index, tensor in self._staging.items()}
        self._origins = {places[index]: origin for index, origin in self._origins.items()}
        if self.started:
            self._pins = self._pins or any(sources[index].device.type == "cuda" for index in new)
            self._stage(sources, new)

    def fill_new(self, sources: Sequence[Tensor], number: int) -> None:
        """Implements :meth:`Shadow.fill_new` in the thread. Local; does not wait."""
        self._submit(sources, lambda taken: self._fill_new(taken, number))

    def start(self, sources: Sequence[Tensor]) -> None:
        """Allocates memory, and starts to copy the sources into every average. Local; does not wait."""
        self.allocate(sources)
        self._submit(sources, self.fill)

    def first_copy(self, sources: Sequence[Tensor]) -> None:
        """Does what ``start()`` does; the thread also logs NaN and Inf weights. Local; does not wait."""

        def work(taken: Sequence[Tensor]) -> None:
            self.fill(taken)
            self.report_nonfinite(wait=False)

        self.allocate(sources)
        self._submit(sources, work)

    def update(self, sources: Sequence[Tensor], weights: Sequence[float], number: int) -> None:
        """Starts to move every average by its weight. Local; waits for the previous update, not for this one."""
        update = super().update
        self._submit(sources, lambda taken: update(taken, weights, number))

    def tensors(self, name: str) -> list[Tensor | None]:
        """Returns the shadow of every share, 1D; None for a live share. Waits for the thread."""
        self._worker.wait()
        return super().tensors(name)

    def check(self, sources: Sequence[Tensor]) -> None:
        """Waits for the previous update. Raises EMAStateError if it failed, or if a source was moved or converted.

        A source whose dtype has more bits than before gets new memory for its copies. This happens with ``masters=``:
        at the first step of the optimizer its fp32 masters become the sources in place of bf16 parameters.
        """
        self._worker.wait()
        widened = []
        for index, origin in self._origins.items():
            dtype = sources[index].dtype
            device = sources[index].device
            first_dtype, first_device = origin
            if (dtype, device) == origin:
                continue
            if device != first_device or dtype.itemsize <= first_dtype.itemsize:
                name = self._shares[index].spec.name
                raise EMAStateError(
                    f"{name!r} was {first_dtype} on {first_device} when the average started and is {dtype} on {device} "
                    "now. Call reset() to start a new average of the model as it is now"
                )
            widened.append(index)
        if widened:
            self._stage(sources, widened)

    def _submit(self, sources: Sequence[Tensor], work: Callable[[Sequence[Tensor]], None]) -> None:
        """Starts the copies of the sources, and then ``work`` on the copies in the thread.

        Local; waits for the previous update.
        """
        # Optimizer steps and the library's own writes wait for this shadow's reads from now on.
        announce(self)
        # The thread reads the staging memory, so it has to be done before new copies go there.
        self._worker.wait()
        # What the thread averages: a copy, or the weight itself where it is read in place.
        taken = list(sources)
        for link, indices in self._routes():
            requests = []
            for index in indices:
                share = self._shares[index]
                # A forward pass may write a buffer, so its copy is made at once or in order with the device's work.
                is_soon = share.spec.kind == "buffer"
                requests.append(CopyRequest(sources[index], share.start, share.stop, self._staging[index], is_soon))
                taken[index] = self._staging[index]
            link.copy(requests)
        # Remember how often each weight was written, to notice a write during the reads.
        self._read = {
            index: (sources[index], write_count(sources[index]))
            for index in self._kept
            if self._shares[index].spec.kind != "buffer"
        }
        self._released = False
        self.scratch.touched = True
        self._worker.start(lambda: self._work(taken, work))

    def _work(self, taken: Sequence[Tensor], work: Callable[[Sequence[Tensor]], None]) -> None:
        """Waits for the copies, then averages. Runs in the thread."""
        for link in self._links.values():
            link.join()
        # Copied weights have been read now, and may be written from here on.
        self._warn_of_writes(self._staging)
        work(taken)
        # Weights that are read in place have been read only after the arithmetic.
        self._warn_of_writes(self._read.keys() - self._staging)
        self._read = {}  # drops the references, so that weights may be freed

    # Who waits for whom: see the table in dist_ema/runtime/__init__.py.

    def wait_for_reads(self) -> None:
        """Waits until the weights have been read, before they are written.

        For copies by a device the device waits, not the host. Raises nothing: a failure of the thread is raised by the
        next call of this library, not by an optimizer's step.
        """
        if not self._worker.busy:
            return
        # A write before this call has not waited for the reads. _released must still be False here.
        self._warn_of_writes(self._read)
        self._released = True
        for link in self._links.values():
            link.wait_for_reads()
        # For weights that are read in place the host waits until the thread is done.
        if self._read.keys() - self._staging:
            self._worker.drain()

    def _warn_of_writes(self, indices: Iterable[int]) -> None:
        """Logs, once, that weights were written while they were being read."""
        read = self._read
        written = [index for index in indices if index in read and write_count(read[index][0]) != read[index][1]]
        # _released has to be read after the counts: an optimizer sets it (by wait_for_reads) before it writes.
        if written and not self._released and not self._warned:
            self._warned = True
            logger.warning(
                "%r and %d more were written by something else than the step() of a torch optimizer, while an "
                "offloaded update was still reading them. The average may have elements from before and from after the "
                "write. Call wait() before you write weights, or call update() after it.",
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
        """Ends the thread; it starts again when it is needed. Raises a failure that no call has raised yet."""
        self._worker.close()

    def discard(self) -> None:
        """Ends the thread, and forgets its failure."""
        self._worker.discard()

    @property
    def failed(self) -> bool:
        """Returns whether the thread has failed, so that every call raises."""
        return self._worker.failed

    # Memory.

    def notes(self) -> list[str]:
        """Returns what memory the shadow takes beside the averages, for ``memory_report()``."""
        staged = sum(tensor.nbytes for tensor in self._staging.values()) / 2**20
        pins = any(tensor.is_pinned() for tensor in self._staging.values()) if self._pins else False
        kind = "pinned" if pins else "pageable"
        return [f"offloaded to the host, {kind} memory; copies of weights: {staged:.1f} MiB"]

    def _routes(self) -> list[tuple[Link, list[int]]]:
        """Returns the links, each with the indices of the shares whose sources it copies."""
        routes: dict[torch.device, list[int]] = {}
        for index, (_, device) in self._origins.items():
            # The thread reads host weights in place, unless another link is registered for host memory. Buffers are
            # always copied, because a forward pass may write them.
            in_place = device.type == "cpu" and "cpu" not in LINKS and self._shares[index].spec.kind != "buffer"
            if not in_place:
                routes.setdefault(device, []).append(index)
        for device in routes.keys() - self._links:
            self._links[device] = LINKS.get(device.type, HostLink)(device)
        return [(self._links[device], indices) for device, indices in routes.items()]

    def _ranges(self, indices: Iterable[int]) -> list[tuple[int, int]]:
        """Returns the range that each share has in what the thread reads: a copy has only the share's elements."""
        ranges = []
        for index in indices:
            share = self._shares[index]
            is_copy = index in self._staging
            ranges.append((0, share.numel) if is_copy else (share.start, share.stop))
        return ranges

    def release_parts(self) -> None:
        """Implements :meth:`Shadow.release_parts`. Waits for the thread, which writes the averages."""
        self._worker.drain()
        super().release_parts()

    def _copy_of(self, tensor: Tensor) -> Tensor:
        """Returns a copy of one shadow, in pinned memory if the shadow is."""
        (copy,) = carve([(tensor.numel(), tensor.dtype)], memory.pinned if self._pins else pageable)
        return copy.copy_(tensor)

    def _allocate(self, sources: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
        """Returns one flat tensor in host memory for each share."""
        for index in indices:
            if sources[index].is_meta:
                name = self._shares[index].spec.name
                raise EMAStateError(f"{name!r} is on the meta device: materialize the model before update()")
        sizes = [(self._shares[index].numel, self._shares[index].dtype) for index in indices]
        return carve(sizes, memory.pinned if self._pins else pageable)
