"""DeepSpeed on a GPU, in one process under NCCL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import ShardedEMA

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
deepspeed = pytest.importorskip("deepspeed", reason="is in the extra 'deepspeed'")


@pytest.fixture(autouse=True)
def nccl() -> Iterator[None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    dist.init_process_group("nccl", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=["device", "offloaded"])
def test_zero_averages_its_masters(stage: int, dtype: str, options: dict[str, str], tmp_path: Path) -> None:
    """The masters, and not the 16-bit weights, whose average would stand still: against a dense float64 one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 7))
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "zero_allow_untested_optimizer": True,
        dtype: {"enabled": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    ema = ShardedEMA(engine, decay=0.9, **options)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(5):
        batch = torch.randn(4, 33, device="cuda", dtype=torch.bfloat16 if dtype == "bf16" else torch.float16)
        engine.backward(engine(batch).float().square().mean())
        engine.step()
        if not ema.update():  # fp16 begins with overflows
            continue
        for name, parameter in engine.module.named_parameters():
            master = deepspeed.utils.safe_get_full_fp32_param(parameter).double().cpu()
            expected[name] = expected.get(name, master).lerp(master, 0.1)
    found = ema.full_state_dict()
    assert ema.num_updates > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-6)
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    with ema.average_parameters():
        engine(batch)
    after = [parameter.detach() for parameter in engine.module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    digest = ema.fingerprint()
    ema.save(tmp_path / "checkpoint")
    ema.reset()
    ema.load(tmp_path / "checkpoint")
    assert ema.fingerprint() == digest
    engine.destroy()
