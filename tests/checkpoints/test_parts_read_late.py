"""A checkpoint writer that copies in the background reads ``state_dict()``'s parts while the loop goes on.

The parts look at the shadow, to take no memory. An update or a visit to the model that wrote there would put other
values into the checkpoint: those of a later step, or live weights in place of averages.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support.any_engine import AVERAGES, average_ema, make_ema
from support.models import CASES, build

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from dist_ema import ShardedEMA, update_bn
from dist_ema.shadow import lent

SECTIONS = [("averages", "fast"), ("averages", "slow"), ("buffers",), ("live",)]


def values(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every part of a state dict with its place and what it holds."""
    for section in SECTIONS:
        found: Any = state
        for key in section:
            found = found.get(key, {})
        yield from (("/".join((*section, name)), part.held) for name, part in found.items())


class Held:
    """A state dict that is kept, with a copy of what it held."""

    def __init__(self, ema: ShardedEMA, live: bool = False) -> None:
        self.state = ema.state_dict(live=live)
        self.before = {place: held.clone() for place, held in values(self.state)}
        assert self.before

    def check(self) -> None:
        for place, held in values(self.state):
            assert torch.equal(held, self.before[place]), place


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    "case", ["plain", "ddp", "fsdp1-full-orig", "fsdp2", "hsdp", "tp", "zero0", "zero1", "zero2", "zero3"]
)
def test_whatever_is_written_a_state_dict_that_is_held_stays_as_it_was(case: str, tmp_path: Path) -> None:
    """Compared bit for bit with an average of which nobody holds anything."""
    twin = make_ema(case)
    average_ema(twin, range(2))
    digests = [[twin.fingerprint(name) for name in AVERAGES]]
    average_ema(twin, range(2, 4))
    digests.append([twin.fingerprint(name) for name in AVERAGES])
    twin.close()

    ema = make_ema(case)
    average_ema(ema, range(2))
    held = [Held(ema)]
    with ema.average_parameters("slow"):
        held.append(Held(ema))  # in the model's memory, which cannot move
        held[0].check()
    for one in held:
        one.check()
    assert [ema.fingerprint(name) for name in AVERAGES] == digests[0]
    average_ema(ema, range(2, 4))
    held.append(Held(ema))
    ema.load_state_dict(held[0].state)
    for one in held:
        one.check()
    assert [ema.fingerprint(name) for name in AVERAGES] == digests[0]
    ema.load_state_dict(held[2].state)
    ema.copy_to("fast")
    assert [ema.fingerprint(name) for name in AVERAGES] == digests[1]
    ema.reset()
    ema.update(due=True)
    for one in held:
        one.check()
    del one, held
    assert not lent.outstanding()
    ema.close()


def step(model: nn.Module, ema: ShardedEMA) -> None:
    ema.wait()  # an offloaded average may still be reading the weights
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    ema.update()


def begun(**options: Any) -> tuple[nn.Module, ShardedEMA]:
    """A model with an average that is not the live weights."""
    model = build()
    ema = ShardedEMA(model, averages=AVERAGES, **options)
    ema.update()
    step(model, ema)
    return model, ema


@pytest.mark.parametrize("options", [{"offload": "cpu"}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}])
def test_shadows_of_every_kind_leave_held_parts_alone(options: dict[str, Any]) -> None:
    model, ema = begun(**options)
    twin_model, twin = begun(**options)
    held = Held(ema)
    for _ in range(2):
        step(model, ema)
        step(twin_model, twin)
    with ema.average_parameters("fast"):
        held.check()
    held.check()
    assert ema.fingerprint("slow") == twin.fingerprint("slow")
    ema.close()
    twin.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teachers_memory_cannot_move_so_the_part_does(dtype: torch.dtype) -> None:
    model, teacher = build(frozen=False), build(frozen=False).requires_grad_(False).to(dtype)
    ema = ShardedEMA(model, averages={"fast": 0.5}, into=teacher)
    ema.update()
    step(model, ema)
    held = Held(ema)
    step(model, ema)
    held.check()
    expected = ema.full_state_dict()["one.weight"]
    assert torch.equal(teacher.one.weight.float(), expected.to(dtype).float())
    with ema.average_parameters():
        held.check()
    ema.reset()
    ema.update(due=True)  # into the teacher again
    held.check()


def test_live_parts_survive_a_visit_and_a_copy_into_the_model() -> None:
    """They look at the model, and what we write there must not reach them."""
    _, ema = begun()
    held = Held(ema, live=True)
    with ema.average_parameters("fast"):
        held.check()
        inside = Held(ema, live=True)
    ema.copy_to("fast")
    held.check()
    inside.check()


