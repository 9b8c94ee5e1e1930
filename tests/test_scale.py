"""Planning for runs of thousands of ranks: every element is kept once, and a rank's work does not grow. No timings."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dist_ema.planning.architecture import Architecture
from dist_ema.planning.layouts import ENGINES, Layout
from dist_ema.planning.plan import make_options, rank_shares, sample
from dist_ema.sharding.runs import Run
from dist_ema.sharding.spec import TensorSpec

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
def test_what_all_ranks_speak_for_is_every_element_once(layout: Layout) -> None:
    """Complete, also for thousands of ranks: no element of an average lost, none written by two ranks."""
    model = uneven()
    heard: dict[str, list[Run]] = {spec.name: [] for spec in model.tensors}
    for rank in range(layout.world_size):
        for share in rank_shares(model, layout, OPTIONS, rank):
            if share.first_replica and (share.spec.lowest_mesh_rank if share.spec.partitioned else rank) == 0:
                heard[share.spec.name] += share.runs
    for spec in model.tensors:
        position = 0
        for start, length in sorted(heard[spec.name]):
            assert (start, length > 0) == (position, True), (spec.name, layout)
            position += length
        assert position == spec.numel


def test_a_sample_has_the_first_rank_and_the_last() -> None:
    assert sample(1) == [0]
    assert sample(64) == list(range(64))
    assert (len(set(sample(8192))), sample(8192)[0], sample(8192)[-1]) == (64, 0, 8191)


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    path = Path(__file__).parent.parent / "launch" / "benchmark_scale.py"
    spec = importlib.util.spec_from_file_location("benchmark_scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_scale"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["benchmark_scale"]


@pytest.fixture(scope="module")
def llama(benchmark: ModuleType) -> Architecture:
    pytest.importorskip("transformers")
    model: Architecture = benchmark.of_config(benchmark.MODELS / "llama-3-70b.json", None)
    return model


@pytest.mark.parametrize(("engine", "ratio"), [("hsdp", 1.001), ("zero1", 1.001), ("fsdp2", 1.25), ("fsdp2+tp", 1.25)])
def test_memory_goes_down_with_the_ranks_and_the_plan_does_not_grow(
    benchmark: ModuleType, llama: Architecture, engine: str, ratio: float
) -> None:
    """Llama 3 70B. fsdp2 cuts rows, and 1,024 of them leave most of 8,192 ranks with none."""
    small, large = (benchmark.measure("llama", llama, benchmark.layout(engine, size), OPTIONS, 1) for size in (8, 8192))
    assert small.times_1_n == pytest.approx(1, abs=0.001)
    assert 1 <= large.times_1_n < ratio
    assert large.last_gb <= large.first_gb < small.first_gb / 800
    assert large.share_kb < small.share_kb * 1.2
    assert (large.files, large.manifest_kb) == (small.files, small.manifest_kb)
