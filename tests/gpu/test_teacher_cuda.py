"""A teacher on a GPU: written in order with what computes, without a wait, in fp32 and in bf16."""

from __future__ import annotations

import os
from collections.abc import Iterator

from support.models import batch, build

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA

DEVICE = "cuda"  # the program is the same for any
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def group() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device(DEVICE, 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_teacher_computes_with_every_update(kind: str, dtype: torch.dtype, group: None) -> None:
    def wrap(model: nn.Module) -> nn.Module:
        return fully_shard(model, mesh=init_device_mesh(DEVICE, (1,))) if kind == "fsdp2" else model

    def forward(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(batch(99).to(DEVICE)).float().cpu()

    student = wrap(build(scalar=False).to(DEVICE))
    teacher = wrap(build(scalar=False).requires_grad_(False).to(DEVICE, dtype)).eval()
    optimizer = torch.optim.SGD([parameter for parameter in student.parameters() if parameter.requires_grad], lr=0.2)
    ema = ShardedEMA(student, into=teacher, decay=0.5)
    ema.attach(optimizer)
    reference = build(scalar=False).to(DEVICE, dtype).eval()
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    for step in range(4):
        student.train()
        student(batch(step).to(DEVICE)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found = forward(teacher)
        reference.load_state_dict(ema.full_state_dict())
        torch.testing.assert_close(found, forward(reference), rtol=close, atol=close)
    for (name, held), expected in zip(teacher.named_parameters(), reference.parameters(), strict=True):
        local = held.to_local() if kind == "fsdp2" else held  # type: ignore[attr-defined]
        assert torch.equal(local, expected), name


def test_update_into_a_teacher_does_not_wait_for_the_device(group: None) -> None:
    student = nn.Linear(64, 64).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        ema = ShardedEMA(student, into=nn.Linear(64, 64).to(DEVICE, dtype).requires_grad_(False), decay=0.5)
        for _ in range(3):
            ema.update()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ema.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
