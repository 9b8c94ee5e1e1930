"""The update of averages on a GPU: one launch for all tensors of a dtype, instead of some for each of hundreds.

Each source element is read once, the guard is inside, and nothing waits for the device. The kernel is Triton's, which
comes with CUDA builds of torch and is compiled at the first update; its arithmetic is in ``triton_kernels.py``. The
choice is made once, logged, and forced by ``DIST_EMA_KERNEL``. An update may be captured into a CUDA graph (which
repeats its weights) once it has run with the same tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_ema.kernels.arguments import CODES, Averages, Ranges, Table, address
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
    """What one launch of the kernel is given.

    Attributes:
        device: where all of it lies.
        dtype: of the sources.
        aligned: every address is a multiple of 16 bytes.
        chunks: int64, (programs, 2), on the device: of each program its tensor, and the element where it begins.
        tensors: int64, (tensors, 2 + averages), on the device: elements, and addresses of source and shadows.
    """

    device: torch.device
    dtype: torch.dtype
    aligned: bool
    chunks: Tensor
    tensors: Tensor


def table(device_type: str = "cuda") -> Table[list[Launch]]:
    """An empty table, to be kept beside one list of tensors. Another device's type is for Triton's interpreter."""
    return Table(device_type, _launches)


def _launches(taken: list[int], averages: Averages, sources: Sequence[Tensor], ranges: Ranges) -> list[Launch]:
    rows: dict[tuple[torch.device, torch.dtype, bool], list[list[int]]] = {}
    for index in taken:
        start, stop = ranges[index]
        places = [address(sources[index], start), *(average[index].data_ptr() for average in averages)]
        aligned = all(place % _ALIGNMENT == 0 for place in places)
        if start < stop:
            group = rows.setdefault((sources[index].device, sources[index].dtype, aligned), [])
            group.append([stop - start, *places])
    return [Launch(*key, *_on_device(group, key[0])) for key, group in rows.items()]


@dataclass(frozen=True)
class RoundedLaunch:
    """What one launch of the kernel for bf16 shadows is given.

    Attributes:
        device: where all of it lies.
        dtype: of the sources.
        chunks: int64, (programs, 4), on the device: of each program its tensor, the element where it begins, its number
            of elements, and the position of the first in the full tensor.
        tensors: int64, (tensors, 2 + averages), on the device: hash of the name, addresses of source and shadows.
    """

    device: torch.device
    dtype: torch.dtype
    chunks: Tensor
    tensors: Tensor


def rounded_table(places: ElementPositions, device_type: str = "cuda") -> Table[list[RoundedLaunch]]:
    """An empty table for :func:`lerp_rounded`, for tensors whose elements have these places."""

    def make(taken: list[int], averages: Averages, sources: Sequence[Tensor], ranges: Ranges) -> list[RoundedLaunch]:
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for index in taken:
            groups.setdefault((sources[index].device, sources[index].dtype), []).append(index)
        launches = []
        for (device, dtype), group in groups.items():
            rows, chunks = [], []
            for row, index in enumerate(group):
                start, stop = ranges[index]
                # Unsigned, and the kernel's integers are signed.
                name = places.names[index] - ((places.names[index] >> 63) << 64)
                shadows = [average[index].data_ptr() for average in averages]
                rows.append([name, address(sources[index], start), *shadows])
                chunks += [[row, *chunk] for chunk in _run_chunks(places, index, stop - start)]
            if chunks:
                tables = [torch.tensor(values, dtype=torch.int64, device="cpu") for values in (chunks, rows)]
                launches.append(RoundedLaunch(device, dtype, *(_send(values, device) for values in tables)))
        return launches

    return Table(device_type, make, torch.bfloat16)


def _run_chunks(places: ElementPositions, tensor: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """Each run of a tensor, cut: first element, number of elements, position of the first."""
    first, last = places.first[tensor], places.first[tensor + 1]
    for run in range(first, last):
        local, full = places.local[run], places.full[run]
        end = places.local[run + 1] if run + 1 < last else numel
        for low in range(local, end, PROGRAM_CHUNK):
            yield low, min(PROGRAM_CHUNK, end - low), full + low - local


def _on_device(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Chunks and tensors of a launch, sent without waiting."""
    with torch.inference_mode(False):
        tensors = torch.tensor(rows, dtype=torch.int64, device="cpu")
        parts = (tensors[:, 0] + PROGRAM_CHUNK - 1) // PROGRAM_CHUNK
        owners = torch.repeat_interleave(torch.arange(len(rows), device="cpu"), parts)
        firsts = torch.cumsum(parts, 0) - parts
        lows = (torch.arange(len(owners), device="cpu") - firsts[owners]) * PROGRAM_CHUNK
        chunks = torch.stack([owners, lows], dim=1)
        return _send(chunks, device), _send(tensors, device)


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

    def lerp(self, launch: Launch, weights: Sequence[float], skipped: Tensor | None) -> None:
        """Averages the tensors of one launch; does not wait for it.

        Args:
            launch: the tensors.
            weights: of each average.
            skipped: int64, on the device; source elements left out are added to it. None takes them as they are.
        """
        device = launch.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._lerp[(len(launch.chunks),)](
                launch.chunks,
                launch.tensors,
                skipped,
                tuple(map(float, weights)),
                len(weights),
                self._dtypes[launch.dtype],
                launch.aligned,
                PROGRAM_CHUNK,
                BLOCK,
                num_warps=_WARPS,
            )

    def lerp_rounded(
        self, launch: RoundedLaunch, weights: Sequence[float], skipped: Tensor | None, keys: Sequence[int]
    ) -> None:
        """:meth:`lerp` for bf16 shadows; ``keys`` of each average, for this update."""
        device = launch.device
        signed = torch.tensor([key - ((key >> 63) << 64) for key in keys], dtype=torch.int64, device="cpu")
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._lerp_rounded[(len(launch.chunks),)](
                launch.chunks,
                launch.tensors,
                _send(signed, device),
                skipped,
                tuple(map(float, weights)),
                len(weights),
                self._dtypes[launch.dtype],
                BLOCK,
                num_warps=_WARPS,
            )


