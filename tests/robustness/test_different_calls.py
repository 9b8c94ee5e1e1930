"""Ranks that make different calls, or one call with different arguments, used to mix their tensors into one result.

Half of a model in one average and half in another passes every check of a file. So ranks compare what they are about to
do before they do it, and each is told in what they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.models import CASES, Case

import pytest
import torch
from torch import nn

from dist_ema import ShardedEMA
from dist_ema.errors import EMAStateError
from dist_ema.schedules import HalfLife

AVERAGES = {"fast": 0.5, "slow": 0.9}


def averaged(case: Case, **options: object) -> tuple[nn.Module, ShardedEMA]:
    """A model after two updates that moved."""
    model = case.model()
    ema = ShardedEMA(model, **(options or {"averages": AVERAGES}))
    for _ in range(2):
        ema.update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
    ema.update()
    return model, ema


def refused(call: Callable[[], object], *words: str) -> None:
    """The call raises on this rank, and says all of the words."""
    with pytest.raises(EMAStateError) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


@pytest.mark.world_size(2)
def test_arguments_that_differ_between_ranks_are_named_on_every_rank(rank: int, tmp_path: Path) -> None:
    _, ema = averaged(CASES["fsdp2"])
    name = ("fast", "slow")[rank]
    named = ("name='fast' on rank 0, 'slow' on rank 1",)
    refused(lambda: ema.full_state_dict(name), "full_state_dict()", *named)
    refused(lambda: ema.fingerprint(name), "fingerprint()", *named)
    refused(lambda: ema.export(tmp_path / "out", name=name), "export()", *named)
    dtype = (torch.bfloat16, None)[rank]
    refused(lambda: ema.export(tmp_path / "out", name="fast", dtype=dtype), "dtype=torch.bfloat16 on rank 0, None on")
    refused(lambda: ema.full_state_dict("fast", include_untracked=rank == 0), "include_untracked=True on rank 0, False")
    assert list(tmp_path.iterdir()) == []
    ema.save(tmp_path / "ema")
    refused(lambda: ema.load(tmp_path / "ema", strict=rank == 0), "strict=True on rank 0, False on rank 1")
    before = ema.fingerprint("fast")  # afterwards all goes on
    refused(lambda: ema.save(tmp_path / "ema", block=rank == 0), "block=True on rank 0, False on rank 1")
    ema.load(tmp_path / "ema")
    assert ema.fingerprint("fast") == before


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "hsdp"])
def test_no_rank_computes_with_another_average_than_the_others(rank: int, case: str) -> None:
    model, ema = averaged(CASES[case])
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def enter() -> None:
        with ema.average_parameters(("fast", "slow")[rank]):
            raise AssertionError("one half of this model is fast, the other slow")

    refused(enter, "average_parameters()", "name='fast' on rank 0, 'slow' on rank 1")
    refused(lambda: ema.copy_to(("fast", "slow")[rank]), "copy_to()", "name=")
    refused(lambda: ema.copy_to("fast", fraction=(0.25, 0.5)[rank]), "copy_to()", "fraction=0.25 on rank 0, 0.5 on")
    refused(lambda: ema.copy_to("fast", fraction=(0.25, 2)[rank]), "copy_to()", "fraction=")
    for parameter, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.detach(), kept)
    with ema.average_parameters("fast"):
        pass


@pytest.mark.world_size(2)
def test_ranks_in_different_methods_do_not_wait_for_each_other(rank: int, tmp_path: Path) -> None:
    _, ema = averaged(CASES["ddp"], decay=0.9)
    calls = {
        "metrics()": ema.metrics,
        "fingerprint()": ema.fingerprint,
        "save()": lambda: ema.save(tmp_path / "ema"),
        "export()": lambda: ema.export(tmp_path / "out"),
        "state_dict()": ema.state_dict,
        "average_parameters()": lambda: ema.average_parameters().__enter__(),
        "copy_to()": ema.copy_to,
        "load()": lambda: ema.load(tmp_path / "ema"),
    }
    names = list(calls)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        refused(calls[(first, second)[rank]], "different calls", f"{first} on rank 0, {second} on rank 1")
    assert list(tmp_path.iterdir()) == []
    assert ema.metrics()["ema/num_updates"] == 3


@pytest.mark.world_size(2)
def test_averages_that_were_made_with_different_options_are_not_mixed(rank: int, tmp_path: Path) -> None:
    order = AVERAGES if rank == 0 else dict(reversed(AVERAGES.items()))
    for options, words in (
        ({"averages": order}, ["averages={'fast': ", "{'slow': "]),
        ({"decay": (0.9, 0.99)[rank]}, ["0.9", "0.99", "on rank 1"]),
        ({"decay": 0.9, "update_interval": (1, 2)[rank]}, ["update_interval='1ba' on rank 0, '2ba' on rank 1"]),
        ({"decay": 0.9, "skip_nonfinite": rank == 0}, ["skip_nonfinite=True on rank 0, False on rank 1"]),
    ):
        _, ema = averaged(CASES["fsdp2"], **options)
        refused(ema.metrics, "metrics()", *words)
        refused(lambda ema=ema: ema.save(tmp_path / "ema"), "save to ", *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.world_size(2)
def test_ranks_that_were_told_of_different_training_have_no_common_average(rank: int, tmp_path: Path) -> None:
    model = CASES["fsdp2"].model()
    ema = ShardedEMA(model, schedule=HalfLife("100tok"))
    ema.update(tokens=64)
    ema.update(tokens=64 + rank)
    refused(lambda: ema.save(tmp_path / "ema"), "128tok on rank 0, 129tok on rank 1", "Call update() on every rank")
    by_batches = ShardedEMA(model, decay=0.9)  # whose decays do not depend on tokens
    by_batches.update(tokens=64 + rank)
    by_batches.save(tmp_path / "ema")


@pytest.mark.world_size(2)
def test_where_a_shadow_lies_and_which_path_is_said_is_each_ranks_own_matter(rank: int, tmp_path: Path) -> None:
    _, ema = averaged(CASES["ddp"], decay=0.9, offload=("cpu", None)[rank])
    ema.save(tmp_path / f"rank{rank}")  # as on nodes with disks of their own: rank 0's counts
    ema.close()
    assert (tmp_path / "rank0/ema.json").exists() and not (tmp_path / "rank1").exists()
