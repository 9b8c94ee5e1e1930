"""A GPU of no speed at all: what the code asks of CUDA's streams, events and pinned memory, in the order that it may be
done in and no sooner.

``with FakeCuda() as gpu`` puts it in the place of ``torch.cuda`` for all threads, and of ``torch.accelerator``. Its
tensors lie in the CPU's memory and say that they are on ``cuda:1``. What is asked of a stream is put into a queue, and
done when somebody has to wait for it: who synchronises, who reads a value, or a stream that waits for an event. So
whoever should have waited and did not reads what was there before, always, where a real GPU does so now and then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dist_ema.kernels import cuda
from dist_ema.runtime import memory

DEVICE = torch.device("cuda", 1)
#: What gives another look at the same memory, and waits for nothing.
VIEWS = {
    "view",
    "detach",
    "reshape",
    "__getitem__",
    "narrow",
    "view_as",
    "as_subclass",
    "expand",
    "numel",
    "size",
    "dim",
}
VIEWS |= {
    "is_contiguous",
    "data_ptr",
    "stride",
    "element_size",
    "is_floating_point",
    "untyped_storage",
    "split",
    "unbind",
}
VIEWS |= {
    "requires_grad_",
    "is_inference",
    "__get__",
    "__set__",
    "is_pinned",
    "storage_offset",
    "__len__",
    "chunk",
    "t",
    "is_complex",
    "is_conj",
    "is_neg",
}
#: What gives a new tensor whose values come later, when the stream gets there.
LATE = {"isfinite", "sum", "clone"}


_doing = threading.RLock()


class Stream:
    """Work that waits to be done, in order."""

    def __init__(self, device: torch.device | int | None = None, name: str = "ours") -> None:
        self.device = DEVICE if device is None else torch.device(device)
        self.name = name
        self.queue: list[Callable[[], object]] = []
        if name == "ours":
            FakeCuda.now.ours.append(self)

    def wait_event(self, event: Event) -> None:
        """As CUDA does, for what the event marks now: it may be recorded anew before the wait is done."""
        self.queue.append(event.as_it_is().synchronize)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.run(len(self.queue))

    def run(self, count: int) -> None:
        """Does the first so many things that are still to be done."""
        with _doing:
            todo, self.queue[:count] = self.queue[:count], []
            for work in todo:
                work()


class Event:
    """A mark in a stream's queue."""

    def __init__(self, **options: bool) -> None:
        self._stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or current_stream()
        self._mark: Callable[[], None] = lambda: None  # an object of its own each time
        self._stream.queue.append(self._mark)

    def as_it_is(self) -> Event:
        """The same mark, whatever is recorded later."""
        same = Event()
        if self._stream is not None:
            same._stream, same._mark = self._stream, self._mark
        return same

    def synchronize(self) -> None:
        FakeCuda.now.pass_by()
        with _doing:
            if self._stream is not None and self._mark in self._stream.queue:
                self._stream.run(self._stream.queue.index(self._mark) + 1)


