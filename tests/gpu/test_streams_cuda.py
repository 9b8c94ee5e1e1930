"""The order of our threads' work against training on a stream of its own: the checks of the fake GPU on a real one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from support import stream_checks

import pytest
import torch
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CYCLES = 50_000_000  # some hundredths of a second of a GPU


class RealGPU:
    """Training on a side stream: a thread of ours on the default stream would read and write out of turn."""

    def put(self, model: nn.Module) -> nn.Module:
        return model.cuda()

    def values(self, values: Tensor) -> Tensor:
        return values.cuda()

    def delay(self) -> None:
        torch.cuda._sleep(CYCLES)

    def rush(self) -> None:
        return

    def hold(self) -> None:
        """Threads cannot be made late here: ``test_offload_cuda.py`` makes copies late."""

    def hurry(self) -> None:
        return


@pytest.fixture
def gpu() -> Iterator[RealGPU]:
    with torch.cuda.stream(torch.cuda.Stream()):
        yield RealGPU()


@pytest.mark.parametrize("check", stream_checks.CHECKS)
def test_in_order(check: str, gpu: RealGPU, tmp_path: Path) -> None:
    for number in range(3):
        stream_checks.CHECKS[check](gpu, tmp_path / f"{number}")
