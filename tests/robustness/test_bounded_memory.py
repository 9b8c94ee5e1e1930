"""Memory and time at two sizes: what grows with the size of the work is noticed, however small the work of a test."""

from __future__ import annotations

import json
import struct
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from dist_ema import ShardedEMA, merge
from dist_ema.checkpoints import reader
from dist_ema.checkpoints.reader import RunReader
from dist_ema.checkpoints.versions import read_manifest
from dist_ema.geometry.runs import Rows, cut
from dist_ema.offline.merging import combine
from dist_ema.runtime.threads import work_through


def python_objects(function: Callable[[], object]) -> int:
    """Bytes of Python objects that a call has at its peak; memory of tensors is not counted."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def python_blocks(function: Callable[[], object]) -> int:
    """Blocks of Python's allocator that a call has at its peak, beyond those before it.

    For calls in which gloo's threads run: CPython 3.11 crashes there under tracemalloc.
    """
    counts = [sys.getallocatedblocks()]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.001):
            counts.append(sys.getallocatedblocks())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return max(counts) - counts[0]


def sparse_folder(path: Path, elements: int) -> Path:
    """A Hugging Face folder of one tensor of zeros, which takes no space on the disk."""
    path.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "BF16", "shape": [elements], "data_offsets": [0, 2 * elements]}}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * elements)
    return path


def test_a_merge_holds_no_object_for_each_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A future for each range, made before the first is read, took 539 MiB of a model of 70 B parameters.

    Ranges are made small here, so that there are thousands of them.
    """
    for name in ("_MOST", "_LEAST"):
        monkeypatch.setattr(combine, name, 1 << 8)
    peaks = {}
    for ranges in (500, 4000):
        paths = [sparse_folder(tmp_path / f"{ranges}" / name, ranges << 8) for name in "ab"]
        peaks[ranges] = python_objects(partial(merge, paths, tmp_path / f"{ranges}" / "out"))
    assert peaks[4000] < peaks[500] + 200_000, peaks


@pytest.mark.world_size(2)
def test_a_load_of_columns_holds_no_object_for_each_row(rank: int, tmp_path: Path) -> None:
    """Experts that are sharded by columns have a run for each of their rows: 1.8 million, which took 202 MiB."""
    mesh = init_device_mesh("cpu", (2,))
    peaks = {}
    for rows in (1 << 13, 1 << 16):
        model = nn.Module()
        local = torch.arange(rows * 16).view(2, rows // 2, 16).float() + rank
        model.experts = nn.Parameter(DTensor.from_local(local, mesh, [Shard(2)]))
        ema = ShardedEMA(model, decay=0.9)
        ema.update()
        ema.save(tmp_path / f"{rows}")
        with torch.no_grad():
            model.experts.zero_()
        ema.reset()
        peaks[rows] = python_blocks(partial(ema.load, tmp_path / f"{rows}"))
        ema.copy_to()
        assert torch.equal(model.experts.to_local(), local)
    assert peaks[1 << 16] < peaks[1 << 13] + 20_000, peaks
    dist.barrier()


@pytest.mark.parametrize("gap", [1 << 14, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_columns_are_read_in_blocks_and_one_by_one_alike(
    gap: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read with what lies between them, and the last row may end with the file."""
    full = torch.arange(60 * 31).view(60, 31).to(dtype)
    model = nn.Module()
    model.register_buffer("w", full)
    model.p = nn.Parameter(torch.ones(1))
    ema = ShardedEMA(model, decay=0.9, dtype=None)
    ema.save(tmp_path / "ema")
    monkeypatch.setattr(reader, "_GAP", gap)
    monkeypatch.setattr(reader, "_BLOCK", 7 * 31 * 8)  # a few rows
    rows = Rows(start=22, length=9, step=31, number=60)
    with RunReader.of(tmp_path / "ema", read_manifest(tmp_path / "ema")) as opened:
        for start, stop in ((0, 540), (4, 540), (0, 533), (13, 500), (100, 105), (3, 15)):
            out = torch.zeros(stop - start, dtype=dtype)
            opened.read(("averages/ema", "w"), cut(rows, start, stop), out)
            assert torch.equal(out, full[:, 22:].reshape(-1)[start:stop]), (start, stop)


def test_threads_take_the_next_item_when_they_have_finished_one() -> None:
    made = done = most = 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal made, most
        for number in range(100):
            made += 1
            most = max(most, made - done)
            yield number

    def work(_: int) -> None:
        nonlocal done
        time.sleep(0.0001)
        with lock:
            done += 1

    work_through(items(), work, 3, "test")
    assert (done, most <= 3) == (100, True)


def test_a_failing_thread_ends_the_others_and_its_error_is_raised() -> None:
    seen = []

    def work(number: int) -> None:
        seen.append(number)
        if number == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        work_through(iter(range(10**9)), work, 2, "test")
    assert len(seen) < 10**6

    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("the list")

    with pytest.raises(KeyError):
        work_through(broken(), lambda _: None, 2, "test")


def test_names_in_a_list_of_modules_are_counted_once() -> None:
    """Each name was counted among all names: 13.8 s for 20,000 of them. Measured in comparisons, not in seconds."""

    class Name(str):
        compared = 0

        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    from dist_ema.engines import pipeline

    compared = {}
    for count in (200, 1600):
        specs = [mock.Mock(aliases=()) for _ in range(count)]
        for number, spec in enumerate(specs):
            spec.name = Name(f"layer.{number}")
        engine = mock.Mock(specs=lambda specs=specs: specs, publish_is_collective=False)
        Name.compared = 0
        assert len(pipeline.CompositeEngine([engine])._read_specs()) == count
        compared[count] = Name.compared
    assert compared[1600] <= 20 * max(compared[200], 100), compared
