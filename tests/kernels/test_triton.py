"""The update of averages by Triton, without a GPU: run by Triton's interpreter, and compiled for CUDA but not run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock
from unittest.mock import Mock

from support import interpreted

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_ema import kernels
from dist_ema.errors import EMAConfigError, EMAStateError
from dist_ema.kernels import cuda, programs
from dist_ema.kernels.compiler import BuildError
from dist_ema.kernels.rounding import ElementPositions, Rounding

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def results() -> dict[str, str | None]:
    """Of every check in the interpreter: what failed, or None."""
    result = subprocess.run(
        [sys.executable, interpreted.__file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", interpreted.CHECKS)
def test_in_the_interpreter(check: str, results: dict[str, str | None]) -> None:
    if results[check] is not None:
        pytest.fail(f"{interpreted.CHECKS[check].__doc__}\n{results[check]}")


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
COMPILE = """
import json
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dist_ema.kernels import cuda, programs, triton_kernels

def build(capability, averages, source, shadow, source_aligned, rows, guarded, swapped=False):
    import torch
    rounded = shadow == tl.bfloat16
    arguments = {"chunks": "*i64", "tensors": "*i64", "skipped": "*i64", "weights": ("fp32",) * averages}
    arguments["keys"] = ("i64",) * 2 * averages
    constants = {"AVERAGES": averages, "SOURCE": source, "SHADOW": shadow, "SOURCE_ALIGNED": source_aligned}
    constants |= {"SHADOW_ALIGNED": True, "ROWS": rows, "SWAPPED": swapped, "CHUNK": programs.CHUNK}
    constants |= {"BLOCK": cuda.BLOCKS[torch.bfloat16 if rounded else torch.float32]}
    constants |= {"UNROLL": 2 if not rounded and averages == 1 else 1}
    names = [*arguments, *constants]
    constants |= {} if guarded else {"skipped": None}
    constants |= {} if rounded else {"keys": None}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(2)}
    code = ASTSource(triton_kernels.lerp, signature, places, attributes)
    built = compile(code, target=GPUTarget("cuda", capability, 32), options={"num_warps": cuda._WARPS})
    return {"ptx": built.asm["ptx"], "cubin": list(built.asm["cubin"])}

