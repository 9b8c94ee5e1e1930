"""``attach()`` counts each step that trains, once, and no other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from support.models import CASES, batch
from support.oracle import DenseAverage
from support.zero_models import make_engine
from support.zero_models import train as train_engine

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.optim.optimizer import Optimizer

from dist_ema import ShardedEMA
from dist_ema.engines.wrappers import is_training_step
from dist_ema.errors import EMAConfigError, EMAStateError

DECAY = 0.5


def in_two_groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The first stands still."""
    return [{"params": parameters[:1], "lr": 0.0}, {"params": parameters[1:]}]


Make = Callable[[Any], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "tensor-lr": lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(0.01)),
    "two-groups": lambda parameters: torch.optim.AdamW(in_two_groups(list(parameters)), lr=0.01),
    "stateless": partial(torch.optim.SGD, lr=0.01),
}


def train(model: nn.Module, optimizer: Optimizer, steps: range, after: Callable[[], object] | None = None) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


@pytest.mark.world_size()
@pytest.mark.parametrize(
    ("case", "world_size"), [("plain", 1), ("ddp", 2), ("fsdp1-full-orig", 2), ("fsdp2", 2), ("fsdp2-tp", 2)]
)
@pytest.mark.parametrize("optimizer", ["adamw", "stateless"])
def test_reading_a_fresh_optimizers_state_is_no_step(case: str, world_size: int, optimizer: str) -> None:
    """torch steps it with gradients of zero, to have a state: the first copy would be of untrained weights, and every
    later progress one too high."""
    model = CASES[case].model()
    adam = OPTIMIZERS[optimizer](model.parameters())
    ema = ShardedEMA(model, decay=DECAY)
    ema.attach(adam)
    steps: list[int] = []
    adam.register_step_post_hook(lambda *_: steps.append(1))
    get_optimizer_state_dict(model, adam)
    assert steps == [1], "torch does so no more: see is_training_step()"
    assert (ema.num_updates, ema.progress.batches) == (0, 0)
    train(model, adam, range(2))
    adam.zero_grad()
    model_state, adam_state = get_state_dict(model, adam)  # an optimizer without state is stepped each time
    set_state_dict(model, adam, model_state_dict=model_state, optim_state_dict=adam_state)
    assert (ema.num_updates, ema.progress.batches) == (2, 1)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loading_an_optimizers_state_is_no_step(optimizer: str, tmp_path: Path) -> None:
    """The average of a resumed run is that of the uninterrupted one, whatever is loaded first."""
    model = CASES["fsdp2"].model()
    adam = OPTIMIZERS[optimizer](model.parameters())
    train(model, adam, range(2))
    weights, state = get_state_dict(model, adam)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "dcp")

    model = CASES["fsdp2"].model()
    adam = OPTIMIZERS[optimizer](model.parameters())
    ema = ShardedEMA(model, decay=DECAY)
    ema.attach(adam)
    weights, state = get_state_dict(model, adam)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "dcp")
    set_state_dict(model, adam, model_state_dict=weights, optim_state_dict=state)
    set_optimizer_state_dict(model, adam, state)
    assert ema.num_updates == 0
    dense = DenseAverage({name for name, tensor in model.named_parameters() if tensor.requires_grad}, DECAY)

    def follow() -> None:
        dense.update({name: tensor.full_tensor().detach().clone() for name, tensor in model.named_parameters()})

    train(model, adam, range(2, 5), follow)
    average = ema.full_state_dict()
    if average:
        dense.check({name: average[name] for name in dense.average})
    assert (ema.num_updates, ema.progress.batches) == (3, 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_warm_up_step_with_a_learning_rate_of_zero_counts(optimizer: str) -> None:
    """It is a batch of the training clock, as for every other call of ``update()``."""
    model = nn.Linear(3, 2)
    adam = OPTIMIZERS[optimizer](model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, step / 2))
    ema = ShardedEMA(model, decay=DECAY)
    ema.attach(adam)
    assert adam.param_groups[-1]["lr"] == 0
    for _ in range(3):
        adam.zero_grad()
        model(torch.ones(3)).sum().backward()
        adam.step()
        schedule.step()
    assert (ema.num_updates, ema.progress.batches) == (3, 2)


def test_a_learning_rate_on_a_device_is_not_read() -> None:
    """It would wait for the device at every step. The meta device has nothing to read, and says so."""
    adam = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=torch.tensor(0.1))
    adam.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    assert is_training_step(adam)


