"""Checks of the Triton kernel, run by Triton's interpreter on the CPU: ``TRITON_INTERPRET=1 python interpreted.py``.

In a process of its own, since Triton looks at the variable when it is imported. Prints one line of JSON: for each check
the traceback of its failure, or null. ``test_triton.py`` asks for it once, and reports each check as a test.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dist_ema import ShardedEMA, kernels
from dist_ema.kernels import cuda, native, programs, triton_kernels
from dist_ema.kernels.compiler import BuildError
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Around a block and a chunk of the kernel, which has four blocks here, and empty.
SIZES = (0, 1, 1024, 2048, 0, 2049, 4097, 7, 0)
NAN, INF = float("nan"), float("inf")


def _mend_the_interpreter() -> None:
    """Triton 3.4 to 3.6 count with arrays of one element as if they were numbers, which numpy since 2.4 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: Any) -> None:
        patch(tensor, *scope)
        keep = scope[0].set_attr if scope else setattr  # since 3.6 it takes note of what it patches
        keep(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched


def _lerp(
    averages: list[list[Tensor]],
    sources: list[Tensor],
    weights: list[float],
    guarded: bool,
    ranges: list[tuple[int, int]] | None = None,
) -> tuple[list[list[Tensor]], int, list[int]]:
    """What the kernel makes of copies of ``averages``, how many elements it skipped, and what it did not take."""
    averages = [[shadow.clone() for shadow in average] for average in averages]
    guard = kernels.Guard()
    ranges = ranges or [(0, source.numel()) for source in sources]
    counter = guard.counter if guarded else None
    table = cuda.table(device_type="cpu")
    rest = cuda.run(cuda.Kernel(), averages, sources, ranges, weights, table, counter)
    return averages, guard.total(), rest


def _eager(
    averages: list[list[Tensor]], sources: list[Tensor], weights: list[float], guarded: bool
) -> tuple[list[list[Tensor]], int]:
    native._decided[:] = [None]
    averages = [[shadow.clone() for shadow in average] for average in averages]
    guard = kernels.Guard() if guarded else None
    if guard is not None:
        guard.tainted.update(range(len(sources)))  # as where shadows may hold NaN from the first copy
    ranges = [(0, source.numel()) for source in sources]
    kernels.lerp(averages, sources, ranges, weights, kernels.Scratch(), guard)
    return averages, guard.total() if guard is not None else 0


def _make(dtype: torch.dtype, count: int, sizes: tuple[int, ...] = SIZES) -> tuple[list[list[Tensor]], list[Tensor]]:
    torch.manual_seed(0)
    sources = [torch.randn(size).to(dtype) for size in sizes]
    return [[torch.randn(size) for size in sizes] for _ in range(count)], sources


def _spoil(tensor: Tensor) -> Tensor:
    for offset, value in enumerate((NAN, INF, -INF)):
        tensor[torch.rand(tensor.shape) < 0.01 / (offset + 1)] = value
    return tensor


def _same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    """Of one bit pattern; all NaN are one, and zeros whatever their sign."""
    for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        same = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan()) | ((a == 0) & (b == 0))
        if not bool(same.all()):
            return False
    return True


class _Fused:
    """The interpreter multiplies and adds as a GPU does: rounding once. A product of two fp32 is exact in fp64."""

    def __enter__(self) -> None:
        from triton.runtime import interpreter

        self._builder = interpreter.InterpreterBuilder
        self._plain = self._builder.create_fma

        def create_fma(_: object, x: object, y: object, z: object) -> object:
            exact = x.data.astype("float64") * y.data.astype("float64") + z.data.astype("float64")
            return interpreter.TensorHandle(exact.astype("float32"), z.dtype.scalar)

        self._builder.create_fma = create_fma

    def __exit__(self, *_: object) -> None:
        self._builder.create_fma = self._plain