def lerp(
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table[list[Launch]],
    counter: Callable[[torch.device], Tensor] | None,
) -> list[int]:
    """``shadow += weight * (source - shadow)`` for the tensors that the kernel takes. Local; no host sync.

    It takes what lies contiguously on a CUDA device: fp32 shadows, and sources in fp32, bf16 or fp16. Arguments are
    those of ``kernels.lerp``; ``table`` is kept by the caller for these tensors, and ``counter`` gives the
    device's count of source elements that were not finite, or is None for no guard.

    Returns:
        The indices of the tensors that it did not take: all of them where there is no kernel.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` is not a choice, or asks for a kernel that is not there.
    """
    if not any(source.is_cuda for source in sources) or (kernel := choice()) is None:
        return list(range(len(sources)))
    return run(kernel, averages, sources, ranges, weights, table, counter)


def run(
    kernel: Kernel,
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table[list[Launch]],
    counter: Callable[[torch.device], Tensor] | None,
) -> list[int]:
    """:func:`lerp` by this kernel."""
    if len(weights) != len(averages):
        raise ValueError(f"{len(weights)} weights for {len(averages)} averages")
    launches, rest = table.read(averages, sources, ranges)
    for launch in launches:
        kernel.lerp(launch, weights, counter(launch.device) if counter is not None else None)
    return rest


def lerp_rounded(
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table[list[RoundedLaunch]],
    counter: Callable[[torch.device], Tensor] | None,
    keys: Sequence[int],
) -> list[int]:
    """:func:`lerp` for bf16 shadows, which are rounded stochastically by these keys of the averages."""
    if not any(source.is_cuda for source in sources) or (kernel := choice()) is None:
        return list(range(len(sources)))
    return run_rounded(kernel, averages, sources, ranges, weights, table, counter, keys)


def run_rounded(
    kernel: Kernel,
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table[list[RoundedLaunch]],
    counter: Callable[[torch.device], Tensor] | None,
    keys: Sequence[int],
) -> list[int]:
    """:func:`lerp_rounded` by this kernel."""
    if not len(weights) == len(averages) == len(keys):
        raise ValueError(f"{len(weights)} weights and {len(keys)} keys for {len(averages)} averages")
    launches, rest = table.read(averages, sources, ranges)
    for launch in launches:
        kernel.lerp_rounded(launch, weights, counter(launch.device) if counter is not None else None, keys)
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
    table_ = table(device.type)
    rounding = Rounding(ElementPositions(["check"], [((2**32 - 50, 99),)]), [average_key(0, 1, "check")])
    rounded_table_ = rounded_table(rounding.places, device.type)
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
                run_rounded(kernel, [[halved]], *given, rounded_table_, counts.__getitem__, rounding.keys)
            except Exception as error:  # Triton's compiler raises all kinds
                raise BuildError(f"{kernel} does not compile: {error!r}") from error
            near = (shadow - expected).abs() <= unit
            # A blend that differs in its last bit may round to the next bf16 number.
            near &= (halved.float() - wanted).abs() <= wanted.abs() * torch.finfo(torch.bfloat16).eps
            if int(counts[device]) != 4 or not bool(near.all()):
                raise BuildError(f"{kernel} does not compute what torch does from {dtype}")