class Projected(torch.optim.SGD):
    """Overrides ``step()`` as optimizers do that build on another: torch runs its hooks in both."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.clamp_(-0.1, 0.1)
        return loss


def test_an_optimizer_class_built_on_another_is_counted_once_and_when_it_is_done() -> None:
    """A half life half as long, and an average of weights that were never trained with."""
    model = nn.Linear(3, 2)
    torch.optim.SGD(model.parameters(), lr=0.1)  # only from now on torch runs the hooks in its step too
    optimizer = Projected(model.parameters(), lr=1.0)
    ema = ShardedEMA(model, decay=DECAY)
    ema.attach(optimizer)
    dense = DenseAverage({"weight", "bias"}, DECAY)

    def fails() -> float:
        raise RuntimeError("out of memory")

    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((3,), 1.0 - step)).sum().backward()
        optimizer.step()
        dense.update(model.state_dict())
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fails)
    assert ema.num_updates == 3
    dense.check(ema.full_state_dict())


class Wrapper:
    """Steps what it holds every second time."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.calls = 0

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        return groups

    def step(self) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            self.optimizer.step()


class Posing(Wrapper, torch.optim.SGD):  # type: ignore[misc]
    """One for which ``isinstance(..., Optimizer)`` holds, without being one: as Accelerate's and Lightning's are."""


@pytest.mark.parametrize("kinds", [[Wrapper], [Posing], [Posing, Wrapper], [Wrapper, Posing]], ids=str)
def test_wrappers_are_taken_off(kinds: list[type[Wrapper]]) -> None:
    model = nn.Linear(3, 2)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer: Any = inner
    for kind in kinds:
        outer = kind(outer)
    ema = ShardedEMA(model, decay=DECAY)
    handle = ema.attach(outer)
    model(torch.ones(3)).sum().backward()
    for _ in range(8):
        outer.step()
    assert ema.num_updates == 8 // 2 ** len(kinds)
    handle.remove()
    inner.step()
    assert ema.num_updates == 8 // 2 ** len(kinds)


class Lookahead(Wrapper):
    """In its usual form: changes the weights when what it holds has stepped."""

    def step(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.5)


def test_the_weights_are_those_after_the_wrappers_own_step() -> None:
    """The hook of the optimizer inside came before, and the average was one of weights that nobody has."""
    model = nn.Linear(3, 2)
    outer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    ema = ShardedEMA(model, decay=DECAY)
    handle = ema.attach(outer)
    dense = DenseAverage({"weight", "bias"}, DECAY)
    for _ in range(3):
        model(torch.ones(3)).sum().backward()
        outer.step()
        dense.update(model.state_dict())
    dense.check(ema.full_state_dict())
    outer.optimizer.step()  # by other hands
    dense.update(model.state_dict())
    dense.check(ema.full_state_dict())
    handle.remove()
    outer.step()
    assert ema.num_updates == 4


COMPILED: dict[str, Make] = {
    "adamw": partial(torch.optim.AdamW, lr=0.01),
    "built-on-another": partial(Projected, lr=1.0),
    "lookahead": lambda parameters: Lookahead(Projected(parameters, lr=0.1)),
}


