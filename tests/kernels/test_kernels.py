"""In-place arithmetic on plain tensors: the compiled update against the eager one, its cache, and views of pieces."""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import re
import stat
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA, kernels
from dist_ema.errors import EMAConfigError
from dist_ema.kernels import compiler, cpu, native
from dist_ema.kernels.copies import Copies

pytestmark = pytest.mark.core

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: 65,536 elements are a thread's chunk, 512 go through all averages at a time.
SIZES = (0, 1, 7, 4096, 0, 511, 2047, 2049, 65536 - 4096, 1, 65537, 131072, 33, 0)
WEIGHTS = (1e-7, 1e-4, 0.3, 0.5, 0.7, 1.0)
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def kernel() -> native.Library:
    return native.build()


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not averaged yet."""
    monkeypatch.setattr(native, "_decided", [])


def _lerp(
    chosen: native.Library | None,
    averages: list[list[Tensor]],
    sources: list[Tensor],
    weights: list[float],
    guarded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[list[list[Tensor]], int]:
    """What becomes of copies of ``averages``, and how many elements were skipped."""
    monkeypatch.setattr(native, "_decided", [chosen])
    averages = [[shadow.clone() for shadow in average] for average in averages]
    guard = kernels.Guard() if guarded else None
    if guard is not None and chosen is None:
        guard.tainted.update(range(len(sources)))  # as where shadows may hold NaN from the first copy
    ranges = [(0, source.numel()) for source in sources]
    kernels.lerp(averages, sources, ranges, weights, kernels.Scratch(), guard)
    return averages, guard.total() if guard is not None else 0


def _differing(first: list[list[Tensor]], second: list[list[Tensor]]) -> int:
    """Elements of other bits; all NaN are one, and zeros where both are zero."""
    count = 0
    for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        same = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan()) | ((a == 0) & (b == 0))
        count += int((~same).sum())
    return count


def _spoil(tensor: Tensor) -> Tensor:
    """NaN and Inf at every 97th element or so."""
    for offset, value in enumerate((NAN, INF, -INF)):
        tensor[torch.rand(tensor.shape) < 0.01 / (offset + 1)] = value
    return tensor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("spoilt", [False, True])
def test_compiled_gives_the_eager_bits(
    dtype: torch.dtype, guarded: bool, spoilt: bool, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of one job may differ in having a compiler, and replicas must not."""
    torch.manual_seed(0)
    sources = [torch.randn(size).to(dtype) for size in SIZES]
    averages = [[torch.randn(size) for size in SIZES] for _ in range(3)]
    if spoilt:
        sources = [_spoil(source) for source in sources]
        averages = [[_spoil(shadow) for shadow in average] for average in averages]
    for first, second in itertools.pairwise(WEIGHTS):
        weights = [first, second, 0.0]
        compiled, skipped = _lerp(kernel, averages, sources, weights, guarded, monkeypatch)
        eager, expected = _lerp(None, averages, sources, weights, guarded, monkeypatch)
        assert _differing(compiled, eager) == 0, weights
        assert skipped == expected
        assert (skipped > 0) == (guarded and spoilt)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", range(1, 11))