def check_bits_are_those_of_the_eager_route() -> None:
    """Three averages in one pass, every dtype of sources, with and without the guard."""
    for dtype, guarded in [(DTYPES[0], False), *((dtype, True) for dtype in DTYPES)]:
        averages, sources = _make(dtype, 3)
        for weights in ([0.0, 1e-7, 0.5], [0.3, 0.7, 1.0]):
            expected, _ = _eager(averages, sources, weights, guarded)
            with _Fused():
                found, skipped, rest = _lerp(averages, sources, weights, guarded)
            assert _same(found, expected), (dtype, guarded, weights)
            assert (skipped, rest) == (0, [])


def check_two_roundings_differ_by_one_unit_at_most() -> None:
    """Where a processor does not fuse, the stated bound holds: 2**-23 of the larger of shadow and source."""
    averages, sources = _make(torch.float32, 1)
    for weight in (1e-7, 0.3, 0.49, 0.5, 0.7):
        expected, _ = _eager(averages, sources, [weight], True)
        found, _, _ = _lerp(averages, sources, [weight], True)
        for a, b, start, end in zip(found[0], expected[0], averages[0], sources, strict=True):
            assert bool(((a - b).abs() <= 2**-23 * torch.maximum(start.abs(), end.abs())).all()), weight


def check_nan_and_inf_are_left_out_and_counted_once() -> None:
    """In the source: the shadow stays. In the shadow alone: it takes the source. Once, whatever the averages."""
    for dtype in DTYPES:
        averages, sources = _make(dtype, 3)
        sources = [_spoil(source) for source in sources]
        averages = [[_spoil(shadow) for shadow in average] for average in averages]
        expected, count = _eager(averages, sources, [1e-4, 0.5, 1.0], True)
        with _Fused():
            found, skipped, _ = _lerp(averages, sources, [1e-4, 0.5, 1.0], True)
        assert _same(found, expected), dtype
        assert skipped == count > 50


def check_a_blend_that_overflows_is_no_reason_to_skip() -> None:
    averages, sources = [[torch.full((40,), -3e38)]], [torch.full((40,), 3e38)]
    for weight in (0.3, 0.7):
        found, skipped, _ = _lerp(averages, sources, [weight], True)
        assert _same(found, _eager(averages, sources, [weight], True)[0])
        assert skipped == 0


def check_hundreds_of_uneven_tensors() -> None:
    """One launch for each dtype, and none for what is empty."""
    sizes = tuple((37 * index * index) % 900 for index in range(150))
    averages, sources = _make(torch.float32, 1, sizes)
    sources = [source.to(DTYPES[index % 3]) for index, source in enumerate(sources)]
    expected, _ = _eager(averages, sources, [0.1], True)
    with _Fused():
        found, _, rest = _lerp(averages, sources, [0.1], True)
    assert _same(found, expected)
    assert not rest


def check_ranges_and_unaligned_views_touch_no_neighbour() -> None:
    """A share is a range of a parameter, at any offset of its memory."""
    kernel = cuda.Kernel()
    for dtype, start, length in itertools.product(DTYPES, (0, 3, 4096), (1, 15, 4999)):
        source = torch.randn(9999).to(dtype)[7:]
        flat = torch.randn(length + 8)
        shadow, before = flat[3 : 3 + length], flat.clone()
        table, spans = cuda.table(device_type="cpu"), [(start, start + length)]
        with _Fused():
            rest = cuda.run(kernel, [[shadow]], [source], spans, [0.25], table, kernels.Guard().counter)
        expected = before.clone()
        expected[3 : 3 + length].lerp_(source[start : start + length].float(), 0.25)
        assert torch.equal(flat, expected), (dtype, start, length)
        assert not rest


def check_what_does_not_lie_flat_is_left_to_the_eager_route() -> None:
    sources = [torch.randn(6, 8)[:, ::2], torch.randn(24), torch.randn(24).double()]
    averages = [[torch.randn(24) for _ in sources]]
    found, _, rest = _lerp(averages, sources, [0.5], True)
    assert rest == [0, 2]
    assert torch.equal(found[0][0], averages[0][0])


