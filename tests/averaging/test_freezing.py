"""``requires_grad`` and the shapes of buffers change while a model is averaged; that is no reason to stop."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from support.models import CASES, batch, build
from support.oracle import DenseAverage
from support.zero_models import make_engine

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, schedules, verify_checkpoint
from dist_ema.errors import CheckpointMismatchError, EMAEngineError, EMAStateError

DECAY = 0.7
#: Parts of the model that every engine can freeze on their own: FSDP1 without ``use_orig_params`` wraps each of them.
PARTS = ("module.0", "module.1", "frozen")
SHARDED = [
    ("ddp", 2),
    ("fsdp1-full", 2),
    ("fsdp1-full-orig", 3),
    ("fsdp1-hybrid-orig", 4),
    ("fsdp1-no-shard-orig", 2),
    ("fsdp2", 3),
    ("fsdp2-keep", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2-tp", 4),
    *((f"zero{stage}", 2) for stage in range(4)),
]


class _Run:
    """A model whose weights are multiplied by numbers, the same bits on any shard, beside its average."""

    def __init__(self, case: str, **options: Any) -> None:
        self.inner = build(scalar=False, hidden=12)
        self.inner.register_buffer("bank", torch.zeros(0, 3))
        self.in_groups = case.startswith("zero") and case != "zero0"  # of an optimizer, which says what is trained
        if case.startswith("zero"):
            optimizer = torch.optim.SGD(self.inner.parameters(), lr=0.1)
            self.target = make_engine(int(case[-1]), model=self.inner, optimizer=optimizer)
        else:
            self.target = CASES[case].wrap(self.inner)
        self.ema = ShardedEMA(self.target, decay=DECAY, **options)
        self.ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]  # weights change without an optimizer

    @torch.no_grad()
    def advance(self, look: bool, flips: dict[str, bool], rows: int, factor: float, trained: set[str]) -> None:
        if look:  # which leaves FSDP's root unsharded: flags then reach full parameters only
            self.target.eval()
            self.target(batch(0))
            self.target.train()
        for part, flag in flips.items():
            module = self.inner.frozen if part == "frozen" else self.inner.module[int(part[-1])]
            module.requires_grad_(flag)
        self.inner.bank = torch.cat([self.inner.bank, torch.full((rows, 3), 0.5 + len(self.inner.bank))])
        engine = self.ema._average.engine
        engine.reshard()
        for share, source in zip(self.ema._average.shares, engine.sources(), strict=True):
            if share.spec.name in trained:
                source.mul_(factor)
        engine.publish()


class _Dense(DenseAverage):
    """The reference: what is trained at an update joins, and a buffer that has another shape starts anew."""

    def __init__(self, mode: str) -> None:
        super().__init__({"norm.running_mean", "norm.running_var", "bank"} if mode == "average" else set(), DECAY)

    def follow(self, live: dict[str, Tensor], trained: set[str]) -> None:
        trained = trained | ({"head.weight"} if "embed.weight" in trained else set())
        for name in trained - self.trained:  # begins with its present value
            self.average.pop(name, None)
        self.trained |= trained
        if "bank" in self.average and self.average["bank"].shape != live["bank"].shape:
            del self.average["bank"]
        self.update(live)


def _random_run(case: str, seed: int, folder: Path, rank: int, **options: Any) -> None:
    """Flags flip and a buffer grows at random, on an engine and on a plain model: the averages have the same bits."""
    dice = random.Random(seed)
    mode = dice.choice(["copy", "average", "ignore"])
    run, plain = _Run(case, buffers=mode, **options), _Run("plain", buffers=mode, **options)
    trained = {name for name, parameter in plain.inner.named_parameters() if parameter.requires_grad}
    dense = _Dense(mode)
    for step in range(6):
        flips = {part: dice.random() < 0.5 for part in PARTS if dice.random() < 0.4}
        look, rows, factor = dice.random() < 0.5, dice.choice([0, 0, 1, 2]), dice.choice([0.75, 1.25])
        told = {} if run.in_groups else flips
        for part, flag in told.items():
            names = {name for name, _ in plain.inner.named_parameters() if name.startswith(f"{part}.")}
            trained = trained | names if flag else trained - names
        run.advance(look, flips, rows, factor, trained)
        plain.advance(look, told, rows, factor, trained)
        assert run.ema.update() and plain.ema.update()
        assert run.ema.fingerprint() == plain.ema.fingerprint(), (mode, step, flips)
        dense.follow(plain.inner.state_dict(), trained)
        if dice.random() < 0.5:
            live = [source.clone() for source in run.ema._average.engine.sources()]
            with run.ema.average_parameters():
                inside = run.ema.fingerprint()
            assert inside == plain.ema.fingerprint()
            assert all(map(torch.equal, live, run.ema._average.engine.sources()))
    found, expected = run.ema.full_state_dict(), plain.ema.full_state_dict()
    if rank == 0:
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        if "dtype" not in options:
            dense.check(found)
    run.ema.save(folder / "ema")
    digests = run.ema.fingerprint(include_untracked=False)
    fresh = _Run("plain", buffers=mode, **options)
    fresh.ema.load(folder / "ema")
    assert fresh.ema.fingerprint(include_untracked=False).items() >= digests.items()
    assert run.ema.update() and fresh.ema.update()


@pytest.mark.parametrize(("case", "world_size"), SHARDED)
@pytest.mark.world_size()
def test_flags_and_shapes_that_change_at_random_match_the_dense_average(
    case: str, world_size: int, rank: int, tmp_path: Path
) -> None:
    """Every engine checked the flags at each update, and stopped."""
    _random_run(case, 10 * world_size + len(case), tmp_path, rank)


@pytest.mark.parametrize("case", ["fsdp2", "hsdp", "zero0", "zero2"])
@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"offload": "cpu"}], ids=["bf16", "offload"])
@pytest.mark.world_size(2)
def test_a_joining_tensor_has_the_same_bits_on_any_shard(
    case: str, options: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    """Stochastic rounding depends on the element, not on when its memory was taken; nor does an offloaded copy."""
    _random_run(case, 5, tmp_path, rank, **options)


# Flags.


def _two(frozen: int | None = 0) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    if frozen is not None:
        model[frozen].requires_grad_(False)
    return model


@torch.no_grad()
def _scale(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(factor)


def _averaged(ema: ShardedEMA) -> set[str]:
    return set(ema.full_state_dict(include_untracked=False))


def test_a_part_that_is_frozen_and_unfrozen_stays_in_every_average(caplog: pytest.LogCaptureFixture) -> None:
    """Gradual freezing: neither the steps nor the save went on, and a good average was lost."""
    model = _two(None)
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": 0.9})
    ema.update()
    model[0].requires_grad_(False)
    _scale(model, 2.0)
    before = {name: ema.full_state_dict(name) for name in ema.names}
    live = {name: value.clone() for name, value in model.state_dict().items()}
    ema.update()
    for name, decay in (("fast", 0.5), ("slow", 0.9)):
        found = ema.full_state_dict(name)
        assert all(
            torch.allclose(value.double(), before[name][key].double().lerp(live[key].double(), 1 - decay), atol=1e-7)
            for key, value in found.items()
        )
    model[0].requires_grad_(True)
    ema.update()
    assert not caplog.records, "it was averaged all the time"


def test_what_is_unfrozen_joins_every_average_once(caplog: pytest.LogCaptureFixture) -> None:
    """rebind(), which the error advised, raised as well."""
    model = _two()
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": 0.9}, update_interval="2ba")
    ema.update(batches=2)
    assert _averaged_of(ema, "fast") == {"1.weight", "1.bias"}
    model[0].requires_grad_(True)
    ema.full_state_dict("fast")  # to read changes nothing
    assert not ema.update() and _averaged_of(ema, "fast") == {"1.weight", "1.bias"}
    assert ema.update() and _averaged_of(ema, "slow") == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "'0.weight' and 1 more" in caplog.text
    joined = model[0].weight.detach().clone()
    _scale(model, 2.0)
    ema.update(batches=2)
    assert torch.equal(ema.full_state_dict("fast")["0.weight"], 1.75 * joined)
    assert len(caplog.records) == 1


def _averaged_of(ema: ShardedEMA, name: str) -> set[str]:
    return set(ema.full_state_dict(name, include_untracked=False))


def test_flags_before_the_first_update_say_what_is_averaged() -> None:
    """A model is often frozen after its average was made: adapters, a backbone that is trained later."""
    model = _two(1)
    ema = ShardedEMA(model, decay=DECAY, ema_start="2ba")
    model[1].requires_grad_(True)
    model[0].requires_grad_(False)
    assert not ema.update() and ema.update()
    assert _averaged(ema) == {"1.weight", "1.bias"}


def test_a_generator_that_is_frozen_at_each_update_is_averaged() -> None:
    """A GAN's loop calls update() at its end, where the generator waits for the critic's turn."""
    model = _two(None)
    ema = ShardedEMA(model, decay=0.5)
    for _ in range(3):
        model.requires_grad_(True)
        _scale(model, 2.0)
        model.requires_grad_(False)
        assert ema.update()
    assert _averaged(ema) == set(model.state_dict())
    assert torch.allclose(ema.full_state_dict()["0.weight"], model[0].weight * (0.25 * 0.25 + 0.25 * 0.5 + 0.5))
    ema.reset()
    assert ema.update() and _averaged(ema) == set(model.state_dict())


def test_what_joins_while_an_average_stands_still_has_its_value() -> None:
    """Between two windows no average is moved, so nothing would fill the new memory."""
    model = _two()
    ema = ShardedEMA(model, schedule=schedules.Window("2ba", every="6ba"))
    for _ in range(7):
        ema.update()
    model[0].requires_grad_(True)
    assert ema.update()
    assert torch.equal(ema.full_state_dict()["0.weight"], model[0].weight)


def test_what_include_and_exclude_leave_out_never_joins() -> None:
    model = _two(None)
    ema = ShardedEMA(model, decay=DECAY, exclude="^0")
    for flag in (False, True):
        model[0].requires_grad_(flag)
        model[0].weight = nn.Parameter(torch.ones(4, 3), requires_grad=flag)  # nor is it checked
        assert ema.update() and _averaged(ema) == {"1.weight", "1.bias"}
    assert torch.equal(ema.full_state_dict()["0.weight"], torch.ones(4, 3))


def test_what_joins_overwrites_its_tensor_in_the_teacher() -> None:
    """A teacher's frozen weights are the user's, until the student trains them."""
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = _two(), _two(None).requires_grad_(False).to(dtype)
        ema = ShardedEMA(student, into=teacher, decay=0.5)
        ema.update()
        kept = teacher[0].weight.clone()
        assert torch.equal(teacher[0].weight, kept) and torch.equal(teacher[1].weight, student[1].weight.to(dtype))
        student[0].requires_grad_(True)
        ema.update()
        assert torch.equal(teacher[0].weight, student[0].weight.to(dtype))
        _scale(student, 2.0)
        ema.update()
        assert torch.equal(teacher[0].weight, (0.75 * student[0].weight).to(dtype))
    teacher.requires_grad_(True)
    with pytest.raises(EMAStateError, match=r"the teacher \(into=\): parameter '0.weight' .* is trained now"):
        ema.update()


def test_what_a_teacher_cannot_hold_is_refused_when_it_would_join() -> None:
    """Training cannot go on as if the teacher had it; frozen again, it goes on."""
    student, teacher = _two(), nn.Sequential(nn.Identity(), nn.Linear(4, 3)).requires_grad_(False)
    ema = ShardedEMA(student, into=teacher, decay=0.5)
    ema.update()
    student[0].requires_grad_(True)
    for _ in range(2):
        with pytest.raises(EMAEngineError, match=r"the teacher \(into=\) .*'0.weight' it has no tensor with that name"):
            ema.update()
    student[0].requires_grad_(False)
    assert ema.update() and ema.num_updates == 2


@pytest.mark.world_size(2)
def test_the_average_leaves_flags_of_fsdp2_as_the_user_set_them(rank: int) -> None:
    """After a forward pass flags reach full parameters only; a reshard of ours brought the old ones back."""

    def losses(averaged: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = fully_shard(_two(None))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ema = ShardedEMA(model, decay=DECAY) if averaged else None
        found = []
        for step in range(4):
            with torch.no_grad():
                model(torch.ones(2, 3))
            model.requires_grad_(step % 2 == 1)
            if ema is not None:
                with ema.average_parameters():
                    pass
                ema.full_state_dict()
            model[1].weight.requires_grad_(True)
            loss = model(torch.ones(2, 3)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
            if ema is not None:
                assert ema.update()
        return found

    assert all(map(torch.equal, losses(False), losses(True)))


@pytest.mark.world_size(2)
def test_what_ddp_does_not_keep_alike_is_not_split_between_ranks(rank: int) -> None:
    """DDP adds up no gradients of what was frozen when it was made: half of each rank's weights is no model."""
    model = DDP(_two())
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    model.module[0].requires_grad_(True)
    with torch.no_grad():
        model.module[0].weight.fill_(rank + 1.0)
    ema.update()
    live = model.module[0].weight.detach().clone()
    with ema.average_parameters():
        pass
    assert torch.equal(model.module[0].weight, live)
    found = ema.full_state_dict()
    assert rank or torch.equal(found["0.weight"], torch.ones(4, 3))


