"""Lightning's Trainer: single device, DDP and ModelParallelStrategy on two gloo processes."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.models import batch, build
from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from dist_ema.errors import CheckpointError, EMAConfigError, EMAStateError

pl = pytest.importorskip("lightning.pytorch", reason="is in the extra 'lightning'")
DECAY = 0.5
STRATEGIES = ["ddp", "fsdp2"]


def full(module: nn.Module) -> dict[str, torch.Tensor]:
    """Collective under FSDP2 and ZeRO-3."""
    if any(hasattr(tensor, "ds_id") and tensor.numel() == 0 for tensor in module.parameters()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return full(module)
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in module.state_dict().items()
    }


class Module(pl.LightningModule):
    """Follows itself with a dense average, after each batch in which it was stepped."""

    def __init__(self, sharded: bool = False) -> None:
        super().__init__()
        self.net = build(scalar=False)
        self.sharded = sharded
        trained = {f"net.{name}" for name, tensor in self.net.named_parameters() if tensor.requires_grad}
        self.dense = DenseAverage(trained | {"net.head.weight"}, DECAY)
        self.steps = 0
        self.losses: list[float] = []  # of validation
        self.expected: list[float] = []  # of the dense average
        self.fails = False

    def configure_model(self) -> None:
        if self.sharded and not hasattr(self.net, "reshard"):
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for block in self.net.module:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    def loss(self, tokens: torch.Tensor, net: nn.Module | None = None) -> torch.Tensor:
        return (net or self.net)(tokens).square().mean()

    def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        return self.loss(tokens)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step > self.steps:
            self.steps = self.trainer.global_step
            self.dense.update(full(self))

    def validation_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
        assert not self.training
        loss = self.loss(tokens)
        if self.dense.average and not self.trainer.sanity_checking:
            plain = build(scalar=False)
            plain.load_state_dict({name.removeprefix("net."): value for name, value in self.dense.average.items()})
            self.losses.append(loss.item())
            self.expected.append(self.loss(tokens, plain.eval()).item())
        self.log("loss", loss)
        if self.fails and not self.trainer.sanity_checking:
            raise OSError("of the test")
        return loss

    test_step = validation_step

    def predict_step(self, tokens: torch.Tensor) -> float:
        return self.loss(tokens).item()

    def check_losses(self, number: int) -> None:
        """All evaluations since the last call were of the average."""
        assert len(self.losses) == number
        torch.testing.assert_close(self.losses, self.expected, atol=1e-6, rtol=1e-5)
        self.losses, self.expected = [], []


class Watch(pl.Callback):
    """Calls back when training begins, after the callback that averages has begun."""

    def __init__(self, call: Callable[[Any], object]) -> None:
        self.call = call

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.call(pl_module)


def callback(**options: Any) -> Any:
    from dist_ema.integrations.lightning import EMACallback

    return EMACallback(**{"decay": DECAY, **options})


def loader(batches: int = 5) -> DataLoader:
    return DataLoader(torch.stack([batch(step) for step in range(batches)]), batch_size=None)


def trainer(folder: Path, strategy: str = "auto", size: int = 1, **options: Any) -> Any:
    if strategy == "fsdp2":
        made = pl.strategies.ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1)
    elif strategy.startswith("zero"):
        made = deepspeed_on_cpu(int(strategy[-1]))
    else:
        made = strategy
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet["enable_checkpointing"] = any(isinstance(one, pl.callbacks.Checkpoint) for one in options["callbacks"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pl.Trainer(
            **{"accumulate_grad_batches": 2, "max_epochs": 2, **quiet, **options},
            accelerator="cpu",
            devices=size,
            strategy=made,
            default_root_dir=folder,
            use_distributed_sampler=False,
        )


def deepspeed_on_cpu(stage: int) -> Any:
    """DeepSpeedStrategy refuses CPUs, DeepSpeed does not: all but that and the device's number is Lightning's own."""
    from support.zero_models import reset_deepspeed

    reset_deepspeed()

    class OnCPU(pl.strategies.DeepSpeedStrategy):
        root_device = torch.device("cpu", 0)

        def setup_environment(self) -> None:
            pl.strategies.DDPStrategy.setup_environment(self)

        def setup_distributed(self) -> None:
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    return OnCPU(stage=stage, process_group_backend="gloo", logging_batch_size_per_gpu=1)


def check(ema: Any, dense: DenseAverage) -> None:
    if state := ema.full_state_dict():
        dense.check(state)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one test leaves for the next."""
    return tmp_path_factory.mktemp("lightning")


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fit_evaluate_and_resume(strategy: str, shared: Path, rank: int) -> None:
    """Per batch it would be 10 updates; ModelCheckpoint saves while validation ends; validate() wraps anew."""
    folder, sharded = shared / strategy, strategy == "fsdp2"

    def checkpoints() -> Any:
        return pl.callbacks.ModelCheckpoint(folder, "{step}", "loss", save_last=True, save_top_k=1)

    module, averaging, saving = Module(sharded), callback(), checkpoints()
    run = trainer(folder, strategy, 2, callbacks=[saving, averaging])
    run.fit(module, loader(), loader(2))
    ema = averaging.ema
    assert ema.num_updates == module.steps == 6  # Lightning steps on the last batch of an epoch too
    check(ema, module.dense)
    module.check_losses(4)

    # The same training and the same logged loss of the live weights, bit for bit, without the callback.
    bare = Module(sharded)
    trainer(folder / "bare", strategy, 2, callbacks=[]).fit(bare, loader(), loader(2))
    for name, value in full(bare).items():
        assert torch.equal(value, full(module)[name]), name

    # What was saved: as many averages as checkpoints, live weights in these.
    dist.barrier()
    beside = [path / "ema" if sharded else Path(f"{path}.ema") for path in folder.glob("*.ckpt")]
    assert len(beside) == 2 and all(path.is_dir() for path in beside)
    assert len([*folder.glob("*.ema")]) == (0 if sharded else 2)

    # Evaluation after fit, and of a checkpoint; in the end the live weights are live.
    before, digest = full(module), ema.fingerprint()
    run.validate(module, loader(2), verbose=False)
    run.test(module, loader(2), verbose=False)
    module.check_losses(4)
    (predicted,) = run.predict(module, loader(1))
    run.validate(module, loader(1), ckpt_path=saving.last_model_path, verbose=False)
    assert averaging.ema is ema and ema.fingerprint() == digest
    assert module.losses[0] == pytest.approx(predicted)
    module.check_losses(1)
    for name, value in full(module).items():
        assert torch.equal(value, before[name]), name

    # Resumed in the middle, in another trainer: as if it had not stopped.
    saver = checkpoints()
    saver.dirpath = str(folder / "half")
    first = Module(sharded)
    trainer(folder, strategy, 2, callbacks=[callback(), saver], max_epochs=1).fit(first, loader(), loader(2))
    resumed, second = Module(sharded), callback()
    run = trainer(folder, strategy, 2, callbacks=[second])
    run.fit(resumed, loader(), loader(2), ckpt_path=folder / "half" / "last.ckpt")
    assert second.ema.num_updates == 6 and second.ema.fingerprint() == digest
    for name, value in full(resumed).items():
        assert torch.equal(value, before[name]), name
    if rank == 0:
        (folder / "digest").write_text(repr(digest))


