"""Targets of other shapes: pipeline stages, lazy modules, tensor subclasses that keep their elements elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline
from torch.utils._pytree import tree_map

from dist_ema import ShardedEMA, compute_ema, read_checkpoint, verify_checkpoint
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAStateError

DECAY = 0.5


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(index): nn.Linear(4, 4) for index in range(4)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def stage_of(model: Model, index: int, stages: int) -> Model:
    """What one stage keeps, under the whole model's names."""
    kept = range(index * 4 // stages, (index + 1) * 4 // stages)
    model.layers = nn.ModuleDict({name: layer for name, layer in model.layers.items() if int(name) in kept})
    return model


def built() -> Model:
    torch.manual_seed(3)
    return Model()


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["stage", "list", "traced", "sharded"])
def test_pipeline_stages_are_averaged_under_the_whole_models_names(kind: str) -> None:
    """A stage is no module; its ``submod`` is, and ranks hold different names."""
    rank = dist.get_rank()
    device = torch.device("cpu")
    target: Any
    if kind == "traced":
        pipe = pipeline(built(), (torch.zeros(2, 4),), split_spec={"layers.2": SplitPoint.BEGINNING})
        target = pipe.build_stage(rank, device)
    elif kind == "list":
        target = [PipelineStage(stage_of(built(), i, 4), i, 4, device) for i in (rank, rank + 2)]
    else:
        module = stage_of(built(), rank, 2)
        if kind == "sharded":
            mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
            fully_shard(module, mesh=mesh["dp"])
        target = PipelineStage(module, rank, 2, device)
    ema = ShardedEMA(target, decay=DECAY, include="weight", exclude=r"layers\.0")  # which rank 1 does not have
    ema.update()
    for stage in target if isinstance(target, list) else [target]:
        move(stage.submod)
    ema.update()
    state = ema.full_state_dict(include_untracked=False)
    expected = {name: value * 0.75 for name, value in built().state_dict().items() if name.endswith("weight")}
    del expected["layers.0.weight"]
    assert not state or state.keys() == expected.keys()
    for name in state:
        assert torch.equal(state[name], expected[name])


@pytest.mark.parametrize("lazy", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)], ids=["parameter", "buffer"])
def test_a_lazy_module_is_refused_until_it_has_a_shape(lazy: nn.Module) -> None:
    """torch's own error named no parameter and spoke of load_state_dict."""
    model = nn.Sequential(nn.Linear(4, 3), lazy)
    with pytest.raises(EMAEngineError, match=r"'1\.(weight|running_mean)' has no shape yet.*Lazy.*one batch"):
        ShardedEMA(model)
    model(torch.ones(2, 4))
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    assert ema.full_state_dict().keys() == model.state_dict().keys()