cases = json.loads(input())
print(json.dumps([build(*case[:2], *(getattr(tl, name) for name in case[2:4]), *case[4:]) for case in cases]))
"""
#: capability, averages, source, shadow, aligned source, column shards, guard
BUILT = [
    (80, 1, "float32", "float32", True, False, True),
    (90, 1, "bfloat16", "float32", True, False, True),
    (100, 1, "bfloat16", "float32", True, False, True),
    (90, 3, "bfloat16", "float32", True, False, True),
    (90, 2, "float16", "float32", False, False, False),
    (80, 1, "bfloat16", "bfloat16", True, False, True),
    (90, 1, "float32", "bfloat16", True, False, True),
    (90, 1, "bfloat16", "bfloat16", True, True, True),
    (100, 3, "bfloat16", "bfloat16", False, True, False),
]
#: Swapped sources, which have no wide loads.
SWAPPED = [
    (90, 1, "bfloat16", "float32", False, False, True, True),
    (80, 1, "float32", "bfloat16", False, True, True, True),
]


IDS = ["-".join(map(str, case)) for case in BUILT]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of every case: its PTX, its machine code, and what that uses."""
    folder = tmp_path_factory.mktemp("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", COMPILE]
    result = subprocess.run(
        command,
        input=json.dumps(BUILT + SWAPPED),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for number, one in enumerate(found):
        cubin = folder / f"{number}.cubin"
        cubin.write_bytes(bytes(one.pop("cubin")))
        for key, option in (("code", "-sass"), ("usage", "-res-usage")):
            reading = [TOOLS / "cuobjdump", option, cubin]
            one[key] = subprocess.run(reading, capture_output=True, text=True, check=True).stdout
    return found


def main_loop(code: str) -> list[str]:
    """The instructions from the first jump backwards to where it leads."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4})\*/\s*(?:@\S+\s+)?(\S+)(.*)$", code, re.MULTILINE)
    for place, operation, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if operation.startswith("BRA") else None
        if target is not None and int(target[1], 16) < int(place, 16):
            return [name for at, name, _ in lines if int(target[1], 16) <= int(at, 16) <= int(place, 16)]
    raise AssertionError("there is no loop")


@pytest.mark.parametrize("case", range(len(BUILT)), ids=IDS)
def test_whole_blocks_are_read_and_written_wide_and_once(case: int, built: list[dict[str, str]]) -> None:
    """The interpreter takes code that the compiler refuses, and says nothing of its speed.

    Blocks that threads hand to each other through shared memory took three averages on an H200 to .73 of a copy, and
    accesses of two bytes bf16 shadows to .30.
    """
    _, averages, source, shadow, aligned, _, _ = BUILT[case]
    assert "fma.rn.f32" in built[case]["ptx"]
    assert not re.search(r"\.ftz", built[case]["ptx"]), "subnormal numbers are flushed to zero"
    loop = Counter(main_loop(built[case]["code"]))
    stores = sum(count for name, count in loop.items() if name.startswith("STG"))
    assert loop["STG.E.128"] == stores
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[source]
    each = stores // averages * (8 if shadow == "bfloat16" else 4)  # elements of a thread
    reads = Counter({"LDG.E.128": stores})
    if not aligned:
        reads["LDG.E.U16" if width == 2 else "LDG.E"] += each
    elif shadow == "float32" and width == 2:
        reads["LDG.E.64"] += each // 4
    else:
        reads["LDG.E.128"] += each * width // 16
    assert {name: count for name, count in loop.items() if name.startswith("LDG")} == reads
    assert not [name for name in loop if name.startswith(("BAR", "LDS", "STS", "LDL", "STL", "ATOM", "RED"))]


def test_swapped_sources_leave_the_shadow_s_accesses_wide(built: list[dict[str, str]]) -> None:
    """And cost few instructions: true divisions took 24 more for an element, half of what an H100 has for it."""
    for one, stores, each, most in zip(built[len(BUILT) :], (2, 1), (4, 8), (28, 58), strict=True):
        instructions = main_loop(one["code"])
        loop = Counter(instructions)
        assert {name: count for name, count in loop.items() if name.startswith("STG")} == {"STG.E.128": stores}
        assert not [name for name in loop if name.startswith(("BAR", "LDS", "STS", "LDL", "STL", "MUFU"))]
        assert len(instructions) / (stores * each) <= most
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", one["usage"]) == ["0", "0"]


@pytest.mark.parametrize("case", range(len(BUILT)), ids=IDS)
def test_values_stay_in_registers_and_instructions_are_few(case: int, built: list[dict[str, str]]) -> None:
    """With too many registers few threads are there to wait for loads; with too many instructions memory waits.

    At the memory's speed an H100 issues 51 an element of bf16 weights and shadow, and 86 where the shadow is fp32.
    """
    capability, averages, _, shadow, _, _, _ = BUILT[case]
    usage = built[case]["usage"]
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]
    (registers,) = map(int, re.findall(r"REG:(\d+)", usage))
    fitting = 65536 // (registers * 32 * 8)  # programs of 8 warps, of which 8 fill a processor
    least = {("float32", 1): 7, ("float32", 2): 5, ("float32", 3): 5, ("bfloat16", 1): 3, ("bfloat16", 3): 1}
    assert fitting >= least[shadow, averages], (capability, registers)
    loop = main_loop(built[case]["code"])
    each = loop.count("STG.E.128") // averages * (8 if shadow == "bfloat16" else 4)  # elements of a thread
    most = {"float32": 15, "bfloat16": 48}[shadow]
    assert len(loop) / each <= most * max(1, averages * 0.8)


def test_keys_compile_no_kernel_anew() -> None:
    """Triton makes another variant of a kernel for small integers, and for multiples of 16: seconds, at any update."""
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    backend = triton.backends.backends["nvidia"].compiler
    keys = [0, 1, 16, 2**32, 2**63 + 32, 2**64 - 1, 0xFFFFFFFF00000010]
    variants = {specialize(backend, cuda.packed([key]), False, True, True) for key in keys}
    assert len(variants) == 1


# The choice.


def test_without_triton_it_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Builds of torch for other systems have none."""
    caplog.set_level(logging.INFO, "dist_ema.kernels.cuda")
    monkeypatch.setattr(cuda, "_decided", [])
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("DIST_EMA_KERNEL", "")
    assert cuda.choice() is None
    assert cuda.choice() is None  # made once
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "Averages on CUDA: eager route" in record.message
    assert "triton cannot be imported" in record.message
    monkeypatch.setattr(cuda, "_decided", [])
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    with pytest.raises(EMAConfigError, match="DIST_EMA_KERNEL=compiled, but there is no compiled kernel: triton"):
        cuda.choice()


def test_eager_route_is_forced_without_a_look_at_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_decided", [])
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("DIST_EMA_KERNEL", "eager")
    assert cuda.choice() is None


def test_tensors_on_the_cpu_start_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its import takes a second, and CPU builds of torch have none."""
    monkeypatch.setattr(cuda, "_decided", [])
    values = [torch.ones(3)]
    assert cuda.lerp([values], values, [(0, 3)], [0.5], cuda.table(), None) == [0]
    assert not cuda._decided


def on_cuda(values: Tensor) -> Tensor:
    """A tensor of the CPU that says it is on a GPU."""
    return values.as_subclass(type("OnCuda", (Tensor,), {"is_cuda": True}))


def test_an_update_that_draws_random_bits_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays would repeat one update's bits: what rounds up once would round up each time, and the average drift."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    rounding = Rounding(ElementPositions(["a"], [((0, 3),)]), [1])
    shadow, scratch = torch.zeros(3, dtype=torch.bfloat16), kernels.Scratch()
    given = [[shadow]], [on_cuda(torch.ones(3))], [(0, 3)], [0.5], scratch, None
    with pytest.raises(EMAStateError, match="cannot be captured into a CUDA graph"):
        kernels.lerp(*given, rounding)
    assert not scratch.touched
    assert not shadow.any()


def test_a_kernel_that_turns_out_not_to_serve_leaves_the_update_to_the_eager_route(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is compiled at the first update of a dtype, long after it was chosen."""
    monkeypatch.setattr(cuda, "_decided", [object()])
    monkeypatch.setattr(cuda, "run", Mock(side_effect=BuildError("no ptxas")))
    given = [[torch.zeros(3)]], [on_cuda(torch.ones(3))], [(0, 3)], [0.5], cuda.table(), None
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    with pytest.raises(EMAConfigError, match="no ptxas"):
        cuda.lerp(*given)
    monkeypatch.delenv("DIST_EMA_KERNEL")
    assert [cuda.lerp(*given) for _ in range(2)] == [[0], [0]]
    (record,) = caplog.records
    assert "Averages on CUDA: eager route" in record.message
    assert cuda.choice() is None


POSITIONS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=12)


