"""A peer that is killed while an average is in the model, or while ranks bring something together.

Real processes, forked from a server that has imported everything, and SIGKILL.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA
from dist_ema.core.broadcast import __file__ as broadcast_file
from dist_ema.errors import EMAStateError


def _run(server: multiprocessing.context.BaseContext, body: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """``body(rank, folder, *arguments)`` on two ranks, of which rank 1 kills itself; rank 0 has to come through."""
    processes, pipes = [], []
    for rank in range(2):
        ours, theirs = server.Pipe(duplex=False)
        process = server.Process(target=_rank, args=(rank, body, folder, arguments, theirs), daemon=True)  # type: ignore[attr-defined]
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        said = pipes[0].recv() if pipes[0].poll(100) else "hangs"
        processes[1].join(20)
        assert said == "done", said
        assert processes[1].exitcode == -signal.SIGKILL
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, body: Callable[..., None], folder: Path, arguments: tuple[Any, ...], pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/group", rank=rank, world_size=2, timeout=timedelta(seconds=40)
        )
        body(rank, folder, *arguments)
        pipe.send("done")
    except BaseException:
        pipe.send(traceback.format_exc())
    pipe.close()
    os._exit(0)  # a group without its peer is not to be taken down in order


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(function: str, call: int) -> None:
    """In the swap, at the n-th call of this function."""
    left = call

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        if frame.f_code.co_filename == broadcast_file and frame.f_code.co_name == function:
            left -= 1
            if left == 0:
                _die()

    sys.settrace(trace)


def _trained(case: str) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))
    if case == "ddp":
        model = DDP(model)
    else:
        size = (2,) if case == "fsdp2" else (2, 1)
        fully_shard(model, mesh=init_device_mesh("cpu", size, mesh_dim_names=("replicate", "shard")[: len(size)]))
    ema = ShardedEMA(model, decay=0.5)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.5)
        ema.update()
    return model, ema


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: _local(value).detach().clone() for name, value in model.state_dict().items()}


def _calls(ema: ShardedEMA, folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "save()": lambda: ema.save(folder / "emergency"),
        "export()": lambda: ema.export(folder / "out"),
        "full_state_dict()": ema.full_state_dict,
        "state_dict()": ema.state_dict,
        "fingerprint()": ema.fingerprint,
        "metrics()": ema.metrics,
        "update()": ema.update,
        "copy_to()": ema.copy_to,
        "average_parameters()": lambda: ema.average_parameters().__enter__(),
    }


def _torn(rank: int, folder: Path, case: str, function: str, call: int) -> None:
    model, ema = _trained(case)
    before = _bits(model)
    shadow = [tensor.clone() for tensor in ema._average.shadow.tensors("ema") if tensor is not None]
    if rank == 1 and function:
        _die_at(function, call)
    raised = None
    try:
        with ema.average_parameters():
            if rank == 1 and not function:
                _die()
    except Exception as error:
        raised = error
    if case == "fsdp2":  # nobody sends anything: there is nothing to lose
        assert raised is None
        assert all(torch.equal(value, before[name]) for name, value in _bits(model).items())
        return
    whole = all(torch.equal(value, before[name]) for name, value in _bits(model).items())
    assert isinstance(raised, EMAStateError), raised
    assert "average_parameters() failed" in str(raised)
    told = "Do not save them" in str(raised)
    assert told or whole
    now = [tensor for tensor in ema._average.shadow.tensors("ema") if tensor is not None]
    assert all(torch.equal(a, b) for a, b in zip(shadow, now, strict=True))  # this rank's part
    if told:
        other = ShardedEMA(model, decay=0.9)
        for name, each in _calls(ema, folder).items():
            with pytest.raises(EMAStateError, match="Do not save them") as caught:
                each()
            assert name in str(caught.value)
        with pytest.raises(EMAStateError, match="Do not save them"):
            other.update()
        assert {found.name for found in folder.iterdir()} <= {"group"}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            _local(value).copy_(before[name])
    ema.reset()
    ema.update()
    assert all(tensor.is_floating_point() for tensor in ema._average.shadow.tensors("ema") if tensor is not None)
    assert ema.num_updates == 1


#: Rank 1 reads four tensors for each of its two messages, and writes one that it received.
PLACES = [("", 0), ("replicas_agree", 1), ("spread", 1), ("read", 1), ("write", 1), ("spread", 2), ("read", 5)]


@pytest.mark.parametrize("case", ["ddp", "hsdp", "fsdp2"])
def test_a_peer_killed_inside_leaves_the_survivor_whole_or_told(
    case: str, server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """A raw RuntimeError, then an emergency save of a model that was half live, half average."""
    places = PLACES if case == "ddp" else PLACES[:1] if case == "fsdp2" else [PLACES[0], PLACES[3], PLACES[-1]]
    for number in range(len(places)):
        (tmp_path / str(number)).mkdir()
    with ThreadPoolExecutor(4) as pool:
        runs = [
            pool.submit(_run, server, _torn, tmp_path / str(number), case, *place)
            for number, place in enumerate(places)
        ]
    for place, run in zip(places, runs, strict=True):
        assert run.exception() is None, (place, run.exception())


def _gather(rank: int, folder: Path, call: str) -> None:
    model, ema = _trained("fsdp2")
    ema.save(folder / "old")
    before, digest = _bits(model), ema.fingerprint()
    calls = _calls(ema, folder) | {
        "load()": lambda: ema.load(folder / "old"),
        "load_state_dict()": lambda: ema.load_state_dict(state),
    }
    state = ema.state_dict()
    dist.barrier()
    if rank == 1:
        _die()
    with pytest.raises(EMAStateError, match="is gone") as caught:
        calls[call]()
    assert call in str(caught.value) or (call == "load()" and "load from" in str(caught.value))
    assert all(torch.equal(value, before[name]) for name, value in _bits(model).items())
    assert len(digest) == 4


def test_a_peer_that_is_gone_is_an_error_of_ours_that_names_the_call(
    server: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """Handlers of EMAError did not see what torch.distributed raises, and its text does not say what was asked."""
    calls = [
        "export()",
        "full_state_dict()",
        "state_dict()",
        "fingerprint()",
        "metrics()",
        "load()",
        "load_state_dict()",
    ]
    for call in calls:
        (tmp_path / call).mkdir()
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(_run, server, _gather, tmp_path / call, call) for call in calls]
    for call, run in zip(calls, runs, strict=True):
        assert run.exception() is None, (call, run.exception())
