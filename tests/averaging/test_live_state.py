"""A checkpoint whose model is the average loses the training weights, unless those of the average bring them along."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from support.models import CASES, batch
from support.zero_models import make_engine, train

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from dist_ema import ShardedEMA
from dist_ema.errors import CheckpointMismatchError, EMAConfigError, EMAStateError

AVERAGES = {"fast": 0.5, "slow": 0.9}


def trained(case: str, steps: int, **options: Any) -> tuple[nn.Module, ShardedEMA]:
    model = CASES[case].model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ema = ShardedEMA(model, averages=AVERAGES, **options)
    ema.attach(optimizer)
    for step in range(steps):
        model(batch(step + 10 * dist.get_rank())).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, ema


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The live model, by an average that has not begun."""
    return ShardedEMA(model, dtype=None).full_state_dict(include_untracked=False)


def carried(save: ShardedEMA, load: ShardedEMA, folder: Path, full: bool) -> None:
    """From one object to the other, by a file of rank 0 or by ``torch.distributed.checkpoint``."""
    state = save.state_dict(full=full, live=True)
    if full:
        assert (dist.get_rank() == 0) == bool(state["live"])
        if dist.get_rank() == 0:
            torch.save(state, folder / "state.pt")
        dist.barrier()
        load.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    else:
        dcp.save({"ema": state}, checkpoint_id=folder / "state")
        target = load.state_dict(live=True)
        dcp.load({"ema": target}, checkpoint_id=folder / "state")
        load.load_state_dict(target)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_weights_come_back_while_the_average_was_in_the_model(
    full: bool, inside: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    for number, case in enumerate(("ddp", "fsdp1-full", "fsdp2", "fsdp2-mixed")):
        folder = tmp_path / f"{number}"
        folder.mkdir(exist_ok=True)
        model, ema = trained(case, 3, dtype=dtype)
        live, averages = whole(model), {name: ema.full_state_dict(name) for name in AVERAGES}
        other, resumed = trained(case, 1, dtype=dtype)
        with ExitStack() as stack:
            if inside:
                stack.enter_context(ema.average_parameters("slow"))
            carried(ema, resumed, folder, full)
        assert equal(whole(other), live), case
        for name in AVERAGES:
            assert resumed.fingerprint(name) == ema.fingerprint(name)
            assert equal(resumed.full_state_dict(name), averages[name])
        assert resumed.progress == ema.progress
        ema.close()
        resumed.close()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("full", [True, False])
def test_live_weights_come_back_under_another_wrapper(full: bool, tmp_path: Path) -> None:
    for saved, loaded in [("fsdp2", "hsdp"), ("hsdp", "fsdp1-full")]:
        folder = tmp_path / saved
        folder.mkdir(exist_ok=True)
        model, ema = trained(saved, 2)
        other, resumed = trained(loaded, 1)
        with ema.average_parameters("fast"):
            carried(ema, resumed, folder, full)
        assert equal(whole(model), whole(other))
        assert resumed.fingerprint("slow") == ema.fingerprint("slow")


@pytest.mark.world_size(2)
@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_master_weights_come_back_and_training_goes_on_from_them(stage: int, dtype: str, tmp_path: Path) -> None:
    engine = make_engine(stage, dtype)
    ema = ShardedEMA(engine, averages=AVERAGES)
    ema.attach(engine)
    train(engine, range(2))
    masters, digest = ShardedEMA(engine, dtype=None), ema.fingerprint("slow")
    before = masters.fingerprint()
    with ema.average_parameters("slow"):
        state = ema.state_dict(live=True)
        dcp.save({"ema": state}, checkpoint_id=tmp_path / "state")
    train(engine, range(2, 4))
    assert masters.fingerprint() != before
    target = ema.state_dict(live=True)
    dcp.load({"ema": target}, checkpoint_id=tmp_path / "state")
    ema.load_state_dict(target)
    assert masters.fingerprint() == before
    assert ema.fingerprint("slow") == digest
    train(engine, range(2, 4))
    ema.close()


@pytest.mark.world_size(2)
def test_before_the_first_update_the_full_dict_is_the_live_model(tmp_path: Path) -> None:
    model, ema = trained("fsdp2", 1, ema_start="5ba")
    other, resumed = trained("fsdp2", 2, ema_start="5ba")
    carried(ema, resumed, tmp_path, full=True)
    assert equal(whole(model), whole(other))
    assert resumed.num_updates == 0
    assert resumed.progress == ema.progress


@pytest.mark.world_size(2)
def test_live_weights_that_only_some_ranks_were_given_are_refused_everywhere(rank: int) -> None:
    model, ema = trained("fsdp2", 1)
    before, digest = whole(model), ema.fingerprint("slow")
    state = ema.state_dict(live=True)
    if rank == 1:
        del state["live"]
    with pytest.raises(CheckpointMismatchError, match="the state dicts of some ranks have 'live'"):
        ema.load_state_dict(state)
    state = ema.state_dict(live=True)
    if rank == 1:
        state["live"].pop("module.0.up.weight")
    with pytest.raises(CheckpointMismatchError, match=r"missing 'module\.0\.up\.weight' in live"):
        ema.load_state_dict(state)
    assert equal(whole(model), before)
    assert ema.fingerprint("slow") == digest
    with pytest.raises((EMAStateError, EMAConfigError), match="live"):
        ema.state_dict(live=rank == 0)


def test_an_error_inside_says_who_holds_the_average_in_the_model() -> None:
    model = CASES["plain"].model()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with ExitStack() as stack:
        stack.enter_context(ema.average_parameters())
        with pytest.raises(EMAStateError, match=r"which .*test_live_state\.py:\d+ holds open"):
            ema.update()
    with ema.average_parameters(held_by="a trainer's validation"):  # noqa: SIM117
        with pytest.raises(EMAStateError, match=r"which a trainer's validation holds open"):
            with ema.average_parameters():
                pass


def test_what_is_no_dict_in_a_state_dict_is_named() -> None:
    ema = ShardedEMA(CASES["plain"].model(), averages=AVERAGES)
    ema.update()
    state, digest = ema.state_dict(full=True, live=True), ema.fingerprint("slow")
    for key, wrong, name in (
        ("schedules", 3, "schedules"),
        ("averages", [1], "averages"),
        ("averages", {**state["averages"], "fast": None}, "averages/fast"),
        ("buffers", "x", "buffers"),
        ("live", None, "live"),
    ):
        with pytest.raises(CheckpointMismatchError, match=f"'{name}' is a .*, not a dict"):
            ema.load_state_dict({**state, key: wrong})
    assert ema.fingerprint("slow") == digest


@pytest.mark.world_size(2)
@pytest.mark.parametrize("full", [True, False], ids=["full", "parts"])
def test_live_values_of_a_buffer_that_was_resized_since_the_update_are_left_out(full: bool) -> None:
    """Its share has the old shape: some of the new elements were saved under that shape, or what memory held."""
    model = nn.Linear(3, 2)
    model.register_buffer("bank", torch.zeros(2, 3))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    model.bank = torch.ones(5, 3)
    state = ema.state_dict(full=full, live=True)
    assert set(state["live"]) <= {"weight", "bias"}
    if full:  # the file that rank 0 writes, as every rank reads it
        everywhere = [state]
        dist.broadcast_object_list(everywhere, src=0)
        state = everywhere[0]
    again = nn.Linear(3, 2)
    again.register_buffer("bank", torch.full((2, 3), 7.0))
    other = ShardedEMA(again, decay=0.5)
    other.load_state_dict(state)
    assert torch.equal(again.bank, torch.full((2, 3), 7.0)), "it keeps its values"
    assert torch.equal(again.weight, model.weight)
    assert ema.metrics()["ema/distance"] == 0