@pytest.mark.world_size(1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_world_size_loads_the_average_bit_for_bit(strategy: str, shared: Path) -> None:
    folder = shared / strategy
    averaging, seen = callback(), []
    watch = Watch(lambda _: seen.append(averaging.ema.fingerprint()))
    run = trainer(folder, strategy, 1, callbacks=[averaging, watch], max_epochs=3)
    run.fit(Module(strategy == "fsdp2"), loader(), loader(2), ckpt_path=folder / "last.ckpt")
    assert repr(seen) == f"[{(folder / 'digest').read_text()}]"
    assert averaging.ema.num_updates == 9


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_exception_in_an_evaluation_leaves_the_live_weights(strategy: str, tmp_path: Path) -> None:
    """And in a checkpoint that is written because of it."""
    module, averaging = Module(strategy == "fsdp2"), callback()
    saving = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    live: list[dict[str, torch.Tensor]] = []
    module.on_train_batch_end = lambda *_: live.append(full(module))  # type: ignore[method-assign]
    module.fails = True
    with pytest.raises(OSError, match="of the test"):
        trainer(tmp_path, strategy, 2, callbacks=[saving, averaging]).fit(module, loader(), loader(1))
    for name, value in full(module).items():
        assert torch.equal(value, live[-1][name]), name
    assert averaging.ema.num_updates == 3 and averaging.ema.update()  # not inside any more
    if strategy == "ddp":
        state = torch.load(tmp_path / "on_exception.ckpt", weights_only=False)["state_dict"]
        assert all(torch.equal(state[name], live[-1][name]) for name in state)


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_without_an_average_is_one_error_on_every_rank(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}")
    trainer(tmp_path, "ddp", 2, callbacks=[saving], max_epochs=1).fit(Module(), loader())
    path = saving.best_model_path
    with pytest.raises(CheckpointError, match=r"no average with it .*EMACallback\(missing="):
        trainer(tmp_path, "ddp", 2, callbacks=[callback()]).fit(Module(), loader(), ckpt_path=path)
    averaging = callback(missing="start")
    module, bound = Module(), []
    module.steps = 3  # of the checkpoint
    watch = Watch(lambda _: bound.append(averaging.ema._average.engine.modules() == [run.strategy.model]))
    run = trainer(tmp_path, "ddp", 2, callbacks=[averaging, watch])
    run.fit(module, loader(), ckpt_path=path)
    assert averaging.ema.num_updates == 3

    # Fitted again, under another DDP: whose forward must leave each rank its buffers while the average is inside.
    run.fit_loop.max_epochs = 3
    run.fit(module, loader(), loader(1))
    assert averaging.ema.num_updates == 6
    check(averaging.ema, module.dense)
    assert bound == [True, True]


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_deepspeed(strategy: str, tmp_path: Path, rank: int) -> None:
    """It accumulates itself, and not over the end of an epoch; the average is of the masters."""
    pytest.importorskip("deepspeed", reason="is in the extra 'deepspeed'")
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", "loss", save_last=True)
    module, averaging = Module(), callback()
    run = trainer(tmp_path, strategy, 2, callbacks=[averaging, saving])
    run.fit(module, loader(6), loader(1))
    assert averaging.ema.num_updates == module.steps == 6
    check(averaging.ema, module.dense)
    assert averaging.ema.progress.epochs == pytest.approx(5 / 3)
    run.validate(module, loader(1), verbose=False)
    module.check_losses(3)
    digest = averaging.ema.fingerprint()
    assert all((path / "ema").is_dir() for path in tmp_path.glob("*.ckpt"))

    resumed, seen = callback(), []
    watch = Watch(lambda _: seen.append(resumed.ema.fingerprint() == digest))
    run = trainer(tmp_path, strategy, 2, callbacks=[resumed, watch], max_epochs=3)
    run.fit(Module(), loader(6), loader(1), ckpt_path=tmp_path / "last.ckpt")
    assert seen == [True] and resumed.ema.num_updates == 9


# One process, and no process group: Lightning evaluates in inference mode.


@pytest.mark.filterwarnings("ignore")
def test_one_device(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tensors made in inference mode could never be updated; a checkpoint in mid-validation has the live weights."""
    module, averaging = Module(), callback()
    with caplog.at_level(logging.WARNING, "dist_ema"):
        trainer(tmp_path, callbacks=[averaging]).validate(module, loader(1), verbose=False)
    assert [record.message for record in caplog.records] == [
        "There is no average of this model yet: its own weights are evaluated."
    ]
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_last="link")
    run = trainer(tmp_path, callbacks=[averaging, saving])
    module.on_validation_epoch_end = lambda: run.save_checkpoint(tmp_path / "inside.ckpt")  # type: ignore[method-assign]
    run.fit(module, loader(), loader(1))
    check(averaging.ema, module.dense)
    module.check_losses(2)
    inside = torch.load(tmp_path / "inside.ckpt", weights_only=False)
    assert torch.equal(inside["state_dict"]["net.embed.weight"], full(module)["net.embed.weight"])
    digest = averaging.ema.fingerprint()

    # By another callback, model and trainer, from a checkpoint: loaded in inference mode, and then trained.
    other, loaded = Module(), callback()
    other.dense = module.dense
    run = trainer(tmp_path, callbacks=[loaded], max_epochs=3)
    run.test(other, loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False)  # a link
    other.check_losses(1)
    assert loaded.ema.fingerprint() == digest
    other.dense, other.steps = copy.deepcopy(module.dense), 6
    run.fit(other, loader(), loader(1), ckpt_path=tmp_path / "last.ckpt")
    assert loaded.ema.num_updates == 9
    check(loaded.ema, other.dense)

    # The same trainer and module again, further on; and a checkpoint by hand, after fit.
    run.fit_loop.max_epochs = 4
    run.fit(other, loader(), loader(1))
    assert loaded.ema.num_updates == 12
    check(loaded.ema, other.dense)
    run.save_checkpoint(tmp_path / "final.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    loaded.ema.reset()
    run.validate(other, loader(1), ckpt_path=tmp_path / "weights.ckpt", verbose=False)
    assert loaded.ema.num_updates == 12
    run.fit_loop.max_epochs = 5
    assert not any(tensor.is_inference() for tensor in loaded.ema._average.shadow.tensors("ema") if tensor is not None)
    run.fit(other, loader(), loader(1))
    assert loaded.ema.num_updates == 15
    run.strategy.remove_checkpoint(tmp_path / "final.ckpt")
    assert not [*tmp_path.glob("final*")]

    # A save that was killed between the weights and their average.
    (tmp_path / "final.ckpt").write_bytes((tmp_path / "inside.ckpt").read_bytes())
    (tmp_path / "weights.ckpt.ema").rename(tmp_path / "final.ckpt.ema")
    with pytest.raises(
        CheckpointError, match=r"is at 12ba 4ep, 12 updates, .* at 6ba 2ep, 6 updates: a save was killed"
    ):
        run.validate(other, loader(1), ckpt_path=tmp_path / "final.ckpt", verbose=False)

    # Copies start anew.
    for fresh in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert fresh.ema is None
        trainer(tmp_path, callbacks=[fresh], max_steps=2).fit(Module(), loader())
        assert fresh.ema.num_updates == 2


class Manual(Module):
    """Two steps a batch, of one optimizer or of two."""

    def __init__(self, optimizers: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.number = optimizers

    def configure_optimizers(self) -> Any:
        parameters = [tensor for tensor in self.net.parameters() if tensor.requires_grad]
        return [torch.optim.SGD(parameters[index :: self.number], lr=0.01) for index in range(self.number)]

    def training_step(self, tokens: torch.Tensor, index: int) -> None:
        made = self.optimizers()
        for optimizer in made if self.number == 2 else [made, made]:
            optimizer.zero_grad()
            self.manual_backward(self.loss(tokens))
            optimizer.step()
            if self.number == 1:
                self.dense.update(full(self))

    def on_train_batch_end(self, *_: Any) -> None:
        if self.number == 2:
            self.dense.update(full(self))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("optimizers", "updates"), [(1, 10), (2, 5)])
def test_manual_optimization(optimizers: int, updates: int, tmp_path: Path) -> None:
    """Of one optimizer each step counts, of two each batch: that of GANs, whose parts step in turn."""
    module, averaging = Manual(optimizers), callback()
    run = trainer(tmp_path, callbacks=[averaging], max_epochs=1, accumulate_grad_batches=1)
    run.fit(module, loader())
    assert averaging.ema.num_updates == updates
    check(averaging.ema, module.dense)


class Logger(pl.loggers.logger.DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.kept.append((step or 0, metrics))


@pytest.mark.filterwarnings("ignore")
def test_epochs_metrics_and_a_learning_rate_finder(tmp_path: Path) -> None:
    """The finder trains, saves and restores for itself before the fit begins, and removes its checkpoint."""
    logger, module = Logger(), Module()
    averaging = callback(decay=None, schedule=None, half_life="1ep", update_interval="1ep", ema_start="0.5dur")
    finder = pl.callbacks.LearningRateFinder(num_training_steps=3, update_attr=False)
    module.lr = 0.01
    run = trainer(tmp_path, callbacks=[averaging, finder], logger=logger, log_every_n_steps=2, max_epochs=4)
    run.fit(module, loader(), loader(1))
    assert averaging.ema.num_updates == 3  # at the ends of epochs 2, 3 and 4
    assert averaging.ema.progress.epochs == pytest.approx(2)
    logged = [metrics for _, metrics in logger.kept if "ema/decay" in metrics]
    assert logged and {"ema/num_updates", "ema/distance", "ema/skipped_elements"} <= logged[-1].keys()
    assert logged[-1]["ema/num_updates"] == 3 and logged[-1]["ema/decay"] == 0.5
    run.fit_loop.max_epochs = 5  # the finder once more, while there is an average
    run.fit(module, loader(), loader(1))
    assert averaging.ema.num_updates == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"half_life": "1ep"}, {"half_life": "4ba", "ema_start": "0.5dur"}])
def test_epochs_and_the_sanity_check(options: dict[str, str], tmp_path: Path) -> None:
    """That comes before Lightning has counted the batches of an epoch, where nothing else has asked for them."""
    averaging = callback(decay=None, **options)
    trainer(tmp_path, callbacks=[averaging]).fit(Module(), loader(), loader(1))
    assert averaging.ema.num_updates == (6 if "ema_start" not in options else 4)
    assert averaging.ema.clock.epochs == pytest.approx(2)


@pytest.mark.filterwarnings("ignore")
def test_asynchronous_checkpoints(tmp_path: Path) -> None:
    """The file may not be there yet when its average is written."""
    plugin = pl.plugins.io.AsyncCheckpointIO()
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, monitor=None)
    module = Module()
    run = trainer(tmp_path, callbacks=[callback(), saving], plugins=[plugin], max_epochs=1)
    run.fit(module, loader(), loader(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=3.ckpt", "step=3.ckpt.ema"]
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in full(module).items())


@pytest.mark.filterwarnings("ignore")
def test_what_contradicts_the_trainer_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"decay": None, "half_life": "100tok"}, "the options count in tok, Lightning in ba and ep only"),
        ({"update_interval": "3x"}, "update_interval='3x'"),
        ({"evaluate": "slow"}, "evaluate='slow': allowed are False, True, 'both', 'ema'"),
        ({"decay": None, "averages": {"a": 0.9, "b": 0.99}}, "evaluate=True: allowed are False, 'a', 'b'"),
        ({"missing": "ignore"}, "missing='ignore'"),
    ):
        with pytest.raises(EMAConfigError, match=said):
            callback(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'half_live'"):
        callback(half_live="1ba")

    def fit(*callbacks: Any, **options: Any) -> None:
        trainer(tmp_path, callbacks=list(callbacks), **options).fit(Module(), loader())

    class Other(type(callback())):  # type: ignore[misc]
        state_key = "other"

    with pytest.raises(EMAConfigError, match="EMACallback and Other: use one EMACallback"):
        fit(callback(), Other(decay=DECAY))
    with pytest.raises(EMAConfigError, match="EMACallback and EMAWeightAveraging: use one EMACallback"):
        fit(callback(), pl.callbacks.EMAWeightAveraging())
    with pytest.raises(EMAConfigError, match="max_duration='9ba': the Trainer says '4ba'"):
        fit(callback(max_duration="9ba"), max_steps=4)
    endless = DataLoader(_Endless(), batch_size=None)
    with pytest.raises(EMAConfigError, match="count in ep, but the loader's length is unknown"):
        trainer(tmp_path, callbacks=[callback(update_interval="1ep")], max_steps=4).fit(Module(), endless)
    with pytest.raises(EMAConfigError, match="count in ep, but the loader's length is unknown"):
        trainer(tmp_path, callbacks=[callback(update_interval="1ep")]).fit(Module(), endless, loader(1))
    several = callback(decay=None, averages={"fast": 0.5, "slow": 0.9}, evaluate="fast")
    fit(several, max_steps=3)
    assert several.ema.names == ("fast", "slow")
    with pytest.raises(EMAStateError, match="cannot be copied or pickled"):
        pickle.dumps(several.ema)


@pytest.mark.filterwarnings("ignore")
def test_epochs_with_a_sanity_check(tmp_path: Path) -> None:
    """Which evaluates before the Trainer has looked at the training data."""
    averaging = callback(decay=None, half_life="1ep")
    trainer(tmp_path, callbacks=[averaging], max_epochs=2).fit(Module(), loader(), loader(1))
    assert averaging.ema.num_updates == 6 and averaging.ema.progress.epochs == pytest.approx(1.6)


@pytest.mark.filterwarnings("ignore")
def test_a_callback_that_saves_before_this_one(tmp_path: Path) -> None:
    """The weights have made their step by then, so the average in that checkpoint has to have it too, once."""

    class Saving(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    averaging, module = callback(), Module()
    trainer(tmp_path, callbacks=[Saving(), averaging]).fit(module, loader())
    saved = torch.load(tmp_path / "4.ckpt", weights_only=False)
    assert saved["global_step"] == 4
    assert saved["callbacks"][averaging.state_key]["average"].endswith("4 updates")
    check(averaging.ema, module.dense)
    assert averaging.ema.num_updates == 6


@pytest.mark.filterwarnings("ignore")
def test_without_evaluation_a_checkpoint_replaces_the_average_too(tmp_path: Path) -> None:
    """Else a later checkpoint would have the weights of one moment and the average of another."""
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    averaging, module = callback(evaluate=False), Module()
    module.validation_step = module.predict_step  # type: ignore[method-assign]
    run = trainer(tmp_path, callbacks=[averaging, saving])
    run.fit(module, loader())
    run.validate(module, loader(1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    run.save_checkpoint(tmp_path / "again.ckpt")
    saved = torch.load(tmp_path / "again.ckpt", weights_only=False)
    assert saved["callbacks"][averaging.state_key]["average"].endswith("3 updates")
    assert averaging.ema.num_updates == 3


class _ScheduleFree(torch.optim.SGD):
    """Laid out as schedule-free optimizers: in eval mode the weights are a mean with other values beside them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.beside = [tensor.detach() + 1.0 for tensor in self.param_groups[0]["params"]]

    @torch.no_grad()
    def eval(self) -> None:
        for tensor, other in zip(self.param_groups[0]["params"], self.beside, strict=True):
            if tensor.requires_grad:  # only what was stepped has another value beside it
                tensor.lerp_(other, 0.5)


def test_a_schedule_free_optimizer_that_is_switched_inside_a_validation_is_said(tmp_path: Path) -> None:
    """Its ``eval()`` writes the weights, which are the average there: that would have become the average."""
    module, averaging = Module(), callback()
    before: list[dict[str, torch.Tensor]] = []
    module.configure_optimizers = lambda: _ScheduleFree(module.net.parameters(), lr=0.01)  # type: ignore[method-assign]

    def switch() -> None:
        if not module.trainer.sanity_checking:
            module.optimizers().optimizer.eval()

    module.on_validation_epoch_start = switch  # type: ignore[method-assign]
    step = module.on_train_batch_end

    def follow(*args: Any) -> None:
        step(*args)
        before[:] = [full(module)]

    module.on_train_batch_end = follow  # type: ignore[method-assign]
    run = trainer(tmp_path, callbacks=[averaging])
    with pytest.raises(EMAStateError, match=r"written inside average_parameters\(\).*eval\(\)"):
        run.fit(module, loader(), loader(1))
    live = full(module)
    assert [name for name, value in before[0].items() if not torch.equal(live[name], value)] == []
    with pytest.raises(EMAStateError):
        averaging.ema.save(tmp_path / "refused")


class _Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        return iter(batch(step) for step in range(1000))
