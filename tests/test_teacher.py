"""A second model that is the average: at every step against a dense float64 teacher, forward by forward."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import CASES, batch, build
from oracle import DenseAverage
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from zero_models import Net, make_engine
from zero_models import batch as zero_batch
from zero_models import train as zero_train

from dist_ema import ShardedEMA
from dist_ema.engines.dtensor import DTensorEngine
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAError, EMAStateError

DECAY = 0.7
MATRIX = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp1-full", 3),
    ("fsdp1-grad-op-orig", 2),
    ("fsdp1-hybrid", 4),
    ("fsdp2", 1),
    ("fsdp2", 3),
    ("fsdp2", 4),
    ("fsdp2-keep", 2),
    ("fsdp2-mixed", 2),
    ("fsdp2-compiled", 2),
    ("fsdp2-checkpointed", 2),
    ("hsdp", 4),
    ("tp", 3),
    ("fsdp2-tp", 4),
]


def make_teacher(case: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Wrapped as the student, with other weights; what DDP wraps has to train, so there the plain model."""
    model = CASES[case].plain()
    for parameter in model.parameters():
        if parameter.requires_grad:  # frozen weights are no part of the average: they stay the user's
            parameter.detach().mul_(3.0)
    model.requires_grad_(False)
    model = model if dtype is None else model.to(dtype)
    return model.eval() if case.startswith("ddp") else CASES[case].wrap(model).eval()


def live(model: nn.Module) -> dict[str, Tensor]:
    from test_engines import _live

    return _live(model.module if isinstance(model, DistributedDataParallel) else model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model.train()
    model(batch(step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.2)


@torch.no_grad()
def forward(model: nn.Module, number: int = 99) -> Tensor:
    return model(batch(number)).double()


def trained() -> set[str]:
    named = build().named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.requires_grad}


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_teacher_is_the_dense_average_at_every_step(case: str, rank: int, world_size: int, tmp_path: Path) -> None:
    """A forward between two steps leaves full weights behind under some engines, and sees the next update under all."""
    student, teacher, third = CASES[case].model(), make_teacher(case), make_teacher(case)
    optimizer = sgd(student)
    before = forward(teacher)
    ema = ShardedEMA(student, into=teacher, decay=DECAY)
    ema.attach(optimizer)
    assert torch.equal(forward(teacher), before)  # until the first update it is the user's
    oracle, reference = DenseAverage(trained(), DECAY), CASES[case].plain().double().eval()
    close = {"rtol": 1e-4, "atol": 1e-5} if "mixed" not in case else {"rtol": 0.05, "atol": 0.05}
    for step in range(3):
        train(student, optimizer, step)
        oracle.update(live(student))
        found = forward(teacher)
        if rank == 0:
            reference.load_state_dict(oracle.average)
            with torch.no_grad():
                torch.testing.assert_close(found, reference(batch(99)), **close)
        ema.copy_to(into=third)
        assert torch.equal(forward(third), found)
    held, full = live(teacher), ema.full_state_dict()
    if rank == 0:
        oracle.check(full)
        assert all(torch.equal(held[name], full[name]) for name in full)

    with ema.average_parameters():
        student.eval()
        assert torch.equal(forward(teacher), found)
        assert torch.equal(forward(student), found)
        digests = ema.fingerprint()
    ema.save(tmp_path / "saved")
    assert ema.fingerprint() == digests
    train(student, optimizer, 3)
    assert not torch.equal(forward(teacher), found)
    ema.load(tmp_path / "saved")
    assert torch.equal(forward(teacher), found)
    assert ema.fingerprint() == digests
