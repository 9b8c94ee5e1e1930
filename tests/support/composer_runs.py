"""Seeded runs of Composer's trainer on a small model, three batches an epoch, and what happened in them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from support import composer_stubs

composer_stubs.import_composer()
os.environ.setdefault("NODE_RANK", "0")  # Composer's own launcher sets it
warnings.filterwarnings("ignore", module="composer")

import composer.core.state  # noqa: E402
import composer.trainer.trainer  # noqa: E402
import torch  # noqa: E402
from composer import ComposerModel, Trainer  # noqa: E402
from composer.core import Algorithm, Callback, Event, State  # noqa: E402
from composer.loggers import InMemoryLogger, Logger  # noqa: E402
from composer.utils import dist  # noqa: E402
from composer.utils.parallelism import FSDP2Config  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # noqa: E402
from torch.distributed.fsdp import FSDPModule  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from torchmetrics import MeanMetric, Metric  # noqa: E402

# It asks pip and the processor, which takes longer than a run.
composer.core.state.get_composer_env_dict = lambda: {"composer_version": "0", "composer_commit_hash": ""}
composer.trainer.trainer.get_composer_env_dict = composer.core.state.get_composer_env_dict

Weights = dict[str, Tensor]
FEATURES, CLASSES, SAMPLES = 5, 3, 24


class Loss(MeanMetric):
    """The mean loss of an evaluation."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:  # type: ignore[override]
        super().update(nn.functional.cross_entropy(outputs, targets), len(targets))


class Net(ComposerModel):  # type: ignore[misc]
    """Uneven shards (5 rows on 2 ranks), buffers that are averaged and one that is counted, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(FEATURES, 5)
        self.norm = nn.BatchNorm1d(5)
        self.frozen = nn.Linear(5, 5)
        self.last = nn.Linear(5, CLASSES)
        self.frozen.requires_grad_(False)
        self.metric = Loss()
        for module in (self.first, self.last):
            module._fsdp_wrap = True

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.last(self.frozen(torch.relu(self.norm(self.first(batch[0])))))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs, batch[1])

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else {"Loss": self.metric}

    def update_metric(self, batch: Any, outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch[1])


TRAINED = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}
AVERAGED = TRAINED | {"norm.running_mean", "norm.running_var"}


def samples(seed: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(SAMPLES, FEATURES, generator=generator)
    return TensorDataset(features.to(dtype), torch.randint(CLASSES, (SAMPLES,), generator=generator))


def loader(seed: int, dtype: torch.dtype = torch.float32) -> DataLoader[Any]:
    dataset = samples(seed, dtype)
    return DataLoader(dataset, batch_size=8 // dist.get_world_size(), sampler=dist.get_sampler(dataset, shuffle=False))


class Watch(Callback):  # type: ignore[misc]
    """What the model holds at events, whole, after the algorithms had their turn."""

    def __init__(self, *events: Event) -> None:
        self.events = events
        self.seen: list[tuple[str, int, Weights]] = []

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event in self.events:
            self.seen.append((event.value, int(state.timestamp.batch), whole(state.model)))

    def at(self, event: Event) -> list[Weights]:
        return [weights for name, _, weights in self.seen if name == event.value]


def whole(model: nn.Module) -> Weights:
    """Full CPU tensors by canonical name, on every rank."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.detach().cpu().clone() for name, value in state.items() if isinstance(value, Tensor)}


def trainer(
    *algorithms: Algorithm,
    callbacks: Sequence[Callback] = (),
    duration: str = "3ep",
    model: nn.Module | None = None,
    fsdp: str | None = None,
    **options: Any,
) -> Trainer:
    """One that has not run yet; ``fsdp`` is the kind of checkpoints."""
    model = Net() if model is None else model
    if fsdp is not None:
        options["parallelism_config"] = {"fsdp": FSDP2Config(state_dict_type=fsdp)}
    options.setdefault("eval_dataloader", loader(2))
    options.setdefault("train_dataloader", loader(1))
    options = {"save_latest_filename": None, "save_overwrite": True} | options
    return Trainer(
        model=model,
        optimizers=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.5),
        max_duration=duration,
        algorithms=list(algorithms),
        callbacks=list(callbacks),
        loggers=[InMemoryLogger()],
        progress_bar=False,
        device="cpu",
        seed=7,
        **options,
    )


def wrapping(model: nn.Module) -> str:
    """What really wraps it."""
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "fsdp2"
    return "ddp" if isinstance(model, DistributedDataParallel) else "none"


def losses(run: Trainer) -> list[float]:
    """What the trainer logged of its evaluations."""
    return [float(value) for _, value in run.logger.destinations[0].data.get("metrics/eval/Loss", [])]


def loss_of(weights: Mapping[str, Tensor]) -> float:
    """What an evaluation of these weights gives."""
    model = Net()
    model.load_state_dict({name: weights[name].to(value.dtype) for name, value in model.state_dict().items()})
    model.eval()
    features, targets = samples(2).tensors
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model((features, targets)), targets))


def differ(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest difference between tensors of floating point."""
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    pairs = [(value.double(), second[name].double()) for name, value in first.items() if value.is_floating_point()]
    return max(float((one - other).abs().max()) for one, other in pairs)


def of_rank_0(steps: list[Weights]) -> list[Weights]:
    """Theirs: buffers, which each rank has of its own, are averaged as rank 0 has them."""
    told = [steps]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit; on the other ranks without the statistics, which a load gives them from rank 0."""
    if dist.get_global_rank():
        first, second = ({k: v for k, v in one.items() if "running" not in k} for one in (first, second))
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
