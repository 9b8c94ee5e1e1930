"""``offload="cpu"``: the bits of an average that is not offloaded, whoever writes or reads while the thread is at it.

Weights in host memory are read in place; ``SlowLink`` puts the route of an accelerator in the place of that: copies
that are made later than they were asked for, in a thread's own time. Arithmetic is slowed down too, so that whoever
does not wait is too early.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

from support.models import CASES, Uneven, batch, build
from support.zero_models import make_engine, train

import pytest
import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA, kernels
from dist_ema.errors import EMAStateError
from dist_ema.runtime import memory
from dist_ema.shadow import staging
from dist_ema.shadow.staging import CopyRequest, HostLink, carve

pytestmark = pytest.mark.core

ROUTES = ("in place", "copied")
DELAY = 0.02


class SlowLink(HostLink):
    """What an accelerator does, in a thread: copies lie behind, ``wait_for_reads`` and ``join`` wait for them."""

    def copy(self, takes: Sequence[CopyRequest]) -> None:
        super().copy([take for take in takes if take.soon])
        self._done = threading.Event()
        later = [take for take in takes if not take.soon]
        threading.Thread(target=self._copy_later, args=(later, self._done)).start()

    def _copy_later(self, takes: list[CopyRequest], done: threading.Event) -> None:
        time.sleep(DELAY)
        super().copy(takes)
        done.set()

    def wait_for_reads(self) -> None:
        self._done.wait()

    def join(self) -> None:
        self._done.wait()


@contextlib.contextmanager
def slowly(route: str) -> Iterator[None]:
    """Everything that the thread does takes a while."""
    lerp, copy = kernels.lerp, kernels.copy

    def late(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if threading.current_thread().name.startswith("dist_ema"):
                time.sleep(DELAY)
            function(*arguments)

        return call

    links = {"cpu": SlowLink} if route == "copied" else {}
    with (
        mock.patch.dict(staging.LINKS, links),
        mock.patch.object(kernels, "lerp", late(lerp)),
        mock.patch.object(kernels, "copy", late(copy)),
    ):
        yield


@contextlib.contextmanager
def failing(error: BaseException) -> Iterator[None]:
    """The thread's arithmetic raises."""
    with mock.patch.object(kernels, "lerp", mock.Mock(side_effect=error)):
        yield


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    model.train()
    model(batch(number)).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(model: nn.Module, lr: float = 0.5) -> torch.optim.Optimizer:
    """Steps so large that weights of the wrong moment are noticed."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)


def both(model: object, **options: Any) -> tuple[ShardedEMA, ShardedEMA]:
    """An average that is offloaded, and one that is not."""
    return ShardedEMA(model, offload="cpu", **options), ShardedEMA(model, **options)


def evaluate(engine: Any) -> Tensor:
    engine.eval()
    with torch.no_grad():
        output: Tensor = engine(torch.zeros(4, dtype=torch.int64))
    engine.train()
    return output


# The same bits.


@pytest.mark.world_size(2)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "case",
    [
        *("plain", "ddp", "fsdp1-full", "fsdp1-grad-op-orig-mixed", "fsdp1-hybrid", "fsdp2", "fsdp2-offloaded"),
        *("fsdp2-mixed", "hsdp", "tp", "fsdp2-tp"),
    ],
)
def test_offloading_changes_no_bit_under_any_wrapper(case: str, route: str, rank: int, tmp_path: Path) -> None:
    """Steps right behind updates, evaluations in between, the shard of each engine read from another thread."""
    with slowly(route):
        model = CASES[case].model()
        optimizer = trained(model, 0.1)
        offloaded, plain = both(model, decay=0.7)
        for ema in (offloaded, plain):
            ema.attach(optimizer)
        for number in range(4):
            step(model, optimizer, number)
            if number % 2:
                for ema in (offloaded, plain):
                    with ema.average_parameters(), torch.no_grad():
                        model.eval()(batch(number))
        assert offloaded.fingerprint() == plain.fingerprint()
        assert offloaded.metrics() == plain.metrics()
        offloaded.save(tmp_path / "checkpoint", block=False)
        before = offloaded.fingerprint()
        step(model, optimizer, 4)
        assert offloaded.fingerprint() == plain.fingerprint() != before
        offloaded.load(tmp_path / "checkpoint")
        assert offloaded.fingerprint() == before
        offloaded.close()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"dtype": "bf16"}),
        (1, {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}),
        (2, {"dtype": "fp16", "offload": True, "gas": 2}),
        (3, {"dtype": "bf16"}),
        (3, {"dtype": "bf16", "offload": True, "zero": {"sub_group_size": 30}}),
    ],
    ids=str,
)
def test_offloading_changes_no_bit_under_deepspeed(
    stage: int, options: dict[str, Any], route: str, rank: int, tmp_path: Path
) -> None:
    """DeepSpeed's steps write masters group by group, through optimizers of torch's class."""
    with slowly(route):
        engine = make_engine(stage, **options)
        offloaded, plain = both(engine, decay=0.7)
        for number in range(6):
            train(engine, range(number, number + 1))
            assert offloaded.update() == plain.update()
        assert offloaded.num_updates == plain.num_updates > 2
        assert offloaded.fingerprint() == plain.fingerprint()
        for ema in (offloaded, plain):
            with ema.average_parameters():
                assert evaluate(engine).isfinite().all()
        train(engine, range(6, 8))
        offloaded.update(), plain.update()
        assert offloaded.fingerprint() == plain.fingerprint()
        assert offloaded.metrics() == plain.metrics()
        offloaded.close()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "options",
    [
        {"averages": {"fast": 0.5, "slow": 0.9}, "update_interval": 2},
        {"buffers": "average", "ema_start": "2ba"},
        {"skip_nonfinite": False, "dtype": torch.float64},
        {"include": "module", "buffers": "ignore"},
    ],
    ids=str,
)
def test_offloading_changes_no_bit_with_any_option(options: dict[str, Any], route: str) -> None:
    """BatchNorm's buffers are written by the very next forward pass, before any optimizer step."""
    with slowly(route):
        model = build()
        optimizer = trained(model)
        offloaded, plain = both(model, **options)
        for number in range(5):
            step(model, optimizer, number)
            offloaded.update(), plain.update()
        for name in plain.names:
            assert offloaded.fingerprint(name) == plain.fingerprint(name)


