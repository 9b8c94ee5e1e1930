"""``prepare_ema()`` under Accelerate: what it counts, saves, loads and refuses, in real training loops."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.models import batch, build
from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import ShardedEMA, verify_checkpoint
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
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["Block"],
                state_dict_type="SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )
        elif strategy.startswith("zero"):
            from support.zero_models import reset_deepspeed

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
            raise ZeroDivisionError
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


def load_alone(strategy: str, shelf: Path) -> None:
    """In one process, what two have saved."""
    from dist_ema.integrations.accelerate import prepare_ema

    seen = torch.load(shelf / "seen.pt")
    with accelerator_of(strategy) as accelerator:
        model, optimizer = prepared(accelerator, strategy)
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        slow = prepare_ema(accelerator, model, optimizer, decay=0.9, name="slow")
        if strategy.startswith("zero"):  # DeepSpeed's own files are for two processes
            ema.load(shelf / "middle" / "ema"), slow.load(shelf / "middle" / "slow")
        else:
            accelerator.load_state(str(shelf / "middle"))
        assert (ema.fingerprint(), slow.fingerprint()) == seen["middle"]
        micro_step(accelerator, model, optimizer, 0)
        micro_step(accelerator, model, optimizer, 1)
        assert ema.num_updates == 4


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_another_world_size_has_the_same_average(strategy: str, shelf: Path, on_ranks: OnRanks) -> None:
    on_ranks(load_alone, 1, strategy=strategy, shelf=shelf)


@pytest.mark.parametrize("strategy", ["ddp"])
def test_another_strategy_loads_the_average(strategy: str, shelf: Path) -> None:
    ema = ShardedEMA(build(scalar=False), decay=DECAY)
    ema.load(shelf / "middle" / "ema")
    assert ema.fingerprint() == torch.load(shelf / "seen.pt")["middle"][0]


# Steps that are none.


@pytest.mark.world_size(1)
def test_a_step_skipped_for_overflow_is_not_counted() -> None:
    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:
        accelerator.gradient_accumulation_steps = 1
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        model, optimizer = prepared(accelerator, "single")
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        for factor in (1.0, float("inf"), 1.0):
            accelerator.backward(model(batch(0)).square().mean() * factor)
            optimizer.step()
            assert optimizer.step_was_skipped == (factor != 1.0)
            optimizer.zero_grad()
        assert ema.num_updates == 2


# Checkpoints.


@pytest.mark.world_size(2)
def test_rotation_takes_the_averages_along(tmp_path: Path) -> None:
    """Accelerate names the folders and removes old ones; load_state() without a path takes the last."""
    from accelerate.utils import ProjectConfiguration

    from dist_ema.integrations.accelerate import prepare_ema

    folder = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    project = ProjectConfiguration(folder[0], automatic_checkpoint_naming=True, total_limit=2)
    with accelerator_of("ddp", project_config=project) as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        for step in range(8):
            micro_step(accelerator, model, optimizer, step)
            if step % 2:
                accelerator.save_state()
                saved = ema.fingerprint()
        micro_step(accelerator, model, optimizer, 8)
        micro_step(accelerator, model, optimizer, 9)
        accelerator.load_state()
        assert ema.fingerprint() == saved and ema.num_updates == 4
        accelerator.wait_for_everyone()
        kept = sorted(path.relative_to(folder[0]).as_posix() for path in Path(folder[0]).glob("checkpoints/*/ema"))
        assert kept == ["checkpoints/checkpoint_2/ema", "checkpoints/checkpoint_3/ema"]


class Stepping(torch.optim.SGD):
    """Steps when its state is loaded, as FSDP2's way of loading an optimizer does."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        self.step()
        self.zero_grad()


