"""Composer's trainer with ``dist_ema.integrations.composer.EMA``, beside its own EMA and beside a dense reference.

All of it runs in the pool, whose processes import Composer once and have a process group of one rank too.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

from support import DATA
from support.oracle import DenseAverage

import pytest
import torch

IMPORTS = DATA / "imports"
AT_BATCH = "ba{batch}.pt"


def saved(folder: str | Path, batch: int, fsdp: str | None = None) -> str:
    """Where a trainer with ``save_filename=AT_BATCH`` saves at a batch."""
    return f"{folder}/ep{batch // 3}-ba{batch}" if fsdp == "sharded" else f"{folder}/ba{batch}.pt"


def read(file: str | Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, weights_only=False, map_location="cpu")["state"]
    return state


# Beside Composer's own.


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    "options",
    [
        {"half_life": "2ba"},
        {"half_life": "4ba", "update_interval": "2ba", "ema_start": "3ba"},  # copies off the interval
        {"half_life": "1ep"},
        {"half_life": None, "smoothing": 0.6, "update_interval": "1ba", "ema_start": "1ep"},
        {"half_life": "3ba", "ema_start": "0.5dur"},
    ],
    ids=str,
)
def test_two_seeded_runs_agree_in_averages_and_metrics(options: dict[str, Any], tmp_path: Path) -> None:
    from support import composer_runs as runs

    from composer.algorithms import EMA as Composers

    from dist_ema.integrations.composer import EMA

    logged, files = [], []
    for kind in (Composers, EMA):
        folder = tmp_path / kind.__module__
        run = runs.trainer(
            kind(**options), save_folder=str(folder), save_filename=AT_BATCH, save_interval="1ep", eval_interval="1ep"
        )
        run.fit()
        logged.append(runs.losses(run))
        files.append([read(saved(folder, batch)) for batch in (3, 6, 9)])
        run.close()
    assert len(logged[0]) == 3
    assert logged[0] == pytest.approx(logged[1], abs=1e-6)
    for theirs, ours in zip(*files, strict=True):
        assert runs.differ(theirs["model"], ours["model"]) < 1e-6
    live = dict(files[1][-1]["algorithms"])["EMA"]["dist_ema"]["live"]
    kept = dict(files[0][-1]["algorithms"])["EMA"]["ema_model"]
    assert runs.differ({**kept["named_parameters_dict"], **kept["named_buffers_dict"]}, live) < 1e-6


@pytest.mark.world_size(1)
def test_what_composer_does_wrong(tmp_path: Path) -> None:
    """Each fault that the docstring names is there in Composer's, and not in ours."""
    from support import composer_runs as runs

    from composer.algorithms import EMA as Composers
    from composer.core import Event

    from dist_ema.integrations.composer import EMA

    for wrong in ({"smoothing": 0.9}, {"half_life": None, "smoothing": 0.9}):
        with pytest.raises((ValueError, AttributeError)):
            Composers(**wrong)
        assert EMA(**wrong).smoothing == 0.9

    seen: dict[Any, Any] = {}
    for kind in (Composers, EMA):
        watch = runs.Watch(Event.BATCH_END, Event.PREDICT_START, Event.FIT_END)
        algorithm = kind(half_life="1ep")
        folder = str(tmp_path / kind.__module__)
        run = runs.trainer(
            algorithm, callbacks=[watch], save_folder=folder, save_filename=AT_BATCH, save_interval="1ba"
        )
        run.fit()
        after = runs.whole(run.state.model)
        run.predict(runs.loader(2))
        if kind is Composers:
            run.state.model.load_state_dict(watch.at(Event.BATCH_END)[-1])  # what should be in it
            algorithm.ema_weights_active = False
        got = runs.whole(algorithm.get_ema_model(run.state.model))
        if kind is EMA:
            run.state.model = algorithm.get_training_model(run.state.model)
        seen[kind] = (watch, after, got, runs.whole(run.state.model), read(saved(folder, 9)))
        run.close()

    dense = DenseAverage(runs.AVERAGED, 0.5)
    for weights in seen[EMA][0].at(Event.BATCH_END)[2::3]:
        before_last = dict(dense.average)  # saved after the last batch, before the epoch's end
        dense.update(weights)
    last = seen[EMA][0].at(Event.BATCH_END)[-1]
    for kind, right in ((Composers, False), (EMA, True)):
        watch, after, got, afterwards, file = seen[kind]
        average = {name: dense.average[name].to(value.dtype) for name, value in last.items()}
        one = runs.differ(file["model"], before_last) < 1e-6
        assert one is right, "averaged into itself after a checkpoint"
        assert runs.same(after, last) is right, "the average stays after the last checkpoint"
        assert runs.same(afterwards, last) is right, "get_ema_model() destroys the live weights"
        if kind is EMA:
            assert runs.differ(got, average) < 1e-6
            assert runs.differ(watch.at(Event.PREDICT_START)[0], average) < 1e-6
            assert file["model"]["norm.num_batches_tracked"] == 6


