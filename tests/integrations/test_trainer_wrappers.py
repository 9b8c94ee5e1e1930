"""What Accelerate, Fabric and Lightning put around models and optimizers: plain names, and real steps only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.models import batch, build
from support.oracle import DenseAverage

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA

pytest.importorskip("accelerate", reason="is in the extra 'test'")
pytest.importorskip("lightning", reason="is in the extra 'test'")

DECAY = 0.5


def names() -> dict[str, torch.Size]:
    """What the plain model's ``state_dict()`` has."""
    return {name: tensor.shape for name, tensor in build(scalar=False).state_dict().items()}


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model that is not sharded, or is an FSDP2 one. Collective."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


def check(ema: ShardedEMA, plain: nn.Module, dense: DenseAverage) -> None:
    state = ema.full_state_dict()
    if state:
        assert {name: tensor.shape for name, tensor in state.items()} == names()
        dense.check(state)


def average_of(plain: nn.Module) -> DenseAverage:
    return DenseAverage(
        {name for name, tensor in plain.named_parameters() if tensor.requires_grad} | {"head.weight"}, DECAY
    )


@contextmanager
def accelerate(**options: Any) -> Iterator[Any]:
    """An Accelerator of this test; its state is that of the process and would go on to the next."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._reset_state()

    reset()
    environment, threads = dict(os.environ), torch.get_num_threads()
    try:
        yield Accelerator(**options)
    finally:
        reset()
        torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


@pytest.mark.world_size(2)
def test_accelerate_with_gradient_accumulation() -> None:
    """Its optimizer is called at every micro-batch, and steps the torch optimizer at each second one."""
    from torch.nn.parallel import DistributedDataParallel

    with accelerate(cpu=True, gradient_accumulation_steps=2) as accelerator:
        plain = build(scalar=False)
        model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.01))
        assert isinstance(model, DistributedDataParallel)
        assert optimizer.optimizer is not optimizer
        ema, dense = ShardedEMA(model, decay=DECAY), average_of(plain)
        handle = ema.attach(optimizer)
        for step in range(6):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch(step)).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if step % 2:
                dense.update(full(plain))
        assert ema.num_updates == 3
        check(ema, plain, dense)
        handle.remove()


def test_accelerate_skips_a_step_that_overflows() -> None:
    """fp16 mixed precision: the scaler leaves out a step with infinite gradients."""
    with accelerate(cpu=True) as accelerator:
        plain = build(scalar=False)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.01))
        ema = ShardedEMA(model, decay=DECAY)
        ema.attach(optimizer)
        for factor in (1.0, float("inf"), 1.0):
            accelerator.backward(model(batch(0)).square().mean() * factor)
            optimizer.step()
            assert optimizer.step_was_skipped == (factor != 1.0)
            optimizer.zero_grad()
        assert ema.num_updates == 2


@pytest.mark.world_size(2)
def test_accelerate_under_deepspeed() -> None:
    """Its optimizer's ``step()`` does nothing: the engine steps in ``accelerator.backward()``."""
    from support.zero_models import reset_deepspeed

    from accelerate import DeepSpeedPlugin
    from accelerate.optimizer import AcceleratedOptimizer

    reset_deepspeed()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        with accelerate(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config)) as accelerator:
            plain = build(scalar=False)
            trained = [parameter for parameter in plain.parameters() if parameter.requires_grad]
            model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(trained, lr=0.01))
            assert type(model).__name__ == "DeepSpeedEngine" and isinstance(optimizer, AcceleratedOptimizer)
            ema, dense = ShardedEMA(model, decay=DECAY), average_of(plain)
            ema.attach(optimizer)
            for step in range(4):
                with accelerator.accumulate(model):
                    accelerator.backward(model(batch(step)).square().mean())
                    optimizer.step()
                    optimizer.zero_grad()
                if step % 2:
                    dense.update(full(plain))
            assert ema.num_updates == 2
            check(ema, plain, dense)
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def fabric(strategy: Any, world_size: int) -> Any:
    from lightning.fabric import Fabric

    warnings.filterwarnings("ignore", module="lightning")
    made = Fabric(accelerator="cpu", devices=world_size, strategy=strategy)
    made.launch()
    return made


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """For Fabric's ModelParallelStrategy: FSDP2."""
    for block in model.module:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(model, mesh=mesh["data_parallel"])


