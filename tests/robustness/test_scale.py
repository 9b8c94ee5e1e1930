"""Planning for runs of thousands of ranks: every element is kept once, and a rank's work does not grow. No timings."""

from __future__ import annotations

import hashlib
import pickle
import tracemalloc
from collections.abc import Iterator

from support import ROOT

import pytest
import torch

from benchmarks import scale
from dist_ema.comm import catalogue as writers
from dist_ema.comm.catalogue import FullTensor, catalogue, writes
from dist_ema.geometry.runs import Run
from dist_ema.geometry.shares import assign_shares
from dist_ema.geometry.spec import TensorSpec
from dist_ema.planning.architecture import Architecture, of_config
from dist_ema.planning.layouts import ENGINES, Layout
from dist_ema.planning.plan import make_options, rank_shares, sample

OPTIONS = make_options()


def uneven() -> Architecture:
    """More rows than ranks, fewer, one; three dimensions; each under another style of tensor parallelism."""
    shapes = {"blocks.0.a": (8195, 3), "blocks.0.b": (1023, 16), "blocks.1.c": (5, 4, 6), "d": (1,), "e": (7, 24)}
    tensors = [
        TensorSpec.unsharded(name, torch.empty(shape, device="meta"), partitioned=False)
        for name, shape in shapes.items()
    ]
    return Architecture(tensors, {"blocks.0.a": 0, "blocks.0.b": 1, "blocks.1.c": 2, "e": None})


def layouts() -> Iterator[Layout]:
    for size in (1, 3, 4, 8):
        for engine in ENGINES:
            for sizes in ({}, {"replicate": 2}, {"tensor_parallel": 2}, {"replicate": 4}, {"tensor_parallel": 4}):
                try:
                    yield Layout(engine, size, **sizes)
                except ValueError:  # does not divide, or not of this engine
                    continue
    yield Layout("hsdp", 1024, replicate=8)
    yield Layout("fsdp2+tp", 1024, tensor_parallel=8)
    yield Layout("zero1", 8192)


@pytest.mark.parametrize("layout", list(layouts()), ids=str)
def test_what_all_ranks_write_is_every_element_once(layout: Layout) -> None:
    """Complete, also for thousands of ranks: no element of an average lost, none written by two ranks."""
    model = uneven()
    written: dict[str, list[Run]] = {spec.name: [] for spec in model.tensors}
    for rank in range(layout.world_size):
        for share in rank_shares(model, layout, OPTIONS, rank):
            if writes(share, rank, lowest_mesh_rank=0):
                written[share.spec.name] += share.runs
    for spec in model.tensors:
        position = 0
        for start, length in sorted(written[spec.name]):
            assert (start, length > 0) == (position, True), (spec.name, layout)
            position += length
        assert position == spec.numel


class Network:
    """A group of ``size`` ranks, one pipeline stage after the other, in which one rank really runs; counts bytes."""

    def __init__(self, size: int, stages: int) -> None:
        self.size, self.stages, self.rank = size, stages, 0
        self.received: list[int] = []

    def stage(self, rank: int) -> int:
        return rank * self.stages // self.size

    def specs(self, rank: int) -> list[TensorSpec]:
        """One stage's tensors, cut over its ranks, and a buffer that each rank holds whole."""
        first, stage = -(-self.stage(rank) * self.size // self.stages), self.stage(rank)
        known = {"dtype": torch.float32, "runs": ((0, 4),)}
        found = [
            TensorSpec(f"stages.{stage}.{number}.weight", torch.Size([64, 64]), lowest_mesh_rank=first, **known)  # type: ignore[arg-type]
            for number in range(300)
        ]
        tied = TensorSpec("embedding", torch.Size([64, 64]), lowest_mesh_rank=first, **known)  # type: ignore[arg-type]
        return [*found, tied, TensorSpec.unsharded("step", torch.zeros(1), kind="buffer", partitioned=False)]

    def full_tensors(self, rank: int) -> list[FullTensor]:
        return [writers._full_tensor(share) for share in assign_shares(self.specs(rank), OPTIONS)]

    def gather(self, digest: bytes, group: object) -> list[bytes]:
        stages: dict[int, bytes] = {}
        for rank in range(self.size):
            if self.stage(rank) not in stages:
                text = repr(self.full_tensors(rank)).encode()
                stages[self.stage(rank)] = hashlib.blake2b(text, digest_size=16).digest()
        assert digest == stages[self.stage(self.rank)]
        digests = [stages[self.stage(rank)] for rank in range(self.size)]
        self.digests = sum(map(len, digests))
        return digests

    def broadcast(self, value: object, group: object, owner: int) -> object:
        assert bool(value) == (owner == self.rank)
        sent = self.full_tensors(owner)
        self.received.append(len(pickle.dumps(sent)))
        return sent

    def run(self, monkeypatch: pytest.MonkeyPatch, rank: int) -> list[FullTensor]:
        self.rank, self.received = rank, []
        monkeypatch.setattr(writers, "gather_objects", self.gather)
        monkeypatch.setattr(writers, "broadcast_object", self.broadcast)
        monkeypatch.setattr(writers, "rank_in", lambda group: rank)
        return catalogue(assign_shares(self.specs(rank), OPTIONS), None)


def test_ranks_of_a_pipeline_are_sent_each_distinct_list_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank was sent every rank's list: 2.5 million descriptions of tensors on each of 8,192 ranks."""
    results, sent, peaks = [], [], []
    for size in (64, 8192):
        network = Network(size, stages=16)
        for rank in (0, size // 2, size - 1):
            tracemalloc.start()
            results.append(network.run(monkeypatch, rank))
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            sent.append(sum(network.received))
            assert len(network.received) == 16
            assert network.digests == 16 * size
    assert max(sent) < 1.1 * min(sent)  # ranks have more digits
    assert max(peaks) < 1.5 * min(peaks)
    assert len(results[0]) == 16 * 300 + 2
    for found in results:
        assert [entry.name for entry in found] == [entry.name for entry in results[0]]
        lowest = {entry.name: entry.lowest_mesh_rank for entry in found}
        assert (lowest["embedding"], lowest["step"]) == (0, 0)
    assert {entry.name: entry.lowest_mesh_rank for entry in results[-1]}["stages.15.0.weight"] == 8192 // 16 * 15


def test_a_sample_has_the_first_rank_and_the_last() -> None:
    assert sample(1) == [0]
    assert sample(64) == list(range(64))
    assert (len(set(sample(8192))), sample(8192)[0], sample(8192)[-1]) == (64, 0, 8191)


@pytest.fixture(scope="module")
def llama() -> Architecture:
    pytest.importorskip("transformers")
    return of_config(ROOT / "configs" / "models" / "llama-3-70b.json", None)


@pytest.mark.parametrize(("engine", "ratio"), [("hsdp", 1.001), ("zero1", 1.001), ("fsdp2", 1.25), ("fsdp2+tp", 1.25)])
def test_memory_goes_down_with_the_ranks_and_the_plan_does_not_grow(
    llama: Architecture, engine: str, ratio: float
) -> None:
    """Llama 3 70B. fsdp2 cuts rows, and 1,024 of them leave most of 8,192 ranks with none."""
    small, large = (scale.measure("llama", llama, scale.layout(engine, size), OPTIONS, 1) for size in (8, 8192))
    assert small.times_1_n == pytest.approx(1, abs=0.001)
    assert 1 <= large.times_1_n < ratio
    assert large.last_gb <= large.first_gb < small.first_gb / 800
    assert large.share_kb < small.share_kb * 1.2
    assert (large.files, large.manifest_kb) == (small.files, small.manifest_kb)
