"""Offloading from a GPU: the race between copies and optimizer steps is attacked, and nobody waits who need not."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from dist_ema import ShardedEMA, kernels
from dist_ema.shadow.staging import CudaLink

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CYCLES = 50_000_000  # some hundredths of a second of a GPU


def _model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Linear(512, 512)).to(dtype)


def _offloaded(late: str, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Fingerprints of an offloaded average of a model in training with something made late, and of the right one."""
    copy, lerp = CudaLink.copy, kernels.lerp

    def late_copy(link: CudaLink, takes: Sequence[Any]) -> None:
        if late == "copies":
            with link._stream.inside():
                torch.cuda._sleep(CYCLES)
        copy(link, takes)

    def late_lerp(*arguments: Any) -> None:
        if late == "arithmetic":
            time.sleep(0.05)
        lerp(*arguments)

    model = _model(dtype).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema = ShardedEMA(model, decay=0.5, offload="cpu")
    moments: list[dict[str, Tensor]] = []
    with mock.patch.object(CudaLink, "copy", late_copy), mock.patch.object(kernels, "lerp", late_lerp):
        for _ in range(6):
            if late == "training":
                torch.cuda._sleep(CYCLES)  # the weights of this step are still to be made when update() asks for them
            model(torch.randn(64, 512, device="cuda", dtype=dtype)).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            moments.append({name: value.clone() for name, value in model.state_dict().items()})  # waits for nothing
        found = ema.fingerprint()
    host = _model(dtype)
    expected = ShardedEMA(host, decay=0.5)
    for moment in moments:
        host.load_state_dict(moment)
        expected.update()
    return found, expected.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("late", ["copies", "training", "arithmetic"])
def test_offloading_takes_the_weights_of_the_moment_whatever_is_late(late: str, dtype: torch.dtype) -> None:
    """A copy that overtakes the step before it, or is overtaken by the step after it, has other weights."""
    found, expected = _offloaded(late, dtype)
    assert found == expected


def test_this_attack_finds_a_race() -> None:
    """Without the wait of the next step the copies are too late: else the test above proves nothing."""
    with mock.patch.object(CudaLink, "wait_for_reads", lambda _link: None):
        found, expected = _offloaded("copies", torch.float32)
    assert found != expected


def test_offloaded_update_waits_for_no_device_and_takes_no_device_memory() -> None:
    model = nn.Linear(8192, 8192, bias=False, device="cuda", dtype=torch.bfloat16)  # 128 MiB
    ema = ShardedEMA(model, decay=0.9, offload="cpu")
    ema.update()
    ema.update()
    ema.wait()
    assert "pinned memory" in ema.memory_report()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        start = time.perf_counter()
        torch.cuda._sleep(CYCLES * 10)
        ema.update()
        asked = time.perf_counter() - start
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert asked < (time.perf_counter() - start) / 2
    ema.wait()
    assert torch.cuda.max_memory_allocated() - before <= 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_average_in_the_model_and_back(dtype: torch.dtype) -> None:
    """Weights and shadow change places across the link."""
    model = nn.Linear(3000, 2000).cuda().to(dtype)
    ema = ShardedEMA(model, decay=0.5, offload="cpu")
    for _ in range(3):
        ema.wait()
        with torch.no_grad():
            model.weight.add_(1)
        ema.update()
    before, digest = model.weight.detach().clone(), ema.fingerprint()
    average = ema.full_state_dict(dtype=dtype)["weight"]
    with ema.average_parameters():
        assert torch.equal(model.weight.cpu(), average)
    assert torch.equal(model.weight, before)
    assert ema.fingerprint() == digest
    distance = (before.double().cpu() - ema.full_state_dict()["weight"].double()).norm().item()
    assert ema.metrics()["ema/distance"] >= distance > 0