@pytest.mark.world_size(2)
def test_what_was_frozen_when_ddp_was_made_is_not_split_though_it_is_trained_by_now(rank: int) -> None:
    """A run that is resumed unfreezes before the average is made. Its average was half of each rank's weights."""
    model = DDP(_two())
    model.module[0].requires_grad_(True)
    model.module[1].requires_grad_(False)  # as many tensors are trained as DDP knows
    ema = ShardedEMA(model, decay=0.5)
    with torch.no_grad():
        model.module[0].weight.fill_(rank + 1.0)
    ema.update()
    found = ema.full_state_dict()
    assert rank or torch.equal(found["0.weight"], torch.ones(4, 3))
    with ema.average_parameters():
        pass
    assert bool((model.module[0].weight == rank + 1.0).all())


@pytest.mark.world_size(2)
def test_flags_that_differ_between_ranks_are_said_on_every_rank(rank: int) -> None:
    model = DDP(_two())
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    model.module[0].requires_grad_(rank == 1)
    ema.update()
    with pytest.raises(EMAEngineError, match=r"'0.weight'"):
        ema.full_state_dict()
    model.module[0].requires_grad_(True)
    ema.update()
    with pytest.raises(EMAEngineError, match=r"joined=2.*joined=3|joined=3.*joined=2"):
        ema.full_state_dict()