@pytest.mark.parametrize("route", ROUTES)
def test_transposed_weights_and_nan_take_the_same_way(route: str) -> None:
    """A source that is not contiguous, one that is not finite at first, and one that is not later."""
    with slowly(route):
        model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last).bfloat16()
        offloaded, plain = both(model, decay=0.5)
        for number in range(4):
            with torch.no_grad():
                model.weight.fill_(number + 0.1)
                model.weight[number, 0, 0, 0] = float("nan") if number < 2 else 1.0
            offloaded.update(), plain.update()
            offloaded.wait()
        assert offloaded.fingerprint() == plain.fingerprint()
        assert offloaded.metrics() == plain.metrics()
        assert offloaded.metrics()["ema/skipped_elements"] == 2


# Who waits, and who does not.


def test_update_returns_before_the_work_is_done_and_a_step_waits_for_it() -> None:
    go = threading.Event()
    inner = kernels.lerp

    def held_up(*arguments: Any) -> None:
        assert go.wait(120)
        inner(*arguments)

    model = build()
    optimizer = trained(model)
    offloaded, plain = both(model, decay=0.5)
    offloaded.update(), plain.update()
    offloaded.wait()
    plain.update()
    with mock.patch.object(kernels, "lerp", held_up):
        assert offloaded.update()
        model(batch(0)).square().mean().backward()  # forward and backward go on meanwhile
        threading.Timer(DELAY, go.set).start()
        optimizer.step()
        assert go.is_set()
        assert offloaded.fingerprint() == plain.fingerprint()


def readers(folder: Path) -> dict[str, Callable[[ShardedEMA], object]]:
    """Every call that shows an average."""

    def inside(ema: ShardedEMA) -> object:
        with ema.average_parameters():
            return [parameter.clone() for parameter in ema._average.engine.modules()[0].parameters()]

    def copied(ema: ShardedEMA) -> object:
        ema.copy_to()
        return [parameter.clone() for parameter in ema._average.engine.modules()[0].parameters()]

    def read(write: Callable[[ShardedEMA, Path], None], what: str) -> Callable[[ShardedEMA], object]:
        def call(ema: ShardedEMA) -> object:
            path = folder / f"{what}-{id(ema)}"
            write(ema, path)
            return {file.name: file.read_bytes() for file in path.rglob("*.safetensors")}

        return call

    return {
        "full_state_dict": lambda ema: ema.full_state_dict(),
        "fingerprint": lambda ema: ema.fingerprint(),
        "metrics": lambda ema: ema.metrics(),
        "state_dict": lambda ema: {name: str(value) for name, value in ema.state_dict().items()},
        "average_parameters": inside,
        "copy_to": copied,
        "export": read(lambda ema, path: ema.export(path), "export"),
        "save": read(lambda ema, path: ema.save(path), "save"),
        "save in the background": read(lambda ema, path: (ema.save(path, block=False), ema.wait()), "saved"),
    }