@pytest.mark.world_size(1)
@pytest.mark.parametrize("by_class", [False, True])
def test_the_average_is_loaded_after_the_optimizer(by_class: bool, tmp_path: Path) -> None:
    """A step that an optimizer makes while it is loaded would move an average that is there already."""
    from accelerate import Accelerator

    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:
        plain = build(scalar=False, frozen=False)
        model, optimizer = accelerator.prepare(plain, Stepping(plain.parameters(), lr=0.1))
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        micro_step(accelerator, model, optimizer, 0)
        micro_step(accelerator, model, optimizer, 1)
        if by_class:  # passes the object's method by; the step comes later there, and is averaged
            Accelerator.save_state(accelerator, str(tmp_path / "state"))
            Accelerator.load_state(accelerator, str(tmp_path / "state"))
            assert ema.num_updates == 2
            return
        accelerator.save_state(str(tmp_path / "state"))
        saved = ema.fingerprint()
        accelerator.load_state(str(tmp_path / "state"))
        assert ema.fingerprint() == saved and ema.num_updates == 1


@pytest.mark.world_size(2)
def test_a_checkpoint_without_the_average(tmp_path: Path) -> None:
    """An error that names it, on both ranks and before anything is loaded; or a new start from the loaded weights."""
    from dist_ema.integrations.accelerate import prepare_ema

    folder = [str(tmp_path / "state")]
    dist.broadcast_object_list(folder)
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        accelerator.save_state(folder[0])
        saved = full(model)
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY, name="fast")
        micro_step(accelerator, model, optimizer, 0)
        micro_step(accelerator, model, optimizer, 1)
        before = full(model)
        with pytest.raises(CheckpointError, match=r"no average 'fast': .* missing='start'"):
            accelerator.load_state(folder[0])
        same(full(model), before)
        assert ema.num_updates == 1
    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY, missing="start")
        micro_step(accelerator, model, optimizer, 0)
        micro_step(accelerator, model, optimizer, 1)
        accelerator.load_state(folder[0])
        assert ema.num_updates == 0
        same(full(model), saved)
        state = ema.full_state_dict()
        assert all(torch.equal(state[name], saved[name].float()) for name in state if saved[name].is_floating_point())


@pytest.mark.world_size(2)
def test_a_save_by_the_main_process_alone_leaves_no_half_of_a_checkpoint(rank: int, tmp_path: Path) -> None:
    """Scripts of diffusers save ``if accelerator.is_main_process``, and resume from the folder of the largest step."""
    from dist_ema.integrations.accelerate import prepare_ema

    # Undone here: the fixture would undo it in the process that runs pytest, and not in this worker of the pool.
    with pytest.MonkeyPatch.context() as patch, accelerator_of("ddp") as accelerator:
        patch.setattr(ShardedEMA, "save", functools.partialmethod(ShardedEMA.save, timeout=1))
        model, optimizer = prepared(accelerator, "ddp")
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        micro_step(accelerator, model, optimizer, 0)
        micro_step(accelerator, model, optimizer, 1)
        ema.wait()
        if accelerator.is_main_process:
            with pytest.raises(CheckpointError, match=r"for rank 1 of 2 ranks\. Every rank must make this call"):
                accelerator.save_state(str(tmp_path / "checkpoint-2"))
            assert list(tmp_path.iterdir()) == []
        dist.barrier()
        accelerator.save_state(str(tmp_path / "checkpoint-2"))  # as the error and the guide say
        dist.barrier()
        assert verify_checkpoint(tmp_path / "checkpoint-2" / "ema").seen.updates == 1


@pytest.mark.world_size(1)
def test_checkpoints_are_refused_inside_an_evaluation(tmp_path: Path) -> None:
    """Accelerate would write the average as the weights that train, or load those into the average's place."""
    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:
        model, optimizer = prepared(accelerator, "single")
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        micro_step(accelerator, model, optimizer, 0)
        micro_step(accelerator, model, optimizer, 1)
        accelerator.save_state(str(tmp_path / "good"))
        with ema.average_parameters():
            with pytest.raises(EMAStateError, match=r"accelerator.save_state\(\) inside average_parameters"):
                accelerator.save_state(str(tmp_path / "bad"))
            with pytest.raises(EMAStateError, match=r"accelerator.load_state\(\) inside average_parameters"):
                accelerator.load_state(str(tmp_path / "good"))
        assert not (tmp_path / "bad").exists()
        accelerator.save_state(str(tmp_path / "bad"))