@pytest.mark.world_size(1)
def test_a_bf16_average_moves(tmp_path: Path) -> None:
    """Composer keeps the parameters' dtype: at a slow decay each step of a bf16 average is less than its last bit."""
    from support import composer_runs as runs

    from composer.algorithms import EMA as Composers

    from dist_ema.integrations.composer import EMA

    def average(kind: Any) -> list[torch.Tensor]:
        model = runs.Net().to(torch.bfloat16)
        algorithm = kind(half_life="10000ba")
        data = runs.loader(1, torch.bfloat16)
        run = runs.trainer(algorithm, model=model, train_dataloader=data, eval_dataloader=None)
        run.fit()
        run.close()
        if kind is Composers:
            return list(algorithm.ema_model.named_parameters_dict.values())
        state: dict[str, torch.Tensor] = algorithm.ema.full_state_dict()
        return [state[name] for name, value in model.named_parameters() if value.requires_grad]

    for kind, moves in ((Composers, False), (EMA, True)):
        shadows = average(kind)
        rounded = [shadow.to(torch.bfloat16).float() for shadow in shadows]
        exact = all(torch.equal(one, shadow.float()) for one, shadow in zip(rounded, shadows, strict=True))
        assert exact is not moves  # between two values of bf16, where an average has to be


# Composer's tests of EMA, in our words.


@pytest.mark.world_size(1)
@pytest.mark.parametrize("smoothing", [0, 0.5, 0.99, 1])
def test_compute_ema_blends_parameters_and_buffers(smoothing: float) -> None:
    from support import composer_runs as runs

    from dist_ema.integrations.composer import compute_ema

    model, average = runs.Net(), runs.Net()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.norm.buffers()]:
            tensor.copy_(torch.randn(tensor.shape) * 3)
    before = copy.deepcopy(average.state_dict())
    compute_ema(model, average, smoothing)
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            expected = smoothing * before[name].double() + (1 - smoothing) * model.state_dict()[name].double()
            torch.testing.assert_close(value, expected.float())


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    "options",
    [
        {"half_life": "10ba", "update_interval": "1ba"},
        {"half_life": "1ep", "update_interval": "1ep"},
        {"half_life": None, "smoothing": 0.999, "update_interval": "1ba"},
    ],
    ids=str,
)
def test_events_called_by_hand(options: dict[str, Any]) -> None:
    """The update event averages, evaluation swaps the average in, and its end swaps it out."""
    from support import composer_runs as runs

    from composer.core import Event, Timestamp

    from dist_ema.integrations.composer import EMA

    algorithm = EMA(**options)
    life = algorithm.half_life
    assert algorithm.smoothing == pytest.approx(0.999 if life is None else 2 ** (-1 / life.value))
    run = runs.trainer(algorithm)
    state = run.state

    def update() -> None:
        state.previous_timestamp = state.timestamp
        step = {"epoch": 1} if algorithm.update_event is Event.EPOCH_END else {"batch": 1}
        state.timestamp = Timestamp(**{name: int(getattr(state.timestamp, name)) + 1 for name in step})
        assert algorithm.match(algorithm.update_event, state)
        algorithm.apply(algorithm.update_event, state, run.logger)

    update()
    first = runs.whole(state.model)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    second = runs.whole(state.model)
    update()
    dense = DenseAverage(runs.AVERAGED, algorithm.smoothing)
    dense.update(first)
    dense.update(second)
    algorithm.apply(Event.EVAL_START, state, run.logger)
    assert algorithm.ema_weights_active
    dense.check(runs.whole(state.model))
    algorithm.apply(Event.EVAL_END, state, run.logger)
    assert runs.same(runs.whole(state.model), second)
    other = algorithm.get_ema_model(runs.Net())
    dense.check(runs.whole(other))
    assert runs.same(runs.whole(algorithm.get_training_model(other)), second)
    run.close()


