"""The guide's recipe in a loop built as torchtitan's trainer is, and torchtitan's own trainer where it is installed.

The parts are as torchtitan 0.3.0 has them: an optimizers container that is an Optimizer itself and steps several, a
checkpointer with a dict of states in which the model is flattened, a validator that is called by the trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.models import batch, build
from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema.errors import EMAConfigError
from dist_ema.importers.torchtitan import options_of
from dist_ema.schedules import HalfLifeFraction

FRACTION = 0.5
OnRanks = Callable[..., None]


class OptimizersContainer(torch.optim.Optimizer, Stateful):
    """Matrices and the rest have an optimizer each; hooks are the container's."""

    def __init__(self, model: nn.Module) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        others = [parameter for parameter in trained if parameter.dim() <= 1]
        self.model = model
        self.optimizers = [torch.optim.AdamW(matrices, lr=0.01), torch.optim.AdamW(others, lr=0.01, weight_decay=0.0)]
        super().__init__(trained, {})

    def step(self, closure: None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {str(index): get_optimizer_state_dict(self.model, one) for index, one in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for index, one in enumerate(self.optimizers):
            set_optimizer_state_dict(self.model, one, state_dict[str(index)])


class Checkpointer:
    """The model's tensors by their own names, all else under its key."""

    def __init__(self, model: nn.Module, states: dict[str, Any], folder: Path) -> None:
        self.model, self.states, self.folder = model, states, folder

    def _flat(self) -> dict[str, Any]:
        return {**self.states, **self.model.state_dict()}

    def save(self, step: int) -> None:
        dcp.save(self._flat(), checkpoint_id=str(self.folder / f"step-{step}"))

    def maybe_wait_for_staging(self) -> None:
        """This one has copied everything when ``save()`` returns."""

    def load(self, step: int) -> None:
        states = self._flat()
        dcp.load(states, checkpoint_id=str(self.folder / f"step-{step}"))
        self.model.load_state_dict(states, strict=False)


class Trainer(Stateful):
    """Steps, validates, saves."""

    def __init__(self, folder: Path) -> None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        with torch.device("meta"):
            model = build(scalar=False)
        for block in model.module:
            fully_shard(block, mesh=mesh)
        self.model_parts = [fully_shard(model, mesh=mesh)]
        self.optimizers = OptimizersContainer(model)
        model.to_empty(device="cpu")
        full = build(scalar=False).state_dict()
        with torch.no_grad():
            for name, value in [*model.state_dict().items(), ("cache", model.cache)]:
                whole = full.get(name, torch.ones(4))
                if hasattr(value, "full_tensor"):
                    whole = dist.tensor.distribute_tensor(whole, value.device_mesh, value.placements)
                value.copy_(whole)
        self.step = 0
        self.checkpointer = Checkpointer(model, {"optimizer": self.optimizers, "train_state": self}, folder)
        self.after_step: Callable[[], object] = lambda: None

    def train(self, until: int, save_at: int | None = None) -> None:
        while self.step < until:
            self.step += 1
            self.optimizers.zero_grad()
            self.model_parts[0](batch(self.step)).square().mean().backward()
            self.optimizers.step()
            if self.step == save_at:
                self.checkpointer.save(self.step)
            self.after_step()

    def validate(self) -> float:
        model = self.model_parts[0].eval()
        with torch.no_grad():
            loss = float(model(batch(100)).square().mean())
        model.train()
        return loss

    def weights(self) -> dict[str, Tensor]:
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone()
            for name, value in self.model_parts[0].state_dict().items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"step": torch.tensor(self.step)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = int(state_dict["step"])


def add_average(trainer: Any) -> ShardedEMA:
    """The recipe of the guide."""
    ema = ShardedEMA(trainer.model_parts[0], schedule=HalfLifeFraction(FRACTION))
    ema.attach(trainer.optimizers)
    trainer.checkpointer.states["ema"] = ema
    validate = trainer.validate

    def validate_average() -> float:
        trainer.checkpointer.maybe_wait_for_staging()
        with ema.average_parameters():
            return float(validate())

    trainer.validate = validate_average
    return ema


class Dense(DenseAverage):
    """With torchtitan's growing half life."""

    def __init__(self) -> None:
        named = build(scalar=False).named_parameters()
        super().__init__({name for name, value in named if value.requires_grad} | {"head.weight"}, 0.0)
        self.n = 0

    def update(self, weights: Any) -> None:
        self.decay = 2.0 ** (-1.0 / (FRACTION * self.n)) if self.n else 0.0
        super().update(weights)
        self.n += 1


def train(folder: Path) -> None:
    bare = Trainer(folder)
    bare.train(8)
    trainer = Trainer(folder)
    ema, dense, digests = add_average(trainer), Dense(), {}

    def note() -> None:
        dense.update(trainer.weights())
        digests[trainer.step] = ema.fingerprint()

    trainer.after_step = note
    trainer.train(8, save_at=4)
    weights, without = trainer.weights(), bare.weights()
    assert all(torch.equal(weights[name], without[name]) for name in weights), "the average has changed the training"
    assert ema.num_updates == 8
    full = ema.full_state_dict()
    plain = build(scalar=False).eval()
    plain.load_state_dict({name: value.to(weights[name].dtype) for name, value in dense.average.items()})
    with torch.no_grad():
        expected = float(plain(batch(100)).square().mean())
    assert trainer.validate() == pytest.approx(expected, rel=1e-5)
    assert trainer.validate() != pytest.approx(bare.validate(), rel=1e-4)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.weights().items())
    if dist.get_rank() == 0:
        dense.check(full)
        torch.save((digests, weights), folder / "seen.pt")


def resume(folder: Path) -> None:
    digests, weights = torch.load(folder / "seen.pt")
    trainer = Trainer(folder)
    ema = add_average(trainer)
    trainer.checkpointer.load(4)
    assert trainer.step == 4 and ema.num_updates == 4
    assert ema.fingerprint() == digests[4]
    trainer.train(8)
    assert ema.num_updates == 8
    if dist.get_world_size() == 2:
        assert ema.fingerprint() == digests[8]
        assert all(torch.equal(value, weights[name]) for name, value in trainer.weights().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("titan")


def test_the_recipe_steps_validates_and_resumes_at_any_world_size(folder: Path, on_ranks: OnRanks) -> None:
    on_ranks(train, 2, folder=folder)
    for world_size in (2, 1, 3):
        on_ranks(resume, world_size, folder=folder)


# The config of torchtitan's own EMA.


@dataclass
class Config:
    """As in torchtitan's components/ema.py, EMAOptimizersContainer.Config (main branch; 0.3.0 has none)."""

    enable: bool = False
    decay: float | None = None
    half_life_fraction: float = 0.05
    start_step: int = 0
    step_bias: int = 0
    update_every_n_steps: int = 1
    offload_to_cpu: bool = False


def test_the_config_of_its_own_ema_is_read() -> None:
    assert options_of(Config()) == {"schedule": HalfLifeFraction(0.05), "update_interval": "1ba", "ema_start": "0ba"}
    options = options_of(Config(decay=0.99, start_step=20, update_every_n_steps=5, offload_to_cpu=True))
    assert options == {"smoothing": 0.99, "update_interval": "5ba", "ema_start": "20ba", "offload": "cpu"}
    ShardedEMA(nn.Linear(2, 2), **options)
    with pytest.raises(EMAConfigError, match="step_bias=3"):
        options_of(Config(step_bias=3))
    with pytest.raises(EMAConfigError, match="half_life_fraction"):
        options_of(object())


def their_average(config: Config, weights: list[float], start: float) -> Iterator[float]:
    """What torchtitan computes, step by step, in plain floats."""
    average = start
    for step, weight in enumerate(weights, start=1):
        elapsed = step - config.start_step
        if elapsed >= 0 and elapsed % config.update_every_n_steps == 0:
            n = max((elapsed + config.step_bias) // config.update_every_n_steps, 1)
            decay = config.decay if config.decay is not None else 2.0 ** (-1.0 / (config.half_life_fraction * n))
            average = decay * average + (1 - decay) * weight
        yield average


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        (Config(start_step=3), 1e-6),  # the first weights weigh 2 ** -20 there, and nothing here
        (Config(start_step=4, decay=0.5), 1e-6),
        (Config(), 2e-3),  # n is ahead by one
        (Config(start_step=10, update_every_n_steps=5, half_life_fraction=0.2), 5e-2),  # per batch here
    ],
)
def test_the_average_is_theirs(config: Config, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = (1 + 0.01 * torch.randn(200, generator=generator).cumsum(0)).tolist()
    model = nn.Linear(1, 1, bias=False)
    ema = ShardedEMA(model, **options_of(config))
    theirs = list(their_average(config, weights, 1.0))
    for step, weight in enumerate(weights, start=1):
        with torch.no_grad():
            model.weight.fill_(weight)
        ema.update()
        if step == config.start_step:
            assert float(ema.full_state_dict()["weight"]) == pytest.approx(weight), "ours copies, theirs blends in"
    assert float(ema.full_state_dict()["weight"]) == pytest.approx(theirs[-1], rel=tolerance)