@pytest.mark.world_size()
@pytest.mark.parametrize(
    ("strategy", "world_size"), [("auto", 1), ("ddp", 2), ("fsdp2", 2), ("compiled", 1), ("ddp-compiled", 2)]
)
def test_fabric(strategy: str, world_size: int, tmp_path: Path) -> None:
    """Its module registers the model twice, its optimizer passes for a torch optimizer."""
    from lightning.fabric.strategies import ModelParallelStrategy

    made: Any = strategy.removesuffix("-compiled").replace("compiled", "auto")
    if strategy == "fsdp2":
        made = ModelParallelStrategy(parallelize_fn=shard, data_parallel_size=world_size, tensor_parallel_size=1)
    fab = fabric(made, world_size)
    plain = build(scalar=False)
    wanted: Any = torch.compile(plain, backend="eager") if "compiled" in strategy else plain
    if strategy == "fsdp2":  # wants the model first, since the parameters become others
        model = fab.setup_module(wanted)
        optimizer = fab.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
    else:
        model, optimizer = fab.setup(wanted, torch.optim.AdamW(plain.parameters(), lr=0.01))
    assert type(model).__name__ == "_FabricModule" and type(optimizer).__name__ == "FabricAdamW"
    ema, dense = ShardedEMA(model, decay=DECAY), average_of(plain)
    ema.attach(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        fab.backward(model(batch(step)).square().mean())
        optimizer.step()
        dense.update(full(plain))
    fab.save(tmp_path / "state", {"model": model, "optimizer": optimizer})
    assert ema.num_updates == 3
    check(ema, plain, dense)
    with ema.average_parameters():
        inside = model(batch(0))
    assert not torch.equal(inside, model(batch(0)))


@pytest.mark.world_size(1)
def test_fabric_loads_an_optimizer_without_a_step(tmp_path: Path) -> None:
    """Fabric's FSDP2 loads through torch.distributed.checkpoint, which steps a fresh optimizer."""
    from lightning.fabric.strategies import ModelParallelStrategy

    fab = fabric(ModelParallelStrategy(parallelize_fn=shard, data_parallel_size=1, tensor_parallel_size=1), 1)
    for resumed in (False, True):
        model = fab.setup_module(build(scalar=False))
        optimizer = fab.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=0.01))
        ema = ShardedEMA(model, decay=DECAY)
        ema.attach(optimizer)
        steps: list[int] = []
        optimizer.optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        if resumed:
            fab.load(tmp_path / "state", {"model": model, "optimizer": optimizer})
            assert (ema.num_updates, steps) == (0, [1]), "it does so no more"
        fab.backward(model(batch(0)).square().mean())
        optimizer.step()
        assert ema.num_updates == 1
        fab.save(tmp_path / "state", {"model": model, "optimizer": optimizer})


def test_a_model_that_holds_fabrics_modules() -> None:
    """Two parts that were set up by themselves."""
    fab = fabric("auto", 1)
    parts = nn.ModuleDict({"generator": fab.setup(nn.Linear(3, 2)), "critic": fab.setup(nn.Linear(2, 1))})
    ema = ShardedEMA(parts)
    assert list(ema.full_state_dict()) == ["generator.weight", "generator.bias", "critic.weight", "critic.bias"]


def test_lightnings_optimizer_under_manual_optimization(tmp_path: Path) -> None:
    """``self.optimizers()`` of a LightningModule gives a wrapper; inside a Trainer it goes through the strategy."""
    import lightning as L
    from torch.utils.data import DataLoader

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = build(scalar=False)
            self.ema: ShardedEMA | None = None
            self.dense = average_of(self.net)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

        def training_step(self, tokens: torch.Tensor, index: int) -> None:
            optimizer: Any = self.optimizers()
            if self.ema is None:
                self.ema = ShardedEMA(self.net, decay=DECAY)
                self.ema.attach(optimizer)
                assert type(optimizer).__name__ == "LightningAdamW"
            optimizer.zero_grad()
            self.manual_backward(self.net(tokens).square().mean())
            if index % 2:
                optimizer.step()
                self.dense.update(full(self.net))

    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(torch.stack([batch(step) for step in range(6)]), batch_size=None))
    assert module.ema is not None and module.ema.num_updates == 3
    check(module.ema, module.net, module.dense)