# One real run for each strategy, against a dense average in float64.


def _without_ema(fsdp: str | None) -> list[dict[str, torch.Tensor]]:
    """The weights after each step."""
    from support import composer_runs as runs

    from composer.core import Event

    watch = runs.Watch(Event.BATCH_END)
    run = runs.trainer(callbacks=[watch], fsdp=fsdp, eval_interval="1ep")
    run.fit()
    run.close()
    return watch.at(Event.BATCH_END)


def _one_run(folder: str, fsdp: str | None) -> None:
    from support import composer_runs as runs

    from composer.core import Event

    from dist_ema.integrations.composer import EMA

    steps = _without_ema(fsdp)
    dense, averages = DenseAverage(runs.AVERAGED, 0.5**0.5), []
    for weights in runs.of_rank_0(steps):
        dense.update(weights)
        averages.append(copy.deepcopy(dense))

    def save(name: str, algorithm: EMA) -> runs.Trainer:
        return runs.trainer(
            algorithm,
            callbacks=[watch],
            fsdp=fsdp,
            eval_interval="1ep",
            save_folder=f"{folder}/{name}",
            save_filename=AT_BATCH,
            save_interval="4ba",
            **({"load_path": saved(f"{folder}/first", 4, fsdp)} if name == "resumed" else {}),
        )

    # Training is what it is without an average; evaluation and its metrics are those of the average.
    watch, algorithm = runs.Watch(Event.BATCH_END, Event.EVAL_START, Event.EVAL_END), EMA(half_life="2ba")
    run = save("first", algorithm)
    run.fit()
    expected_wrapping = "fsdp2" if fsdp else "none" if runs.dist.get_world_size() == 1 else "ddp"
    assert runs.wrapping(run.state.model) == expected_wrapping
    for expected, found in zip(steps, watch.at(Event.BATCH_END), strict=True):
        assert runs.same(expected, found)
    for batch, found in zip((3, 6, 9), watch.at(Event.EVAL_START), strict=True):
        averages[batch - 1].check(found)
    for batch, found in zip((3, 6, 9), watch.at(Event.EVAL_END), strict=True):
        assert runs.same(steps[batch - 1], found)
    assert runs.losses(run) == pytest.approx([runs.loss_of(averages[b - 1].average) for b in (3, 6, 9)], abs=1e-6)
    assert runs.same(runs.whole(run.state.model), steps[-1])
    ended = algorithm.ema.fingerprint()

    # An explicit checkpoint holds the training weights, one at a checkpoint event the average.
    run.save_checkpoint(f"{folder}/explicit/{AT_BATCH}")
    if fsdp != "sharded":
        averages[3].check(read(saved(f"{folder}/first", 4))["model"])
        assert runs.same(read(f"{folder}/explicit/ba9.pt")["model"], steps[-1])

    # An exception inside an evaluation leaves the live weights live.
    with patch.object(runs.Net, "update_metric", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        run.eval()
    assert runs.same(runs.whole(run.state.model), steps[-1])
    run.predict(runs.loader(2))
    assert runs.same(runs.whole(run.state.model), steps[-1])
    run.close()

    # Resuming in the middle is as no interruption.
    watch, algorithm = runs.Watch(Event.FIT_START, Event.BATCH_END, Event.EVAL_START), EMA(half_life="2ba")
    run = save("resumed", algorithm)
    loaded = algorithm.ema.full_state_dict(include_untracked=False)
    if loaded:  # on rank 0
        torch.save(loaded, f"{folder}/average.pt")
        assert runs.differ(loaded, {name: averages[3].average[name] for name in loaded}) < 1e-6
    run.fit()
    assert runs.same(watch.at(Event.FIT_START)[0], steps[3])
    for expected, found in zip(steps[4:], watch.at(Event.BATCH_END), strict=True):
        assert runs.same(expected, found)
    for batch, found in zip((6, 9), watch.at(Event.EVAL_START), strict=True):
        averages[batch - 1].check(found)
    assert algorithm.ema.fingerprint() == ended
    assert algorithm.ema.progress.batches == 8
    run.close()


def _other_size(folder: str, fsdp: str | None) -> None:
    """The average is bit for bit what was saved, and the live weights are live, on one process."""
    from support import composer_runs as runs

    from dist_ema.integrations.composer import EMA

    algorithm = EMA(half_life="2ba")
    run = runs.trainer(algorithm, fsdp=fsdp, load_path=saved(f"{folder}/first", 4, fsdp))
    found = algorithm.ema.full_state_dict(include_untracked=False)
    assert runs.same(found, torch.load(f"{folder}/average.pt"))
    run.fit()
    assert algorithm.ema.num_updates == 9
    run.close()


@pytest.mark.world_size(1)
def test_one_process(tmp_path: Path) -> None:
    _one_run(str(tmp_path), None)


@pytest.mark.parametrize("fsdp", [None, "full", "sharded"], ids=["ddp", "fsdp2-full", "fsdp2-sharded"])
def test_two_processes(fsdp: str | None, tmp_path: Path, on_ranks: Callable[..., None]) -> None:
    on_ranks(_one_run, 2, folder=str(tmp_path), fsdp=fsdp)
    on_ranks(_other_size, 1, folder=str(tmp_path), fsdp=fsdp)


# Layers that are frozen and unfrozen in training.


def _freezing(fsdp: str | None) -> None:
    """Composer's LayerFreezing from the first layer on, and an algorithm that unfreezes the layer frozen at first."""
    from support import composer_runs as runs

    from composer.algorithms import LayerFreezing
    from composer.core import Algorithm, Event

    from dist_ema.integrations.composer import EMA

    class Unfreezing(Algorithm):  # type: ignore[misc]
        def match(self, event: Event, state: Any) -> bool:
            return event == Event.EPOCH_END and int(state.timestamp.epoch) == 1

        def apply(self, event: Event, state: Any, logger: object) -> None:
            layer = getattr(state.model, "module", state.model).frozen
            layer.requires_grad_(True)
            state.optimizers[0].add_param_group({"params": list(layer.parameters())})

    frozen: list[set[str]] = []

    class Flags(Algorithm):  # type: ignore[misc]
        def match(self, event: Event, state: Any) -> bool:
            return event == Event.BATCH_START

        def apply(self, event: Event, state: Any, logger: object) -> None:
            model = getattr(state.model, "module", state.model)
            frozen.append({name for name, value in model.named_parameters() if not value.requires_grad})

    watch, algorithm = runs.Watch(Event.BATCH_END), EMA(half_life="2ba")
    freezing = [LayerFreezing(freeze_start=0.4), Flags()] if fsdp else [LayerFreezing(0.4), Unfreezing(), Flags()]
    run = runs.trainer(*freezing, algorithm, callbacks=[watch], fsdp=fsdp, eval_interval="1ep")
    run.fit()
    dense, trained = DenseAverage(set(runs.AVERAGED), 0.5**0.5), set(runs.AVERAGED)
    for weights, flags in zip(runs.of_rank_0(watch.at(Event.BATCH_END)), frozen, strict=True):
        for name in (weights.keys() - flags) & {"frozen.weight", "frozen.bias"} - trained:
            dense.trained.add(name)
            dense.average.pop(name)
            trained.add(name)
        dense.update(weights)
    assert frozen[0] == {"frozen.weight", "frozen.bias"} and "first.weight" in frozen[-1]
    assert algorithm.ema.num_updates == 9
    found = algorithm.ema.full_state_dict()
    if found:  # on rank 0
        dense.check(found)
    run.close()  # which has saved nothing: Composer cannot save an optimizer from which LayerFreezing took parameters


@pytest.mark.world_size(1)
def test_layers_that_are_frozen_and_unfrozen() -> None:
    """Composer's LayerFreezing stopped training at the next update."""
    _freezing(None)


@pytest.mark.parametrize("fsdp", [None, "sharded"], ids=["ddp", "fsdp2-sharded"])
def test_layers_that_are_frozen_on_two_processes(fsdp: str | None, on_ranks: Callable[..., None]) -> None:
    on_ranks(_freezing, 2, fsdp=fsdp)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ema_start": "7ba"}, 1), ({"ema_start": "3ep"}, 1), ({"ema_start": "1ep"}, 0)],
    ids=str,
)
@pytest.mark.world_size(1)
def test_an_average_that_never_begins_is_said_when_training_begins(options: dict[str, str], said: int) -> None:
    """Six batches in two epochs. Its users evaluated the live model and did not know it."""
    from support import composer_runs as runs

    from dist_ema.integrations import composer

    logger = Mock()
    with patch.object(composer, "_log", logger):
        run = runs.trainer(composer.EMA(half_life="2ba", **options), duration="2ep")
        run.fit()
        run.close()
    found = [call.args[0] % call.args[1:] for call in logger.warning.call_args_list]
    assert len(found) == said and all("no average will be made" in text for text in found), found