@pytest.mark.world_size(1)
def test_register_for_checkpointing_is_refused(tmp_path: Path) -> None:
    """It would pickle what rank 0 has."""
    from accelerate import Accelerator

    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:
        model, optimizer = prepared(accelerator, "single")
        ema = prepare_ema(accelerator, model, optimizer, decay=DECAY)
        with pytest.raises(EMAConfigError, match="pickle the part of the average that rank 0 has"):
            accelerator.register_for_checkpointing(ema)
        assert accelerator._custom_objects == []
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer.optimizer)
        accelerator.register_for_checkpointing(scheduler)  # anything else is as ever
        accelerator.save_state(str(tmp_path / "state"))
        Accelerator.register_for_checkpointing(accelerator, ema)  # behind our back
        with pytest.raises(EMAConfigError, match="Leave the call out"):
            accelerator.save_state(str(tmp_path / "other"))
        assert not (tmp_path / "other").exists()


# What is refused, and what is let go.


def test_without_accelerate_the_import_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "dist_ema.integrations.accelerate", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'dist_ema\[accelerate\]'"):
        importlib.import_module("dist_ema.integrations.accelerate")


@pytest.mark.world_size(1)
def test_bad_arguments_name_what_to_do() -> None:
    from accelerate.utils import DistributedType

    from dist_ema.integrations import accelerate as ours
    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:
        model, optimizer = prepared(accelerator, "single")
        prepare_ema(accelerator, model, optimizer, decay=DECAY)
        hooks = len(accelerator._save_model_state_pre_hook)
        other = build(scalar=False)
        for arguments, message in (
            ((accelerator, other), "not prepared by this accelerator"),
            ((accelerator, nn.Sequential(model)), "not prepared by this accelerator"),
            ((accelerator, model, optimizer.optimizer), "optimizer=AdamW: it was not prepared"),
            ((model, optimizer), "accelerator=Uneven"),
        ):
            with pytest.raises(EMAConfigError, match=message):
                prepare_ema(*arguments, decay=DECAY, name="other")
        for options, message in (
            ({}, "has an average of that name"),
            ({"name": "a/b"}, "allowed are letters"),
            ({"name": "a.b"}, "allowed are letters"),
            ({"name": "x", "missing": "ignore"}, "allowed are 'error', 'start'"),
            ({"name": "x", "decay": 2.0}, "decay"),
            ({"name": "x", "half_life": "10tok"}, r"count in tok.*leave optimizer out, and call ema.update\("),
            ({"name": "x", "ema_start": "0.1dur", "decay": DECAY}, "max_duration"),
        ):
            with pytest.raises(EMAConfigError, match=message):
                prepare_ema(accelerator, model, optimizer, **options)
        assert len(accelerator._save_model_state_pre_hook) == hooks
        prepare_ema(accelerator, model, name="x", half_life="10tok").update(tokens=3)
        version, ours.accelerate.__version__ = ours.accelerate.__version__, "1.2.1"
        try:
            with pytest.raises(EMAConfigError, match=r"accelerate 1.2.1 is installed.*needs 1.6 or later"):
                prepare_ema(accelerator, model, name="y")
        finally:
            ours.accelerate.__version__ = version
        accelerator.state.distributed_type = DistributedType.MEGATRON_LM
        with pytest.raises(EMAEngineError, match="MEGATRON_LM"):
            prepare_ema(accelerator, model, name="y")


