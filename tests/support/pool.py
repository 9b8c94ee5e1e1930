"""One pool of worker processes for the whole run: asking them costs milliseconds.

They are forked from a server that has imported everything and run nothing; importing it in each of them costs as much
as a hundred tests. Each test gets a fresh gloo group of the size that it asks for. A worker that hangs or dies takes
the pool with it, and the next test starts a new one.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_any
from pathlib import Path
from tempfile import TemporaryDirectory

from support import FOLDERS, ROOT

SIZE = 4
TEST_TIMEOUT = 180.0
GRACE_AFTER_FAILURE = 10.0
#: Of one worker. A gloo group has three, which wake a hundred times a second, and some tests leave theirs: torch and
#: DeepSpeed keep groups in caches of their own. A few hundred groups take the machine, so there are new workers then.
MAX_THREADS = 120
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
#: What takes long to import. What is not there is left out: the tests that need it say so themselves.
PRELOAD = [
    "pytest",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.distributed.checkpoint",
    "torch._dynamo",  # by the first optimizer
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "dist_ema.ema",
    "dist_ema.checkpoints.load",
]


def server() -> multiprocessing.context.BaseContext:
    """Starts processes that are forked from one that has imported everything. There is one such for all who ask."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _serve(index: int, pipe: Connection, port: int) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # all that was imported: DeepSpeed collects garbage in every stage 3 engine, and would look through it
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.path[:0] = [str(path) for path in (ROOT / "tests", ROOT / "launch", *FOLDERS)]
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    modules = _forget_groups(0)
    while True:
        try:
            module, function, arguments, world_size, rendezvous = pipe.recv()
        except EOFError:
            return
        failure = None
        os.environ.update(WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
        torch.set_num_threads(1)  # a trainer may have said otherwise, and bits depend on it
        try:
            torch.manual_seed(0)
            dist.init_process_group(
                "gloo", f"file://{rendezvous}", rank=index, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
            )
            test = getattr(importlib.import_module(module), function)
            test(**{key: index if key == "rank" else value for key, value in arguments.items()})
            dist.barrier()
        except BaseException:
            failure = traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # It would give the next test tensors on an equal mesh of this one, whose groups are gone.
            _forget_meshes()
            modules = _forget_groups(modules)
        pipe.send(failure)


def _forget_meshes() -> None:
    """Clears what DTensor keeps about operations and the meshes that they were on."""
    from torch.distributed.tensor import DTensor, debug

    # Private, read in torch 2.7 to 2.14. The second cache is there since torch 2.10.
    DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    if hasattr(debug, "_clear_fast_path_sharding_prop_cache"):
        debug._clear_fast_path_sharding_prop_cache()


def _forget_groups(modules: int) -> int:
    """Collects what a test left in cycles, process groups among it; returns how many modules there are.

    What new ``modules`` have brought stays, so it is not looked through again.
    """
    gc.collect()
    if len(sys.modules) != modules:
        gc.freeze()
    return len(sys.modules)


class Pool:
    """Runs a test function on several ranks."""

    def __init__(self) -> None:
        self._workers: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder = TemporaryDirectory(prefix="dist_ema_pool_")
        self._runs = 0

    def run(self, module: str, function: str, arguments: Mapping[str, object], world_size: int) -> None:
        """Calls ``module.function(**arguments)`` on ``world_size`` ranks; AssertionError with every traceback."""
        if not self._workers:
            self._start()
        self._runs += 1
        rendezvous = Path(self._folder.name) / f"run{self._runs}"
        for pipe in self._pipes[:world_size]:
            pipe.send((module, function, dict(arguments), world_size, str(rendezvous)))
        failures = self._collect(world_size)
        if any(_threads(worker) > MAX_THREADS for worker in self._workers):
            self.close()
        if failures:
            raise AssertionError("\n".join(f"[rank {rank}] {text}" for rank, text in sorted(failures.items())))

    def _collect(self, world_size: int) -> dict[int, str]:
        waiting = {self._pipes[rank]: rank for rank in range(world_size)}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + TEST_TIMEOUT
        while waiting:
            ready = wait_any(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                for rank in waiting.values():
                    failures[rank] = "did not return: hanging, or left behind by the failure of another rank"
                    os.kill(self._workers[rank].pid or 0, signal.SIGUSR1)
                time.sleep(0.5)
                self.close()
                return failures
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[arg-type]
                try:
                    failure = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    failure = "the worker died"
                if failure is not None:
                    failures[rank] = failure
                    deadline = min(deadline, time.monotonic() + GRACE_AFTER_FAILURE)
        if "the worker died" in failures.values():
            self.close()
        return failures

    def _start(self) -> None:
        context, port = server(), _free_port()
        for index in range(SIZE):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(index, theirs, port), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append(worker)
            self._pipes.append(ours)

    def close(self) -> None:
        """Kills the workers."""
        for worker in self._workers:
            worker.kill()
            worker.join()
        self._workers, self._pipes = [], []


def _threads(worker: multiprocessing.process.BaseProcess) -> int:
    """0 where the system does not say."""
    tasks = Path(f"/proc/{worker.pid}/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.is_dir() else 0


def _free_port() -> int:
    """A fixed one would make two runs of the suite on one machine disturb each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
