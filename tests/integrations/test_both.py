"""``evaluate="both"``, ``should_update=`` and ``average_at_end=`` of every trainer, in real runs.

The reference of "both" are two further runs, one that evaluates the live weights and one that evaluates the average.
Models have dropout: a second evaluation that drew from the same generators would change the training.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dist_ema.errors import EMAConfigError

STEPS = {2, 3, 6}


def some_steps(clock: Any) -> bool:
    """An irregular rule, which no interval says."""
    return clock.batches in STEPS


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def average(steps: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The dense average, in float64, of the weights after the steps of ``some_steps``."""
    chosen = sorted(STEPS)
    found = {name: value.double() for name, value in steps[chosen[0] - 1].items()}
    for before, now in itertools.pairwise(chosen):
        kept = decay ** (now - before)
        found = {name: kept * value + (1 - kept) * steps[now - 1][name].double() for name, value in found.items()}
    return found


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-5, msg=name)


# Lightning.


class Regression:
    """Makes the LightningModule, whose class needs Lightning."""

    def __new__(cls) -> Any:
        import lightning.pytorch as pl

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
                self.steps: list[dict[str, Tensor]] = []

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

            def training_step(self, rows: Tensor, index: int) -> Tensor:
                return (self.net(rows) - rows.sum(1, keepdim=True)).square().mean()

            def on_train_batch_end(self, *_: Any) -> None:
                self.steps.append(weights(self.net))

            def validation_step(self, rows: Tensor, index: int, dataloader_idx: int = 0) -> None:
                self.log("val_loss", self.training_step(rows, index))

            test_step = validation_step

        return Module()


def rows(seed: int) -> DataLoader[Any]:
    return DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)), batch_size=4)


def fit_lightning(folder: Path, loaders: int = 1, **options: Any) -> tuple[Any, Any, Any, list[dict[str, float]]]:
    """A trainer of 12 steps in 3 epochs, the callback, and what was logged of each validation."""
    pl = pytest.importorskip("lightning.pytorch", reason="is in the extra 'lightning'")
    from lightning.pytorch.loggers import CSVLogger

    from dist_ema.integrations.lightning import EMACallback

    logged: list[dict[str, float]] = []

    class Recording(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            found = {name: value for name, value in metrics.items() if "val_loss" in name}
            logged.extend([found] if found else [])

    own = EMACallback(decay=0.5, log=False, **options)
    monitor = "ema_val_loss" if options.get("evaluate") == "both" else "val_loss"
    best = pl.callbacks.ModelCheckpoint(folder / "best", monitor=monitor if loaders == 1 else None, save_top_k=1)
    pl.seed_everything(1, verbose=False)
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=Recording(folder),
        callbacks=[own, best],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        log_every_n_steps=1,
    )
    module = Regression()
    trainer.fit(module, rows(1), [rows(2), rows(3)][:loaders] if loaders > 1 else rows(2))
    return trainer, module, own, logged


@pytest.mark.parametrize("loaders", [1, 2])
def test_lightning_logs_live_and_averaged_metrics_of_each_validation(loaders: int, tmp_path: Path) -> None:
    """They needed two runs, and a second validation by hand was seen by every callback and changed the training."""
    runs = {
        evaluate: fit_lightning(tmp_path / str(evaluate), loaders, evaluate=evaluate)
        for evaluate in ((False, True, "both") if loaders == 1 else (True, "both"))
    }
    trainer, module, own, logged = runs["both"]
    assert len(logged) == 3
    assert same(weights(module), weights(runs[True][1]))
    for number, metrics in enumerate(runs[True][3]):
        assert {f"ema_{name}": value for name, value in metrics.items()} == pytest.approx(
            {name: value for name, value in logged[number].items() if name.startswith("ema_")}
        )
    if loaders == 1:
        assert [metrics["val_loss"] for metrics in logged] == [metrics["val_loss"] for metrics in runs[False][3]]
        best = trainer.checkpoint_callback
        assert float(best.best_model_score) == pytest.approx(min(metrics["ema_val_loss"] for metrics in logged))
        (validated,) = trainer.validate(module, rows(2), verbose=False)
        assert validated == pytest.approx({name: logged[-1][name] for name in ("val_loss", "ema_val_loss")})
        (tested,) = trainer.test(module, rows(2), verbose=False)
        assert tested == pytest.approx(validated)
        assert own.ema.held_by is None


def test_lightning_averages_the_steps_that_it_is_told(tmp_path: Path) -> None:
    _, module, own, _ = fit_lightning(tmp_path, should_update=some_steps, average_at_end=True)
    assert (own.ema.num_updates, own.ema.clock.batches) == (3, 12)
    check(weights(module.net), average(module.steps, 0.5))


# The Trainer of transformers.


def fit_transformers(folder: Path, **options: Any) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    """A trainer of 6 steps in 2 epochs, the callback, and the weights after each step."""
    pytest.importorskip("transformers", reason="is in the extra 'test'")
    from test_transformers import CONFIG, EVAL, HEADS, make
    from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback

    from dist_ema.integrations.transformers import EMACallback

    steps: list[dict[str, Tensor]] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            steps.append(weights(model))

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, **HEADS, attention_dropout=0.3))
    own = EMACallback(decay=0.5, **options)
    saved = {"save_strategy": "epoch", "load_best_model_at_end": True} if options.get("evaluate") == "both" else {}
    trainer = make(
        folder,
        own,
        Steps(),
        *([EarlyStoppingCallback(5)] if saved else []),
        model=model,
        eval_strategy="epoch",
        eval_dataset=EVAL["a"],
        metric_for_best_model="loss",
        use_cpu=True,
        **saved,
    )
    trainer.train()
    return trainer, own, steps


