"""An exception between any two lines, or a signal whose handler raises: Ctrl-C, a preemption, a watchdog."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from support.models import CASES
from support.zero_models import make_engine

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import dist_ema
from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.checkpoints.save import Save
from dist_ema.errors import EMAStateError

SOURCE = str(Path(dist_ema.__file__).parent)


class Interrupt(BaseException):
    """What nobody else raises or expects."""


def _raise(*_: object) -> None:
    raise Interrupt


def _signal() -> None:
    signal.raise_signal(signal.SIGUSR1)


def _at_line(
    number: int, act: Callable[[], None], call: Callable[[], object], files: str | tuple[str, ...] = SOURCE
) -> int:
    """Runs ``call``, and ``act`` before the line of the library of this number; gives how many lines there were."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(files):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                act()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
        # What is raised on the very line of a ``with`` finds the block entered and its exit not yet set up, as no
        # signal does: this one would last for all tests that come after in the process, and fake_cuda needs subclasses.
        torch._C.DisableTorchFunctionSubclass().__exit__(None, None, None)
    return seen


class Net(nn.Module):
    """Weights that change places with their shadow, bf16 ones that cannot, one that is not contiguous, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.half = nn.Linear(4, 2).bfloat16()
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.norm = nn.BatchNorm1d(4)


@torch.no_grad()
def _train(model: nn.Module, ema: ShardedEMA | None, by: float = 0.25) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.add_(by) if tensor.is_floating_point() else tensor.add_(1)
    if ema is not None:
        ema.update()


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def _inside(ema: ShardedEMA) -> None:
    with ema.average_parameters():
        len(ema.names)


CALLS: dict[str, Callable[[ShardedEMA, Path], object]] = {
    "average_parameters": lambda ema, path: _inside(ema),
    "copy_to": lambda ema, path: ema.copy_to(),
    "copy_to a part": lambda ema, path: ema.copy_to(fraction=0.25),
    "update": lambda ema, path: ema.update(),
    "first update": lambda ema, path: (ema.reset(), ema.update()),
    "reset": lambda ema, path: ema.reset(),
    "save": lambda ema, path: ema.save(path / "new"),
    "save behind": lambda ema, path: (ema.save(path / "new", block=False), ema.wait()),
    "load": lambda ema, path: ema.load(path / "old"),
    "load_state_dict": lambda ema, path: ema.load_state_dict(torch.load(path / "dict", weights_only=False)),
    "state_dict": lambda ema, path: ema.state_dict(),
    "export": lambda ema, path: ema.export(path / "out"),
    "fingerprint": lambda ema, path: ema.fingerprint(),
}
#: Of how many lines one is tried: these are thousands. With EVERY_LINE=1 in the environment all are.
STRIDES = {"average_parameters": 4, "update": 4, "reset": 9, "copy_to": 5, "copy_to a part": 9, "fingerprint": 29}
STRIDES |= {"first update": 13}
STRIDES |= {"save": 43, "save behind": 41, "load": 37, "export": 31, "load_state_dict": 17, "state_dict": 19}


class _Run:
    """A trained model, its average, and what both may be after a call that was interrupted."""

    def __init__(self, path: Path, **options: Any) -> None:
        torch.manual_seed(3)
        self.model = Net()
        self.ema = ShardedEMA(self.model, decay=0.5, **options)
        self.path = path
        for _ in range(2):
            _train(self.model, self.ema)

    def save(self) -> None:
        self.ema.save(self.path / "old")
        torch.save(copy.deepcopy(self.ema.state_dict()), self.path / "dict")

    def moment(self) -> tuple[object, ...]:
        """The average and its clocks."""
        ema = self.ema
        return ema.fingerprint(), ema.num_updates, ema.progress, ema.clock

    def later(self) -> tuple[object, ...]:
        """The same two updates later: clocks that do not belong to the average would show."""
        for _ in range(2):
            _train(self.model, self.ema)
        return self.moment()


@pytest.fixture(autouse=True)
def _handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, _raise)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("act", [_raise, _signal])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_leaves_weights_and_average_whole_or_says_so(
    call: str, act: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in an evaluation lost the weights, or had every later call refused; in an update it was half done, and
    then saved."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    make = CALLS[call]
    run = _Run(tmp_path)
    run.save()
    live, before = _bits(run.model), run.moment()
    lives, moments = [live], []
    for half in [lambda ema, path: None, make] + [CALLS["reset"]] * (call == "first update"):
        run = _Run(_emptied(tmp_path))
        half(run.ema, tmp_path)
        lives.append(_bits(run.model))
        run.model.load_state_dict(live)
        moments.append((run.moment(), run.later()))
    run = _Run(_emptied(tmp_path))
    lines = _at_line(0, _raise, lambda: make(run.ema, tmp_path))
    refused = 0
    for number in range(1, lines + 1, 1 if os.environ.get("EVERY_LINE") else STRIDES[call] + 4 * (act is _signal)):
        run = _Run(_emptied(tmp_path))
        with pytest.raises(Interrupt):
            _at_line(number, act, lambda ema=run.ema: make(ema, tmp_path))
        with pytest.raises(Interrupt):  # a handler that was held back is in its place again
            _signal()
        assert signal.getsignal(signal.SIGUSR1) is _raise
        run.ema.wait()
        assert any(_same(_bits(run.model), each) for each in lives), number
        if (tmp_path / "out").exists():
            assert load_file(tmp_path / "out" / "model.safetensors").keys() == live.keys()
        try:
            now = run.moment()
            run.model.load_state_dict(live)
            assert (now, run.later()) in moments, number
        except EMAStateError as error:
            assert "not whole" in str(error)
            refused += 1
            _mend(run, tmp_path, before, by_load=number % 2 == 1)
    # Only what cannot be undone may be refused, and only after an exception that does not come from a signal.
    if act is _signal or call in (
        "average_parameters",
        "copy_to",
        "copy_to a part",
        "save",
        "save behind",
        "export",
        "fingerprint",
        "state_dict",
    ):
        assert refused == 0
    assert lines > 20


def _mend(run: _Run, path: Path, before: tuple[object, ...], by_load: bool) -> None:
    for call in (run.ema.update, run.ema.full_state_dict, lambda: run.ema.save(path / "new"), lambda: _inside(run.ema)):
        with pytest.raises(EMAStateError, match="not whole"):
            call()
    if by_load:
        run.ema.load(path / "old")
        assert run.moment() == before
    else:
        run.ema.reset()
        run.ema.update()
        assert _same(run.ema.full_state_dict(), _bits(run.model))


def _emptied(path: Path) -> Path:
    shutil.rmtree(path / "out", ignore_errors=True)
    return path


# One rank among others.


def _model(case: str) -> tuple[nn.Module, object]:
    """A model whose ranks hold different buffers, and what is averaged."""
    if case.startswith("zero"):
        engine = make_engine(int(case[4]), case[6:])
        return engine.module, engine
    model = CASES[case].model()
    return model, model


#: Where ranks send each other; what comes before may end the call on one rank alone.
SENDING = (
    "core/swap.py",
    "core/broadcast.py",
    "kernels",
    "engines",
    "comm/agreement.py",
    "comm/collectives.py",
    "comm/windows.py",
)
FILES = tuple(f"{SOURCE}/{name}" for name in SENDING)
assert all(Path(file).exists() for file in FILES), "moved, and with it the lines that are interrupted"
ENGINES = ["ddp", "fsdp2", "hsdp", "zero1-bf16", "zero2-fp32", "zero3-bf16"]


def _trained(case: str, rank: int) -> tuple[ShardedEMA, Callable[[object], None]]:
    """An average, and a check that it and the live weights are what they were. The check is collective."""
    model, target = _model(case)
    ema = ShardedEMA(target, decay=0.5)
    ema._average.engine.stepped = lambda: True
    for step in range(2):
        with torch.no_grad():
            for share, source in zip(ema._average.shares, ema._average.engine.sources(), strict=True):
                if share.mode == "average":
                    source.add_(0.5 + step)
                elif source.is_floating_point():
                    source.add_(rank + 1)
        ema._average.engine.publish()
        ema.update()
    live = [source.clone() for source in ema._average.engine.sources()]
    weights = {name: _local(value).clone() for name, value in model.state_dict().items()}
    digest = ema.fingerprint()

    def check(number: object) -> None:
        for share, before, now in zip(ema._average.shares, live, ema._average.engine.sources(), strict=True):
            assert torch.equal(before, now), (number, share.spec.name)
        for name, value in model.state_dict().items():
            assert torch.equal(_local(value), weights[name]), (number, name)
        assert ema.fingerprint() == digest, number

    _inside(ema)  # the first time takes longer
    return ema, check


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ENGINES)
def test_a_signal_on_one_rank_waits_until_the_ranks_have_sent_each_other_all(case: str, rank: int) -> None:
    """It went on to send live weights while the others still waited for averaged ones: both of one size, and mixed."""
    before = signal.signal(signal.SIGUSR1, _raise)
    ema, check = _trained(case, rank)
    lines = [_at_line(0, _raise, lambda: _inside(ema), FILES)]
    dist.broadcast_object_list(lines, src=0)
    for number in range(1, lines[0], lines[0] // 12):
        if rank == 0:
            with pytest.raises(Interrupt):
                _at_line(number, _signal, lambda: _inside(ema), FILES)
        else:
            _inside(ema)
        check(number)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.world_size(1)
@pytest.mark.parametrize("case", ENGINES)
def test_what_one_rank_sends_itself_is_sent_again(case: str, rank: int) -> None:
    """One process under a wrapper: no other rank is elsewhere, so that nothing need be lost."""
    ema, check = _trained(case, rank)
    lines = _at_line(0, _raise, lambda: _inside(ema))
    for number in range(1, lines, 1 if os.environ.get("EVERY_LINE") else lines // 40):
        with pytest.raises(Interrupt):
            _at_line(number, _raise, lambda: _inside(ema))
        check(number)


def test_signals_that_come_together_lose_nothing_either() -> None:
    """A launcher that is interrupted sends SIGINT, then SIGTERM: the second came when the way back had just begun."""
    seen = []

    def handle(number: int, _: object) -> None:
        seen.append(number)
        if armed:
            raise Interrupt(number)

    armed: list[bool] = []
    numbers = [signal.SIGUSR1, signal.SIGUSR2]
    before = {number: signal.signal(number, handle) for number in numbers}

    def both() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    together = 0
    run = _Run(Path())
    live, digest = _bits(run.model), run.ema.fingerprint()
    lines = _at_line(0, _raise, lambda: _inside(run.ema))
    for number in range(1, lines, 1 if os.environ.get("EVERY_LINE") else lines // 60):
        seen.clear()
        armed.append(True)
        with contextlib.suppress(Interrupt):
            try:
                _at_line(number, both, lambda: _inside(run.ema))
            finally:  # outside of the library's own care the second may come as late as here
                armed.clear()
        armed.clear()
        together += seen == numbers
        assert _same(_bits(run.model), live), number
        assert run.ema.fingerprint() == digest, number
    assert together > 10
    for number, handler in before.items():
        signal.signal(number, handler)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_an_interrupted_wait_does_not_forget_the_save(tmp_path: Path) -> None:
    """Python took the thread for ended: the next ``wait()`` returned at once, and a second save ran beside it."""
    ema = ShardedEMA(nn.Linear(4, 4), decay=0.5)
    ema.update()
    go_on, started = threading.Event(), threading.Event()
    finish = Save.finish

    def slow(self: Save, *arguments: Any) -> None:
        started.set()
        assert go_on.wait(60)
        finish(self, *arguments)

    def raises(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, raises)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Save, "finish", slow)
            ema.save(tmp_path / "c", block=False)
            assert started.wait(60)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                ema.wait()
            assert not (tmp_path / "c").exists()
            threading.Timer(0.1, go_on.set).start()
            ema.wait()
            assert verify_checkpoint(tmp_path / "c")
    finally:
        signal.signal(signal.SIGALRM, before)
        go_on.set()