@given(st.one_of(POSITIONS, st.integers(1, 9)), st.sampled_from([0, 2**32 - 60, 2**40]), st.integers(0, 8))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_programs_know_the_place_of_every_element(found: list[tuple[int, int]] | int, first: int, lacks: int) -> None:
    """Column shards, whose ends may be cut, and any other runs; with the kernel's own 32-bit arithmetic."""
    if isinstance(found, int):  # rows of one length
        found = [(13, found)] * 9
        found[0] = (13 + min(lacks, found[0][1] - 1), found[0][1] - min(lacks, found[0][1] - 1))
        found[-1] = (13, max(1, found[-1][1] - lacks))
        starts = [first + 13 * row + (found[0][0] - 13 if row == 0 else 0) for row in range(9)]
        runs = tuple(zip(starts, (length for _, length in found), strict=True))
    else:
        starts = list(itertools.accumulate((gap + length for gap, length in found[:-1]), initial=first))
        runs = tuple((start, length) for start, (_, length) in zip(starts, found, strict=True))
    numel = sum(length for _, length in runs)
    wanted = [start + inside for start, length in runs for inside in range(length)]
    with mock.patch.object(programs, "CHUNK", 32):
        chunks = programs.placed(ElementPositions(["a"], [runs]), {0: numel}).tolist()
    seen = []
    for row, low, count, position, before, length, step, multiplier, shift in chunks:
        assert (row, low) == (0, len(seen))
        assert 0 < count <= 32
        for inside in range(before, before + count):
            run = (inside * multiplier >> 32) >> shift
            place = (position + inside + run * (step - length)) % 2**32
            seen.append((position >> 32 << 32) + place)
    assert seen == wanted


@given(st.integers(2, 2**30 - 1), st.integers(0, 2**30 - 1))
@settings(derandomize=True, deadline=None, max_examples=500)
def test_lengths_of_runs_divide_exactly(length: int, low: int) -> None:
    """By a multiplication and a shift, for the ends of a program and of each run in it."""
    grid = (0, 0, length, length + 1)
    start = (low // length * length + length - 1) // programs.CHUNK * programs.CHUNK
    chunk = programs._in_rows(start, start + programs.CHUNK, *grid)
    if chunk is not None:
        _, count, _, before, _, _, multiplier, shift = chunk
        assert multiplier < 2**32
        for inside in {before, before + count - 1, *range(length - 1, before + count, length)}:
            assert (inside * multiplier >> 32) >> shift == inside // length
