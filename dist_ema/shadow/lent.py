"""Parts of averages and weights that ``state_dict()`` has handed out, and that somebody may still be reading.

A part has no memory of its own, since one more shadow would be needed for that: it looks at the shadow. A checkpoint
writer that copies in the background (``dcp.async_save`` with an asynchronous stager) may therefore still be reading a
part when the next update or swap is about to write there. So every write asks here first:

* Nobody holds the part any more: nothing is to be done. That is the usual case.
* Another thread is working with it: the write waits, 30 seconds at most.
* Somebody still holds it, a variable of the user's program for one: the two are separated by a copy of that part. The
  holder keeps the values that it was given.

Every part gets a storage object of its own over the memory of the shadow. A weak reference to that storage tells
whether anybody holds the part, or any view of it, in this thread or in another. ::

    shadow   [ . . a a a a . . b b b . . . ]
                   ^ ^ ^ ^     ^ ^ ^
    parts          storage 1   storage 2       each is gone when its last view is gone

What is separated moves: the shadow does where it can, because views and pointers that exist already stay valid then.
The memory of a model or of a teacher cannot move, so there the part does.
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
#: Seconds that a write waits for threads that work with a part.
PATIENCE = 30.0
#: Seconds in which a thread that was given a part just now becomes visible. Short, because users keep dicts too.
GRACE = 0.25
_POLL = 0.01


class Loan:
    """One part that was handed out.

    Args:
        part: a tensor whose storage covers the part and nothing else.

    Attributes:
        begin, end: the addresses of its memory.
        device: where these are.
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
        """Returns whether anybody holds the part or a view of it."""
        return not self.storage.expired()  # type: ignore[no-untyped-call]

    def move(self) -> None:
        """Gives the part memory of its own, with the same values. Views of it stay where they are."""
        part = self._part()
        if part is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            part.set_(part.clone())  # type: ignore[call-overload]
            if not part.is_cpu:  # the holder may read on another stream
                torch.accelerator.current_stream(part.device).synchronize()


#: By id. No lock: a signal's handler may break off a thread that holds one, or call this library while it does. Each
#: change is a single step of a dict, which other threads see done or not done.
_loans: dict[int, Loan] = {}
_told = False


def lend(values: Tensor) -> Tensor:
    """Returns the same elements in the same memory, as a part whose holders can be noticed. Local; copies nothing.

    Args:
        values: flat and contiguous.
    """
    if not values.numel():
        return values
    with torch.inference_mode(False), torch.no_grad():
        begin = values.storage_offset() * values.element_size()
        storage = values.untyped_storage()[begin : begin + values.nbytes]
        part = torch.empty(0, dtype=values.dtype, device=values.device)
        part.set_(storage, 0, (values.numel(),), (1,))
    loan = Loan(part)
    _loans[id(loan)] = loan
    return part


def outstanding() -> bool:
    """Returns whether anybody holds a part. Costs nothing where none was ever handed out."""
    if not _loans:
        return False
    _forget(loan for loan in list(_loans.values()) if not loan.held)
    return bool(_loans)


def _forget(loans: Iterable[Loan]) -> None:
    for loan in loans:
        _loans.pop(id(loan), None)


def wait(tensors: Iterable[Tensor | None]) -> None:
    """Before these tensors are written: waits until no other thread works with parts of them. Local; raises nothing.

    At most ``PATIENCE`` seconds, and once for each part. A part that is only kept is not waited for.
    """
    if not outstanding():
        return
    waiting = _unique(_by_tensor(tensors))
    waiting = [loan for loan in waiting if not loan.waited]
    begun = time.monotonic()
    while waiting:
        elapsed = time.monotonic() - begun
        # A thread that was started just now does not have the parts among its variables yet.
        may_be_read = elapsed < GRACE and threading.active_count() > 1
        if elapsed > PATIENCE or not (may_be_read or is_at_work({loan.storage for loan in waiting})):
            break
        time.sleep(_POLL)
        waiting = [loan for loan in waiting if loan.held]
    for loan in waiting:
        loan.waited = True


def separate(tensors: Sequence[Tensor], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Before these tensors are written, whose memory may move: those of which parts are held are replaced by copies.

    The holders keep the memory that there was. Local.

    Args:
        tensors: the tensors.
        copy: makes a copy of one.

    Returns:
        The tensors to write to.
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
            except RuntimeError as error:  # no memory
                _wait_without_memory(loans, error)
    _end(_unique(held))
    return moved


def make_way(tensors: Iterable[Tensor | None]) -> None:
    """Before these tensors are written, whose memory cannot move: parts that are held get copies of it. Local."""
    if not outstanding():
        return
    tensors = list(tensors)
    wait(tensors)
    loans = _unique(_by_tensor(tensors))
    for loan in loans:
        try:
            loan.move()
        except RuntimeError as error:  # no memory
            _wait_without_memory([loan], error)
    viewed = sum(loan.held for loan in loans)
    _end(loans)
    if viewed:
        logger.warning(
            "Views of %d parts of a state_dict() are still held, and the model's memory, in which they lie, is written "
            "now: whoever holds these views will see other values. Wait for the checkpoint writer first.",
            viewed,
        )


def _wait_without_memory(loans: Sequence[Loan], error: RuntimeError) -> None:
    """There is no memory for a copy: waits until the parts are dropped. Raises nothing: other ranks would wait."""
    begun = time.monotonic()
    while any(loan.held for loan in loans) and time.monotonic() - begun < PATIENCE:
        time.sleep(_POLL)
    if any(loan.held for loan in loans):
        logger.error(
            "There is no memory to copy a part of a state_dict() that is still held, %.1f MiB: whoever holds it will "
            "see newer values. Do not use that dict. %s",
            _mebibytes(loans),
            error,
        )


def _mebibytes(loans: Iterable[Loan]) -> float:
    return sum(loan.end - loan.begin for loan in loans) / 2**20


def _end(loans: Sequence[Loan]) -> None:
    """These parts share no memory with us any more. The first time, that is a warning."""
    global _told
    if not loans:
        return
    _forget(loans)
    level = logging.INFO if _told else logging.WARNING
    _told = True
    logger.log(
        level,
        "%d parts of a state_dict(), %.1f MiB, were still held when their memory was about to be written, so they were "
        "copied. Drop the dict, or wait for the checkpoint writer, to save that memory.",
        len(loans),
        _mebibytes(loans),
    )


def _by_tensor(tensors: Iterable[Tensor | None]) -> list[list[Loan]]:
    """Returns for each tensor the parts of its memory that somebody holds."""
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
        first = bisect_left(starts[tensor.device], begin - longest[tensor.device])
        last = bisect_left(starts[tensor.device], end)
        found.append([loan for loan in loans[first:last] if loan.end > begin])
    return found


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the addresses between which a tensor's elements lie."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _unique(found: Iterable[Iterable[Loan]]) -> list[Loan]:
    return list({id(loan): loan for loans in found for loan in loans}.values())
