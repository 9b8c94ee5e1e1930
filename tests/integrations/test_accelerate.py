"""``prepare_ema()`` under Accelerate: what it counts, saves, loads and refuses, in real training loops."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import batch, build
from oracle import DenseAverage
from torch import Tensor, nn

from dist_ema import ShardedEMA
from dist_ema.errors import CheckpointError, EMAConfigError, EMAEngineError, EMAStateError

pytest.importorskip("accelerate", reason="is in the extra 'accelerate'")

DECAY = 0.5
STRATEGIES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero2": 2, "zero3": 2}
OnRanks = Callable[..., None]


# One run under each strategy, which the first tests look at.


@contextmanager
def accelerator_of(strategy: str, **options: Any) -> Iterator[Any]:
    """An Accelerator of this test; its state is that of the process and would go on to the next."""
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        if strategy == "single":
            os.environ.pop("LOCAL_RANK", None)  # what Accelerate takes for several processes
        PartialState(cpu=True)  # here, since Accelerator(cpu=True) would drop DeepSpeed
        if strategy == "fsdp2":
            # On several CPUs Accelerate drops the plugin and wraps the model in DDP. Told that these are GPUs, it
            # calls fully_shard() on them.
            PartialState._shared_state["distributed_type"] = "MULTI_GPU"
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=100, state_dict_type="SHARDED_STATE_DICT"
            )
        elif strategy.startswith("zero"):
            from zero_models import reset_deepspeed

            reset_deepspeed()
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
            config = {
                "train_micro_batch_size_per_gpu": 4,
                "gradient_accumulation_steps": 2,
                "zero_optimization": {"stage": int(strategy[-1]), "stage3_param_persistence_threshold": 20},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
            options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
        yield Accelerator(gradient_accumulation_steps=2, **options)
    finally:
        reset()
        torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def prepared(accelerator: Any, strategy: str) -> tuple[Any, Any]:
    """The uneven model, a tied pair and a frozen layer in it, wrapped as the strategy says, and its optimizer."""
    plain = build(scalar=False)
    trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    if strategy == "fsdp2":
        trained = list(plain.parameters())
    model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(trained, lr=0.01))
    kinds = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPUneven", "single": "Uneven"}
    assert type(model).__name__ == kinds.get(strategy, "DeepSpeedEngine"), "Accelerate has dropped the strategy"
    if strategy.startswith("zero"):
        assert model.zero_optimization_stage() == int(strategy[-1])
    return model, optimizer


def full(model: Any) -> dict[str, Tensor]:
    """The live weights by their plain names, whole. Collective."""
    inner = getattr(model, "module", model) if type(model).__name__ != "FSDPUneven" else model
    if type(inner).__name__ == "ModuleList":  # the model's own attribute of that name
        inner = model
    parameters = [value for value in inner.parameters() if hasattr(value, "ds_id")]
    if parameters:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            return {name: value.detach().clone() for name, value in inner.state_dict().items()}
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in inner.state_dict().items()
    }


def micro_step(accelerator: Any, model: Any, optimizer: Any, step: int) -> None:
    """Half of a step: gradients are accumulated over two."""
    with accelerator.accumulate(model):
        accelerator.backward(model(batch(step)).square().mean())
        optimizer.step()
        optimizer.zero_grad()


def evaluate(accelerator: Any, model: Any) -> float:
    """A metric as scripts for Accelerate log it."""
    model.eval()
    with torch.no_grad():
        losses = [model(batch(100 + index)).square().mean().reshape(1) for index in range(2)]
    model.train()
    return float(accelerator.gather_for_metrics(torch.cat(losses)).mean())


def metric_of(weights: dict[str, Tensor]) -> float:
    """The same of a plain model."""
    plain = build(scalar=False).eval()
    plain.load_state_dict({name: value.to(plain.state_dict()[name].dtype) for name, value in weights.items()})
    with torch.no_grad():
        return float(torch.stack([plain(batch(100 + index)).square().mean() for index in range(2)]).mean())


def real_run(strategy: str, shelf: Path) -> None:
    """Trains without an average, with one, and from the middle of that; leaves what it saw on the shelf."""
    from dist_ema.integrations.accelerate import prepare_ema

    seen: dict[str, Any] = {}
    with accelerator_of(strategy) as accelerator:
        model, optimizer = prepared(accelerator, strategy)
        for step in range(12):
            micro_step(accelerator, model, optimizer, step)
        seen["without"] = full(model)
    trained = {name for name, value in build(scalar=False).named_parameters() if value.requires_grad} | {"head.weight"}
    with accelerator_of(strategy) as accelerator:
        model, optimizer = prepared(accelerator, strategy)
        ema, dense = prepare_ema(accelerator, model, optimizer, decay=DECAY), DenseAverage(trained, DECAY)
        slow = prepare_ema(accelerator, model, optimizer, decay=0.9, name="slow")
        seen["before"] = evaluate(accelerator, model)
        with ema.average_parameters():
            seen["before inside"] = evaluate(accelerator, model)
        for step in range(12):
            micro_step(accelerator, model, optimizer, step)
            if step % 2:
                dense.update(full(model))
            if step == 5:
                accelerator.save_state(str(shelf / "middle"))
                seen["middle"] = ema.fingerprint(), slow.fingerprint()
        seen["updates"], seen["average"], seen["dense"] = ema.num_updates, ema.full_state_dict(), dense.average
        seen["live"], seen["live metric"] = full(model), evaluate(accelerator, model)
        with ema.average_parameters():
            seen["metric"] = evaluate(accelerator, model)
        with pytest.raises(ZeroDivisionError), ema.average_parameters():
            evaluate(accelerator, model)
            1 / 0
        seen["after exception"] = full(model)
        seen["end"] = ema.fingerprint(), slow.fingerprint()
    with accelerator_of(strategy) as accelerator:
        model, optimizer = prepared(accelerator, strategy)
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        slow = prepare_ema(accelerator, model, optimizer, decay=0.9, name="slow")
        micro_step(accelerator, model, optimizer, 50)  # something to be overwritten
        micro_step(accelerator, model, optimizer, 51)
        accelerator.load_state(str(shelf / "middle"))
        seen["loaded"], seen["updates loaded"] = (ema.fingerprint(), slow.fingerprint()), ema.num_updates
        for step in range(6, 12):
            micro_step(accelerator, model, optimizer, step)
        seen["resumed"], seen["resumed end"] = full(model), (ema.fingerprint(), slow.fingerprint())
    if dist.get_rank() == 0:
        torch.save(seen, shelf / "seen.pt")


_SHELVES: dict[str, Path] = {}


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def shelf(strategy: str, on_ranks: OnRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the strategy's one run has left its checkpoint and what it saw."""
    if strategy not in _SHELVES:
        shelf = tmp_path_factory.mktemp(strategy)
        on_ranks(real_run, STRATEGIES[strategy], strategy=strategy, shelf=shelf)
        _SHELVES[strategy] = shelf
    return _SHELVES[strategy]


