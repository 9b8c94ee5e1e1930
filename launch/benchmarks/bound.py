"""The memory's speed: ``a += w * b`` over the bytes that an update has to move."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import Model, weights


def compile_axpy(folder: Path) -> ctypes.CDLL | None:
    """``a += w * b`` for fp32 and for bf16 ``b``, into one and into three ``a``; None where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("c++")
    if compiler is None:
        return None
    source = """
    #include <stdint.h>
    #include <string.h>
    static inline float wide(uint16_t value) {
        uint32_t bits = (uint32_t)value << 16;
        float result;
        memcpy(&result, &bits, 4);
        return result;
    }
    #define AXPY(name, type, load) \\
        void name##_1(float *restrict a, const type *restrict b, int64_t n, float w) { \\
            for (int64_t i = 0; i < n; i++) a[i] += w * load(b[i]); \\
        } \\
        void name##_3(float *restrict a, float *restrict c, float *restrict d, const type *restrict b, int64_t n, \\
                      float w) { \\
            for (int64_t i = 0; i < n; i++) { \\
                const float value = w * load(b[i]); \\
                a[i] += value; \\
                c[i] += value; \\
                d[i] += value; \\
            } \\
        }
    AXPY(fp32, float, )
    AXPY(bf16, uint16_t, wide)
    """
    (folder / "axpy.c").write_text(source)
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-x", "c", "axpy.c", "-o", "axpy.so"]
    if subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode:
        return None
    return ctypes.CDLL(str(folder / "axpy.so"))


def bound(model: Model, averages: int = 1) -> tuple[str, Callable[[], object]]:
    """Label and function of ``a += w * b`` from one flat array of as many elements, into one or three others.

    On a GPU, whose mixed-dtype addition torch does not vectorise, of a copy on the device that moves as many bytes.
    """
    source = torch.cat(weights(model))
    if source.device.type != "cpu":
        moved = source.numel() * (source.itemsize + 8 * averages)  # half of it read, half of it written
        first, second = (torch.empty(moved // 2, dtype=torch.uint8, device=source.device) for _ in range(2))
        label = "bound" if averages == 1 else f"bound of {averages} averages"
        return f"{label}: a copy on the device", lambda: second.copy_(first)
    targets = [source.to(torch.float32, copy=True) for _ in range(averages)]
    name = "bound: a += w * b" if averages == 1 else f"bound of {averages} averages: a += w * b"
    with tempfile.TemporaryDirectory() as folder:
        library = compile_axpy(Path(folder))
    if library is not None:
        dtype = "fp32" if source.dtype == torch.float32 else "bf16"
        function = getattr(library, f"{dtype}_{averages}")
        function.argtypes = (*[ctypes.c_void_p] * (averages + 1), ctypes.c_int64, ctypes.c_float)
        function.restype = None
        # Python threads: a second OpenMP runtime would spin against that of torch. The caller does its part as
        # with OpenMP: on a busy machine a fresh thread is scheduled before one that has been working.
        threads = torch.get_num_threads()
        parts = list(zip(*(values.chunk(threads) for values in (*targets, source)), strict=True))
        pool = ThreadPoolExecutor(threads)

        def part(*values: Tensor) -> None:
            function(*(each.data_ptr() for each in values), values[0].numel(), 1e-9)

        def run() -> None:
            others = [pool.submit(part, *group) for group in parts[1:]]
            part(*parts[0])
            for other in others:
                other.result()

        return f"{name}, C, one array", run
    # One step of torch's reads the weights again for each average, and would convert the whole array first: in chunks
    # they come from the cache.
    chunked = averages > 1 or source.dtype != torch.float32
    size = 1 << 18 if chunked else max(source.numel(), 1)
    scratch = torch.empty(size if chunked else 0)

    def steps() -> None:
        for b, *parts in zip(*(torch.split(values, size) for values in (source, *targets)), strict=True):
            wide = scratch[: b.numel()].copy_(b) if chunked else b
            for a in parts:
                a.add_(wide, alpha=1e-9)

    return f"{name}, torch, {'chunks' if chunked else 'one array'}", steps
