"""Averages of the fp32 masters that an optimizer keeps: those of the bf16 parameters would lose what rounding drops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAError

DECAY = 0.7
TRAINED = {"0.weight", "0.bias", "2.weight", "2.bias"}


class FusedAdam(torch.optim.Optimizer):
    """Keeps masters as TransformerEngine's does: made at the first step, in ``state[parameter]["master_param"]``.

    The arithmetic is plain momentum. With ``apex=True`` masters lie where apex keeps them.
    """

    def __init__(self, params: Any, lr: float = 0.03, apex: bool = False) -> None:
        super().__init__(params, {"lr": lr})
        if apex:
            self.param_groups_master = [
                {"params": [parameter.detach().clone().float() for parameter in group["params"]]}
                for group in self.param_groups
            ]

    def masters(self, parameter: Tensor, group: int, place: int) -> Tensor:
        if hasattr(self, "param_groups_master"):
            return self.param_groups_master[group]["params"][place]
        state = self.state[parameter]
        if "master_param" not in state:
            state["master_param"] = parameter.detach().clone().float()
        return state["master_param"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                master = self.masters(parameter, number, place)
                if parameter.grad is not None:
                    master.sub_(parameter.grad.to(master.dtype), alpha=group["lr"])
                    parameter.copy_(master)


def build(wrapper: str) -> nn.Module:
    """bf16, of sizes that two ranks do not divide."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).to(torch.bfloat16)
    model[1].requires_grad_(False)
    if wrapper == "ddp":
        return DistributedDataParallel(model)
    return fully_shard(model) if wrapper == "fsdp2" else model


def full(tensor: Tensor) -> Tensor:
    value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value.detach().clone()


def names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.removeprefix("module."): value for name, value in model.named_parameters() if value.requires_grad}


