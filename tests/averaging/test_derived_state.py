"""What a model keeps that it computed from its weights, and goes on using when the average comes in or goes out.

Caches of eval mode, parametrisations that are cached, weights that a compiler took for constants. The outputs would be
those of other weights, and nothing would show it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support.models import CASES, batch, build

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dist_ema import ShardedEMA
from dist_ema.engines import derived


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the library logs in the block, as warnings or worse."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_ema").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("dist_ema").removeHandler(handler)


class Cached(nn.Linear):
    """As LeViT's attention biases: computed at the first forward pass in eval mode, dropped by ``train()``."""

    cache: Tensor | None = None

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            self.cache = None
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x @ self.weight.T + self.bias
        if self.cache is None:
            self.cache = self.weight.detach().T.clone()
        return x @ self.cache + self.bias


class Merged(nn.Module):
    """As loralib's layers: ``train()`` takes the low-rank part out of the frozen weight, and ``eval()`` puts it in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4), requires_grad=False)
        self.low = nn.Parameter(torch.ones(4))
        self.merged = False

    def train(self, mode: bool = True) -> Merged:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += torch.diag(self.low.data) * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.merged else x @ (self.weight + torch.diag(self.low))


class OnlyEval(Cached):
    """Overrides ``eval()`` in place of ``train()``."""

    def train(self, mode: bool = True) -> OnlyEval:
        return nn.Module.train(self, mode)

    def eval(self) -> OnlyEval:
        self.cache = None
        return nn.Module.eval(self)


KINDS = {"cached": lambda: Cached(4, 4), "merged": Merged, "only-eval": lambda: OnlyEval(4, 4)}


def step(model: nn.Module, ema: ShardedEMA) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    ema.update()


def two_models(kind: str) -> tuple[nn.Module, ShardedEMA, Tensor, dict[str, Tensor]]:
    """A model with its average, and the outputs that each has in training mode, where nothing is kept."""
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind](), nn.ReLU())
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    step(model, ema)
    x = torch.randn(3, 4)
    outputs = {"live": model(x).detach()}
    with ema.average_parameters():
        outputs["average"] = model(x).detach()
    assert not torch.allclose(outputs["live"], outputs["average"])
    return model, ema, x, outputs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["live", "average"])
def test_an_evaluation_does_not_use_what_was_kept_of_other_weights(kind: str, first: str) -> None:
    model, ema, x, outputs = two_models(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.eval()
    with torch.inference_mode():
        for which in (first, *outputs, *outputs):
            if which == "live":
                found = model(x)
            else:
                with ema.average_parameters():
                    found = model(x)
            assert torch.allclose(found, outputs[which]), which
    assert not any(module.training for module in model.modules())
    model.train()
    assert torch.allclose(model(x), outputs["live"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_copy_to_drops_what_was_kept(kind: str) -> None:
    model, ema, x, outputs = two_models(kind)
    model.eval()
    model(x)
    ema.copy_to()
    assert torch.allclose(model(x), outputs["average"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_in_eval_mode_follows_every_update(dtype: torch.dtype) -> None:
    """Its memory is written at each step, and nobody calls its ``train()``."""
    torch.manual_seed(0)
    model = nn.Sequential(Cached(4, 4), nn.ReLU())
    teacher = nn.Sequential(Cached(4, 4), nn.ReLU()).requires_grad_(False).to(dtype).eval()
    ema = ShardedEMA(model, decay=0.5, into=teacher)
    x = torch.randn(3, 4)
    for _ in range(3):
        step(model, ema)
        found = teacher(x.to(dtype))
        with ema.average_parameters():
            assert torch.allclose(found.float(), model(x), atol=1e-5)
        assert not any(module.training for module in teacher.modules())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full-orig", "fsdp2", "fsdp2-mixed", "hsdp"])
def test_modes_are_exactly_what_they_were(case: str) -> None:
    """Some modules train and others do not; a switch of an outer one reaches those inside."""

    class Outer(type(build())):  # type: ignore[misc]
        calls = 0

        def train(self, mode: bool = True) -> nn.Module:
            Outer.calls += 1
            super().train(mode)
            self.norm.train(False)  # frozen statistics
            return self

    model = build(CASES[case].scalar)
    model.__class__ = Outer
    wrapped = CASES[case].wrap(model)
    inner = next(module for module in wrapped.modules() if isinstance(module, Outer))
    ema = ShardedEMA(wrapped, decay=0.5)
    ema.update()
    inner.training = False
    inner.norm.training = True
    modes = {module: module.training for module in wrapped.modules()}
    with warnings() as said, ema.average_parameters():
        assert Outer.calls
        assert {module: module.training for module in wrapped.modules()} == modes
        with torch.no_grad():
            wrapped.eval()
            wrapped(batch(0))
            for module, mode in modes.items():
                module.training = mode
    assert {module: module.training for module in wrapped.modules()} == modes
    assert not [text for text in said if "written" in text]
    ema.close()


def test_a_train_method_that_raises_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks are on their way into the swap, so that it must not raise; and modes are put back."""
    monkeypatch.setattr(derived, "_warned", set())

    class Broken(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            if mode:
                raise NotImplementedError("exported")
            return super().train(mode)

    model = nn.Sequential(Broken(4, 4)).eval()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with warnings() as said, ema.average_parameters():
        pass
    assert len([text for text in said if "Broken.train() raised NotImplementedError" in text]) == 1
    assert not any(module.training for module in model.modules())


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("order", [("live", "average", "live"), ("average", "live", "average")])
def test_cached_parametrisations_follow_the_weights(order: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model: Any = nn.Linear(4, 2)
    parametrize.register_parametrization(model, "weight", Double())
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    step(model, ema)
    x = torch.randn(3, 4)
    state = ema.full_state_dict()
    average = x @ (2 * state["parametrizations.weight.original"]).T + state["bias"]
    outputs = {"live": model(x).detach(), "average": average}
    with torch.no_grad(), parametrize.cached():
        for which in order:
            if which == "live":
                found = model(x)
            else:
                with ema.average_parameters():
                    found = model(x)
            assert torch.allclose(found, outputs[which], atol=1e-6), which
        ema.copy_to()
        assert torch.allclose(model(x), outputs["average"], atol=1e-6)


@pytest.fixture
def freezing() -> Iterator[None]:
    """inductor's option, as TORCHINDUCTOR_FREEZING sets it."""
    import torch._dynamo
    import torch._inductor.config

    with torch._inductor.config.patch(freezing=True):
        yield


@pytest.mark.parametrize("how", ["config", "options", "method"])
def test_frozen_constants_are_compiled_anew(
    how: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Here only that everything compiled is dropped, each time; a real compilation takes a minute."""
    monkeypatch.setattr(derived, "_warned", set())
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    target: nn.Module = model
    if how == "config":
        request.getfixturevalue("freezing")
    elif how == "options":
        target = torch.compile(model, options={"freezing": True})  # type: ignore[assignment]
    else:
        model[0].compile(options={"freezing": True})
    ema = ShardedEMA(target, decay=0.5)
    ema.update()
    with warnings() as said:
        for visits in (1, 2):
            with ema.average_parameters():
                assert len(resets) == 2 * visits - 1
            assert len(resets) == 2 * visits
    assert len([text for text in said if "freezing=True" in text]) == 1


def test_a_compiled_model_without_frozen_constants_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    model = torch.compile(nn.Sequential(nn.Linear(4, 4)).eval())
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with ema.average_parameters():
        pass
    assert not resets
