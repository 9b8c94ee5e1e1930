"""What must hold on a GPU, whatever is late: run on a fake one everywhere, and on a real one where there is one.

Each takes ``gpu``: ``fake_cuda.FakeCuda``, or what ``gpu/test_streams.py`` has in its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_ema import ShardedEMA, read_checkpoint

SIZE = 2048


def _model(gpu: Any, value: float) -> nn.Linear:
    model = gpu.put(nn.Linear(SIZE, SIZE, bias=False))
    _fill(model, value)
    return model


@torch.no_grad()
def _fill(model: nn.Linear, value: float) -> None:
    """Queued, as an optimizer's step is."""
    model.weight.fill_(value)


def _whole(value: float) -> torch.Tensor:
    return torch.full((SIZE, SIZE), value)


def check_an_offloaded_update_takes_the_weights_of_its_moment(gpu: Any, tmp_path: Path) -> None:
    """Not those that were there before the step that is still queued, and not those of the next step."""
    model = _model(gpu, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ema = ShardedEMA(model, decay=0.5, offload="cpu", skip_nonfinite=False)
    for value in (2.0, 4.0):
        gpu.delay()
        _fill(model, value)
        ema.wait()
        if value == 2.0:  # the thread is early
            ema.update()
            ema.wait()
        else:  # and late
            gpu.hold()
            ema.update()
        optimizer.step()  # without gradients: only its hook counts
        _fill(model, -100.0)
        gpu.hurry()
    assert torch.equal(ema.full_state_dict()["weight"], _whole(3.0))


class _Filling(torch.optim.Optimizer):
    """An optimizer whose step puts the next value into all weights, queued."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self._value = 0.0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._value += 2.0
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(self._value)


def check_an_update_beside_training_takes_the_weights_of_its_moment(gpu: Any, tmp_path: Path) -> None:
    """After the step that is still queued, before the next one, and before the next forward pass writes buffers."""
    model = _model(gpu, 0.0)
    model.register_buffer("seen", gpu.values(torch.zeros(1)))
    optimizer = _Filling(model)
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.attach(optimizer, overlap=True)
    for number, expected in enumerate((2.0, 3.0, 4.5, 6.25)):
        gpu.delay()
        model.seen.fill_(number)
        optimizer.step()
        if number == 1:
            gpu.rush()
        model.seen.fill_(-7.0)  # as the next forward pass may
        if number != 2:
            averaged = ema.full_state_dict()
            assert torch.equal(averaged["weight"], _whole(expected)), number
            assert averaged["seen"].item() == number
        model.seen.fill_(number)


def check_a_background_save_reads_what_was_queued_before_it(gpu: Any, tmp_path: Path) -> None:
    """And the next update does not change what it still has to read."""
    model = _model(gpu, 0.0)
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.update()
    for step, expected in enumerate((0.5, -11.375, -13.84375)):
        gpu.delay()
        _fill(model, float(step + 1))
        ema.update()
        ema.save(tmp_path / f"{step}", block=False)
        _fill(model, -50.0)
        ema.update()
        ema.wait()
        assert torch.equal(read_checkpoint(tmp_path / f"{step}")["weight"], _whole(expected)), step


def check_a_load_is_not_overwritten_by_what_was_queued_before_it(gpu: Any, tmp_path: Path) -> None:
    """In memory that its shadow may be given; and its host buffers are not filled again before they have been read."""
    model = _model(gpu, 1.0)
    with torch.no_grad():
        model.weight.copy_(gpu.values(torch.arange(SIZE * SIZE, dtype=torch.float32).view(SIZE, SIZE)))
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.update()
    ema.save(tmp_path / "one")
    saved = ema.full_state_dict()["weight"]
    assert saved.unique().numel() == SIZE * SIZE
    for strict in (True, False):
        gpu.delay()
        ema.reset()
        _fill(model, 2.0)
        ema.update()
        ema.load(tmp_path / "one", strict=strict)
        assert torch.equal(ema.full_state_dict()["weight"], saved)


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}
