"""The compiled update of averages on the CPU: ``fused.cpp``, built on first use and kept for the next process.

One pass over memory, one parallel region for all tensors, the guard inside: what no sequence of torch operations can
do. Where there is no compiler, the callers' own route, chunk by chunk, gives the same bits at about half the speed.

What it is built from and for (source, compiler, processor) names the file in the cache, ``$DIST_EMA_CACHE`` or
``~/.cache/dist_ema``. Processes that start together each build and rename into place, so none sees half a file; where
the directory cannot be written, the build goes to a temporary directory. ``DIST_EMA_KERNEL`` forces the choice:
``eager`` or ``compiled``.

The bits are those of ``torch.lerp``, but for the sign of zero at a weight of exactly 1, where torch's vectors and the
elements that are left over from them differ between themselves.

OpenMP is torch's own runtime where that is GNU's, so both share one set of threads. Its threads do not survive a fork:
a child forked later (a worker of a data loader) computes with one thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import uuid
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dist_ema.errors import EMAConfigError

logger = logging.getLogger(__name__)

#: Seconds that a compiler may take. It needs one or two.
COMPILER_TIMEOUT = 120.0
_SOURCE = Path(__file__).with_suffix(".cpp")
_OPTIONS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
# No -ffast-math, which drops the tests for NaN; no contraction, so that only what is written as fused is.
_OPTIONS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_pointer = Tensor.data_ptr


class BuildError(Exception):
    """The kernel could not be built or does not compute what it should; the message says why."""


class Kernel:
    """The loaded library.

    Args:
        path: of the shared library.

    Raises:
        OSError: it cannot be loaded, or is another library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._function = ctypes.CDLL(str(path)).dist_ema_lerp
        except AttributeError as error:
            raise OSError(str(error)) from error
        self._function.argtypes = [ctypes.c_int64] * 2 + [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2
        self._function.restype = ctypes.c_int64
        self._process = os.getpid()

    def __call__(self, arrays: Sequence[array[int]], weights: Sequence[float], guarded: bool) -> int:
        """Averages; other Python threads run meanwhile.

        Args:
            arrays: for each tensor where it begins in all of them laid end to end, and the end; the address of its
                source; the code of the source's dtype; and, average by average, the address of its shadow.
            weights: of each average.
            guarded: leave out what is not finite.

        Returns:
            How many source elements were left out.
        """
        threads = torch.get_num_threads() if os.getpid() == self._process else 1
        given: list[array[int] | array[float]] = [*arrays, array("d", weights)]
        addresses = [values.buffer_info()[0] for values in given]
        skipped: int = self._function(len(arrays[1]), len(weights), *addresses, guarded, threads)
        return skipped


class Table:
    """The kernel's arguments, kept from one update to the next: making them takes longer than a small update.

    Addresses, dtypes and layouts are compared at every update, since a parameter's memory may move.
    """

    def __init__(self) -> None:
        self._seen: list[object] = []
        self._arrays: list[array[int]] = []
        self._rest: list[int] = []

    def read(
        self, averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], ranges: Sequence[tuple[int, int]]
    ) -> tuple[list[array[int]], list[int]]:
        """The arrays for :class:`Kernel`, and the indices of the tensors that it cannot take."""
        seen: list[object] = [
            [source.dtype for source in sources],
            *(list(map(read, sources)) for read in (_pointer, Tensor.numel, Tensor.is_contiguous)),
            *(list(map(_pointer, average)) for average in averages),
            list(ranges),
        ]
        if seen != self._seen:
            self._make(averages, sources, ranges)
            self._seen = seen
        return self._arrays, self._rest

    def _make(
        self, averages: Sequence[Sequence[Tensor]], sources: Sequence[Tensor], ranges: Sequence[tuple[int, int]]
    ) -> None:
        taken = []
        self._rest = []
        for index, (source, (start, stop)) in enumerate(zip(sources, ranges, strict=True)):
            shadows = [average[index] for average in averages]
            if source.dtype in _CODES and _lies_flat(source, stop) and all(_fits(s, stop - start) for s in shadows):
                taken.append(index)
            else:
                self._rest.append(index)
        counts = [ranges[index][1] - ranges[index][0] for index in taken]
        starts = [_pointer(sources[index]) + ranges[index][0] * sources[index].itemsize for index in taken]
        codes = [_CODES[sources[index].dtype] for index in taken]
        targets = [_pointer(average[index]) for average in averages for index in taken]
        offsets = itertools.accumulate(counts, initial=0)
        self._arrays = [array("q", values) for values in (offsets, starts, codes, targets)]