class Subclass(Tensor):
    """A tensor without memory of its own, whose operations work on what ``_plain()`` computes."""

    parts: dict[str, Tensor]

    @staticmethod
    def __new__(cls: type[Subclass], shape: torch.Size, dtype: torch.dtype, **parts: Tensor) -> Subclass:
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    def __init__(self, shape: torch.Size, dtype: torch.dtype, **parts: Tensor) -> None:
        self.parts = parts
        for name, part in parts.items():
            setattr(self, name, part)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return list(self.parts), None

    def _plain(self) -> Tensor:
        raise NotImplementedError

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return type(self).__name__

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].shape, args[0].dtype, **args[0].parts)
        plain = tree_map(lambda value: value._plain() if isinstance(value, Subclass) else value, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class Quantised(Subclass):
    """int8 with a scale for each row, as torchao's weights for quantised training are."""

    @classmethod
    def of(cls, values: Tensor) -> Quantised:
        scale = values.abs().amax(dim=1, keepdim=True) / 127
        quantised = (values / scale).round().to(torch.int8)
        return cls(values.shape, values.dtype, quantised=quantised, scale=scale)

    def _plain(self) -> Tensor:
        return self.parts["quantised"].to(self.dtype) * self.parts["scale"]


class Dressed(Subclass):
    """Nothing but its elements, and another way to gather them, as torchao's float8 weights under FSDP2 are."""

    @classmethod
    def of(cls, values: Tensor) -> Dressed:
        return cls(values.shape, values.dtype, inner=values)

    def _plain(self) -> Tensor:
        return self.parts["inner"]


def with_weight(kind: Callable[[Tensor], Tensor], trained: bool) -> nn.Sequential:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    model[0].weight = nn.Parameter(kind(model[0].weight.detach()), requires_grad=trained)
    return model


def test_a_trained_tensor_without_memory_of_its_own_is_refused() -> None:
    """A kernel would read at address 0."""
    model = with_weight(Quantised.of, trained=True)
    assert model[0].weight.data_ptr() == 0
    with pytest.raises(
        EMAEngineError, match=r"parameter '0\.weight' is a Quantised.*exclude='0\.weight', or freeze it"
    ):
        ShardedEMA(model)
    with pytest.raises(EMAConfigError, match=r"'0\.weight' is a tensor subclass"):
        compute_ema(model, with_weight(Quantised.of, trained=True))
    buffered = nn.BatchNorm1d(3)
    buffered.register_buffer("table", Quantised.of(torch.ones(2, 2)))
    with pytest.raises(EMAEngineError, match=r"buffer 'table' is a Quantised.*buffers='ignore'"):
        ShardedEMA(buffered)
    assert ShardedEMA(buffered, buffers="ignore").update()


@pytest.mark.parametrize("how", ["frozen", "excluded"])
def test_a_frozen_one_can_be_left_out(how: str, tmp_path: Path) -> None:
    """``save()`` of a model with a frozen quantised part died of a segmentation fault."""
    model = with_weight(Quantised.of, trained=how == "excluded")
    ema = ShardedEMA(model, decay=DECAY, exclude=r"0\.weight" if how == "excluded" else None)
    for _ in range(2):
        ema.update()
        move(model[1])
    for call in (ema.full_state_dict, lambda: ema.save(tmp_path / "c"), lambda: ema.export(tmp_path / "e")):
        with pytest.raises(EMAStateError, match=r"'0\.weight' is not averaged and is a Quantised.*include_untracked"):
            call()
    ema.save(tmp_path / "c", include_untracked=False)
    ema.export(tmp_path / "e", include_untracked=False)
    verify_checkpoint(tmp_path / "c")
    saved = read_checkpoint(tmp_path / "c")
    assert saved.keys() == model.state_dict().keys() - {"0.weight"}
    ema.load(tmp_path / "c")
    with ema.average_parameters():
        assert torch.equal(model[1].weight, saved["1.weight"])


def test_one_that_only_wraps_its_elements_is_averaged_inside() -> None:
    model, plain = with_weight(Dressed.of, trained=True), with_weight(lambda values: values, trained=True)
    assert model[0].weight.data_ptr() == 0
    average, reference = ShardedEMA(model, decay=DECAY), ShardedEMA(plain, decay=DECAY)
    for _ in range(3):
        for ema in (average, reference):
            ema.update()
        for weight in (model[0].weight.parts["inner"], plain[0].weight):
            weight.detach().mul_(0.5)
    state = average.full_state_dict()
    for name, value in reference.full_state_dict().items():
        assert torch.equal(state[name], value), name
    with average.average_parameters():
        assert torch.equal(model[0].weight.parts["inner"], state["0.weight"])


def test_one_that_comes_to_hold_more_is_refused() -> None:
    """torchao's float8 weights keep a scale from the first step on, where it is computed ahead."""
    model = with_weight(Dressed.of, trained=True)
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    model[0].weight.parts["scale"] = model[0].weight.scale = torch.tensor(2.0)  # type: ignore[assignment]
    with pytest.raises(EMAStateError, match=r"'0\.weight' is a Dressed.*exclude='0\.weight'"):
        ema.update()
