"""An average of weights that are scaled by hand, compared with that of whole tensors in float64.

Every element is scaled by the same number, so that the values of a step do not tell where an element is. The full
weights of before the model was sharded do: gathering by torch is no reference for all layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA, read_checkpoint

DECAY = 0.75
STEPS = (1.125, 1.25)


def check_average(model: nn.Module, full: Mapping[str, Tensor], folder: Path, rank: int) -> None:
    """Trains, and compares what each call returns with the average of ``full``, the weights before. Collective."""
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    live = {name: tensor.double() for name, tensor in full.items()}
    mean = dict(live)
    for factor in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        live = {name: tensor * factor for name, tensor in live.items()}
        mean = {name: DECAY * before + (1 - DECAY) * live[name] for name, before in mean.items()}
        ema.update()

    found = ema.full_state_dict()
    ema.save(folder / "ema")
    ema.export(folder / "exported", dtype=torch.float32)
    stored = read_checkpoint(folder / "ema")
    exported = load_file(folder / "exported" / "model.safetensors")
    streamed = {name: tensor.clone() for name, tensor in ema.iter_full_tensors()}
    for values in [streamed, stored, exported, *([found] if rank == 0 else [])]:
        check_same(values, mean)

    # The file loads into another average, which the model then computes with; afterwards it has its own weights back.
    again = ShardedEMA(model, decay=DECAY)
    again.load(folder / "ema")
    with again.average_parameters():
        pass
    check_same(dict(ShardedEMA(model, decay=DECAY).iter_full_tensors()), live)
    again.copy_to()
    check_same(dict(ShardedEMA(model, decay=DECAY).iter_full_tensors()), mean)


def check_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compares two sets of full tensors by name."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-6, atol=1e-6, msg=name)