# Checkpoints: of Composer's own EMA, without an average, found by autoresume.


def _composers(folder: str) -> None:
    """A run of Composer's own EMA, with checkpoints."""
    from support import composer_runs as runs

    from composer.algorithms import EMA as Composers

    run = runs.trainer(
        Composers(half_life="2ba"), save_folder=folder, save_filename=AT_BATCH, save_interval="4ba", eval_interval="1ep"
    )
    run.fit()
    run.save_checkpoint(f"{folder}/explicit.pt")
    run.close()


def _change_over(folder: str) -> None:
    from support import composer_runs as runs

    from dist_ema.integrations.composer import EMA

    file = saved(folder, 4)
    state = read(file)
    algorithm = EMA(half_life="2ba")
    run = runs.trainer(algorithm, load_path=file, eval_interval="1ep")
    kept = dict(state["algorithms"])["EMA"]["ema_model"]
    live = {**kept["named_parameters_dict"], **kept["named_buffers_dict"]}
    cut = "module." if "module.first.weight" in live else ""
    held = runs.whole(run.state.model)
    for name in runs.AVERAGED:
        assert torch.equal(held[name], live[cut + name])
    average = algorithm.ema.full_state_dict(include_untracked=False)
    for name in average:
        assert torch.equal(average[name], state["model"][name])
    run.fit()
    found = algorithm.ema.full_state_dict()
    if found:
        assert runs.differ(found, read(saved(folder, 9))["model"]) < 1e-6
    run.close()


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_changes_over_from_composers_own_ema(
    world_size: int, tmp_path: Path, on_ranks: Callable[..., None]
) -> None:
    on_ranks(_composers, world_size, folder=str(tmp_path))
    on_ranks(_change_over, world_size, folder=str(tmp_path))