def test_transformers_logs_live_and_averaged_metrics_of_each_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The best checkpoint and early stopping follow the average, as with evaluate=True."""
    runs = {each: fit_transformers(tmp_path / str(each), evaluate=each) for each in (False, True, "both")}
    losses: dict[Any, dict[str, list[float]]] = {}
    for each, (trainer, _, _) in runs.items():
        names = ("eval_loss", "live_eval_loss")
        losses[each] = {name: [log[name] for log in trainer.state.log_history if name in log] for name in names}
    assert losses["both"]["eval_loss"] == losses[True]["eval_loss"]
    assert losses["both"]["live_eval_loss"] == losses[False]["eval_loss"]
    assert losses["both"]["eval_loss"] != losses["both"]["live_eval_loss"]
    for one, two in zip(runs["both"][2], runs[True][2], strict=True):
        assert same(one, two)
    trainer = runs["both"][0]
    assert trainer.state.best_metric == min(losses["both"]["eval_loss"])
    found = trainer.evaluate()
    assert {"eval_loss", "live_eval_loss"} <= found.keys()
    assert found["eval_loss"] == pytest.approx(min(losses["both"]["eval_loss"]))
    assert not [record for record in caplog.records if "early stopping" in record.message]
    nested = trainer.evaluate({"x": trainer.eval_dataset})
    assert {"eval_x_loss", "live_eval_x_loss"} <= nested.keys()


def test_transformers_averages_the_steps_that_it_is_told(tmp_path: Path) -> None:
    trainer, own, steps = fit_transformers(tmp_path, should_update=some_steps, average_at_end=True)
    assert (own.ema.num_updates, own.ema.clock.batches) == (3, 6)
    check(weights(trainer.model), average(steps, 0.5))


# Composer.


@pytest.mark.world_size(1)
def test_composer_logs_live_and_averaged_metrics_of_each_evaluation() -> None:
    from support import composer_runs as runs

    from dist_ema.integrations.composer import EMA

    found: dict[Any, tuple[dict[str, list[float]], dict[str, Tensor]]] = {}
    for evaluate in (False, True, "both"):
        run = runs.trainer(EMA(half_life="2ba", evaluate=evaluate), eval_interval="1ep")
        run.fit()
        data = run.logger.destinations[0].data
        losses = {
            label: [float(value) for _, value in data.get(f"metrics/{label}/Loss", [])]
            for label in ("eval", "ema_eval")
        }
        found[evaluate] = losses, runs.whole(run.state.model)
        run.close()
    both, live = found["both"]
    assert both["eval"] == found[False][0]["eval"]
    assert both["ema_eval"] == found[True][0]["eval"]
    assert len(both["eval"]) == 3 and both["eval"] != both["ema_eval"]
    assert same(live, found[True][1])


@pytest.mark.world_size(1)
def test_composer_averages_the_batches_that_it_is_told() -> None:
    from support import composer_runs as runs

    from composer.core import Event

    from dist_ema.integrations.composer import EMA

    watch = runs.Watch(Event.BATCH_END)
    algorithm = EMA(half_life="1ba", should_update=some_steps, average_at_end=True)
    run = runs.trainer(algorithm, callbacks=[watch], eval_interval="1ep")
    run.fit()
    assert algorithm.ema is not None
    assert algorithm.ema.num_updates == 3
    steps = [
        {name: value for name, value in each.items() if name in runs.AVERAGED} for each in watch.at(Event.BATCH_END)
    ]
    check(runs.whole(run.state.model), average(steps, 0.5))
    run.close()


# Accelerate.


def test_accelerate_averages_the_steps_that_it_is_told() -> None:
    pytest.importorskip("accelerate", reason="is in the extra 'accelerate'")
    from test_accelerate import accelerator_of

    from dist_ema.integrations.accelerate import prepare_ema

    with accelerator_of("single") as accelerator:  # two batches a step
        model: Any = nn.Linear(3, 1)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer = accelerator.prepare(model, optimizer)
        ema = prepare_ema(accelerator, model, optimizer, decay=0.5, should_update=some_steps)
        steps = []
        for number in range(14):
            with accelerator.accumulate(model):
                inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
                accelerator.backward(model(inputs).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                steps.append(weights(model))
        assert (ema.num_updates, ema.clock.batches) == (3, 7)
        check(ema.full_state_dict(), average(steps, 0.5))
        with pytest.raises(EMAConfigError, match="should_update needs optimizer, after whose steps it is called"):
            prepare_ema(accelerator, model, name="other", should_update=some_steps)


# Bad input.


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"evaluate": "all"}, "evaluate='all': allowed are False, True, 'both', 'ema'"),
        ({"evaluate": 1}, "evaluate=1: allowed are False, True, 'both', 'ema'"),
        ({"average_at_end": "both"}, "average_at_end='both': allowed are False, True, 'ema'"),
        ({"should_update": 3}, "should_update=3: allowed are None and a callable"),
        ({"should_update": some_steps, "update_interval": "2ba"}, "update_interval='2ba': should_update says when"),
        ({"should_update": some_steps, "ema_start": "2ba"}, "ema_start='2ba': should_update says when"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(EMAConfigError) as caught:
        fit_lightning(tmp_path, **options)
    assert says in str(caught.value)
    with pytest.raises(EMAConfigError) as caught:
        fit_transformers(tmp_path, **options)
    assert says in str(caught.value)
