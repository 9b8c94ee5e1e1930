"""The update of averages by Triton, without a GPU: run by Triton's interpreter, and compiled for CUDA but not run."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import interpreted
import pytest
import torch

from dist_ema.errors import EMAConfigError
from dist_ema.kernels import cuda


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


COMPILE = """
import json
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dist_ema.kernels import triton_kernels
from dist_ema.kernels import cuda

def build(kernel, arguments, constants, guarded, capability):
    if not guarded:
        constants["skipped"] = None
    signature = {**arguments, **dict.fromkeys(constants, "constexpr")}
    names = list(signature)
    constants = {(names.index(name),): value for name, value in constants.items()}
    attributes = {(index,): [["tt.divisibility", 16]] for index in range(2)}
    code = ASTSource(kernel, signature, constants, attributes)
    return compile(code, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm

def plain(averages, source, aligned, guarded, capability):
    arguments = {"chunks": "*i64", "tensors": "*i64", "skipped": "*i64", "weights": ("fp32",) * averages}
    constants = {"AVERAGES": averages, "SOURCE": source, "ALIGNED": aligned}
    constants |= {"CHUNK": cuda.PROGRAM_CHUNK, "BLOCK": cuda.BLOCK}
    return build(triton_kernels.lerp, arguments, constants, guarded, capability)

def rounded(averages, source, guarded, capability):
    arguments = dict.fromkeys(["chunks", "tensors", "keys", "skipped"], "*i64") | {"weights": ("fp32",) * averages}
    constants = {"AVERAGES": averages, "SOURCE": source, "BLOCK": cuda.BLOCK}
    return build(triton_kernels.lerp_rounded, arguments, constants, guarded, capability)

one = plain(1, tl.float32, True, True, 80)
three = plain(3, tl.bfloat16, True, False, 90)
unaligned = plain(2, tl.float16, False, True, 90)
bf16 = [rounded(1, tl.bfloat16, True, 80), rounded(2, tl.float32, False, 90)]
print(json.dumps([[len(asm["cubin"]), asm["ptx"]] for asm in (one, three, unaligned, *bf16)]))
"""


def test_compiles_for_cuda_to_fused_arithmetic_and_wide_loads(tmp_path: Path) -> None:
    """The interpreter takes code that the compiler refuses, and says nothing of its speed."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-"],
        input=COMPILE,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    built = json.loads(result.stdout.splitlines()[-1])
    for (size, code), wide in zip(built, (True, True, False, False, False), strict=True):
        assert size > 1000
        assert "fma.rn.f32" in code
        assert not re.search(r"\.ftz", code), "subnormal numbers are flushed to zero"
        assert ("ld.global.v4.b32" in code) == wide
        assert ("st.global.v4.b32" in code) == wide


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