def _lies_flat(tensor: Tensor, count: int) -> bool:
    """Whether its first ``count`` elements lie one after the other, aligned, in the CPU's memory."""
    plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # not a wrapper around other tensors
    flat = plain and tensor.is_cpu and tensor.is_contiguous() and tensor.numel() >= count
    return flat and tensor.data_ptr() % tensor.itemsize == 0


def _fits(shadow: Tensor, count: int) -> bool:
    return shadow.dtype == torch.float32 and _lies_flat(shadow, count)


def lerp(
    averages: Sequence[Sequence[Tensor]],
    sources: Sequence[Tensor],
    ranges: Sequence[tuple[int, int]],
    weights: Sequence[float],
    table: Table,
    guarded: bool,
) -> tuple[int, list[int]]:
    """``shadow += weight * (source - shadow)`` for the tensors that the kernel takes. Local.

    It takes what lies contiguously in the CPU's memory: fp32 shadows, and sources in fp32, bf16 or fp16. Arguments are
    those of :func:`dist_ema.kernels.lerp`; ``table`` is kept by the caller for these tensors.

    Returns:
        How many source elements were skipped since they were not finite, and the indices of the tensors that it did not
        take: all of them where there is no kernel.

    Raises:
        EMAConfigError: ``DIST_EMA_KERNEL`` is not a choice, or asks for a kernel that cannot be built.
    """
    if not any(source.is_cpu for source in sources) or (kernel := choice()) is None:
        return 0, list(range(len(sources)))
    if len(weights) != len(averages):
        raise ValueError(f"{len(weights)} weights for {len(averages)} averages")
    arrays, rest = table.read(averages, sources, ranges)
    return kernel(arrays, weights, guarded), rest


# The choice.

_lock = threading.Lock()
_decided: list[Kernel | None] = []


def choice() -> Kernel | None:
    """The kernel, or None for the eager route: decided, and logged, at the first call. Raises EMAConfigError."""
    if not _decided:
        with _lock:
            if not _decided:
                _decided.append(_decide(os.environ.get("DIST_EMA_KERNEL", "")))
    return _decided[0]


def _decide(wish: str) -> Kernel | None:
    if wish not in ("", "eager", "compiled"):
        raise EMAConfigError(f"DIST_EMA_KERNEL={wish!r}: it can be 'eager' or 'compiled', or unset for what is there")
    if wish == "eager":
        logger.info("Averages on the CPU: eager route (DIST_EMA_KERNEL=eager)")
        return None
    try:
        kernel = build()
        _check(kernel)
    except (BuildError, OSError) as error:
        if wish == "compiled":
            raise EMAConfigError(f"DIST_EMA_KERNEL=compiled, but there is no compiled kernel: {error}") from error
        logger.warning("Averages on the CPU: eager route, at about half the speed. No compiled kernel: %s", error)
        return None
    logger.info("Averages on the CPU: compiled kernel, %s", kernel.path)
    return kernel


