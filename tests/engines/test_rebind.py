"""Trainers wrap a model anew (for an evaluation, or late): the average has to go on with it, and not to start again."""

from __future__ import annotations

from support.models import CASES, batch, build

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA
from dist_ema.errors import EMAEngineError, EMAStateError

KINDS = ["plain", "ddp", "fsdp1-full", "fsdp1-full-orig", "fsdp2", "hsdp", "fsdp2-tp"]


def wrapped(kind: str, hidden: int, shift: float) -> nn.Module:
    """The same weights under any wrapper, the trained ones moved by ``shift``."""
    model = build(scalar=False, hidden=hidden)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shift * parameter.requires_grad)
    return CASES[kind].wrap(model)


@pytest.mark.world_size(4)
@pytest.mark.parametrize("old", KINDS)
def test_an_average_goes_on_bit_for_bit_under_another_wrapper(old: str) -> None:
    for new in KINDS:
        hidden = 12 if "fsdp2-tp" in (old, new) else 7
        ema = ShardedEMA(wrapped(old, hidden, 0.0), averages={"fast": 0.5, "slow": 0.9})
        ema.update()
        moved = ShardedEMA(wrapped(old, hidden, 0.0), averages={"fast": 0.5, "slow": 0.9})
        moved.update()
        ema.rebind(wrapped(new, hidden, 1.0))
        assert [ema.fingerprint(name) for name in ema.names] == [moved.fingerprint(name) for name in ema.names]
        stays = ShardedEMA(wrapped(new, hidden, 0.0), averages={"fast": 0.5, "slow": 0.9})
        stays.update()
        stays.rebind(wrapped(new, hidden, 1.0))
        for average in (ema, stays):
            average.update()
        assert ema.fingerprint("slow") == stays.fingerprint("slow")
        assert ema.fingerprint("fast") != moved.fingerprint("fast")
        assert ema.num_updates == 2


@pytest.mark.world_size(2)
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_what_a_trainer_does_late_keeps_average_counts_and_training(rank: int, offload: str | None) -> None:
    plain = build(scalar=False)
    ema = ShardedEMA(plain, decay=0.5, offload=offload)
    with torch.no_grad():
        plain.one.weight[0, rank] = float("nan")  # one on each rank
    ema.update()
    model = DDP(plain)
    ema.rebind(model)
    assert ema.metrics()["ema/skipped_elements"] == 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema.attach(optimizer)
    with torch.no_grad():
        plain.one.weight.fill_(0.25)
    model(batch(0)).square().mean().backward()
    optimizer.step()
    assert ema.num_updates == 2
    live = [parameter.detach().clone() for parameter in model.parameters()]
    with ema.average_parameters():
        pass
    assert all(torch.equal(a, b) for a, b in zip(live, model.parameters(), strict=True))
    ema.close()


@pytest.mark.world_size(2)
def test_another_model_is_refused_and_the_average_stays(rank: int) -> None:
    ema = ShardedEMA(fully_shard(build(scalar=False)), decay=0.5)
    ema.update()
    before = ema.fingerprint()
    other = build(scalar=False, hidden=9)
    other.more = nn.Linear(2, 2)
    del other.one
    with pytest.raises(EMAEngineError) as caught:
        ema.rebind(fully_shard(other))
    for word in (
        "missing 'one.weight'",
        "unexpected 'more.weight'",
        "mismatch for 'module.0.up.weight': (9, 15)",
    ):
        assert word in str(caught.value)
    unlike = build(scalar=False)
    unlike.frozen.weight.requires_grad_(rank == 1)  # it would join the average on one rank alone
    with pytest.raises(EMAEngineError, match=r"frozen\.weight"):
        ema.rebind(fully_shard(unlike))
    with ema.average_parameters(), pytest.raises(EMAStateError, match=r"rebind\(\) inside"):
        ema.rebind(fully_shard(build(scalar=False)))
    assert ema.fingerprint() == before


def test_before_the_first_update_the_average_is_the_new_model() -> None:
    ema = ShardedEMA(build(), decay=0.5, ema_start="2ba")
    ema.update()
    model = build()
    with torch.no_grad():
        model.embed.weight.fill_(3.0)
    ema.rebind(model)
    assert torch.equal(ema.full_state_dict()["embed.weight"], model.embed.weight)
    assert ema.update()
    assert torch.equal(ema.full_state_dict()["embed.weight"], model.embed.weight)