@pytest.mark.world_size(2)
def test_one_stage_of_a_pipeline_unfreezes(rank: int, tmp_path: Path) -> None:
    """The other ranks have no tensor that joins, and have to learn of it when they next meet."""
    stages = nn.ModuleDict({f"stage{number}": _two(0 if number else None) for number in range(2)})
    mine = nn.ModuleDict({f"stage{rank}": stages[f"stage{rank}"]})
    ema = ShardedEMA([mine], decay=DECAY)
    ema.update()
    stages["stage1"].requires_grad_(True)
    ema.update()
    ema.save(tmp_path / "ema")
    assert set(verify_checkpoint(tmp_path / "ema").averages["ema"]) == set(stages.state_dict())


# Files.


def test_a_checkpoint_says_what_was_frozen_and_a_later_run_may_train_it(tmp_path: Path) -> None:
    """Resumed after an unfreezing: the stored value is the average of a weight that was constant."""
    model = _two()
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": 0.9})
    ema.update()
    ema.save(tmp_path / "ema")
    assert verify_checkpoint(tmp_path / "ema").frozen == ("0.weight", "0.bias")
    other = _two(None)
    later = ShardedEMA(other, averages={"fast": 0.5, "slow": 0.9})
    later.load(tmp_path / "ema")
    for name in later.names:
        found = later.full_state_dict(name, include_untracked=False)
        assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())
    assert later.update()