def same(found: object, expected: object) -> bool:
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in found)
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return torch.equal(found, expected) if isinstance(found, Tensor) else found == expected


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reader", readers(Path()))
def test_every_reader_waits_for_the_update(reader: str, route: str, tmp_path: Path) -> None:
    look = readers(tmp_path)[reader]
    found = []
    for offload in ("cpu", None):
        with slowly(route):
            model = build()
            optimizer = trained(model)
            ema = ShardedEMA(model, decay=0.5, offload=offload)
            ema.attach(optimizer)
            for number in range(2):
                step(model, optimizer, number)
            found.append(look(ema))
    assert same(*found)


@pytest.mark.parametrize("route", ROUTES)
def test_another_average_that_goes_into_the_model_waits_for_the_reading(route: str) -> None:
    """No optimizer writes here: the other object of the same model does."""
    with slowly(route):
        model = build()
        optimizer = trained(model)
        other = ShardedEMA(model, decay=0.1)
        other.update()
        step(model, optimizer, 0)
        offloaded, plain = both(model, decay=0.5)
        for _ in range(2):
            plain.update()
            offloaded.update()
            with other.average_parameters():
                pass
            offloaded.update(), plain.update()
            other.copy_to()
        assert offloaded.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("route", ROUTES)
def test_a_write_by_other_hands_is_logged_once_unless_it_waited(route: str, caplog: pytest.LogCaptureFixture) -> None:
    with slowly(route):
        model = build()
        ema = ShardedEMA(model, offload="cpu")
        for waits in (True, False, False):
            ema.update()
            if waits:
                ema.wait()
            with torch.no_grad():
                model.one.weight.add_(1)
            ema.wait()
            assert ("were written by something else" in caplog.text) == (not waits)
        assert caplog.text.count("were written by something else") == 1
        assert "'one.weight'" in caplog.text
        assert "wait()" in caplog.text


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("seed", range(2))
def test_no_order_of_calls_makes_a_difference(seed: int, route: str, tmp_path: Path) -> None:
    """Whatever follows whatever, at once: the bits, the live weights and the numbers are those of the other average."""
    draw = random.Random(seed)
    model, twin = build(), build()
    offloaded = ShardedEMA(model, decay=0.5, offload="cpu")
    plain = ShardedEMA(twin, decay=0.5)
    sides = [(model, trained(model, 0.1), offloaded), (twin, trained(twin, 0.1), plain)]
    offloaded.save(tmp_path / "offloaded"), plain.save(tmp_path / "plain")

    def evaluate(model: nn.Module, _: object, ema: ShardedEMA) -> None:
        with ema.average_parameters(), torch.no_grad():
            model.eval()(batch(1))

    def save(_model: object, _optimizer: object, ema: ShardedEMA) -> None:
        ema.save(tmp_path / ("plain" if ema is plain else "offloaded"), block=False)

    def load(_model: object, _optimizer: object, ema: ShardedEMA) -> None:
        ema.load(tmp_path / ("plain" if ema is plain else "offloaded"), strict=False)

    def forward(model: nn.Module, *_: object) -> None:
        model.train()(batch(2))

    def adopt(model: nn.Module, _optimizer: object, ema: ShardedEMA) -> None:
        ema.copy_to()

    actions: list[Callable[..., object]] = [evaluate, save, load, forward, adopt]
    actions += [lambda *side: side[2].reset(), lambda *side: side[2].close(), lambda *side: side[2].metrics()]
    actions += [lambda *side: step(side[0], side[1], 3), lambda *side: side[2].update()] * 6
    with slowly(route):
        for action in draw.choices(actions, k=25):
            for side in sides:
                action(*side)
        assert offloaded.num_updates == plain.num_updates
        assert offloaded.fingerprint() == plain.fingerprint()
        assert offloaded.metrics() == plain.metrics()
    for mine, other in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_a_step_that_was_asked_for_after_the_copies_is_no_write_by_other_hands(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GPU does things in their order: the optimizer has counted its writes before the thread has seen the copies."""

    stepped = threading.Event()

    class Asked(HostLink):
        def join(self) -> None:
            assert stepped.wait(120)

    with mock.patch.dict(staging.LINKS, {"cpu": Asked}):
        model = build()
        optimizer = trained(model)
        offloaded, plain = both(model, decay=0.5)
        for number in range(3):
            stepped.clear()
            offloaded.update(), plain.update()
            step(model, optimizer, number)
            stepped.set()
            offloaded.wait()
        assert offloaded.fingerprint() == plain.fingerprint()
    assert "were written by something else" not in caplog.text


# Failures.


def broken(error: BaseException) -> tuple[Uneven, torch.optim.Optimizer, ShardedEMA]:
    """An average whose second update has failed."""
    model = build()
    optimizer = trained(model)
    ema = ShardedEMA(model, decay=0.5, offload="cpu")
    ema.update()
    ema.wait()
    with failing(error):
        ema.update()
        step(model, optimizer, 0)  # an optimizer step is not the place to learn of it
    return model, optimizer, ema


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("CUDA error: out of memory")], ids=repr)
def test_a_failed_update_is_raised_by_every_call_until_reset(error: BaseException, tmp_path: Path) -> None:
    _, _, ema = broken(error)
    for look in (lambda ema: ema.update(), lambda ema: ema.wait(), *readers(tmp_path).values()):
        with pytest.raises(EMAStateError, match="failed in the background") as caught:
            look(ema)
        assert str(error) in str(caught.value)
        assert "reset()" in str(caught.value)
        assert caught.value.__cause__ is error
    ema.reset()
    ema.update()
    assert ema.metrics()["ema/distance"] == 0
    ema.close()


def test_a_failed_update_is_raised_by_the_next_call_even_if_no_update_is_due() -> None:
    ema = ShardedEMA(build(), update_interval=2, offload="cpu")
    with failing(MemoryError()):
        assert [ema.update() for _ in range(4)] == [False, True, False, True]
        ema._average.shadow.drain()
    with pytest.raises(EMAStateError, match="MemoryError"):
        ema.update()


def test_a_failed_update_is_forgotten_by_a_load(tmp_path: Path) -> None:
    good = ShardedEMA(build(), decay=0.5)
    good.update()
    good.save(tmp_path / "checkpoint")
    state = good.state_dict()
    for restore in (lambda ema: ema.load(tmp_path / "checkpoint"), lambda ema: ema.load_state_dict(state)):
        _, _, ema = broken(MemoryError())
        with pytest.raises(EMAStateError):
            ema.update()
        restore(ema)
        assert ema.fingerprint() == good.fingerprint()
        ema.update()
        ema.close()


def test_close_raises_a_failure_that_nobody_has_seen_and_only_that(caplog: pytest.LogCaptureFixture) -> None:
    _, _, ema = broken(MemoryError("no memory"))
    assert "failed in the background" in caplog.text
    with pytest.raises(EMAStateError, match="no memory"):
        ema.close()
    ema.close()


def test_a_failure_that_was_reset_is_not_reported_any_more(tmp_path: Path) -> None:
    good = ShardedEMA(build(), decay=0.5)
    good.update()
    good.save(tmp_path / "checkpoint")
    for forget in (lambda ema: ema.reset(), lambda ema: ema.load(tmp_path / "checkpoint")):
        _, _, ema = broken(MemoryError())
        worker = ema._average.shadow._worker  # type: ignore[attr-defined]
        assert worker.unseen() is not None
        forget(ema)
        assert worker.unseen() is None


def test_a_failed_first_copy_is_no_average() -> None:
    ema = ShardedEMA(build(), offload="cpu")
    with mock.patch.object(kernels, "copy", mock.Mock(side_effect=MemoryError("first"))):
        ema.update()
        with pytest.raises(EMAStateError, match="first"):
            ema.full_state_dict()


def test_a_first_copy_that_could_not_be_asked_for_is_no_average() -> None:
    """Its memory was there, uninitialised, and was taken for an average."""
    model = build()
    ema = ShardedEMA(model, offload="cpu")
    with (
        mock.patch.object(ThreadPoolExecutor, "submit", mock.Mock(side_effect=RuntimeError("can't start new thread"))),
        pytest.raises(RuntimeError, match="can't start"),
    ):
        ema.update()
    assert ema.num_updates == 0
    for name, value in ema.full_state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    ema.update()
    assert ema.metrics()["ema/distance"] == 0


@pytest.mark.world_size(2)
def test_a_failure_on_one_rank_is_raised_on_all_by_the_first_save(rank: int, tmp_path: Path) -> None:
    """The save makes its group first; a rank that raised before left the others waiting for it."""
    ema = ShardedEMA(nn.parallel.DistributedDataParallel(build()), offload="cpu")
    ema.update()
    with failing(MemoryError("no memory")) if rank == 1 else contextlib.nullcontext():
        ema.update()
        ema._average.shadow.drain()
    with pytest.raises(EMAStateError, match=r"rank 1: EMAStateError: .*no memory"):
        ema.save(tmp_path / "checkpoint")
    ema.reset()
    ema.update()
    ema.save(tmp_path / "checkpoint")


@pytest.mark.world_size(2)
def test_a_failure_that_comes_during_a_restore_is_forgotten_by_it(rank: int) -> None:
    """One rank raised, and the others had restored."""
    ema = ShardedEMA(nn.parallel.DistributedDataParallel(build()), offload="cpu")
    ema.update()
    ema.wait()
    state = ema.state_dict()
    expected = ema.fingerprint()

    restoring = threading.Event()
    drain = ema._average.shadow.drain

    def fail(*_: Any) -> None:
        assert restoring.wait(120)
        raise MemoryError("late")

    def drained() -> None:  # the first that a restore does
        restoring.set()
        drain()

    with contextlib.ExitStack() as stack:
        if rank == 1:
            stack.enter_context(mock.patch.object(kernels, "lerp", fail))
            stack.enter_context(mock.patch.object(ema._average.shadow, "drain", drained))
        ema.update()
        ema.load_state_dict(state)
        assert restoring.is_set() == (rank == 1)
    assert ema.fingerprint() == expected


@pytest.mark.parametrize("to", [torch.bfloat16, torch.device("meta")], ids=str)
def test_weights_that_move_or_change_their_dtype_are_refused(to: Any) -> None:
    """Before anything has moved. (There is no second device here: what the engine says is replaced.)"""
    model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5, offload="cpu")
    ema.update()
    moved = [parameter.detach().to(to) for parameter in model.parameters()]
    with (
        mock.patch.object(ema._average.engine, "sources", lambda: moved),
        pytest.raises(EMAStateError, match=rf"'weight' was torch.float32 on cpu when .* {to}.* now.*reset\(\)"),
    ):
        ema.update()
    assert ema.num_updates == 1
    assert ema.metrics()["ema/distance"] == 0


def test_without_pinned_memory_there_is_pageable_memory_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """No CUDA here, so that torch refuses; as it does where the limits on locked memory are low."""
    if torch.cuda.is_available():
        pytest.skip("this machine has pinned memory")
    tensor = memory.pinned(3 << 18, torch.float32)
    assert (tensor.numel(), tensor.dtype, tensor.device.type) == (3 << 18, torch.float32, "cpu")
    assert "No pinned memory for 3.0 MiB" in caplog.text
    assert "ulimit -l" in caplog.text


# Processes and threads.


def script(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code that has a model, an optimizer step and a slow offloaded average, in a process of its own."""
    begin = """
import os, sys, time, torch
from torch import nn
from dist_ema import ShardedEMA
from dist_ema import kernels
inner = kernels.lerp
def slow(*arguments):
    time.sleep(0.3)
    inner(*arguments)
kernels.lerp = slow
model = nn.Linear(3, 3)
ema = ShardedEMA(model, decay=.5, offload="cpu")
ema.update()
ema.wait()
"""
    command = [sys.executable, "-c", begin + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_program_that_ends_during_an_update_ends() -> None:
    done = script("ema.update()")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_failure_that_nobody_saw_ends_the_program_with_an_error() -> None:
    done = script("def kernels_fail(*_): raise MemoryError('none left')\nkernels.lerp = kernels_fail\nema.update()")
    assert done.returncode == 1
    assert "nobody looked: MemoryError('none left')" in done.stderr


def test_a_forked_child_has_a_whole_average_or_an_error() -> None:
    """Data loaders fork, with an update under way or not; most never look at the average."""
    done = script("""
from dist_ema.errors import EMAStateError
def child(work):
    if (pid := os.fork()) == 0:
        try:
            os._exit(work())
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def updates():
    ema.update()
    ema.wait()
    return 0 if ema.num_updates == 2 else 1
def refuses():
    try:
        ema.update()
    except EMAStateError as error:
        return 0 if "forked" in str(error) else 1
    return 2
print(child(updates))
ema.update()
print(child(refuses), child(lambda: 0))
loader = torch.utils.data.DataLoader(range(4), num_workers=2, multiprocessing_context="fork")
print([int(item) for item in loader])
ema.update()
ema.close()
""")
    assert (done.stdout, done.returncode) == ("0\n0 0\n[0, 1, 2, 3]\n", 0), done.stderr


def test_the_threads_are_those_that_were_given_and_nobody_elses_change() -> None:
    seen = []
    inner = kernels.lerp

    def spy(*arguments: Any) -> None:
        seen.append(torch.get_num_threads())
        inner(*arguments)

    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        for threads in (None, 1, 3):
            ema = ShardedEMA(build(), offload="cpu", offload_threads=threads)
            with mock.patch.object(kernels, "lerp", spy):
                ema.update(), ema.update()
                ema.close()
            assert torch.get_num_threads() == 5
            later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            later.start()
            later.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 5, 1, 5, 3, 5]


def test_the_thread_ends_with_close_and_with_its_average() -> None:
    def started(ema: ShardedEMA) -> threading.Thread:
        before = set(threading.enumerate())
        ema.update()
        (new,) = set(threading.enumerate()) - before
        return new

    ema = ShardedEMA(build(), offload="cpu")
    thread = started(ema)
    ema.close()
    assert not thread.is_alive()
    thread = started(ema)
    ema.wait()
    assert (ema.num_updates, thread.is_alive()) == (2, True)
    del ema
    gc.collect()
    thread.join(120)
    assert not thread.is_alive()


def test_reset_and_load_during_an_update(tmp_path: Path) -> None:
    """The old thread may not go on writing into what is new."""
    with slowly("copied"):
        model = build()
        offloaded, plain = both(model, decay=0.5)
        offloaded.update(), plain.update()
        offloaded.save(tmp_path / "checkpoint")
        offloaded.update()
        offloaded.load(tmp_path / "checkpoint")
        assert offloaded.fingerprint() == plain.fingerprint()
        offloaded.update()
        offloaded.reset()
        offloaded.update()
        assert offloaded.num_updates == 1
        assert offloaded.metrics()["ema/distance"] == 0


# Memory.


def test_memory_report_shows_staging() -> None:
    model = nn.Linear(1 << 9, 1 << 9, bias=False)
    for route, staged in (("in place", "0.0 MiB"), ("copied", "1.0 MiB")):
        with slowly(route):
            ema = ShardedEMA(model, offload="cpu")
            ema.update()
            assert f"offloaded to the host, pageable memory; copies of weights: {staged}" in (ema.memory_report())
    assert "offloaded" not in ShardedEMA(model).memory_report()


def test_memory_is_carved_from_blocks(caplog: pytest.LogCaptureFixture) -> None:
    """In the order that was asked for, each in one block, blocks of the limit unless one tensor is larger; what is less
    than that in powers of two, to which torch rounds pinned memory up."""
    caplog.set_level(logging.DEBUG)
    blocks: list[Tensor] = []

    def empty(numel: int, dtype: torch.dtype) -> Tensor:
        blocks.append(torch.empty(numel, dtype=dtype))
        return blocks[-1]

    sizes = [(0, torch.int8), (5, torch.float32), (3, torch.float32), (1, torch.float64), (9, torch.float32)]
    sizes += [(0, torch.float32), (4, torch.float32), (4, torch.float32)]
    with mock.patch.object(staging, "_BLOCK", 32):
        tensors = carve(sizes, empty)
    assert [(tensor.numel(), tensor.dtype) for tensor in tensors] == sizes
    assert [block.numel() for block in blocks] == [0, 8, 1, 9, 8]
    found, blocks = blocks, []
    many = [(100, torch.float32)] * 70  # 28,000 bytes: 16,384, 8,192, 2,048 and what is left
    with mock.patch.object(staging, "_BLOCK", 1 << 20):
        carve(many, empty)
    rounded = sum(1 << (block.nbytes - 1).bit_length() for block in blocks)
    assert rounded <= 1.1 * 28_000 < 32_768
    blocks = found
    for index, tensor in enumerate(tensors):
        tensor.fill_(index)
    assert [tensor.unique().tolist() for tensor in tensors if tensor.numel()] == [[1], [2], [3], [4], [6], [7]]
    assert carve([], empty) == []