def step(model: nn.Module, optimizer: FusedAdam, number: int) -> dict[str, Tensor]:
    """One step, alike on every rank; returns the full masters."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    places = {id(parameter): place for place, parameter in enumerate(optimizer.param_groups[0]["params"])}
    return {
        name: full(optimizer.masters(parameter, 0, places[id(parameter)])) for name, parameter in names(model).items()
    }


def check(ema: ShardedEMA, dense: DenseAverage) -> None:
    found = ema.full_state_dict()
    if not dist.is_initialized() or dist.get_rank() == 0:
        for name, expected in dense.average.items():
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=["", "offload"])
@pytest.mark.parametrize("apex", [False, True])
@pytest.mark.parametrize("wrapper", ["plain", "ddp", "fsdp2"])
def test_the_average_is_that_of_the_masters(wrapper: str, apex: bool, options: dict[str, str]) -> None:
    """Steps of less than half of a weight's last bit move the masters, and never the parameters."""
    model = build(wrapper)
    optimizer = FusedAdam([value for value in model.parameters() if value.requires_grad], lr=1e-4, apex=apex)
    ema = ShardedEMA(model, decay=DECAY, masters=optimizer, **options)
    ema.attach(optimizer)
    assert ema.update(batches=0, due=True)  # before there are masters
    dense = DenseAverage(TRAINED, DECAY)
    dense.update({name: full(value).float() for name, value in names(model).items()})
    for number in range(5):
        dense.update(step(model, optimizer, number))
        check(ema, dense)
    parameters = {name: full(value) for name, value in names(model).items()}
    masters = [
        full(optimizer.masters(value, 0, place)) for place, value in enumerate(optimizer.param_groups[0]["params"])
    ]
    trained = optimizer.param_groups[0]["params"]
    with ema.average_parameters():
        for name, value in names(model).items():
            average = dense.average[name].to(torch.float32).to(torch.bfloat16)
            torch.testing.assert_close(full(value), average, rtol=1e-2, atol=1e-6)
        check(ema, dense)
    assert all(torch.equal(full(value), parameters[name]) for name, value in names(model).items())
    for place, value in enumerate(trained):
        assert torch.equal(full(optimizer.masters(value, 0, place)), masters[place])
    ema.copy_to()
    for place, (name, value) in enumerate(names(model).items()):
        master = full(optimizer.masters(trained[place], 0, place))
        torch.testing.assert_close(master.double(), dense.average[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(full(value), master.to(torch.bfloat16))
    step(model, optimizer, 9)


def saved(folder: Path, wrapper: str) -> None:
    model = build(wrapper)
    optimizer = FusedAdam([value for value in model.parameters() if value.requires_grad])
    ema = ShardedEMA(model, decay=DECAY, masters=optimizer)
    for number in range(3):
        step(model, optimizer, number)
        ema.update()
    ema.save(folder / "saved")
    ema.export(folder / "export")
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(ema.full_state_dict(), folder / "full.pt")
    else:
        ema.full_state_dict()


def test_a_run_goes_on_at_another_world_size(on_ranks: Callable[..., None], tmp_path: Path) -> None:
    on_ranks(saved, 2, folder=tmp_path, wrapper="fsdp2")
    expected = torch.load(tmp_path / "full.pt")
    model = build("plain")
    optimizer = FusedAdam([value for value in model.parameters() if value.requires_grad])
    ema = ShardedEMA(model, decay=DECAY, masters=optimizer)
    ema.load(tmp_path / "saved")  # before the first step
    found = ema.full_state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    dense = DenseAverage(TRAINED, DECAY)
    dense.average = {name: expected[name].double() for name in TRAINED}
    dense.update(step(model, optimizer, 7))
    ema.update()
    check(ema, dense)
    exported = dist_ema.read_checkpoint(tmp_path / "saved")
    assert exported["0.weight"].dtype == torch.float32
    for state in optimizer.state.values():  # as after load_state_dict(): other tensors of the same values
        state["master_param"] = state["master_param"].clone()
    dense.update(step(model, optimizer, 8))
    ema.update()
    check(ema, dense)


def test_a_function_finds_masters_that_no_optimizer_has() -> None:
    """For loops that keep fp32 copies by hand. A parameter without a master is averaged itself."""
    model = nn.ModuleDict({"low": nn.Linear(3, 2).to(torch.bfloat16), "high": nn.Linear(2, 2)})
    masters = {id(value): value.detach().float() + 1e-4 for value in model["low"].parameters()}
    ema = ShardedEMA(model, decay=DECAY, masters=lambda parameter: masters.get(id(parameter)))
    ema.update()
    state = ema.full_state_dict()
    assert torch.equal(state["low.weight"], masters[id(model["low"].weight)])
    assert torch.equal(state["high.weight"], model["high"].weight)


def test_a_function_that_finds_no_master_after_a_step_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    """The average of the parameters would pass for one of the masters."""
    model = build("plain")
    ema = ShardedEMA(model, decay=DECAY, masters=lambda parameter: None)
    ema.update(batches=0, due=True)
    assert not caplog.records  # before the first step there are no masters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(4, 5, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        ema.update()
    (record,) = caplog.records
    assert "returned None for '0.weight' and for every other parameter" in record.getMessage()


def _remainders(model: nn.Module) -> object:
    optimizer = FusedAdam([value for value in model.parameters() if value.requires_grad])
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter]["master_param"] = torch.zeros_like(parameter, dtype=torch.int16)
    return optimizer


def _of_a_part(model: nn.Module) -> object:
    optimizer = FusedAdam(model[0].parameters())
    step_of_part = torch.ones(4, 5, dtype=torch.bfloat16)
    model(step_of_part).sum().backward()
    optimizer.step()
    return optimizer


def _without(model: nn.Module) -> object:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("masters", "says"),
    [
        (lambda model: 3, "masters=int: allowed are an optimizer that keeps masters"),
        (_without, "'0.weight' and 3 more with fewer bits than fp32 have no master"),
        (_of_a_part, "'2.weight' and 1 more with fewer bits than fp32 have no master"),
        (_remainders, "is torch.int16, but only fp32 and fp64 are allowed"),
        (
            lambda model: lambda parameter: torch.ones(1),
            "has the shape (1,) on this rank, and its parameter has (7, 5)",
        ),
        (lambda model: lambda parameter: "w", "the master of '0.weight' is a str"),
        (lambda model: lambda parameter: parameter.float().to("meta"), "is on meta, and its parameter on cpu"),
    ],
)
def test_masters_that_cannot_be_averaged_are_named(masters: Callable[[nn.Module], object], says: str) -> None:
    model = build("plain")
    with pytest.raises(EMAError) as caught:
        ema = ShardedEMA(model, masters=masters(model))
        ema.update()
    assert says in str(caught.value)


def test_where_masters_are_refused() -> None:
    model = build("plain")
    optimizer = FusedAdam(model.parameters())
    with pytest.raises(EMAEngineError, match=r"not for CompositeEngine"):
        ShardedEMA([model], masters=optimizer)
    with pytest.raises(EMAConfigError, match="masters= and into="):
        ShardedEMA(model, into=build("plain").requires_grad_(False), masters=optimizer)
