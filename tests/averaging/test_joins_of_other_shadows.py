"""Parameters that join an average later, where the shadow is in host memory or is sent to a teacher; lists of modules.

These calls take other ways through the library than the plain shadow does.
"""

from __future__ import annotations

import copy

from support.oracle import DenseAverage

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dist_ema import ShardedEMA, update_bn
from dist_ema.schedules import Window

TRAINED = {"0.weight", "0.bias", "1.weight", "1.bias"}


def two_layers() -> nn.Sequential:
    """The second layer is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    return model


@torch.no_grad()
def step(model: nn.Module, number: int) -> dict[str, Tensor]:
    """Moves what is trained, alike on every rank; returns full float64 copies."""
    full = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.mul_(1.0 + 0.1 * number)
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        full[name] = value.detach().double().clone()
    return full


def check(found: dict[str, Tensor], dense: DenseAverage) -> None:
    for name, expected in dense.average.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.world_size(2)
def test_what_joins_is_sent_to_a_gathered_teacher() -> None:
    """The teacher would keep the first values of a layer that is unfrozen later."""
    student = fully_shard(two_layers())
    teacher = two_layers().requires_grad_(False)
    ema = ShardedEMA(student, into=teacher, sync="gather", decay=0.5)
    dense = DenseAverage({"0.weight", "0.bias"}, 0.5)
    for number in range(5):
        if number == 2:
            student[1].requires_grad_(True)
        weights = step(student, number)
        ema.update()
        if number == 2:  # the layer joins with its present values
            dense.average.update({name: weights[name] for name in ("1.weight", "1.bias")})
        dense.update(weights)
        if number == 2:
            dense.trained = TRAINED
        check(dict(teacher.named_parameters()), dense)
    ema.close()
    moved = teacher[1].weight - two_layers()[1].weight
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_what_joins_while_the_average_stands_still_has_its_present_values(offload: str | None) -> None:
    """Between two windows the update moves nothing, but what is new has to be filled."""
    model = two_layers()
    ema = ShardedEMA(model, schedule=Window("1ba", "4ba"), offload=offload)
    for number in range(3):
        step(model, number)
        ema.update()
    model[1].requires_grad_(True)
    joined = step(model, 3)
    ema.update(batches=0, due=True)  # nothing is forgotten since the last update
    found = ema.full_state_dict()
    assert torch.equal(found["1.weight"].double(), joined["1.weight"])
    assert not torch.equal(found["0.weight"].double(), joined["0.weight"])


def test_a_list_of_modules_is_attached_and_measures_its_batch_norm() -> None:
    """Pipeline stages on one rank: one optimizer steps for all of them."""
    torch.manual_seed(0)
    names = ["front", "back"]
    whole = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for name in names})
    stages = [nn.ModuleDict({name: whole[name]}) for name in names]
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
    ema = ShardedEMA(stages, decay=0.5)
    handle = ema.attach(optimizer)
    dense = DenseAverage({name for name, _ in whole.named_parameters()}, 0.5)

    def forward(x: Tensor) -> Tensor:
        return whole["back"](whole["front"](x))  # type: ignore[no-any-return]

    data = [torch.randn(8, 4, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    for x in data:
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        dense.update({name: value.detach().clone() for name, value in whole.named_parameters()})
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 4
    check(ema.full_state_dict(), dense)

    reference = copy.deepcopy(whole)
    reference.load_state_dict(dense.average, strict=False)
    torch.optim.swa_utils.update_bn(data, nn.Sequential(reference["front"], reference["back"]))
    update_bn(ema, data, forward=forward)
    found = ema.full_state_dict()
    for name, expected in reference.named_buffers():
        torch.testing.assert_close(found[name].float(), expected.float(), rtol=1e-4, atol=1e-5, msg=name)