@pytest.mark.world_size(2)
def test_the_model_inside_ddp_is_refused() -> None:
    """Its average would not be spread over the ranks."""
    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("ddp") as accelerator:
        model, optimizer = prepared(accelerator, "ddp")
        with pytest.raises(EMAConfigError, match="not prepared by this accelerator"):
            prepare_ema(accelerator, model.module, optimizer)
        with pytest.raises(EMAConfigError, match="not prepared by this accelerator"):
            prepare_ema(accelerator, accelerator.unwrap_model(model), optimizer)
        prepare_ema(accelerator, model, optimizer)


@pytest.mark.world_size(1)
def test_a_compiled_model_is_known() -> None:
    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single", dynamo_backend="eager") as accelerator:
        plain = build(scalar=False)
        model, optimizer = accelerator.prepare(plain, torch.optim.AdamW(plain.parameters(), lr=0.01))
        assert type(model).__name__ == "OptimizedModule"
        ema = prepare_ema(accelerator, model, optimizer)
        assert set(ema.full_state_dict()) == set(plain.state_dict())


@pytest.mark.world_size(1)
def test_free_memory_lets_go_of_averages(tmp_path: Path) -> None:
    """Hooks that held one would hold its model, and the next training's checkpoints would have it."""
    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:
        model, optimizer = prepared(accelerator, "single")
        ema = prepare_ema(accelerator, model, optimizer)
        gone = weakref.ref(ema)
        del ema
        gc.collect()
        accelerator.save_state(str(tmp_path / "held"))  # the accelerator holds it
        assert (tmp_path / "held" / "ema").is_dir()
        model, optimizer = accelerator.free_memory(model, optimizer)
        gc.collect()
        assert gone() is None
        model, optimizer = prepared(accelerator, "single")
        accelerator.save_state(str(tmp_path / "without"))
        assert not (tmp_path / "without" / "ema").exists()
        prepare_ema(accelerator, model, optimizer)  # the name is free again
        there = weakref.ref(accelerator)
    del accelerator, model, optimizer
    gc.collect()
    assert there() is None


@pytest.mark.world_size(2)
def test_a_training_loop_as_diffusers_has_it(tmp_path: Path) -> None:
    """A UNet that predicts noise; images are made with the average, which diffusers loads in the end."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    from dist_ema.integrations.accelerate import prepare_ema

    folder = [str(tmp_path)]
    dist.broadcast_object_list(folder)
    with accelerator_of("ddp") as accelerator:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        schedule = DDPMScheduler(num_train_timesteps=20)
        images = torch.utils.data.DataLoader(torch.rand(16, 1, 8, 8) * 2 - 1, batch_size=2)
        model, optimizer, images = accelerator.prepare(unet, torch.optim.AdamW(unet.parameters(), lr=1e-3), images)
        ema = prepare_ema(accelerator, model, optimizer, half_life="2ba")
        for clean in images:
            with accelerator.accumulate(model):
                noise, times = torch.randn_like(clean), torch.randint(0, 20, (len(clean),))
                noised = schedule.add_noise(clean, noise, times)
                accelerator.backward(nn.functional.mse_loss(model(noised, times).sample, noise))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        assert ema.num_updates == 2  # 16 images, 2 ranks, batches of 2, 2 batches a step
        live = {name: value.clone() for name, value in unet.state_dict().items()}
        with ema.average_parameters():
            pipeline = DDPMPipeline(accelerator.unwrap_model(model), schedule)
            pipeline.set_progress_bar_config(disable=True)
            seed = torch.Generator().manual_seed(1)
            made = pipeline(generator=seed, num_inference_steps=2, output_type="np").images
        same(dict(unet.state_dict()), live)
        ema.export(Path(folder[0]) / "unet", layout="diffusers")
        loaded = UNet2DModel.from_pretrained(Path(folder[0]) / "unet")
        state = ema.full_state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items() if state)
        pipeline = DDPMPipeline(loaded, schedule)
        pipeline.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(1)
        again = pipeline(generator=seed, num_inference_steps=2, output_type="np").images
        torch.testing.assert_close(torch.from_numpy(again), torch.from_numpy(made))