def check_convolutions_in_channels_last_and_transposed_matrices() -> None:
    """Two dimensions have changed places in memory: of every rank, in ranges that begin anywhere, in every dtype."""
    shapes = [(8, 3, 5, 7), (4, 6, 3, 2, 5), (1, 4, 1, 9), (5, 1, 3, 3), (40, 33)]
    formats = [torch.channels_last, torch.channels_last_3d, torch.channels_last, torch.channels_last, None]
    for dtype, rounded in itertools.product(DTYPES, (False, True)):
        sources = []
        for shape, form in zip(shapes, formats, strict=True):
            source = torch.randn(shape).to(dtype)
            source = source.t() if form is None else source.to(memory_format=form)
            sources.append(source)
        ranges = [(0, sources[0].numel()), (7, 500), (3, 36), (0, 45), (1, 1320)]
        sizes = [stop - start for start, stop in ranges]
        rounding = Rounding(ElementPositions(list("abcde"), [((0, size),) for size in sizes]), [average_key(0, 1, "x")])
        used = rounding if rounded else None
        shadows = [torch.randn(size).to(torch.bfloat16 if rounded else torch.float32) for size in sizes]
        results = []
        for table in (None, cuda.table(rounding.positions if rounded else None, "cpu")):
            copies = [[shadow.clone() for shadow in shadows]]
            given = copies, sources, ranges, [0.25]
            if table is None:
                native._decided[:] = [None]
                kernels.lerp(*given, kernels.Scratch(), None, used)
            else:
                with _Fused():
                    assert cuda.run(cuda.Kernel(), *given, table, None, used) == []
            results.append([[shadow.float() for shadow in copies[0]]])
        assert _same(*results), (dtype, rounded)


@triton.jit
def _places(columns: tl.tensor, low: tl.tensor, found: tl.tensor) -> None:
    inside = tl.arange(0, 64)
    tl.store(found + inside, triton_kernels._swapped(inside, triton_kernels._layout(columns, low)))


