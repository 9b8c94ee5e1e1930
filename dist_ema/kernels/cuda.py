"""The update of averages on a GPU: one launch for all tensors of a dtype, instead of some for each of hundreds.

Each source element is read once, the guard is inside, and nothing waits for the device. The kernel is Triton's, which
comes with CUDA builds of torch and is compiled at the first update; its arithmetic is in ``triton_kernels.py``. The
choice is made once, logged, and forced by ``DIST_EMA_KERNEL``. An update may be captured into a CUDA graph (which
repeats its weights) once it has run with the same tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from dist_ema.kernels import arguments
from dist_ema.kernels.arguments import CODES, Averages, Ranges, address, check_numbers
from dist_ema.kernels.choice import choose
from dist_ema.kernels.compiler import BuildError
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key

logger = logging.getLogger(__name__)

#: Elements of one program, and at a time. Small enough that a few large tensors keep every processor of a GPU busy.
PROGRAM_CHUNK = 1 << 14
BLOCK = 1 << 11
#: Bytes that a thread loads at once, where addresses are multiples of them.
_ALIGNMENT = 16
_WARPS = 8


@dataclass(frozen=True)
class Launch:
    """What one launch of a kernel is given: tensors of one dtype on one device.

    Attributes:
        device: where all of it lies.
        dtype: of the sources.
        aligned: every address is a multiple of 16 bytes, and the kernel may rely on it.
        chunks: int64, (programs, 2), on the device: of each program its tensor, and the element where it begins. For
            bf16 shadows (programs, 4): also its number of elements, and the position of the first in the full tensor.
        tensors: int64, (tensors, 2 + averages), on the device: its number of elements (for bf16 shadows the hash of its
            name), and the addresses of source and shadows.
    """

    device: torch.device
    dtype: torch.dtype
    aligned: bool
    chunks: Tensor
    tensors: Tensor


Table: TypeAlias = arguments.Table[list[Launch]]


def table(positions: ElementPositions | None = None, device_type: str = "cuda") -> Table:
    """An empty table, to be kept beside one list of tensors; for bf16 shadows, with the ``positions`` of these.

    Another device's type is for Triton's interpreter.
    """
    dtype = torch.float32 if positions is None else torch.bfloat16
    return arguments.Table(device_type, partial(_launches, positions), dtype)


def _launches(
    positions: ElementPositions | None,
    taken: list[int],
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
) -> list[Launch]:
    groups: dict[tuple[torch.device, torch.dtype, bool], dict[int, list[int]]] = {}
    for index in taken:
        start, stop = ranges[index]
        addresses = [address(sources[index], start), *(average[index].data_ptr() for average in averages)]
        aligned = positions is None and all(found % _ALIGNMENT == 0 for found in addresses)
        if start < stop:
            key = sources[index].device, sources[index].dtype, aligned
            groups.setdefault(key, {})[index] = addresses
    launches = []
    for (device, dtype, aligned), group in groups.items():
        numels = {index: ranges[index][1] - ranges[index][0] for index in group}
        if positions is None:
            rows = [[numels[index], *addresses] for index, addresses in group.items()]
            chunks = _even_chunks(list(numels.values()))
        else:
            # The hash of a name is unsigned, and the kernel's integers are signed.
            names = {index: positions.names[index] - ((positions.names[index] >> 63) << 64) for index in group}
            rows = [[names[index], *addresses] for index, addresses in group.items()]
            chunks = _run_chunks(positions, numels)
        with torch.inference_mode(False):
            tensors = torch.tensor(rows, dtype=torch.int64, device="cpu")
            launches.append(Launch(device, dtype, aligned, _send(chunks, device), _send(tensors, device)))
    return launches


def _even_chunks(numels: Sequence[int]) -> Tensor:
    """Each tensor, cut into equal parts: its row, and the first element of the part. int64, (programs, 2)."""
    with torch.inference_mode(False):
        parts = (torch.tensor(numels, dtype=torch.int64, device="cpu") + PROGRAM_CHUNK - 1) // PROGRAM_CHUNK
        owners = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), parts)
        firsts = torch.cumsum(parts, 0) - parts
        lows = (torch.arange(len(owners), device="cpu") - firsts[owners]) * PROGRAM_CHUNK
        return torch.stack([owners, lows], dim=1)


def _run_chunks(positions: ElementPositions, numels: Mapping[int, int]) -> Tensor:
    """Each run of each tensor, cut: row, first element, elements, position of the first. int64, (programs, 4)."""
    chunks = []
    for row, (index, numel) in enumerate(numels.items()):
        first, last = positions.first[index], positions.first[index + 1]
        for run in range(first, last):
            local, full = positions.local[run], positions.full[run]
            end = positions.local[run + 1] if run + 1 < last else numel
            for low in range(local, end, PROGRAM_CHUNK):
                chunks.append([row, low, min(PROGRAM_CHUNK, end - low), full + low - local])
    with torch.inference_mode(False):
        return torch.tensor(chunks, dtype=torch.int64, device="cpu")


def _send(values: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, which the allocator does not give to others before the copy has been made.
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class Kernel:
    """The Triton kernel.

    Raises:
        BuildError: there is no Triton.
    """

    def __init__(self) -> None:
        try:
            import triton
            import triton.language as tl

            from dist_ema.kernels import triton_kernels
        except Exception as error:  # ImportError, or what a Triton for another torch runs into
            raise BuildError(f"triton cannot be imported: {error}") from error
        self._version = triton.__version__
        self._dtypes = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
        self._lerp, self._lerp_rounded = triton_kernels.lerp, triton_kernels.lerp_rounded

    def __str__(self) -> str:
        return f"Triton {self._version}"

    def lerp(
        self, launch: Launch, weights: Sequence[float], skipped: Tensor | None, keys: Sequence[int] | None = None
    ) -> None:
        """Averages the tensors of one launch; does not wait for it.

        Args:
            launch: the tensors.
            weights: of each average.
            skipped: int64, on the device; source elements left out are added to it. None takes them as they are.
            keys: of each average, for this update of bf16 shadows; None for fp32 ones.
        """
        device, grid = launch.device, (len(launch.chunks),)
        given = skipped, tuple(map(float, weights)), len(weights), self._dtypes[launch.dtype]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if keys is None:
                self._lerp[grid](
                    launch.chunks, launch.tensors, *given, launch.aligned, PROGRAM_CHUNK, BLOCK, num_warps=_WARPS
                )
            else:
                signed = torch.tensor([key - ((key >> 63) << 64) for key in keys], dtype=torch.int64, device="cpu")
                sent = _send(signed, device)
                self._lerp_rounded[grid](launch.chunks, launch.tensors, sent, *given, BLOCK, num_warps=_WARPS)


def lerp(
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table,
    counter: Callable[[torch.device], Tensor] | None,
    rounding: Rounding | None = None,
) -> list[int]:
    """``shadow += weight * (source - shadow)`` for the tensors that the kernel takes. Local; no host sync.

    It takes what lies contiguously on a CUDA device: fp32 shadows (with ``rounding``, bf16 ones), and sources in fp32,
    bf16 or fp16. Arguments are those of ``kernels.lerp``; ``table`` is kept by the caller for these tensors, and
    ``counter`` gives the device's count of source elements that were not finite, or is None for no guard.

    Returns:
        The indices of the tensors that it did not take: all of them where there is no kernel.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` is not a choice, or asks for a kernel that is not there.
    """
    if not any(source.is_cuda for source in sources) or (kernel := choice()) is None:
        return list(range(len(sources)))
    return run(kernel, averages, sources, ranges, weights, table, counter, rounding)


def run(
    kernel: Kernel,
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table,
    counter: Callable[[torch.device], Tensor] | None,
    rounding: Rounding | None = None,
) -> list[int]:
    """:func:`lerp` by this kernel."""
    check_numbers(averages, weights, rounding)
    launches, rest = table.read(averages, sources, ranges)
    keys = None if rounding is None else rounding.keys
    for launch in launches:
        kernel.lerp(launch, weights, counter(launch.device) if counter is not None else None, keys)
    return rest


# The choice.

_decided: list[Kernel | None] = []


def choice() -> Kernel | None:
    """The kernel, or None for the eager route: decided, and logged, at the first call. Raises EMAConfigError."""
    return choose(_decided, "CUDA", _build_and_check, logger)


def _build_and_check() -> Kernel:
    kernel = Kernel()
    check(kernel, torch.device("cuda", torch.cuda.current_device()))
    return kernel


def check(kernel: Kernel, device: torch.device) -> None:
    """A few elements against torch on this device. Waits for it, once.

    Raises:
        BuildError: a kernel does not compile, or differs by more than one unit in the last place.
    """
    table_ = table(device_type=device.type)
    rounding = Rounding(ElementPositions(["check"], [((2**32 - 50, 99),)]), [average_key(0, 1, "check")])
    rounded_table_ = table(rounding.positions, device.type)
    for dtype in CODES:
        source = torch.linspace(-3, 5, 99, dtype=torch.float32, device=device).tan_().to(dtype)
        source[7], source[60] = float("nan"), float("inf")
        for weight in (1e-4, 0.7):
            shadow = torch.linspace(1, -2, 99, dtype=torch.float32, device=device)
            end = torch.where(source.isfinite(), source.float(), 0.0)
            expected = torch.where(source.isfinite(), torch.lerp(shadow, end, weight), shadow)
            unit = torch.maximum(shadow.abs(), end.abs()) * torch.finfo(torch.float32).eps
            before = shadow.bfloat16()
            halved = before.clone()
            blended = rounding.apply(0, 0, 0, torch.lerp(before.float(), end, weight))
            wanted = torch.where(source.isfinite(), blended, before).float()
            counts = {device: torch.zeros((), dtype=torch.int64, device=device)}
            given = [source], [(0, 99)], [weight]
            try:
                run(kernel, [[shadow]], *given, table_, counts.__getitem__)
                run(kernel, [[halved]], *given, rounded_table_, counts.__getitem__, rounding)
            except Exception as error:  # Triton's compiler raises all kinds
                raise BuildError(f"{kernel} does not compile: {error!r}") from error
            near = (shadow - expected).abs() <= unit
            # A blend that differs in its last bit may round to the next bf16 number.
            near &= (halved.float() - wanted).abs() <= wanted.abs() * torch.finfo(torch.bfloat16).eps
            if int(counts[device]) != 4 or not bool(near.all()):
                raise BuildError(f"{kernel} does not compute what torch does from {dtype}")