@pytest.mark.world_size(1)
@pytest.mark.parametrize("version", ["0_12_1", "0_32_1"])
def test_files_of_composers_releases(version: str) -> None:
    """The state of the algorithm in each of its forms, on the model that the file holds."""
    from support.composer_stubs import import_composer

    from safetensors.torch import load_file
    from torch import nn

    from dist_ema import ShardedEMA
    from dist_ema.schedules.clock import Progress

    import_composer()
    from dist_ema.integrations.composer_trainer import change_over

    state = read(IMPORTS / f"composer-{version}.pt")
    algorithm = dict(state["algorithms"])["EMA"]
    expected = load_file(IMPORTS / f"composer-{version}.expected.safetensors")
    kept = algorithm["ema_model"]
    kept = {**kept["named_parameters_dict"], **kept["named_buffers_dict"]} if "named_buffers_dict" in kept else kept

    model = nn.Module()
    for name, value in state["model"].items():
        owner = model
        *path, last = name.split(".")
        for part in path:
            owner.add_module(part, getattr(owner, part, nn.Module()))
            owner = getattr(owner, part)
        if value.is_floating_point() and "running" not in name:
            owner.register_parameter(last, nn.Parameter(value.clone(), requires_grad=name in kept))
        else:
            owner.register_buffer(last, value.clone())
    ema = ShardedEMA(model, half_life="4ba", buffers="average")
    ema.load_state_dict(change_over(algorithm, ema.state_dict(), Progress().advance(batches=6)))
    found = ema.full_state_dict()
    assert ema.num_updates == 6
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    live = algorithm.get("training_model") or kept
    moved = [name for name, value in model.named_parameters() if value.requires_grad]
    assert all(torch.equal(dict(model.named_parameters())[name], live[name]) for name in moved)
    assert any(not torch.equal(found[name], live[name]) for name in moved)