def check_places_in_swapped_tensors_of_two_billion_elements() -> None:
    """They are 32-bit sums and products that wrap around; divisions are by multiplication."""
    for a, b in (
        (3, (2**31 - 1) // 6),
        ((2**31 - 1) // 6, 3),
        (2, 2**30 - 1),
        (2**30 - 1, 2),
        (46_340, 46_341),
        (7, 9),
    ):
        outer = (2**31 - 1) // (a * b)
        last = outer * a * b
        for low in (0, a * b - 40, b - 30, last // 2, last - 64):
            low = max(0, min(low, last - 64))
            columns = torch.tensor([5, a, b, *programs.division(b), *programs.division(a)])
            found = torch.zeros(64, dtype=torch.int32)
            _places[(1,)](columns, low - 5, found)
            numbers = torch.arange(low, low + 64)
            line, column = numbers // b, numbers % b
            wanted = (line // a * b + column) * a + line % a
            assert torch.equal(found.long(), wanted), (a, b, low)


def check_table_is_kept_until_memory_or_dtype_changes() -> None:
    """Made anew for each update, it would cost more than the update; kept too long, it would read freed memory."""
    kernel, table = cuda.Kernel(), cuda.table(device_type="cpu")
    parameter, shadow = nn.Parameter(torch.ones(40)), torch.zeros(40)
    launches = []
    for values in (None, torch.full((40,), 2.0), torch.full((40,), 3.0).bfloat16()):
        if values is not None:
            parameter.data = values
        for _ in range(2):
            shadow.zero_()
            cuda.run(kernel, [[shadow]], [parameter], [(0, 40)], [1.0], table, None)
            assert torch.equal(shadow, parameter.detach().float())
            launches.append(table.read([[shadow]], [parameter], [(0, 40)])[0])
    assert [a is b for a, b in itertools.pairwise(launches)] == [True, False, True, False, True]


def check_tensors_of_more_than_two_to_the_31_elements() -> None:
    """Offsets in 32 bits would wrap. Two bytes of memory stand for 5 GB: only the table is looked at."""
    launch = programs.even([2**31 + 2 * programs.CHUNK])
    assert launch[-1].tolist() == [0, 2**31 + programs.CHUNK]
    source = torch.ones(40)
    shadow = torch.zeros(40)
    low = 2**33  # elements
    chunks = torch.tensor([[0, low]])
    tensors = torch.tensor([[low + 40, source.data_ptr() - 4 * low, shadow.data_ptr() - 4 * low]])
    made = cuda.Launch(torch.device("cpu"), torch.float32, torch.float32, False, False, chunks, tensors)
    cuda.Kernel().lerp(made, [1.0], None)
    assert torch.equal(shadow, source)


def check_weights_fit_averages() -> None:
    """The kernel would read past the end of the list."""
    with pytest.raises(ValueError, match="1 weights for 2 averages"):
        _lerp([[torch.ones(3)]] * 2, [torch.ones(3)], [0.5], True)


def check_self_check_notices_a_wrong_kernel() -> None:
    """What the first update on a GPU does before it trusts the kernel."""
    device = torch.device("cpu")
    kernel = cuda.Kernel()
    kinds = list(itertools.product(DTYPES, (False, True)))
    for dtype, rounded in kinds:
        cuda.check(kernel, device, dtype, rounded)
    right = kernel._lerp

    class Wrong:
        def __init__(self, rounded: bool) -> None:
            self.rounded = rounded

        def __getitem__(self, grid: tuple[int]) -> object:
            def call(
                chunks: Tensor,
                tensors: Tensor,
                skipped: Tensor,
                weights: tuple[float],
                keys: object,
                *rest: object,
                **options: object,
            ) -> None:
                if (keys is not None) == self.rounded:
                    weights = tuple(weight * 1.1 for weight in weights)
                right[grid](chunks, tensors, skipped, weights, keys, *rest, **options)

            return call

    class Broken:
        def __getitem__(self, grid: tuple[int]) -> object:
            raise RuntimeError("no ptxas")

    doubles = [(Wrong(False), "does not compute what torch does"), (Wrong(True), "does not compute what torch does")]
    for double, why in (*doubles, (Broken(), "does not compile: RuntimeError")):
        kernel = cuda.Kernel()
        kernel._lerp = double
        for dtype, rounded in kinds:
            if getattr(double, "rounded", rounded) == rounded:
                with pytest.raises(BuildError, match=why):
                    cuda.check(kernel, device, dtype, rounded)


def check_only_what_is_used_is_compiled_and_checked_and_what_fails_changes_nothing() -> None:
    """Six kernels at the first update were seconds for each rank. One that fails leaves shadows to the eager route."""
    kernel = cuda.Kernel()
    sources, shadow = [torch.ones(3, dtype=torch.bfloat16)], torch.zeros(3)
    given = [[shadow]], sources, [(0, 3)], [0.5]
    for _ in range(2):
        cuda.run(kernel, *given, cuda.table(device_type="cpu"), None)
    assert kernel._checked == {(torch.device("cpu"), torch.bfloat16, torch.float32)}
    assert shadow.tolist() == [0.75] * 3
    kernel = cuda.Kernel()
    kernel._lerp = {}  # as where it does not compile
    with pytest.raises(BuildError, match="does not compile"):
        cuda.run(kernel, *given, cuda.table(device_type="cpu"), None)
    assert shadow.tolist() == [0.75] * 3


def check_a_whole_average_goes_through_it() -> None:
    """As on a GPU, from ``ShardedEMA.update`` down: the CPU's tensors are passed off as CUDA's."""
    model = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 7))
    averages, kernel = {"fast": 0.5, "slow": 0.999}, cuda.Kernel()
    fast, slow = ShardedEMA(model, averages=averages), ShardedEMA(model, averages=averages)
    calls = []

    def lerp(*arguments: object) -> list[int]:
        calls.append(1)
        *most, _, counter, rounding = arguments
        return cuda.run(kernel, *most, cuda.table(device_type="cpu"), counter, rounding)

    native._decided[:] = [None]
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
            model[0].weight[0, 0] = NAN if step == 2 else 1.0
        slow.update()
        plain, cuda.lerp = cuda.lerp, lerp
        try:
            with _Fused():
                fast.update()
        finally:
            cuda.lerp = plain
    assert len(calls) == 3
    assert all(fast.fingerprint(name) == slow.fingerprint(name) for name in averages)
    assert fast.metrics()["ema/skipped_elements"] == slow.metrics()["ema/skipped_elements"] == 1


def check_bf16_shadows_are_rounded_to_the_eager_bits() -> None:
    """Short and long runs, columns, positions past 2**32, ranges of sources, two averages, NaN and Inf everywhere."""
    native._decided[:] = [None]
    torch.manual_seed(0)
    runs = [((5, 4_099),), (), tuple((2**32 - 30 + 7 * row, 3) for row in range(9)), ((2**40, 1),)]
    runs += [((2**33 + 8, 2), *((2**33 + 3 + 1000 * row, 7) for row in range(1, 800)), (2**33 + 800_003, 4))]
    runs += [((2**32 - 7, 14),), ((3, 2), (9, 5), (50, 1))]
    sizes = [sum(length for _, length in found) for found in runs]
    rounding = Rounding(ElementPositions(list("abcdefg"), runs), [average_key(7, 3, name) for name in "xy"])
    ranges = [(4, 4 + size) for size in sizes]
    modes = ([0.0, 1e-4], True), ([0.5, 0.3], True), ([0.7, 1.0], False)
    for dtype, (weights, guarded) in zip(DTYPES, modes, strict=True):
        sources = [_spoil(torch.randn(size + 9).to(dtype)) for size in sizes]
        averages = [[_spoil(torch.randn(size).bfloat16()) for size in sizes] for _ in range(2)]
        results, guards = [], []
        for table in (None, cuda.table(rounding.positions, "cpu")):
            copies = [[shadow.clone() for shadow in average] for average in averages]
            guard = kernels.Guard()
            if table is None:
                chosen = guard if guarded else None
                kernels.lerp(copies, sources, ranges, weights, kernels.Scratch(), chosen, rounding)
            else:
                counter = guard.counter if guarded else None
                given = (copies, sources, ranges, weights, table, counter, rounding)
                with _Fused():
                    assert cuda.run(cuda.Kernel(), *given) == []
            guards.append(guard.total())
            results.append([[shadow.float() for shadow in average] for average in copies])
        assert _same(*results), (dtype, weights)
        assert guards[0] == guards[1]
        assert (guards[0] > 20) == guarded


def check_the_largest_numbers_are_rounded_as_the_eager_route_does() -> None:
    """Up from the largest bf16 number would be Inf; what is not finite stays it, whatever is drawn."""
    native._decided[:] = [None]
    bits = [0x7F7E8000, 0x7F7EFFFF, 0x7F7F0000, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF, 0, 1]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32).repeat(50)
    source = torch.cat([values, -values])
    rounding = Rounding(ElementPositions(["a"], [((0, len(source)),)]), [average_key(1, 2, "x")])
    found = []
    for chosen in (None, cuda.table(rounding.positions, "cpu")):
        shadow = torch.zeros(len(source), dtype=torch.bfloat16)
        given = [[shadow]], [source], [(0, len(source))], [1.0]
        if chosen is None:
            kernels.lerp(*given, kernels.Scratch(), None, rounding)
        else:
            cuda.run(cuda.Kernel(), *given, chosen, None, rounding)
        found.append([[shadow.float()]])
    assert _same(*found)
    assert bool(found[0][0][0][source.isfinite()].isfinite().all())


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


def main() -> None:
    np.seterr(all="ignore")  # of NaN and Inf
    _mend_the_interpreter()
    programs.CHUNK = 2 * cuda.BLOCKS[torch.bfloat16]  # the interpreter takes milliseconds for a block
    results = {}
    for name, check in CHECKS.items():
        try:
            check()
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