@pytest.mark.parametrize("make", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("by_hand", [False, True])
def test_a_compiled_step_leaves_the_update_as_it_is(
    make: Make, by_hand: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """The compiler followed it into hundreds of our functions, compiled the arithmetic in fragments, and an optimizer
    class built on another was counted twice."""
    graphs: list[list[torch.fx.GraphModule]] = []

    def note(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs[-1].append(graph)
        return graph.forward

    for averaged in (False, True):
        torch._dynamo.reset()
        graphs.append([])
        model = nn.Linear(3, 2)
        torch.optim.SGD(model.parameters(), lr=0.1)  # only from now on torch runs the hooks of Projected too
        optimizer = make(model.parameters())
        ema, dense = ShardedEMA(model, decay=DECAY), DenseAverage({"weight", "bias"}, DECAY)

        def step(optimizer: Optimizer = optimizer, update: Callable[[], object] | None = None) -> None:
            optimizer.step()
            if update is not None:
                update()

        if averaged and not by_hand:
            ema.attach(optimizer)
        compiled = torch.compile(partial(step, update=ema.update if averaged and by_hand else None), backend=note)
        for number in range(4):
            model.zero_grad()
            model(torch.full((3,), 1.0 - number)).sum().backward()
            compiled()
            dense.update(model.state_dict())
        if averaged:
            assert ema.num_updates == 4
            dense.check(ema.full_state_dict())
    kinds = [[str(node.target) for graph in found for node in graph.graph.nodes] for found in graphs]
    assert not [target for target in kinds[1] if target not in kinds[0]]
    assert len(graphs[1]) <= len(graphs[0]) + 1
    assert not [warning.message for warning in recwarn if "Dynamo" in str(warning.message)]


def test_another_models_optimizer_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """The average of a generator counted the steps of the discriminator."""
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    ema = ShardedEMA(model, decay=DECAY)
    ema.attach(torch.optim.SGD(model.parameters(), lr=0.1)).remove()
    assert not caplog.messages
    ema.attach(torch.optim.SGD(other.parameters(), lr=0.1))
    assert "steps no parameter of the averaged model" in caplog.text


class Circle(Wrapper):
    """Holds itself."""

    param_groups: list[dict[str, Any]] = []  # type: ignore[assignment]  # noqa: RUF012


def test_what_steps_nothing_is_refused() -> None:
    """A scheduler and a wrapper around itself have an ``optimizer`` too."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    circle = Circle(None)
    circle.optimizer = circle
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for wrong in (scheduler, Wrapper(scheduler), Wrapper(None), circle):
        with pytest.raises(EMAConfigError, match=rf"attach\(optimizer={type(wrong).__name__}\)"):
            ShardedEMA(model).attach(wrong)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("stage", "dtype", "offload"),
    [(0, "fp32", False), (0, "bf16", False), (1, "bf16", False), (2, "fp32", True), (3, "bf16", False)],
)
def test_loading_a_deepspeed_checkpoint_is_no_step(stage: int, dtype: str, offload: bool, tmp_path: Path) -> None:
    """An optimizer that was stepped to be loaded would make the next micro-step count."""
    engine = make_engine(stage, dtype, offload=offload, gas=2)
    train_engine(engine, range(4))
    engine.save_checkpoint(str(tmp_path), tag="last")
    engine = make_engine(stage, dtype, offload=offload, gas=2)
    ema = ShardedEMA(engine, decay=DECAY)
    ema.attach(engine)
    engine.load_checkpoint(str(tmp_path), tag="last")
    if (stage, dtype) == (0, "fp32"):  # then it is a torch optimizer as any other
        set_optimizer_state_dict(
            engine.module, engine.optimizer, get_optimizer_state_dict(engine.module, engine.optimizer)
        )
    assert not ema.update()
    train_engine(engine, range(4, 5))
    assert ema.num_updates == 0
    train_engine(engine, range(5, 6))
    assert ema.num_updates == 1


def test_who_counts_himself_may_attach_several_optimizers_and_count_epochs() -> None:
    """A trainer with two optimizers, say: ``attach()`` alone would count a batch twice, and knows no epochs."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = ShardedEMA(model, half_life="1ep")
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    stepped: list[int] = []
    handles = [ema.attach(one, call=lambda: stepped.append(1)) for one in optimizers]
    model(torch.ones(2, 3)).sum().backward()
    for one in optimizers:
        one.step()
    assert (stepped, ema.num_updates) == ([1, 1], 0)
    assert ema.update(epochs=0.5)
    for handle in handles:
        handle.remove()
    optimizers[0].step()
    assert len(stepped) == 2


def test_a_compiled_step_does_not_trace_the_average() -> None:
    """It gave the same, in 276 frames and a quarter of a minute."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, offloaded = (ShardedEMA(model, decay=0.5, offload=offload) for offload in (None, "cpu"))
    for one in (ema, offloaded):
        one.attach(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
        step()
        optimizer.zero_grad()
    assert ema.num_updates == offloaded.num_updates == 3
    assert ema.fingerprint() == offloaded.fingerprint()
    assert counters["frames"]["total"] < 20


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full", "fsdp1-full-orig", "fsdp2", "hsdp", "fsdp2-tp"])
def test_an_optimizer_that_lacks_averaged_parameters_is_named(case: str, rank: int) -> None:
    """With Muon for matrices and AdamW for the rest, the first of them sees half of the weights before their step."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_ema").addHandler(handler)
    try:
        model = CASES[case].model()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ema = ShardedEMA(model, decay=DECAY)
        for optimizer in (torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(trained, 0.1)):
            ema.attach(optimizer).remove()
        assert said == []
        ema.attach(torch.optim.SGD(trained[1:], 0.1)).remove()
        if len(trained) > 1:  # else FSDP has made one flat parameter of all
            text = said.pop()
            assert "does not step 1 of the averaged parameters" in text and "steps last" in text
        left_out = ShardedEMA(model, decay=DECAY, include="one")
        left_out.attach(torch.optim.SGD(trained, 0.1)).remove()
        assert said == []
    finally:
        logging.getLogger("dist_ema").removeHandler(handler)


def test_several_optimizers_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    ema = ShardedEMA(model, decay=DECAY)
    first, second = (torch.optim.SGD(part.parameters(), lr=0.1) for part in model)
    with pytest.raises(EMAConfigError, match="of several optimizers, the one that steps last"):
        ema.attach([first, second])
    ema.attach(second)
    with pytest.raises(EMAStateError, match=r"counted twice.*the one that steps last.*remove\(\).*call="):
        ema.attach(first)


def test_weights_that_change_after_the_step_are_averaged_by_hand() -> None:
    """An attached average takes them before the change: a critic's clipped weights, or normalised ones."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ema = ShardedEMA(model, decay=DECAY)
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.clamp_(-0.05, 0.05)
        ema.update()  # as the docstring of attach() says
    assert "clipping" in (ShardedEMA.attach.__doc__ or "")
    assert max(value.abs().max().item() for value in ema.full_state_dict().values()) < 0.051