def _check(kernel: Kernel) -> None:
    """A few elements against torch: another processor or compiler may round otherwise, and then is not used."""
    source = torch.linspace(-3, 5, 99, dtype=torch.float32, device="cpu").tan_()  # whatever the defaults are
    source[7], source[60] = float("nan"), float("inf")
    for dtype in _CODES:
        for weight in (1e-4, 0.7):
            values = source.to(dtype)
            shadow = torch.linspace(1, -2, 99, dtype=torch.float32, device="cpu")
            expected = torch.where(values.isfinite(), torch.lerp(shadow, values.float(), weight), shadow)
            arrays, _ = Table().read([[shadow]], [values], [(0, 99)])
            skipped = kernel(arrays, [weight], True)
            if skipped != 2 or not torch.equal(shadow, expected):
                raise BuildError(f"{kernel.path} does not compute what torch does from {dtype}")


# The build.


def build() -> Kernel:
    """Loads the kernel from the cache, or compiles it and puts it there.

    Raises:
        BuildError: there is no compiler, it fails, or it takes too long.
        OSError: a file cannot be written, or the library not loaded.
    """
    compiler = _compiler()
    command = [*compiler, *_OPTIONS, *_machine_options()]
    facts = [_SOURCE.read_text(), *command, _run([*compiler, "--version"]), _processor()]
    name = f"fused-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.so"
    try:
        return _kept(_cache() / name)
    except (OSError, RuntimeError):  # not there, damaged, or nobody knows where home is
        pass
    # Private, since in a shared directory somebody else could lay a library of that name. A loaded one can be deleted.
    with tempfile.TemporaryDirectory(prefix="dist_ema_") as folder:
        built = Path(folder) / name
        _run([*command, str(_SOURCE), "-o", str(built)])
        try:
            return _kept(_keep(built))
        except (OSError, RuntimeError) as error:
            logger.info("The compiled kernel is not kept for the next process: %s", error)
            return Kernel(built)


def _cache() -> Path:
    named = os.environ.get("DIST_EMA_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "dist_ema"


def _keep(built: Path) -> Path:
    """Copies it into the cache so that no process sees a part of it, and tells its path there. Raises OSError."""
    folder = _cache()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.so"
    code = built.read_bytes()
    try:
        temporary.write_bytes(code + hashlib.sha256(code).digest())  # the loader does not mind what follows
        temporary.replace(folder / built.name)
    finally:
        temporary.unlink(missing_ok=True)
    return folder / built.name


def _kept(path: Path) -> Kernel:
    """Loads what ``_keep`` wrote. Raises OSError: it is not there, or damaged; to load that could end the process."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise OSError(f"{path} is damaged")
    return Kernel(path)


def _compiler() -> list[str]:
    """``$CXX``, which may have arguments, or the first that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named and shutil.which(named[0]):
        return named
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("no C++ compiler ($CXX, c++, g++, clang++) was found")


def _machine_options() -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    options = ["-mprefer-vector-width=512"]  # compilers choose 256 by themselves, which is slower here
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        options.append("-DDIST_EMA_NO_FMA")  # torch then multiplies and adds in two roundings
    return options


def _processor() -> str:
    """What ``-march=native`` depends on, since a home directory may be shared by different machines."""
    facts = [platform.system(), platform.machine(), *platform.libc_ver()]
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    keys = ("model", "flags", "features", "cpu family", "cpu implementer", "cpu part")
    return "\n".join([*facts, *(line for line in lines if line.lower().startswith(keys))])


def _run(command: Sequence[str]) -> str:
    """The end of what a compiler wrote. Raises BuildError: it fails, or takes too long."""
    # Into a file and in a session of its own: a compiler's children would otherwise survive a timeout, and hold a pipe.
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as error:
            raise BuildError(f"{command[0]}: {error}") from error
        try:
            code = process.wait(COMPILER_TIMEOUT)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{shlex.join(command)} took more than {COMPILER_TIMEOUT:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        log = output.read().decode(errors="replace").strip()[-2000:]
    if code:
        raise BuildError(f"{shlex.join(command)} failed with {code}: {log}")
    return log