@pytest.mark.parametrize("case", ["plain", "ddp", "fsdp1-full-orig", "fsdp2", "hsdp", "fsdp2-tp"])
@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.world_size(2)
def test_what_is_unfrozen_before_a_load_starts_from_its_stored_value(
    case: str, updates: int, rank: int, tmp_path: Path
) -> None:
    """It was left out of the load, and joined later with the value that it had by then."""
    model = CASES[case].model()
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    ShardedEMA(model, decay=0.5).save(tmp_path / "trained")
    parameter.requires_grad_(False)
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": 0.9})
    ema.update()
    ema.save(tmp_path / "ema")
    stored = ema.full_state_dict("fast")
    (frozen,) = set(verify_checkpoint(tmp_path / "ema").frozen) - set(verify_checkpoint(tmp_path / "trained").frozen)
    other = CASES[case].model()
    parameter = dict(other.named_parameters())[name]
    parameter.requires_grad_(False)
    later = ShardedEMA(other, averages={"fast": 0.5, "slow": 0.9})
    for _ in range(updates):
        later.update()
    parameter.requires_grad_(True)
    with torch.no_grad():
        parameter.add_(1)
    later.load(tmp_path / "ema")
    for average in later.names:
        found = later.full_state_dict(average)
        if rank == 0:
            assert torch.equal(found[frozen], stored[frozen])
    later.update()
    found = later.full_state_dict("fast")
    if rank == 0:
        assert torch.allclose(found[frozen], stored[frozen] + 0.5)  # the models are alike