def _without_average(folder: str, fsdp: str | None) -> None:
    from support import composer_runs as runs

    from dist_ema.errors import CheckpointError
    from dist_ema.integrations.composer import EMA

    run = runs.trainer(fsdp=fsdp, save_folder=folder, save_filename=AT_BATCH, save_interval="4ba")
    run.fit()
    run.close()
    path = saved(folder, 4, fsdp)
    with pytest.raises(CheckpointError, match=r"has no average.*missing='start'"):
        runs.trainer(EMA(), fsdp=fsdp, load_path=path)
    algorithm = EMA(missing="start")
    run = runs.trainer(algorithm, fsdp=fsdp, load_path=path)
    run.fit()
    assert algorithm.ema.num_updates == 5
    run.close()


@pytest.mark.parametrize(("fsdp", "world_size"), [(None, 1), ("sharded", 2)])
def test_a_checkpoint_without_an_average(
    fsdp: str | None, world_size: int, tmp_path: Path, on_ranks: Callable[..., None]
) -> None:
    on_ranks(_without_average, world_size, folder=str(tmp_path), fsdp=fsdp)


@pytest.mark.world_size(1)
def test_autoresume_and_evaluation_before_training(tmp_path: Path) -> None:
    from support import composer_runs as runs

    from dist_ema.integrations.composer import EMA

    options = {"save_folder": str(tmp_path), "save_filename": AT_BATCH, "save_interval": "4ba", "run_name": "run"}
    options |= {"autoresume": True, "save_latest_filename": "latest.pt", "save_overwrite": False}
    first, second = EMA(half_life="2ba"), EMA(half_life="2ba")
    run = runs.trainer(first, duration="5ba", **options)
    run.eval()
    assert runs.losses(run) == pytest.approx([runs.loss_of(runs.Net().state_dict())], abs=1e-6)
    assert not first.ema_started
    run.fit()
    run.close()
    run = runs.trainer(second, duration="5ba", **options)
    assert run.state.timestamp.batch == 5
    assert second.ema.fingerprint() == first.ema.fingerprint()
    run.close()


@pytest.mark.world_size(1)
def test_a_checkpoint_at_the_end_of_an_iteration(tmp_path: Path) -> None:
    """Composer swaps at two of its three checkpoint events."""
    from support import composer_runs as runs

    from dist_ema.integrations.composer import EMA

    algorithm = EMA(half_life="2ba")
    run = runs.trainer(
        algorithm, duration="2ep", save_folder=str(tmp_path), save_filename=AT_BATCH, save_interval="1iter"
    )
    run.state._iteration_length = "1ep"
    run.fit()
    state = read(saved(tmp_path, 3))
    averages = dict(state["algorithms"])["EMA"]["dist_ema"]["averages"]["ema"]
    assert all(torch.equal(state["model"][name], value) for name, value in averages.items())
    run.close()