def test_views_of_a_part_keep_it_too() -> None:
    """The dict and its parts are gone, and somebody has a slice, a detached part or an array of the same memory."""
    model, ema = begun()
    parts = ema.state_dict()["averages"]["fast"]
    views = [parts["one.weight"].held[3:7], parts["embed.weight"].detach().held]
    array = parts["module.0.up.weight"].held.numpy()
    before, array_before = [view.clone() for view in views], array.copy()
    del parts
    step(model, ema)
    with ema.average_parameters("fast"):
        pass
    assert all(torch.equal(view, value) for view, value in zip(views, before, strict=True))
    assert np.array_equal(array, array_before)


def test_batch_norms_statistics_leave_held_parts_alone() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    ema = ShardedEMA(model, averages={"fast": 0.5}, buffers="average")
    ema.update()
    held = Held(ema)
    update_bn(ema, [torch.randn(8, 6)])
    held.check()


def test_what_nobody_holds_any_more_is_not_copied() -> None:
    """The shadow stays in its memory after a usual checkpoint."""
    model, ema = begun()
    before = [tensor.data_ptr() for tensor in ema._average.shadow.tensors("fast") if tensor is not None]
    ema.state_dict()
    step(model, ema)
    assert [tensor.data_ptr() for tensor in ema._average.shadow.tensors("fast") if tensor is not None] == before


def test_only_the_parts_that_are_held_are_copied() -> None:
    model, ema = begun()
    before = {id(tensor): tensor for tensor in ema._average.shadow.tensors("fast") if tensor is not None}
    part = ema.state_dict()["averages"]["fast"]["one.weight"]
    step(model, ema)
    after = [tensor for tensor in ema._average.shadow.tensors("fast") if tensor is not None]
    assert sum(id(tensor) not in before for tensor in after) == 1
    del part


def test_a_user_who_keeps_the_dict_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many programs keep it in a variable for the whole run: each checkpoint would stop training for 30 s."""
    monkeypatch.setattr(lent, "PATIENCE", 1e9)
    model, ema = begun()
    held = Held(ema)
    step(model, ema)
    with ema.average_parameters("fast"):
        pass
    held.check()


class Reader(threading.Thread):
    """Copies a state dict slowly, as a stager does, when it is told to begin."""

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._given: list[Any] = [state]
        self.at_work, self.go_on = threading.Event(), threading.Event()
        self.copies: dict[str, Tensor] = {}

    def run(self) -> None:
        state = self._given.pop()
        self.at_work.set()
        self.go_on.wait(60)
        self.copies = {place: held.clone() for place, held in values(state)}


def test_a_thread_at_work_is_waited_for_and_nothing_is_copied() -> None:
    model, ema = begun()
    memory = [tensor.data_ptr() for tensor in ema._average.shadow.tensors("fast") if tensor is not None]
    expected = Held(ema).before
    reader = Reader(ema.state_dict())
    reader.start()
    reader.at_work.wait(60)
    threading.Timer(0.3, reader.go_on.set).start()
    step(model, ema)
    reader.join(60)
    assert reader.copies.keys() == expected.keys()
    assert all(torch.equal(reader.copies[place], value) for place, value in expected.items())
    assert [tensor.data_ptr() for tensor in ema._average.shadow.tensors("fast") if tensor is not None] == memory


def test_a_thread_that_does_not_end_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks would wait. The thread reads what it was given all the same."""
    monkeypatch.setattr(lent, "PATIENCE", 0.3)
    model, ema = begun()
    expected = Held(ema).before
    reader = Reader(ema.state_dict())
    reader.start()
    reader.at_work.wait(60)
    step(model, ema)
    with ema.average_parameters("fast"):
        pass
    reader.go_on.set()
    reader.join(60)
    assert all(torch.equal(reader.copies[place], value) for place, value in expected.items())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
@pytest.mark.parametrize("visit", [False, True])
def test_an_asynchronous_stager_saves_what_there_was(case: str, visit: bool, tmp_path: Path) -> None:
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5)
    average_ema(ema, range(2))
    expected = ema.fingerprint(include_untracked=False)
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=False
    )
    stager, group = DefaultStager(options), dist.new_group()  # of its thread: the others' calls would mix with ours
    started = dcp.async_save({"ema": ema}, checkpoint_id=tmp_path / "save", async_stager=stager, process_group=group)
    if visit:
        with ema.average_parameters():
            time.sleep(0)
    else:
        average_ema(ema, range(2, 3))
    started.staging_completion.result()
    started.upload_completion.result()
    stager.close()
    dcp.load({"ema": ema}, checkpoint_id=tmp_path / "save")
    assert ema.fingerprint(include_untracked=False) == expected
    ema.close()
