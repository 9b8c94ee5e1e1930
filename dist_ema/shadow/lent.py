"""Protects the tensors that ``state_dict()`` has returned from later writes.

Such a tensor, here called a part, is a view of the shadow: a copy would need as much memory as the shadow. A checkpoint
writer that copies in the background (``dcp.async_save`` with an asynchronous stager) may still be reading a part when
the next update or swap writes to the shadow. So every write calls this module first:

* If the part is no longer referenced, there is nothing to do. This is the usual case.
* If another thread is working with the part, the write waits for at most 30 seconds.
* If the part is still referenced, for example by a variable of the user's program, shadow and part are separated: one
  of them is copied, and the holder of the part keeps the values that it was given.

Every part gets a storage object of its own over the memory of the shadow. A weak reference to that storage says whether
the part, or any view of it, is still referenced by any thread::

    shadow   [ . . a a a a . . b b b . . . ]
                   ^ ^ ^ ^     ^ ^ ^
    parts          storage 1   storage 2       each is gone when its last view is gone

Separating copies the shadow where that is possible (``separate``), because views and pointers into the part then stay
valid. The memory of a model or of a teacher must stay where it is, so there the part is copied (``move_parts``).
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dist_ema.shadow.readers import is_at_work

logger = logging.getLogger(__name__)
#: Seconds that a write waits for threads that are working with a part.
PATIENCE = 30.0
#: Seconds that a write waits for a thread that was just given a part and does not have it in a variable yet. Short,
#: because users keep dicts as well.
GRACE = 0.25
#: Seconds between two looks at parts that a write waits for.
_POLL = 0.01


class Loan:
    """Describes one part that was handed out.

    Args:
        part: a tensor whose storage covers the part and nothing else.

    Attributes:
        begin, end: the addresses of its memory.
        device: the device of that memory.
        storage: a weak reference to its storage.
        waited: whether a write has waited for it already.
    """

    def __init__(self, part: Tensor) -> None:
        self.begin = part.data_ptr()
        self.end = self.begin + part.nbytes
        self.device = part.device
        self.storage = StorageWeakRef(part.untyped_storage())  # type: ignore[no-untyped-call]
        self.waited = False
        self._part = weakref.ref(part)

    @property
    def held(self) -> bool:
        """Returns whether the part or a view of it is still referenced."""
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    def move(self) -> None:
        """Copies the part into memory of its own. Views of the part keep pointing to the shared memory."""
        part = self._part()
        if part is None:  # only views of it are left, and those cannot be moved
            return
        with torch.inference_mode(False), torch.no_grad():
            part.set_(part.clone())  # type: ignore[call-overload]
            if not part.is_cpu:  # the holder may read on another stream
                torch.accelerator.current_stream(part.device).synchronize()


#: All loans by ``id()``. There is no lock, because a signal handler may raise in a thread that holds the lock, or may
#: call this library. Each change is one atomic operation of a dict.
_loans: dict[int, Loan] = {}
#: Whether the warning about copies was logged; it is logged once.
_has_warned = False


def lend(values: Tensor) -> Tensor:
    """Returns a part: the same elements in the same memory, with a storage of its own. Local; copies nothing.

    Args:
        values: 1D and contiguous.
    """
    if not values.numel():
        return values
    with torch.inference_mode(False), torch.no_grad():
        # A slice of a storage is a new storage object over the same memory. Its reference count is that of this part.
        begin = values.storage_offset() * values.element_size()
        storage = values.untyped_storage()[begin : begin + values.nbytes]
        part = torch.empty(0, dtype=values.dtype, device=values.device)
        part.set_(storage, 0, (values.numel(),), (1,))
    loan = Loan(part)
    _loans[id(loan)] = loan
    return part


def outstanding() -> bool:
    """Returns whether any part is still referenced. Costs nothing if none was ever handed out."""
    if not _loans:
        return False
    _forget(loan for loan in list(_loans.values()) if not loan.held)
    return bool(_loans)


def _forget(loans: Iterable[Loan]) -> None:
    """Removes parts from the list of all loans."""
    for loan in loans:
        _loans.pop(id(loan), None)


def wait(tensors: Iterable[Tensor | None]) -> None:
    """Waits until no other thread works with parts of these tensors, before they are written. Local; raises nothing.

    Waits at most ``PATIENCE`` seconds, and only once for each part. A part that is only kept in a variable is not
    waited for.
    """
    if not outstanding():
        return
    waiting = _unique(_by_tensor(tensors))
    waiting = [loan for loan in waiting if not loan.waited]
    begun = time.monotonic()
    while waiting:
        elapsed = time.monotonic() - begun
        # A thread that was just started does not have the parts in its variables yet.
        may_be_read = elapsed < GRACE and threading.active_count() > 1
        if elapsed > PATIENCE or not (may_be_read or is_at_work({loan.storage for loan in waiting})):
            break
        # Polled, because torch has no call that waits until a storage is freed.
        time.sleep(_POLL)
        waiting = [loan for loan in waiting if loan.held]
    # The next write does not wait for these again: a dict that the user keeps would slow down every step.
    for loan in waiting:
        loan.waited = True


def separate(tensors: Sequence[Tensor], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Copies those of these tensors that have referenced parts, before they are written. Local.

    The holders of the parts keep the old memory.

    Args:
        tensors: tensors whose memory may move.
        copy: returns a copy of a tensor.

    Returns:
        The tensors to write to: copies, or the same ones.
    """
    if not outstanding():
        return list(tensors)
    wait(tensors)
    held = _by_tensor(tensors)
    moved = list(tensors)
    for number, (tensor, loans) in enumerate(zip(tensors, held, strict=True)):
        if loans:
            try:
                moved[number] = copy(tensor)
            except RuntimeError as error:  # out of memory
                _wait_without_memory(loans, error)
    _log_copies(_unique(held))
    return moved