class _Thread(threading.local):
    """What a thread has: the streams that it is in, and its device."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.devices: list[torch.device] = [torch.device("cuda", 0)]  # of a new thread


_here = _Thread()


def current_stream(device: object = None) -> Stream:
    return _here.streams[-1] if _here.streams else FakeCuda.now.default


class OnGPU(Tensor):
    """A tensor of the fake device."""

    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    device = property(lambda self: DEVICE)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return ask(function, arguments, options or {})


def ask(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """A call of torch of a tensor of the device."""
    name = getattr(function, "__name__", "")
    with torch._C.DisableTorchFunctionSubclass():
        if name == "copy_":
            return _copy(*arguments, **options)
        if name == "_foreach_copy_":
            for target, source in zip(*arguments, strict=True):
                _copy(target, source, **options)
            return None
        if name.endswith("_") and name not in VIEWS and not name.startswith("_"):  # changes its first argument
            FakeCuda.now.used()
            target = _counted(arguments[0])
            current_stream().queue.append(lambda: _plainly(function, (target, *arguments[1:]), options))
            return arguments[0]
        if name in LATE:
            FakeCuda.now.used()
            result = function(*arguments, **options)  # of the values of now, for its shape and dtype
            current_stream().queue.append(lambda: _compute_late(result, function, arguments, options))
            return _on_gpu(result)
        if name not in VIEWS:  # it needs the values
            FakeCuda.now.used()
            current_stream().synchronize()
        return _on_gpu(function(*arguments, **options))


def _counted(target: Tensor) -> Tensor:
    """The same memory, to be written later: torch counts a write when it is asked for."""
    torch.autograd.graph.increment_version(target)
    return target.as_subclass(Tensor).data


def _plainly(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        function(*arguments, **options)


def _compute_late(result: Tensor, function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        result.copy_(function(*arguments, **options))


def _on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor) and not isinstance(value, OnGPU):
        return value.as_subclass(OnGPU)
    return type(value)(map(_on_gpu, value)) if isinstance(value, (tuple, list)) else value


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    FakeCuda.now.used()
    stream, plain, written = current_stream(), source.as_subclass(Tensor).detach(), _counted(target)
    stream.queue.append(lambda: written.copy_(plain))
    if not non_blocking and not (isinstance(target, OnGPU) and isinstance(source, OnGPU)):
        stream.synchronize()
    return target


class _Factories(TorchFunctionMode):
    """``torch.empty(..., device="cuda:1")``, in the thread that trains."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if options.get("device") is not None and torch.device(options["device"]).type == "cuda":
            return _on_gpu(function(*arguments, **{**options, "device": "cpu"}))
        return function(*arguments, **options)


class FakeCuda:
    """See above. In place of ``torch.cuda`` while it is entered.

    Attributes:
        default: the default stream, which no thread of ours may use.
        uses: of each use of a stream, whether the thread was the one that trains, the stream's name and the device that
            the thread had set.
    """

    now: FakeCuda
    device = DEVICE

    def __init__(self) -> None:
        self.default = Stream(name="default")
        self.training = Stream(name="training")
        self.ours: list[Stream] = []
        self.uses: list[tuple[bool, str, int | None]] = []
        self._thread = threading.get_ident()
        self._free = threading.Event()
        self._free.set()
        self._stack = ExitStack()

    def used(self) -> None:
        self.uses.append((threading.get_ident() == self._thread, current_stream().name, _here.devices[-1].index))

    def __enter__(self) -> FakeCuda:
        FakeCuda.now = self
        pinned = memory.pinned
        fakes = {
            "Stream": Stream,
            "Event": Event,
            "current_stream": current_stream,
            "device": _device,
            "stream": _stream,
        }
        for name, fake in fakes.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, fake))
        self._stack.enter_context(mock.patch.object(torch.accelerator, "current_stream", current_stream))
        self._stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        self._stack.enter_context(
            mock.patch.object(memory, "pinned", lambda numel, dtype: torch.empty(numel, dtype=dtype))
        )
        self._stack.enter_context(mock.patch.object(cuda, "_decided", [None]))
        self._stack.enter_context(_Factories())
        self._stack.enter_context(_device(DEVICE))
        self._stack.enter_context(_stream(self.training))
        assert pinned is not memory.pinned
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.__exit__(*raised)

    def delay(self) -> None:
        """Makes what the training stream is asked next take long. Here it does so anyway."""

    def rush(self) -> None:
        """Does all that streams of ours have been asked for, as early as they may."""
        for stream in self.ours:
            stream.synchronize()

    def hold(self) -> None:
        """Makes threads of ours late, until ``hurry()``."""
        self._free.clear()

    def hurry(self) -> None:
        """Does all that the training stream has been asked for, before our threads come to it."""
        self.training.synchronize()
        self._free.set()

    def pass_by(self) -> None:
        """Where a thread waits for an event."""
        if threading.get_ident() != self._thread:
            self._free.wait(10)

    def values(self, values: Tensor) -> Tensor:
        """These values on the device."""
        return _on_gpu(values.clone())

    def put(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with its weights on the device."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(_on_gpu(parameter.detach().clone()))
        return model


@contextmanager
def _device(device: torch.device) -> Iterator[None]:
    _here.devices.append(torch.device(device))
    try:
        yield
    finally:
        _here.devices.pop()


@contextmanager
def _stream(stream: Stream) -> Iterator[None]:
    _here.streams.append(stream)
    try:
        yield
    finally:
        _here.streams.pop()
