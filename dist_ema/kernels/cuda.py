"""Runs the update of averages on a GPU: one launch for all tensors of a dtype, instead of several for each tensor.

Each source element is read once, the guard is inside, and nothing waits for the device. The kernel is compiled at the
first update by Triton, which comes with CUDA builds of torch; its arithmetic is in ``triton_kernels.py``. The choice is
made and logged once, and ``DIST_EMA_KERNEL`` forces it. An update may be captured into a CUDA graph (which repeats its
weights) after it has run once with the same tensors. An update of bf16 shadows may not be captured, because the graph
would repeat its random bits, too.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from dist_ema.errors import EMAStateError
from dist_ema.kernels import arguments, programs
from dist_ema.kernels.arguments import Averages, Ranges, address, check_numbers
from dist_ema.kernels.choice import choose, give_up
from dist_ema.kernels.compiler import BuildError
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key

logger = logging.getLogger(__name__)

#: Bytes that a thread loads at once, where addresses are multiples of them.
_ALIGNMENT = 16
_WARPS = 8
#: Elements of a block, by the shadows' dtype. Loads of one width for source and shadow: 4 or 8 elements for each of the
#: 256 threads. With others the compiler carries every block from thread to thread, through memory that they share.
BLOCKS = {torch.float32: 1 << 10, torch.bfloat16: 1 << 11}


@dataclass(frozen=True)
class Launch:
    """Holds the arguments of one kernel launch: tensors of one dtype on one device.

    Attributes:
        device: the device of all tensors.
        source, shadow: the dtypes.
        source_aligned, shadow_aligned: whether every address is a multiple of 16 bytes, which the kernel then relies
            on.
        chunks: int64, on the device: for each program its tensor and its elements (:mod:`dist_ema.kernels.programs`).
        tensors: int64, (tensors, 2 + averages), on the device: for each tensor its number of elements (for bf16 shadows
            the hash of its name), and the addresses of source and shadows. For swapped sources seven more columns: the
            first element of the range; ``a`` and ``b`` of :func:`~dist_ema.kernels.arguments.swapped`; the divisions by
            ``b`` and by ``a``. The address is then that of the whole tensor.
        rows: whether a program may have several runs of a column shard.
        swapped: whether two dimensions of the sources are exchanged in memory.
    """

    device: torch.device
    source: torch.dtype
    shadow: torch.dtype
    source_aligned: bool
    shadow_aligned: bool
    chunks: Tensor
    tensors: Tensor
    rows: bool = False
    swapped: bool = False


Table: TypeAlias = arguments.Table[list[Launch]]


def table(positions: ElementPositions | None = None, device_type: str = "cuda") -> Table:
    """Returns an empty table for one list of tensors, which the caller keeps; for bf16 shadows, with their
    ``positions``.

    Another device type serves Triton's interpreter.
    """
    dtype = torch.float32 if positions is None else torch.bfloat16
    return arguments.Table(device_type, partial(_launches, positions), dtype, swapped=True)


def _launches(
    positions: ElementPositions | None,
    taken: list[int],
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
) -> list[Launch]:
    # One launch has one code path: tensors are grouped by all that changes the code.
    groups: dict[tuple[torch.device, torch.dtype, bool, bool, bool], dict[int, list[int]]] = {}
    for index in taken:
        (start, stop), source = ranges[index], sources[index]
        if start >= stop:
            continue
        flat = source.is_contiguous()
        # The range of a swapped source is not contiguous, so its address is that of the whole tensor.
        place = address(source, start if flat else 0)
        shadows = [average[index].data_ptr() for average in averages]
        source_aligned = flat and place % _ALIGNMENT == 0
        shadow_aligned = all(shadow % _ALIGNMENT == 0 for shadow in shadows)
        key = source.device, source.dtype, source_aligned, shadow_aligned, not flat
        layout = () if flat else (start, *_layout(source))
        groups.setdefault(key, {})[index] = [place, *shadows, *layout]
    # The tables of each group are built on the host and copied to the device once; the launches are kept.
    launches = []
    for (device, dtype, source_aligned, shadow_aligned, swapped), group in groups.items():
        numels = {index: ranges[index][1] - ranges[index][0] for index in group}
        if positions is None:
            rows = [[numels[index], *values] for index, values in group.items()]
            chunks = programs.even(list(numels.values()))
        else:
            rows = [[_signed(positions.names[index]), *values] for index, values in group.items()]
            chunks = programs.placed(positions, numels)
        shadow = torch.float32 if positions is None else torch.bfloat16
        with torch.inference_mode(False):
            tensors = torch.tensor(rows, dtype=torch.int64, device="cpu")
            sent = _send(chunks, device), _send(tensors, device)
        several = positions is not None and programs.has_rows(chunks)
        launches.append(Launch(device, dtype, shadow, source_aligned, shadow_aligned, *sent, several, swapped))
    return launches


def _layout(source: Tensor) -> tuple[int, ...]:
    sizes = arguments.swapped(source)
    if sizes is None:
        raise ValueError(f"shape {tuple(source.shape)}, strides {source.stride()}: not a swapped source")
    a, b = sizes
    return a, b, *programs.division(b), *programs.division(a)


def _signed(bits: int) -> int:
    """Returns the int64 with the bits of an unsigned 64-bit integer: the kernel's are signed."""
    return bits - ((bits >> 63) << 64)