def move_parts(tensors: Iterable[Tensor | None]) -> None:
    """Copies the referenced parts of these tensors, whose memory cannot move, before they are written. Local."""
    if not outstanding():
        return
    tensors = list(tensors)
    wait(tensors)
    loans = _unique(_by_tensor(tensors))
    for loan in loans:
        try:
            loan.move()
        except RuntimeError as error:  # out of memory
            _wait_without_memory([loan], error)
    # move() gives the part new memory. A storage that is still referenced then belongs to views, which stay behind.
    viewed = sum(loan.held for loan in loans)
    _log_copies(loans)
    if viewed:
        logger.warning(
            "Views of %d parts of a state_dict() are still referenced, and the memory of the model that they point to "
            "is written now, so their values change. Wait for the checkpoint writer before this call.",
            viewed,
        )


def _wait_without_memory(loans: Sequence[Loan], error: RuntimeError) -> None:
    """Waits until the parts are dropped, if there is no memory for a copy. Raises nothing: other ranks would wait."""
    begun = time.monotonic()
    while any(loan.held for loan in loans) and time.monotonic() - begun < PATIENCE:
        time.sleep(_POLL)
    if any(loan.held for loan in loans):
        logger.error(
            "There is no memory to copy a part of a state_dict() that is still referenced, %.1f MiB. Its values change "
            "now: do not use that dict. %s",
            _mebibytes(loans),
            error,
        )


def _mebibytes(loans: Iterable[Loan]) -> float:
    """Returns the size of the parts in MiB."""
    return sum(loan.end - loan.begin for loan in loans) / 2**20


def _log_copies(loans: Sequence[Loan]) -> None:
    """Forgets parts that were separated, and logs how much was copied: the first time as a warning, later as info."""
    global _has_warned
    if not loans:
        return
    _forget(loans)
    level = logging.INFO if _has_warned else logging.WARNING
    _has_warned = True
    logger.log(
        level,
        "%d parts of a state_dict(), %.1f MiB, were still referenced when their memory was written, so they were "
        "copied. To save that memory, drop the dict earlier, or wait for the checkpoint writer.",
        len(loans),
        _mebibytes(loans),
    )


def _by_tensor(tensors: Iterable[Tensor | None]) -> list[list[Loan]]:
    """Returns for each tensor the parts of its memory that are still referenced."""
    # Sorted by address, so that each tensor finds its parts by bisection.
    by_device: dict[torch.device, list[Loan]] = {}
    for loan in sorted(_loans.values(), key=lambda loan: loan.begin):
        if loan.held:
            by_device.setdefault(loan.device, []).append(loan)
    starts = {device: [loan.begin for loan in loans] for device, loans in by_device.items()}
    longest = {device: max(loan.end - loan.begin for loan in loans) for device, loans in by_device.items()}
    found: list[list[Loan]] = []
    for tensor in tensors:
        loans = by_device.get(tensor.device, []) if tensor is not None and tensor.numel() else []
        if tensor is None or not loans:
            found.append([])
            continue
        begin, end = _extent(tensor)
        # A part that overlaps begins before ``end``, and at most the longest part's length before ``begin``.
        first = bisect_left(starts[tensor.device], begin - longest[tensor.device])
        last = bisect_left(starts[tensor.device], end)
        # What begins early enough may still end before the tensor.
        found.append([loan for loan in loans[first:last] if loan.end > begin])
    return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the addresses between which a tensor's elements lie."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _unique(found: Iterable[Iterable[Loan]]) -> list[Loan]:
    """Returns each part once: a part that overlaps two tensors is in two lists."""
    return list({id(loan): loan for loans in found for loan in loans}.values())