# Bad input: one clear message.


@pytest.mark.world_size(1)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"half_life": None}, "half_life=None: give half_life, smoothing, decay"),
        ({"half_life": "10ba", "smoothing": 0.9}, "give exactly one of"),
        ({"half_life": "10ba", "update_interval": "1ep"}, "half_life='10ba', update_interval='1ep': of one unit"),
        ({"update_interval": "0.1dur"}, "update_interval='0.1dur': unit 'dur' is not allowed"),
        ({"update_interval": "10sec"}, "unknown unit 'sec'"),
        ({"half_life": "1ep", "update_interval": "0.5ep"}, "counts whole epochs"),
        ({"ema_start": "soon"}, "ema_start='soon': not a time string"),
        ({"missing": "maybe"}, "missing='maybe': allowed are 'error' and 'start'"),
        ({"decay": 2}, "decay=2"),
        ({"buffers": "all"}, "buffers='all'"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    from support import composer_runs  # noqa: F401

    from dist_ema.errors import EMAConfigError
    from dist_ema.integrations.composer import EMA

    with pytest.raises(EMAConfigError, match=message):
        EMA(**options)


@pytest.mark.world_size(2)
def test_options_that_contradict_the_trainer() -> None:
    from support import composer_runs as runs

    from composer.algorithms import EMA as Composers

    from dist_ema.errors import EMAConfigError
    from dist_ema.integrations.composer import EMA

    with pytest.raises(TypeError, match="unexpected keyword argument 'half_live'"):
        EMA(half_live="10ba")
    for other in (EMA(), Composers()):
        with pytest.raises(EMAConfigError, match="algorithms has EMA 2 times: of dist_ema"):
            runs.trainer(EMA(), other)
    with pytest.raises(EMAConfigError, match="has no trainer"):
        EMA().get_ema_model(runs.Net())
    for options, message in (
        ({"half_life": "100tok"}, "count in 'tok', of which the trainer has counted none"),
        ({"max_duration": "100ba"}, "max_duration='100ba': the trainer's is '1ep'; leave it out"),
    ):
        run = runs.trainer(EMA(**options), duration="1ep")
        with pytest.raises(EMAConfigError, match=message):
            run.fit()
        run.close()
    shared = EMA()  # or the first trainer's events would average the second one's model
    first, second = runs.trainer(shared, duration="1ep"), runs.trainer(shared, duration="1ep")
    with pytest.raises(EMAConfigError, match="this EMA belongs to a trainer that was made later"):
        first.fit()
    second.fit()
    assert shared.ema is not None and shared.ema.num_updates == 3
    first.close()
    second.close()


@pytest.mark.world_size(1)
def test_samples_and_several_averages() -> None:
    """A half life in samples decays by the samples of each update; the first of several averages is evaluated."""
    from support import composer_runs as runs

    from composer.core import Event

    from dist_ema import HalfLife
    from dist_ema.integrations.composer import EMA

    watch, algorithm = runs.Watch(Event.BATCH_END, Event.EVAL_START), EMA(half_life="16sp", ema_start="16sp")
    several = EMA(averages={"slow": HalfLife("16sp"), "fast": 0.1}, ema_start="2ba")
    for one in (algorithm, several):
        run = runs.trainer(one, callbacks=[watch], duration="1ep", eval_interval="1ep")
        run.fit()
        run.close()
    dense = DenseAverage(runs.AVERAGED, 0.5**0.5)
    for weights in watch.at(Event.BATCH_END)[1:3]:
        dense.update(weights)
    for evaluated in watch.at(Event.EVAL_START):
        dense.check(evaluated)


@pytest.mark.world_size(1)
def test_without_composer_the_import_says_how_to_install_it() -> None:
    name = "dist_ema.integrations.composer"
    with patch.dict(sys.modules, {"composer": None}):
        known = sys.modules.pop(name, None)
        with pytest.raises(ImportError, match=r"needs MosaicML Composer.*mosaicml==0\.32\.1"):
            __import__(name)
    if known is not None:
        sys.modules[name] = known
