"""Every engine against the dense average, on a model that no world size divides."""

from __future__ import annotations

from pathlib import Path

from support.models import CASES, batch, build, live_weights
from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA

pytestmark = pytest.mark.core

MATRIX = [(name, size) for name, case in CASES.items() for size in case.group_sizes]
DECAY = 0.7
UPDATES = 4


def _trained() -> set[str]:
    model = build()
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """One operation a tensor: Adam's ten take DTensor longer than all else here."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, micro_steps: int = 2) -> None:
    model.train()
    for micro in range(micro_steps):
        model(batch(10 * step + micro)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _evaluate(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(batch(99)).float()


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_average_equals_dense_average_on_uneven_shards(case: str, rank: int, world_size: int, tmp_path: Path) -> None:
    """Uneven and empty shards, ties, frozen parts, buffers, gradient accumulation, evaluation between updates."""
    spec = CASES[case]
    model = spec.model()
    optimizer = _optimizer(model)
    ema = ShardedEMA(model, decay=DECAY)
    ema.attach(optimizer)
    oracle = DenseAverage(_trained(), DECAY)
    for step in range(UPDATES):
        _train(model, optimizer, step)
        oracle.update(live_weights(model))
        _evaluate(model)  # gathers and keeps, under some
    assert ema.num_updates == UPDATES

    state = ema.full_state_dict()
    assert bool(state) == (rank == 0)
    if rank == 0:
        oracle.check(state)
    ema.export(tmp_path / "export")
    if rank == 0:
        exported = load_file(tmp_path / "export" / "model.safetensors")
        spec.plain().load_state_dict(exported, strict=True)
        assert exported.keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(exported[name], value), name

    before = live_weights(model)
    reference = spec.plain()
    with ema.average_parameters():
        inside = live_weights(model)
        output = _evaluate(model)
    after = live_weights(model)
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} was not restored"
    if rank == 0:
        assert before.keys() == inside.keys() == after.keys() == state.keys()
        for name, value in inside.items():
            assert torch.equal(value, state[name]), f"{name} is not the average"
        reference.load_state_dict(state)
        reference.eval()
        exact = {"rtol": 1e-5, "atol": 1e-5} if "mixed" not in case else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(output, reference(batch(99)), **exact)

    check_that_a_fraction_moves_the_trained_weights_only(model, ema)
    check_that_copy_to_changes_what_the_model_computes_with(model, ema, output)
    if world_size == 2:
        check_that_same_weights_give_the_same_bits_however_they_are_sharded(model, spec.plain())


def check_that_a_fraction_moves_the_trained_weights_only(model: nn.Module, ema: ShardedEMA) -> None:
    """copy_to(fraction=) against float64: replicas that move twice, a part that does not move, buffers that do."""
    before, average = live_weights(model), ema.full_state_dict()
    ema.copy_to(fraction=0.25)
    for name, value in live_weights(model).items():
        if average and name in _trained():
            expected = before[name].double() + 0.25 * (average[name].double() - before[name].double())
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7, msg=name)
        else:
            assert name in _trained() or torch.equal(value, before[name]), name
    after = ema.full_state_dict()
    assert all(torch.equal(value, after[name]) for name, value in average.items())


def check_that_copy_to_changes_what_the_model_computes_with(
    model: nn.Module, ema: ShardedEMA, averaged: Tensor
) -> None:
    """A write that the next forward ignores: an unsharded root, a persistent parameter, a replica left behind."""
    assert not torch.equal(_evaluate(model), averaged)
    ema.copy_to()
    assert torch.equal(_evaluate(model), averaged)


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), [pair for pair in MATRIX if pair[1] == 2])
def test_training_after_evaluation_is_bitwise_the_training_that_never_evaluated(
    case: str, rank: int, world_size: int
) -> None:
    """Whatever a swap leaves behind (a stale unsharded copy, a lost bit) would show in the next steps."""
    spec = CASES[case]
    finals = []
    for evaluates in (False, True):
        model = spec.model()
        optimizer = _optimizer(model)
        ema = ShardedEMA(model, decay=DECAY)
        for step in range(4):
            _train(model, optimizer, step)
            ema.update()
            if evaluates:
                with ema.average_parameters():
                    _evaluate(model)
                with pytest.raises(KeyError), ema.average_parameters():
                    _evaluate(model)
                    raise KeyError("the body fails")
                _evaluate(model)
        finals.append((live_weights(model), ema.fingerprint()))
    (never, never_digest), (often, often_digest) = finals
    for name, value in never.items():
        assert torch.equal(value, often[name]), name
    assert never_digest == often_digest


def check_that_same_weights_give_the_same_bits_however_they_are_sharded(model: nn.Module, plain: nn.Module) -> None:
    """The average is elementwise, so its digest may not depend on engine or world size: compared with one process."""
    live = [live_weights(model)]
    dist.broadcast_object_list(live)
    plain.load_state_dict(live[0])
    ema, single = ShardedEMA(model, decay=0.9), ShardedEMA(plain, decay=0.9)
    for step in range(3):
        _perturb(model, step)
        _perturb(plain, step)
        ema.update()
        single.update()
    assert ema.fingerprint() == single.fingerprint()


@torch.no_grad()
def _perturb(model: nn.Module, step: int) -> None:
    """Adds the same number to every element: the same on any shard."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.0 + 0.25 * (step + 1))