def _send(values: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, which the allocator does not give to others before the copy has been made.
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


class Kernel:
    """Runs the Triton kernel.

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
        self._lerp = triton_kernels.lerp
        self._checked: set[tuple[torch.device, torch.dtype, torch.dtype]] = set()

    def __str__(self) -> str:
        return f"Triton {self._version}"

    def check(self, launch: Launch) -> None:
        """Compares a few elements with torch before the first launch of a kind, so that only used kinds are compiled.

        Raises BuildError.
        """
        kind = launch.device, launch.source, launch.shadow
        if kind not in self._checked:
            check(self, launch.device, launch.source, launch.shadow == torch.bfloat16)
            self._checked.add(kind)

    def lerp(
        self, launch: Launch, weights: Sequence[float], skipped: Tensor | None, keys: Sequence[int] | None = None
    ) -> None:
        """Averages the tensors of one launch; does not wait for it.

        Args:
            launch: the tensors.
            weights: the weight of each average.
            skipped: int64, on the device; the number of skipped source elements is added to it. None uses all values.
            keys: the key of each average for this update of bf16 shadows; None for fp32 ones.
        """
        device = launch.device
        given = tuple(map(float, weights))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._lerp[(len(launch.chunks),)](
                launch.chunks,
                launch.tensors,
                skipped,
                given,
                None if keys is None else packed(keys),
                len(given),
                self._dtypes[launch.source],
                self._dtypes[launch.shadow],
                launch.source_aligned,
                launch.shadow_aligned,
                launch.rows,
                launch.swapped,
                programs.CHUNK,
                BLOCKS[launch.shadow],
                2 if keys is None and len(given) == 1 else 1,
                num_warps=_WARPS,
            )


def packed(keys: Sequence[int]) -> tuple[int, ...]:
    """Returns the halves of each key, the lower one first, in a form that is always odd and has 62 bits.

    Triton compiles a kernel again if an integer fits into 32 bits, or is a multiple of 16, for the first time.
    """
    halves = (half for key in keys for half in (key & 0xFFFFFFFF, key >> 32))
    return tuple(1 << 61 | half << 8 | 1 for half in halves)


def lerp(
    averages: Averages,
    sources: Sequence[Tensor],
    ranges: Ranges,
    weights: Sequence[float],
    table: Table,
    counter: Callable[[torch.device], Tensor] | None,
    rounding: Rounding | None = None,
) -> list[int]:
    """Computes ``shadow += weight * (source - shadow)`` for the tensors that the kernel takes. Local; no host sync.

    It takes contiguous tensors on a CUDA device: fp32 shadows (with ``rounding``, bf16 ones), and sources in fp32, bf16
    or fp16; sources may also be in ``channels_last``, or transposed. Other layouts (other dimensions exchanged, or
    gaps) use
    the eager route: such weights are rare, and each layout would need code of its own.

    The arguments are those of ``kernels.lerp``. The caller keeps ``table`` for these tensors. ``counter`` returns the
    device's count of source elements that were not finite; None means no guard.

    Returns:
        The indices of the tensors that it did not take: all of them if there is no kernel.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` has another value than those allowed, or asks for a kernel that is not
            available.
    """
    everything = list(range(len(sources)))
    if not any(source.is_cuda for source in sources) or (kernel := choice()) is None:
        return everything
    try:
        return run(kernel, averages, sources, ranges, weights, table, counter, rounding)
    except BuildError as error:
        give_up(_decided, "CUDA", error, logger)
        return everything


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
    """Implements :func:`lerp` with this kernel. Raises BuildError, before anything is written, if the kernel fails."""
    check_numbers(averages, weights, rounding)
    launches, rest = table.read(averages, sources, ranges)
    for launch in launches:
        kernel.check(launch)
    _launch(kernel, launches, weights, counter, rounding)
    return rest


def _launch(
    kernel: Kernel,
    launches: Sequence[Launch],
    weights: Sequence[float],
    counter: Callable[[torch.device], Tensor] | None,
    rounding: Rounding | None,
) -> None:
    keys = None if rounding is None else rounding.keys
    for launch in launches:
        kernel.lerp(launch, weights, counter(launch.device) if counter is not None else None, keys)


def refuse_capture(sources: Sequence[Tensor]) -> None:
    """Raises EMAStateError while a CUDA graph is captured, for work that a graph must not repeat. No host sync."""
    if any(source.is_cuda for source in sources) and torch.cuda.is_current_stream_capturing():
        raise EMAStateError(
            "update() with bf16 shadows cannot be captured into a CUDA graph: each replay would round by the random "
            "bits of this one update, so that the average drifts. Call update() after the graph's replay, or give "
            "dtype=torch.float32"
        )


# The choice.

_decided: list[Kernel | None] = []


def choice() -> Kernel | None:
    """Returns the kernel, or None for the eager route. Decides and logs at the first call. Raises EMAConfigError."""
    return choose(_decided, "CUDA", Kernel, logger)


def check(kernel: Kernel, device: torch.device, dtype: torch.dtype, rounded: bool) -> None:
    """Compares a few elements with torch on this device. Waits for the device, once.

    Args:
        kernel: the kernel to check.
        device: the device to check it on.
        dtype: the dtype of the sources.
        rounded: whether shadows are bf16.

    Raises:
        BuildError: the kernel does not compile, or differs by more than one unit in the last place.
    """
    rounding = Rounding(ElementPositions(["check"], [((2**32 - 50, 99),)]), [average_key(0, 1, "check")])
    used = rounding if rounded else None
    table_ = table(used.positions if used is not None else None, device.type)
    source = torch.linspace(-3, 5, 99, dtype=torch.float32, device=device).tan_().to(dtype)
    source[7], source[60] = float("nan"), float("inf")
    counts = {device: torch.zeros((), dtype=torch.int64, device=device)}
    for weight in (1e-4, 0.7):
        before = torch.linspace(1, -2, 99, dtype=torch.float32, device=device)
        before = before.bfloat16() if rounded else before
        start = before.float()
        end = torch.where(source.isfinite(), source.float(), 0.0)
        expected = torch.lerp(start, end, weight)
        unit = torch.maximum(start.abs(), end.abs()) * torch.finfo(torch.float32).eps
        if rounded:  # a blend that differs in its last bit may round to the next bf16 number
            expected = rounding.apply(0, 0, 0, expected).float()
            unit = torch.maximum(unit, expected.abs() * torch.finfo(torch.bfloat16).eps)
        expected = torch.where(source.isfinite(), expected, start)
        shadow = before.clone()
        launches, _ = table_.read([[shadow]], [source], [(0, 99)])
        try:
            _launch(kernel, launches, [weight], counts.__getitem__, used)
        except Exception as error:  # Triton's compiler raises all kinds
            raise BuildError(f"{kernel} does not compile: {error!r}") from error
        if not bool(((shadow.float() - expected).abs() <= unit).all()):
            raise BuildError(f"{kernel} does not compute what torch does from {dtype} to {shadow.dtype}")
    if int(counts[device]) != 4:
        raise BuildError(f"{kernel} counts {int(counts[device])} of 4 elements that are not finite in {dtype}")