@pytest.fixture
def seen(shelf: Path) -> dict[str, Any]:
    return dict(torch.load(shelf / "seen.pt"))


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_each_real_step_is_averaged_and_no_micro_step(seen: dict[str, Any]) -> None:
    """Twelve micro-batches of two each are six steps."""
    assert seen["updates"] == 6
    dense = DenseAverage(set(), DECAY)
    dense.average = seen["dense"]
    dense.check(seen["average"])


def test_the_logged_metric_is_the_averages(seen: dict[str, Any]) -> None:
    assert seen["metric"] == pytest.approx(metric_of(seen["dense"]), rel=1e-5)
    assert seen["live metric"] == pytest.approx(metric_of(seen["live"]), rel=1e-5)
    assert seen["metric"] != pytest.approx(seen["live metric"], rel=1e-4)
    assert seen["before"] == seen["before inside"], "before training the average is the model"


def test_training_is_bit_for_bit_that_without_an_average(seen: dict[str, Any]) -> None:
    same(seen["live"], seen["without"])


def test_an_exception_in_an_evaluation_leaves_the_live_weights(seen: dict[str, Any]) -> None:
    same(seen["after exception"], seen["live"])


def test_resuming_in_the_middle_is_as_no_interruption(seen: dict[str, Any]) -> None:
    assert seen["loaded"] == seen["middle"] and seen["updates loaded"] == 3
    assert seen["middle"][0] != seen["middle"][1]
    same(seen["resumed"], seen["live"])
    assert seen["resumed end"] == seen["end"]