def test_what_a_checkpoint_does_not_know_is_a_mismatch(tmp_path: Path) -> None:
    """An excluded weight was trained all the time: its stored value is no average."""
    model = _two(None)
    ema = ShardedEMA(model, decay=DECAY, exclude="^0")
    ema.update()
    ema.save(tmp_path / "ema")
    assert verify_checkpoint(tmp_path / "ema").frozen == ()
    with pytest.raises(CheckpointMismatchError, match=r"missing '0.weight'"):
        ShardedEMA(_two(None), decay=DECAY).load(tmp_path / "ema")


def test_an_average_of_what_is_frozen_now_goes_on_after_load(tmp_path: Path) -> None:
    """A resumed run is often built frozen, and unfreezes when its callback is called."""
    model = _two(None)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    _scale(model, 3.0)
    ema.update()
    ema.save(tmp_path / "ema")
    full, before = ema.state_dict(full=True), ema.full_state_dict()
    for load in (lambda one: one.load(tmp_path / "ema"), lambda one: one.load_state_dict(full)):
        other = _two()
        other.load_state_dict(model.state_dict())
        later = ShardedEMA(other, decay=0.5)
        load(later)
        found = later.full_state_dict(include_untracked=False)
        assert all(torch.equal(found[name], value) for name, value in before.items()) and len(found) == 4
        later.update()
        expected = before["0.weight"].lerp(other[0].weight.detach(), 0.5)
        assert torch.allclose(later.full_state_dict()["0.weight"], expected)
    with pytest.raises(CheckpointMismatchError, match=r"unexpected '0.weight'"):
        ShardedEMA(_two(), decay=0.5, exclude="^0").load(tmp_path / "ema")


