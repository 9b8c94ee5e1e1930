"""Weights that cache a scale beside their elements, as torchao's do for float8 all-gathers under FSDP2."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_unusual_models import Subclass, move
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA, compute_ema
from dist_ema.geometry.subclasses import hidden_type

DECAY = 0.5


class Cached(Subclass):
    """Rounds to a grid that a scale gives, which may be cached: the attributes are those of torchao's class."""

    @classmethod
    def of(cls, values: Tensor) -> Cached:
        made = cls(values.shape, values.dtype, _tensor=values)
        made._precomputed_scale = None
        return made

    _tensor: Tensor
    _precomputed_scale: Tensor | None

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        raise AssertionError("torchao's asks whether the scale is zero, which waits for the device")

    def _own_scale(self) -> Tensor:
        return 100 / self._tensor.detach().abs().max()

    def _plain(self) -> Tensor:
        scale = self._own_scale() if self._precomputed_scale is None else self._precomputed_scale
        return (self._tensor * scale).round() / scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            made = cls.of(args[0]._tensor)
            made._precomputed_scale = args[0]._precomputed_scale
            return made
        return super().__torch_dispatch__(func, types, args, kwargs)


def model_with_scale() -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model[0].weight = nn.Parameter(Cached.of(model[0].weight.detach()))
    return model


def precompute(model: nn.Module) -> None:
    weight: Any = model[0].weight  # type: ignore[index]
    weight._precomputed_scale = weight._own_scale()


@torch.no_grad()
def step(model: nn.Module) -> None:
    weight: Any = model[0].weight  # type: ignore[index]
    weight._tensor.mul_(1.5).add_(0.125)
    move(model[1])  # type: ignore[index]
    precompute(model)


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_cached_scale_is_no_part_of_the_weight(offload: str | None) -> None:
    """It appears after the first step, and every update was refused then. The model that computes with the average has
    to compute its scale from the average, and afterwards has the one that it had."""
    model = model_with_scale()
    ema = ShardedEMA(model, decay=DECAY, offload=offload)
    want = None
    for _ in range(3):
        step(model)
        ema.update()
        ema.wait()  # step() here is no optimizer's, which would wait by itself
        now = model[0].weight._tensor.detach().double()
        want = now.clone() if want is None else DECAY * want + (1 - DECAY) * now
    assert want is not None
    inputs = torch.randn(3, 8)
    scale, before, outputs = model[0].weight._precomputed_scale, model[0].weight._tensor.clone(), model(inputs)
    with ema.average_parameters():
        torch.testing.assert_close(model[0].weight._tensor.double(), want, rtol=1e-6, atol=1e-6)
        assert model[0].weight._precomputed_scale is None
        precompute(model)  # as a trainer's hook might
    assert model[0].weight._precomputed_scale is scale
    assert torch.equal(model[0].weight._tensor, before)
    assert torch.equal(model(inputs), outputs)
    ema.copy_to()
    assert model[0].weight._precomputed_scale is None
    torch.testing.assert_close(model[0].weight._tensor.double(), want, rtol=1e-6, atol=1e-6)


def test_a_scale_that_is_cached_before_construction() -> None:
    model = model_with_scale()
    precompute(model)
    ema = ShardedEMA(model, decay=DECAY)
    assert ema.update()
    with pytest.raises(ZeroDivisionError), ema.average_parameters():
        raise ZeroDivisionError
    assert model[0].weight._precomputed_scale is not None


def test_loaded_live_weights_drop_the_scale_of_those_that_were() -> None:
    model = model_with_scale()
    ema = ShardedEMA(model, decay=DECAY)
    step(model)
    ema.update()
    state = copy.deepcopy(ema.state_dict(live=True))
    precompute(model)
    ema.load_state_dict(state)
    assert model[0].weight._precomputed_scale is None


@pytest.mark.parametrize("how", ["teacher", "copy", "compute_ema"])
def test_a_second_model_drops_its_scale_when_it_is_written(how: str) -> None:
    """It would go on dividing by the scale of the weights that it had."""
    model, other = model_with_scale(), model_with_scale()
    precompute(other)
    if how == "compute_ema":
        compute_ema(model, other, smoothing=0.5)
    else:
        if how == "teacher":
            other.requires_grad_(False)
        ema = ShardedEMA(model, decay=DECAY, into=other if how == "teacher" else None)
        step(model)
        ema.update()
        if how == "copy":
            ema.copy_to(into=other)
        else:
            precompute(other)
            step(model)
            ema.update()
    assert other[0].weight._precomputed_scale is None


def test_elements_of_another_dtype_are_not_taken_for_the_weight() -> None:
    """A class with those attributes may hold numbers that only its scale makes a weight."""
    weight = Cached(torch.Size([6, 8]), torch.float32, _tensor=torch.zeros(6, 8, dtype=torch.int8))
    weight._precomputed_scale = None
    assert hidden_type(weight) == "Cached"


def float8_model(reshard: bool = True) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
    convert_to_float8_training(model, config=config)
    return fully_shard(model, reshard_after_forward=reshard)


def float8_step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(number))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    precompute_float8_dynamic_scale_for_fsdp(model)


def elements(model: Any) -> Tensor:
    return model[0].weight._local_tensor._tensor.detach()


@pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.world_size(2)
def test_torchao_trains_as_without_an_average(reshard: bool) -> None:
    """FSDP2's float8 all-gather with scales computed ahead, as torchtitan trains."""
    models = [float8_model(reshard) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    model, alone = models
    ema = ShardedEMA(model, decay=DECAY)
    evaluated = torch.randn(4, 16, generator=torch.Generator().manual_seed(99))
    want: Tensor | None = None
    for number in range(4):
        for one, optimizer in zip(models, optimizers, strict=True):
            float8_step(one, optimizer, number)
        ema.update()
        now = elements(model).double()
        want = now.clone() if want is None else DECAY * want + (1 - DECAY) * now
        with torch.no_grad(), ema.average_parameters():
            torch.testing.assert_close(elements(model).double(), want, rtol=1e-6, atol=1e-6)
            expected = float8_model(reshard)  # has never cached a scale
            for to, of in zip(expected.parameters(), model.parameters(), strict=True):
                to.copy_(of)
            assert torch.equal(model(evaluated), expected(evaluated))
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())  # type: ignore[attr-defined]
    saved = ema.full_state_dict()
    assert not saved or type(saved["0.weight"]) is Tensor
