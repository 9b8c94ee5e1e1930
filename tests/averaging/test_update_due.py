"""update(due=...): a trainer with a rule of its own says when an update is due."""

from __future__ import annotations

from support.oracle import DenseAverage

import torch
from torch import nn

from dist_ema import ShardedEMA


def _step(model: nn.Module) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_an_update_that_is_not_due_moves_the_clock_only() -> None:
    """A trainer that kept back its calls until the next update would leave ``progress`` behind the training."""
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, smoothing=0.5, update_interval="100ba", ema_start="50ba")
    dense = DenseAverage({"weight", "bias"}, 0.5)
    for batch in range(1, 8):
        weights = _step(model)
        due = batch in (3, 5, 6)
        assert ema.update(samples=4, due=due) is due
        if due:
            dense.update(weights)
    dense.check(ema.full_state_dict())
    assert (ema.num_updates, ema.progress.batches, ema.progress.samples) == (3, 4, 16)


def test_not_said_means_the_interval_and_the_start() -> None:
    model = nn.Linear(3, 2)
    ema = ShardedEMA(model, update_interval="2ba", ema_start="3ba")
    assert [ema.update() for _ in range(6)] == [False, False, False, True, False, True]