@pytest.mark.world_size(2)
def test_dcp_carries_what_has_joined(rank: int, tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    model = fully_shard(_two())
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    model[0].requires_grad_(True)
    ema.update()
    before = ema.fingerprint()
    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp")
    later = ShardedEMA(fully_shard(_two(None)), decay=DECAY)
    dcp.load({"ema": later}, checkpoint_id=tmp_path / "dcp")
    assert later.fingerprint() == before


@pytest.mark.world_size(2)
def test_dcp_says_that_it_has_not_read_what_is_frozen_now(rank: int, tmp_path: Path) -> None:
    """A run that is resumed frozen went on without the average of what was trained before."""
    import torch.distributed.checkpoint as dcp

    model = fully_shard(_two(None))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    _scale(model, 2.0)
    ema.update()
    before = ema.full_state_dict()
    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp")
    resumed = fully_shard(_two())
    later = ShardedEMA(resumed, decay=0.5)
    with pytest.raises(
        CheckpointMismatchError, match=r"of 4 tensors, and only 2 .* \(frozen are '0.weight', '0.bias'\)"
    ):
        dcp.load({"ema": later}, checkpoint_id=tmp_path / "dcp")
    assert later.num_updates == 0
    resumed[0].requires_grad_(True)
    later.reset()
    dcp.load({"ema": later}, checkpoint_id=tmp_path / "dcp")
    resumed[0].requires_grad_(False)
    assert later.update()
    found = later.full_state_dict(include_untracked=False)
    assert rank or found.keys() == before.keys()
    first = next(iter(resumed[0].parameters())).full_tensor()
    assert rank or torch.allclose(found["0.weight"], before["0.weight"].lerp(first, 0.5))


@pytest.mark.parametrize("case", ["ddp", "fsdp1-full-orig", "fsdp2", "hsdp", "zero0", "zero2"])
@pytest.mark.world_size(2)
def test_each_ranks_own_file_loads_after_a_part_has_joined(case: str, rank: int, tmp_path: Path) -> None:
    """Replicas split what joins apart from what there was: a new object would split all of it together."""
    run = _Run(case)
    run.ema.update()
    run.inner.frozen.requires_grad_(True)
    run.advance(False, {}, 0, 1.25, {"frozen.weight", "frozen.bias", "embed.weight"})
    run.ema.update()
    run.advance(False, {}, 0, 1.25, {"frozen.weight", "frozen.bias", "embed.weight"})
    run.ema.update()
    before = run.ema.fingerprint(include_untracked=False)
    torch.save(run.ema.state_dict(), tmp_path / f"{rank}.pt")
    state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
    for frozen in [False] if case == "zero0" else [True, False]:
        other = _Run(case)
        other.inner.frozen.requires_grad_(not frozen)
        later = ShardedEMA(other.target, decay=DECAY)
        later.load_state_dict(state)
        assert later.fingerprint(include_untracked=False) == before


def test_a_snapshot_of_the_update_at_which_a_part_joins(tmp_path: Path) -> None:
    model = _two()
    ema = ShardedEMA(model, decay=DECAY)
    snapshots = ema.snapshot(tmp_path / "snapshots", every="1ba")
    ema.update()
    model[0].requires_grad_(True)
    ema.update()
    _scale(model, 2.0)
    ema.update()
    ema.wait()
    found = [set(verify_checkpoint(path).averages["ema"]) for path in snapshots.paths()]
    assert found == [{"1.weight", "1.bias"}, set(model.state_dict()), set(model.state_dict())]


# rebind().


def test_rebind_goes_on_after_a_join_and_takes_new_parts() -> None:
    """The errors about added and replaced parameters advise it."""
    model = _two()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    model[0].requires_grad_(True)
    ema.update()
    _scale(model, 2.0)
    ema.update()
    before = ema.full_state_dict()
    model[0].requires_grad_(False)
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    model.append(nn.Linear(3, 2))
    with pytest.raises(EMAStateError, match=r"rebind\(model\)"):
        ema.update()
    ema.rebind(model)
    found = ema.full_state_dict(include_untracked=False)
    assert all(torch.equal(found[name], value) for name, value in before.items())
    assert torch.equal(found["2.weight"], model[2].weight)
    assert ema.update() and ema.num_updates == 4


# Buffers.


class _Bank(nn.Module):
    """A bank of features that grows with each forward pass, and a buffer that comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("bank", torch.zeros(0, 4))
        self.register_buffer("passing", None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.bank = torch.cat([self.bank, y.detach()[:1]])
        return y


@pytest.mark.parametrize("mode", ["copy", "average", "ignore"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_a_buffer_that_grows_is_trained_evaluated_saved_and_loaded(
    mode: str, offload: str | None, tmp_path: Path
) -> None:
    """A model with a memory bank could not be averaged at all, and an evaluation grows it too."""
    model = _Bank()
    ema = ShardedEMA(model, decay=0.5, buffers=mode, offload=offload)
    for _ in range(3):
        model(torch.ones(2, 4))
        assert ema.update()
        live = model.bank.clone()
        model(torch.ones(2, 4))
        grown = model.bank
        with ema.average_parameters():
            assert torch.equal(model.bank, grown if mode == "ignore" else live)
            model(torch.ones(2, 4))
        assert torch.equal(model.bank[: len(grown)], grown)
        assert mode == "ignore" or model.bank is grown
    ema.save(tmp_path / "ema")
    before = ema.full_state_dict()
    full = ema.state_dict(full=True)
    for load in (lambda one: one.load(tmp_path / "ema"), lambda one: one.load_state_dict(full)):
        later = ShardedEMA(_Bank(), decay=0.5, buffers=mode, offload=offload)
        load(later)
        found = later.full_state_dict()
        assert mode == "ignore" or torch.equal(found["bank"], before["bank"])
        assert torch.equal(found["linear.weight"], before["linear.weight"])
        later.copy_to()
        assert later.update()


def test_what_is_ignored_may_come_and_go() -> None:
    model = _Bank()
    ema = ShardedEMA(model, decay=0.5, buffers="ignore")
    ema.update()
    for value in (torch.ones(2), torch.ones(3, 3), None):
        model.passing = value
        assert ema.update()
        found = ema.full_state_dict()
        assert ("passing" in found) is (value is not None)
        assert value is None or torch.equal(found["passing"], value)
    model.passing = torch.ones(1)
    del model.bank
    assert ema.update() and set(ema.full_state_dict()) == {"linear.weight", "linear.bias", "passing"}
    with ema.average_parameters():
        pass


@pytest.mark.parametrize("mode", ["copy", "ignore"])
@pytest.mark.world_size(2)
def test_banks_that_grow_by_different_numbers_on_each_rank(mode: str, rank: int, tmp_path: Path) -> None:
    """Batches are uneven at the end of an epoch; a buffer of each rank's own is no matter between ranks."""
    model = _Bank()
    fully_shard(model.linear)
    model = fully_shard(model)
    ema = ShardedEMA(model, decay=0.5, buffers=mode)
    for step in range(2):
        model.bank = torch.full((1 + 2 * rank + step, 4), float(rank))
        ema.update()
        mine = model.bank
        with ema.average_parameters():
            assert mode == "ignore" or model.bank.shape == (1 + step, 4)
        assert torch.equal(model.bank, mine)
        ema.save(tmp_path / "ema")
        found = ema.full_state_dict()
        assert rank or torch.equal(found["bank"], torch.zeros(1 + step, 4))
    ema.load(tmp_path / "ema")
    assert ema.update()


# Parts that replicas split.


@pytest.mark.parametrize("case", ["hsdp", "zero0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.world_size(2)
def test_replicas_send_each_other_what_joined_as_they_split_it(case: str, dtype: torch.dtype) -> None:
    """Cut anew together with what was there, shares would move, and each rank would send the other's elements."""
    run, plain = _Run(case, dtype=dtype), _Run("plain", dtype=dtype)
    trained = {name for name, parameter in plain.inner.named_parameters() if parameter.requires_grad}
    for part in (None, *PARTS, None):
        flips = dict.fromkeys(PARTS[:2], False) if part is None else {part: True}
        for name in flips:
            names = {known for known, _ in plain.inner.named_parameters() if known.startswith(f"{name}.")}
            trained = trained | names if flips[name] else trained - names
        for one in (run, plain):
            one.advance(False, flips, 0, 1.37, trained)
            assert one.ema.update()
        assert run.ema.fingerprint() == plain.ema.fingerprint()
        with run.ema.average_parameters(), plain.ema.average_parameters():
            names = [share.spec.name for share in plain.ema._average.shares]
            wholes = dict(zip(names, plain.ema._average.engine.sources(), strict=True))
            for share, source in zip(run.ema._average.shares, run.ema._average.engine.sources(), strict=True):
                flat = wholes[share.spec.name].reshape(-1)
                expected = torch.cat([flat[start : start + size] for start, size in share.spec.runs] or [flat[:0]])
                assert torch.equal(source.reshape(-1), expected), share.spec.name
    assert {share.joined for share in run.ema._average.shares} >= {2, 3}