def test_averages_that_share_a_loop_do_not_share_more(
    count: int, dtype: torch.dtype, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight, a shadow or what the guard keeps of one average that goes to another; one that no loop takes."""
    random, sizes = torch.Generator().manual_seed(count), (1500, 37)
    sources = [_spoil(torch.randn(size)).to(dtype) for size in sizes]
    averages = [[_spoil(torch.randn(size)) for size in sizes] for _ in range(count)]
    for guarded, largest in itertools.product((False, True), (0.4, 1.0)):  # below .5, where all share; and mixed
        weights = (torch.rand(count, generator=random) * largest).tolist()
        compiled, skipped = _lerp(kernel, averages, sources, weights, guarded, monkeypatch)
        eager, expected = _lerp(None, averages, sources, weights, guarded, monkeypatch)
        assert _differing(compiled, eager) == 0, weights
        assert skipped == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-44, 1e-39, 6e-8, 1e-5, 1e30, 1e38])
def test_subnormal_and_huge_values_too(
    dtype: torch.dtype, scale: float, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where conversions go wrong, and where a difference overflows to Inf without a source that is Inf."""
    torch.manual_seed(0)
    sources = [(torch.randn(size) * scale).to(dtype) for size in (5000, 37)]
    averages = [[torch.randn(size) * scale for size in (5000, 37)]]
    for weight, guarded in itertools.product(WEIGHTS, (False, True)):
        compiled, skipped = _lerp(kernel, averages, sources, [weight], guarded, monkeypatch)
        eager, expected = _lerp(None, averages, sources, [weight], guarded, monkeypatch)
        assert _differing(compiled, eager) == 0, weight
        assert skipped == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_converted_as_torch_does(
    dtype: torch.dtype, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    (((copied,),), skipped) = _lerp(kernel, [[torch.zeros(2**16)]], [source], [1.0], True, monkeypatch)
    finite = source.float().isfinite()
    assert torch.equal(copied, torch.where(finite, source.float(), 0.0))
    assert skipped == int((~finite).sum())


def test_cut_and_unaligned_views_are_averaged_in_place(kernel: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """A share is a range of a parameter, at any offset of its memory; its neighbours must not be touched."""
    monkeypatch.setattr(native, "_decided", [kernel])
    for dtype, start, length in itertools.product(DTYPES, (0, 1, 3, 65535), (1, 15, 70001)):
        memory = torch.randn(150000).to(dtype)
        source = memory[7 : 7 + 140000]
        flat = torch.randn(length + 8)
        shadow, before = flat[3 : 3 + length], flat.clone()
        kernels.lerp([[shadow]], [source], [(start, start + length)], [0.25], kernels.Scratch(), kernels.Guard())
        expected = before.clone()
        expected[3 : 3 + length].lerp_(source[start : start + length].float(), 0.25)
        assert torch.equal(flat, expected)


def test_what_the_kernel_does_not_take_goes_the_eager_way_beside_it(
    kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One transposed or double weight must not cost the others their speed, nor be left out."""
    sources = [
        torch.randn(6, 4).t(),
        torch.randn(24).bfloat16(),
        torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
        torch.randn(24).double(),
        torch.randn(24),
    ]
    averages = [[torch.randn(24) for _ in range(5)] for _ in range(2)]
    averages[0][4], averages[1][4] = torch.randn(24).double(), torch.randn(24).double()
    before = [[shadow.clone() for shadow in average] for average in averages]
    monkeypatch.setattr(native, "_decided", [kernel])
    ranges = [(0, 24)] * 5
    _, rest = cpu.lerp(
        [[s.clone() for s in average] for average in averages], sources, ranges, [0.1, 0.9], cpu.table(), True
    )
    assert rest == [0, 2, 3, 4]
    kernels.lerp(averages, sources, ranges, [0.1, 0.9], kernels.Scratch(), kernels.Guard())
    for average, old, weight in zip(averages, before, (0.1, 0.9), strict=True):
        for shadow, start, source in zip(average, old, sources, strict=True):
            torch.testing.assert_close(shadow, start.lerp(source.flatten().to(start.dtype), weight), rtol=0, atol=1e-6)


def test_table_follows_memory_dtype_and_layout(kernel: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments are kept between updates; a parameter set anew through .data must be seen."""
    monkeypatch.setattr(native, "_decided", [kernel])
    parameter = nn.Parameter(torch.full((4, 4), 1.0))
    scratch, memory = kernels.Scratch(), parameter.data
    changes: list[Callable[[], Tensor]] = [
        lambda: torch.full((4, 4), 2.0),
        lambda: memory.copy_(torch.arange(16.0).view(4, 4)),
        lambda: memory.t(),  # the same address
        lambda: memory.t().bfloat16(),
        lambda: memory.view(torch.bfloat16)[:, :4].contiguous(),
    ]
    for change in changes:
        parameter.data = change()
        shadow = torch.zeros(16)
        kernels.lerp([[shadow]], [parameter], [(0, 16)], [1.0], scratch, None)
        assert torch.equal(shadow, parameter.detach().flatten().float())


def test_too_few_weights_are_refused(kernel: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would read past the end of the list."""
    monkeypatch.setattr(native, "_decided", [kernel])
    with pytest.raises(ValueError, match="1 weights for 2 averages"):
        kernels.lerp([[torch.ones(3)]] * 2, [torch.ones(3)], [(0, 3)], [0.5], kernels.Scratch(), None)


@pytest.mark.parametrize("route", ["compiled", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_weights_move_no_element(
    route: str, dtype: torch.dtype, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d * s + (1 - d) * p rounds twice, and drifts."""
    monkeypatch.setattr(native, "_decided", [kernel if route == "compiled" else None])
    source = torch.randn(5000).to(dtype)
    shadow = source.float()
    for weight in (1e-7, 1e-4, 0.3, 0.7) * 50:
        kernels.lerp([[shadow]], [source], [(0, 5000)], [weight], kernels.Scratch(), kernels.Guard())
    assert torch.equal(shadow, source.float())


def test_200_000_noisy_updates_stay_with_float64(kernel: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of single updates must not add up: d * s + (1 - d) * p leaves these limits behind in both averages.

    The compiled route makes all updates; the eager one follows it for some blocks and has to end at the same bits, so
    the limits hold for it too. The float64 averages are those of whole blocks at a time.
    """
    numel, block, blocks = 256, 1000, 200
    limits = {0.9999: 1e-5, 0.99999: 2e-5}  # of each element, relative to it
    weights = [1 - decay for decay in limits]
    noise = torch.Generator().manual_seed(0)
    center = torch.rand(numel, generator=noise) + 1
    shadows = [center.clone() for _ in limits]
    references = [center.double() for _ in limits]
    ages = torch.arange(block, dtype=torch.float64).flip(0)
    for number in range(blocks):
        sources = torch.randn(block, numel, generator=noise).mul_(0.1).add_(center)
        follows = number % 100 == 99
        before = [[shadow.clone()] for shadow in shadows]
        offsets, starts, codes, targets = (
            array("q", entries) for entries in ([0, numel], [0], [0], [shadow.data_ptr() for shadow in shadows])
        )
        for row in range(block):
            starts[0] = sources.data_ptr() + row * numel * sources.itemsize
            kernel.lerp([offsets, starts, codes, targets], weights, True)
        if follows:
            monkeypatch.setattr(native, "_decided", [None])
            scratch, guard = kernels.Scratch(), kernels.Guard()
            for source in sources:
                kernels.lerp(before, [source], [(0, numel)], weights, scratch, guard)
            assert all(torch.equal(eager, shadow) for (eager,), shadow in zip(before, shadows, strict=True))
        for reference, weight in zip(references, weights, strict=True):
            shares = weight * (1 - weight) ** ages
            reference.mul_((1 - weight) ** block).add_(shares @ sources.double())
    for shadow, reference, limit in zip(shadows, references, limits.values(), strict=True):
        assert ((shadow.double() - reference) / reference).abs().max() < limit


# The choice.

SCRIPT = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from dist_ema import ShardedEMA
model = torch.nn.Linear(3, 3)
ema = ShardedEMA(model, decay=0.5)
for _ in range(3):
    ema.update()
assert torch.equal(ema.full_state_dict()["weight"], model.weight)
"""


def _run(**environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True, check=False, timeout=300
    )


def test_without_a_compiler_it_falls_back_and_says_so(tmp_path: Path) -> None:
    """Containers often have none."""
    result = _run(PATH="", CXX="", DIST_EMA_CACHE=str(tmp_path), DIST_EMA_KERNEL="")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if "route" in line]
    assert len(lines) == 1
    assert "eager route" in lines[0]
    assert "no C++ compiler" in lines[0]
    forced = _run(PATH="", CXX="", DIST_EMA_CACHE=str(tmp_path), DIST_EMA_KERNEL="compiled")
    assert "EMAConfigError: DIST_EMA_KERNEL=compiled, but there is no compiled kernel: no C++ compiler" in forced.stderr


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which a compiler that takes a second more leaves a line each time; and an empty cache."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo >> {calls}; sleep 1; }}\nexec {compiler._compiler()[0]} "$@"\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("DIST_EMA_CACHE", str(tmp_path / "new"))
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    return calls


def test_processes_that_start_at_once_compile_once(tmp_path: Path, counted: Path) -> None:
    """All ranks of a node start together, with an empty cache, and all of them compiled, for 20 s on a busy node."""
    started = [subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0
        assert f"compiled kernels, {tmp_path}/new/native-" in output
    assert counted.read_text() == "\n"
    assert sum("Compiling the kernels" in output for output in outputs) == 1
    assert len(list((tmp_path / "new").glob("*.so"))) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir())[0] == "lock"


#: Takes the lock, says so, and keeps it until it is killed.
HOLDER = """
import fcntl, os, sys, time
path = sys.argv[1]
os.makedirs(os.path.dirname(path), exist_ok=True)
file = open(path, "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path, counted: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock of the cache and does not give it up."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "new" / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_lock_that_is_never_given_up_is_waited_for_in_bounds(
    holder: subprocess.Popen[str],
    counted: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On a network's file system a lock can outlive its holder, or the request hang."""
    caplog.set_level(logging.INFO, "dist_ema.kernels.compiler")
    monkeypatch.setattr(compiler, "PATIENCE", 0.3)
    native._check(native.build())
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING", "INFO"]
    assert "Waiting for another process" in caplog.text
    assert re.search(r"without the lock \S*/new/lock: another process has held it for \d+ s", caplog.text)
    assert counted.read_text() == "\n"
    native._check(native.build())  # what is in the cache needs no lock
    assert counted.read_text() == "\n"
    # When the lock comes in the end it goes on to the next, who is not kept waiting by this process.
    holder.kill()
    with (counted.parent / "new" / "lock").open("r+") as next_one:
        deadline = time.monotonic() + 60
        while True:
            try:
                fcntl.flock(next_one, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_lock_of_a_dead_process_is_free(
    holder: subprocess.Popen[str], counted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that is killed while it compiles must not make the next one wait."""
    caplog.set_level(logging.WARNING, "dist_ema.kernels.compiler")
    holder.kill()
    holder.wait()
    native._check(native.build())
    assert counted.read_text() == "\n"
    assert not caplog.records


def test_file_system_without_locks_is_no_obstacle(
    counted: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some refuse; what the call raises there is put in its place."""
    caplog.set_level(logging.INFO, "dist_ema.kernels.compiler")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    native._check(native.build())
    assert "No locks available" in caplog.text
    assert counted.read_text() == "\n"


@pytest.mark.usefixtures("undecided", "kernel")
def test_choice_is_forced_by_the_environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """To compare, or where a compiler is not to be started."""
    caplog.set_level(logging.INFO, "dist_ema.kernels.native")
    monkeypatch.setenv("DIST_EMA_KERNEL", "fast")
    with pytest.raises(EMAConfigError, match="DIST_EMA_KERNEL='fast': it can be 'eager' or 'compiled'"):
        native.choice()
    monkeypatch.setenv("DIST_EMA_KERNEL", "eager")
    assert native.choice() is None
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    assert native.choice() is None  # made once
    assert [record.message for record in caplog.records] == ["Averages on the CPU: eager route (DIST_EMA_KERNEL=eager)"]
    monkeypatch.setattr(native, "_decided", [])
    assert isinstance(native.choice(), native.Library)


@pytest.mark.usefixtures("undecided", "kernel")
def test_defaults_of_torch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first update may be made where tensors are double, or on the meta device, by default."""
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert isinstance(native.choice(), native.Library)
    finally:
        torch.set_default_dtype(previous)


@pytest.mark.usefixtures("undecided", "kernel")
def test_construction_and_import_start_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model on an accelerator needs none, and an import must not take seconds."""

    def refuse() -> native.Library:
        raise AssertionError("built")

    monkeypatch.setattr(native, "build", refuse)
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    ema = ShardedEMA(nn.Linear(2, 2), decay=0.5)
    ema.update()
    with pytest.raises(AssertionError, match="built"):
        ema.update()


def test_directory_that_cannot_hold_the_cache(
    tmp_path: Path, kernel: native.Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Home is read-only, missing, or full on many clusters: then each process builds its own."""
    caplog.set_level(logging.INFO, "dist_ema.kernels.compiler")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIST_EMA_CACHE", str(tmp_path / "file" / "cache"))
    native._check(native.build())
    assert "not kept" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.usefixtures("undecided")
def test_damaged_library_in_the_cache_is_built_again(
    tmp_path: Path, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that was full, or a machine that lost power, leaves half a file."""
    monkeypatch.setenv("DIST_EMA_CACHE", str(tmp_path))
    damaged = tmp_path / kernel.path.name
    damaged.write_bytes(kernel.path.read_bytes()[:1000])
    monkeypatch.setenv("DIST_EMA_KERNEL", "compiled")
    assert isinstance(native.choice(), native.Library)
    assert damaged.stat().st_size > 1000


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("folder", lambda path: path.chmod(0o777)),
        ("folder", lambda path: path.chmod(0o770)),
        ("folder", lambda path: path.chmod(0o1777)),
        ("folder", lambda path: os.chown(path, 4321, -1)),
        ("file", lambda path: path.chmod(0o666)),
        ("file", lambda path: path.chmod(0o620)),
        ("file", lambda path: os.chown(path, 4321, -1)),
        ("file", lambda path: path.rename(path.with_name("elsewhere")) and path.symlink_to("elsewhere")),
    ],
)
def test_library_that_somebody_else_may_have_written_is_not_loaded(
    tmp_path: Path,
    kernel: native.Library,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    what: str,
    change: Callable[[Path], None],
) -> None:
    """Whoever can write a library that this process loads runs code as this user: in a cache on /tmp, or of a group."""
    script = tmp_path / "compiler"  # hands out the kernel that is there, so that the test takes no seconds
    script.write_text(f'#!/bin/sh\nfor last; do :; done\n[ "$last" = --version ] || cp {kernel.path} "$last"\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    cache = tmp_path / "cache"
    monkeypatch.setenv("DIST_EMA_CACHE", str(cache))
    path, _ = compiler.build([])
    assert path.parent == cache
    assert (stat.S_IMODE(cache.stat().st_mode), stat.S_IMODE(path.stat().st_mode)) == (0o700, 0o600)
    assert compiler.build([])[0] == path
    try:
        change(cache if what == "folder" else path)
    except PermissionError:
        pytest.skip("only root may give files away")
    caplog.clear()
    private, library = compiler.build([])
    assert library is not None
    if what == "folder":
        assert private.parent != cache and str(cache) in caplog.text
        assert [record.levelname for record in caplog.records if "this process alone" in record.message] == ["WARNING"]
    else:  # the folder is this user's, so a new file takes the place of the one in doubt
        assert private == path and stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_uid == os.geteuid() and not path.is_symlink()


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("fault", ["fails", "hangs", "rounds otherwise"])
def test_compiler_of_no_use_is_logged(
    fault: str,
    tmp_path: Path,
    kernel: native.Library,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A broken toolchain must cost speed, not the training run; nor may it cost the average its bits."""
    script = tmp_path / "compiler"
    endings = {
        "fails": "echo no such header; exit 1",
        "hangs": "sleep 60",
        "rounds otherwise": f'exec {compiler._compiler()[0]} "$@" -DDIST_EMA_NO_FMA',
    }
    reasons = {
        "fails": "failed with 1: no such header",
        "hangs": "took more than 1 s",
        "rounds otherwise": "does not compute what torch does",
    }
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{endings[fault]}\n')
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("DIST_EMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DIST_EMA_KERNEL", raising=False)
    if fault == "rounds otherwise" and "-DDIST_EMA_NO_FMA" in compiler._machine_options():
        pytest.skip("torch itself rounds so here")
    if fault == "hangs":
        monkeypatch.setattr(compiler, "COMPILER_TIMEOUT", 1.0)
    assert native.choice() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert reasons[fault] in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_child_forked_after_an_update_can_average(kernel: native.Library) -> None:
    """OpenMP's threads are gone in a forked child, and a parallel region would wait for them for ever."""
    code = """
import os, torch
from dist_ema.kernels import cpu
from dist_ema import kernels
shadow, source = torch.zeros(1 << 20), torch.ones(1 << 20)
def update():
    kernels.lerp([[shadow]], [source], [(0, 1 << 20)], [.5], kernels.Scratch(), None)
torch.set_num_threads(2)
update()
child = os.fork()
if child == 0:
    update()
    os._exit(0 if shadow[-1].item() == .75 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    variables = {**os.environ, "DIST_EMA_KERNEL": "compiled"}
    subprocess.run([sys.executable, "-c", code], env=variables, check=True, timeout=300)


# Pieces.


@pytest.mark.parametrize("limit", [1, 4, 7, 24, 1000])
def test_pieces_are_writable_views_in_row_major_order(limit: int) -> None:
    """Of a tensor that is not contiguous a flat view would be a copy, and what is written to it lost."""
    layouts = [
        torch.zeros(2, 3, 4),
        torch.zeros(4, 3, 2).permute(2, 1, 0),
        torch.zeros(1, 4, 3, 2).to(memory_format=torch.channels_last),
        torch.zeros(2, 3, 8)[:, :, ::2],
        torch.zeros(4, 6).t(),
    ]
    for tensor, start, stop in itertools.product(layouts, (0, 1, 5, 12), (5, 13, 23, 24)):
        tensor.zero_()
        seen = 0
        for offset, piece in kernels.pieces(tensor, start, stop, limit):
            assert offset == seen
            assert 0 < piece.numel() <= limit
            piece.copy_(torch.arange(offset + 1, offset + 1 + piece.numel()).view(piece.shape))
            seen += piece.numel()
        assert seen == max(stop - start, 0)
        expected = torch.zeros(24)
        expected[start:stop] = torch.arange(1, max(stop - start, 0) + 1)
        assert torch.equal(tensor.flatten(), expected)


def test_pieces_of_empty_and_scalar_tensors() -> None:
    assert list(kernels.pieces(torch.zeros(0, 3), 0, 0, 8)) == []
    ((offset, piece),) = kernels.pieces(torch.tensor(3.0), 0, 1, 8)
    assert (offset, piece.item()) == (0, 3.0)


@pytest.mark.parametrize("route", ["compiled", "eager"])
def test_copies_hold_the_average_in_their_dtype(
    route: str, kernel: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bf16 teacher in the same pass; other dtypes and layouts, a tensor without a copy, and NaN sources besides."""
    monkeypatch.setattr(native, "_decided", [kernel if route == "compiled" else None])
    torch.manual_seed(0)
    sizes = [70_001, 0, 1, 700, 512, 1025]
    sources = [torch.randn(size) for size in sizes]
    sources[0][5], sources[3][-1] = float("nan"), float("inf")
    sources[4] = sources[4].double()  # which the kernel does not take
    shadows = [[torch.randn(size) for size in sizes] for _ in range(2)]
    tensors = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes]
    tensors[2] = tensors[2].half()
    tensors[3] = torch.zeros(20, 35, dtype=torch.bfloat16).t()
    tensors[5] = torch.zeros(1026, dtype=torch.bfloat16)[1:]  # at no multiple of four bytes
    copies = Copies([*tensors[:1], None, *tensors[2:]])
    for _ in range(2):
        ranges = [(0, size) for size in sizes]
        kernels.lerp(shadows, sources, ranges, [0.3, 0.7], kernels.Scratch(), kernels.Guard(), None, copies)
        for number, (tensor, shadow) in enumerate(zip(tensors, shadows[0], strict=True)):
            assert torch.equal(tensor.reshape(-1), shadow.to(tensor.dtype)), number


@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@pytest.mark.parametrize("shadow", [torch.float32, torch.bfloat16, torch.float64])
def test_blend_is_rounded_once_whatever_the_dtypes(live: torch.dtype, shadow: torch.dtype) -> None:
    """Computed in the dtype of bf16 weights a fraction of a small difference would be lost, or rounded twice."""
    torch.manual_seed(0)
    shadow = {torch.float32: torch.complex64}.get(shadow, torch.complex128) if live.is_complex else shadow
    source = torch.randn(70, 33).to(live).t()  # not contiguous
    average = torch.randn(source.numel() - 40).to(shadow)
    before = source.clone()
    kernels.Blend(average, 33, source.numel() - 7, 0.3, kernels.Scratch()).move(source)
    wide = torch.promote_types(torch.promote_types(live, shadow), torch.float32)
    flat, start = before.reshape(-1).to(wide), slice(33, source.numel() - 7)
    flat[start] = flat[start].lerp(average.to(wide), 0.3)
    assert torch.equal(source, flat.view(source.shape).to(live))
