"""What the options of ShardedEMA mean: the clock, several averages, buffers, names, the guard, what an update costs."""

from __future__ import annotations

import copy
from pathlib import Path

from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, compute_ema, schedules
from dist_ema.errors import EMAConfigError, EMAStateError

pytestmark = pytest.mark.core


def _model(*values: float) -> nn.Linear:
    model = nn.Linear(len(values), 1, bias=False)
    _set(model, *values)
    return model


@torch.no_grad()
def _set(model: nn.Linear, *values: float) -> None:
    model.weight.copy_(torch.tensor([values]))


def _average(ema: ShardedEMA, name: str | None = None) -> list[float]:
    return ema.full_state_dict(name)["weight"].flatten().tolist()


# The clock.


def test_average_is_the_live_model_before_the_first_update() -> None:
    """Code that evaluates from step 0 must not meet zeros, an error, or a copy from construction."""
    model = _model(1.0)
    ema = ShardedEMA(model, decay=0.9, ema_start="5ba")
    _set(model, 3.0)
    assert _average(ema) == [3.0]
    with ema.average_parameters():
        assert model.weight.item() == 3.0
    ema.copy_to()
    assert ema.num_updates == 0
    assert ema.progress.batches == 0
    assert ema.metrics()["ema/distance"] == 0.0


def test_first_due_update_copies_and_the_next_blends() -> None:
    """Zero initialisation, or a blend with the weights at construction, would bias the average."""
    model = _model(1.0)
    ema = ShardedEMA(model, decay=0.75)
    _set(model, 2.0)
    assert ema.update()
    assert _average(ema) == [2.0]
    _set(model, 4.0)
    assert ema.update()
    assert _average(ema) == [2.5]
    assert ema.num_updates == 2
    assert ema.progress.batches == 1


def test_interval_does_not_change_the_half_life() -> None:
    """Without correction an interval of 10 makes the half life 10 times longer."""
    model = _model(0.0)
    ema = ShardedEMA(model, half_life="20ba", update_interval="10ba")
    done = []
    for step in range(1, 41):
        if step > 10:
            _set(model, 1.0)
        done.append(ema.update())
    assert [step for step, did in enumerate(done, 1) if did] == [10, 20, 30, 40]
    # The copy at 10 holds 0; then 30 batches of 1: 1 - 2 ** (-30 / 20).
    assert _average(ema)[0] == pytest.approx(1 - 2 ** (-1.5), rel=1e-6)


def test_smoothing_is_never_rescaled_by_the_interval() -> None:
    """Composer's users know smoothing as the fraction kept per update."""
    model = _model(0.0)
    ema = ShardedEMA(model, smoothing=0.5, update_interval=5)
    for _ in range(5):
        ema.update()
    _set(model, 1.0)
    for _ in range(10):
        ema.update()
    assert _average(ema) == [0.75]


def test_start_counts_training_and_progress_counts_averaging() -> None:
    """ema_start="0.1dur" of 100 batches is the 10th batch, whose weights are the first of the average."""
    model = _model(0.0)
    ema = ShardedEMA(model, decay=0.5, ema_start="0.1dur", max_duration="100ba")
    done = [ema.update() for _ in range(12)]
    assert done == [False] * 9 + [True] * 3
    assert ema.progress.batches == 2


def test_token_half_life_follows_tokens_through_a_batch_ramp() -> None:
    """When the batch size grows, an average in batches shortens in tokens; one in tokens does not."""
    model = _model(0.0)
    ema = ShardedEMA(model, half_life="1000tok")
    ema.update(tokens=10)
    _set(model, 1.0)
    for tokens in (100, 300, 600):
        ema.update(tokens=tokens)
    assert _average(ema)[0] == pytest.approx(0.5, rel=1e-6)


def test_average_that_cannot_move_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """A half life in tokens, and nobody passes tokens: the average silently never moves."""
    ema = ShardedEMA(_model(0.0), half_life="1000tok")
    ema.update()
    ema.update()
    ema.update()
    said = [record.message for record in caplog.records if record.name.startswith("dist_ema.core")]
    assert len(said) == 1
    assert "counts in tok" in said[0]


def test_the_last_decay_is_told_on_each_rank_alone() -> None:
    """metrics() is collective, so a rank that logs by itself had no number."""
    model = _model(0.0)
    ema = ShardedEMA(model, averages={"fast": schedules.NumUpdatesWarmup(0.99), "slow": 0.9}, update_interval=2)
    assert ema.decays == {"fast": 0.0, "slow": 0.0}
    ema.update(batches=2)
    assert ema.decays == {"fast": 0.0, "slow": 0.0}  # a copy keeps nothing
    ema.update(batches=2)
    assert ema.decays == {"fast": pytest.approx(2 / 11 * 3 / 12), "slow": pytest.approx(0.81)}
    ema.update()
    assert ema.decays["slow"] == pytest.approx(0.81)  # of the last update, not of the last call
    with pytest.raises(EMAConfigError, match="there are several averages \\('fast', 'slow'\\): use decays"):
        _ = ema.decay
    state = ema.state_dict()
    ema.load_state_dict(state)
    assert ema.decays == {"fast": 0.0, "slow": 0.0}
    single = ShardedEMA(model, decay=0.9)
    single.update(), single.update()
    assert single.decay == single.metrics()["ema/decay"] == pytest.approx(0.9)


# Several averages, names, buffers.


def test_several_averages_equal_separate_ones() -> None:
    """They share one read of the weights, and must not share anything else."""
    kinds = {
        "fast": 0.5,
        "slow": schedules.HalfLife("50ba"),
        "power": schedules.PowerFunction(sigma_rel=0.1),
        "mean": schedules.Uniform(),
    }
    model = build()
    together = ShardedEMA(model, averages=kinds)
    apart = {
        name: ShardedEMA(model, decay=value) if isinstance(value, float) else ShardedEMA(model, schedule=value)
        for name, value in kinds.items()
    }
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * step)
        together.update()
        for ema in apart.values():
            ema.update()
    assert together.names == tuple(kinds)
    for name, ema in apart.items():
        assert together.fingerprint(name) == ema.fingerprint()
    metrics = together.metrics()
    assert metrics["ema/fast/decay"] == 0.5
    assert metrics["ema/slow/distance"] > metrics["ema/fast/distance"]


def test_uniform_is_the_plain_mean_of_the_weights_at_updates() -> None:
    """SWA: every set of weights counts the same, whatever lies between the updates."""
    model = _model(0.0)
    ema = ShardedEMA(model, schedule=schedules.Uniform(), update_interval=3)
    for step in range(1, 13):
        _set(model, float(step))
        ema.update()
    assert _average(ema)[0] == pytest.approx((3 + 6 + 9 + 12) / 4)


def test_include_and_exclude_choose_by_canonical_name() -> None:
    """A wrapper's prefix in a name would make a pattern miss, and the average silently stay."""
    model = torch.compile(build(), backend="eager")
    ema = ShardedEMA(model, decay=0.5, include=[r"^module\.\d", "embed"], exclude="bias$")
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(2.0)
    ema.update()
    before = build().state_dict()
    moved = {
        name
        for name, value in ema.full_state_dict().items()
        if not torch.equal(value, model.state_dict()["_orig_mod." + name])
    }
    assert moved == {
        name for name in before if name.endswith("weight") and name.startswith(("module.", "embed", "head"))
    }
    tracked = ema.full_state_dict(include_untracked=False)
    assert tracked.keys() == moved


BY_PATTERN = {"expert_bias$": "average", "^norm": "ignore", "num_batches": "average"}


class Router(nn.Module):
    """Learnt buffers, statistics, and a counter that nobody names."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(3)
        self.other = nn.BatchNorm1d(3)
        self.register_buffer("expert_bias", torch.zeros(2))
        self.register_buffer("tokens", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.other(self.norm(x))) + self.expert_bias


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["plain", "ddp", "fsdp2", "teacher"])
def test_buffers_are_averaged_copied_or_ignored_by_their_names(case: str, rank: int, tmp_path: Path) -> None:
    """A router's learnt bias was copied with every other buffer, or all statistics averaged with it."""
    torch.manual_seed(0)
    model = {"ddp": DDP, "fsdp2": fully_shard}.get(case, nn.Module.float)(Router())
    teacher = Router().requires_grad_(False) if case == "teacher" else None
    own = dict.fromkeys([name for name, _ in Router().named_buffers()], "copy")
    own |= {"expert_bias": "average", "norm.running_mean": "ignore", "norm.running_var": "ignore"}
    own |= {
        "norm.num_batches_tracked": "ignore"
    }  # the first match counts; an integer is copied where it would be averaged
    ema = ShardedEMA(model, decay=0.75, buffers=BY_PATTERN, into=teacher)
    expected: dict[str, Tensor] = {}
    for step in range(3):
        for name, buffer in model.named_buffers():
            name = name.removeprefix("module.")
            buffer.fill_(10 * step + 1)
            first = name not in expected or own[name] != "average"
            expected[name] = buffer.double() if first else 0.75 * expected[name] + 0.25 * buffer.double()
        ema.update()
    for name, buffer in model.named_buffers():
        buffer.fill_(99)
        if own[name.removeprefix("module.")] == "ignore":
            expected[name.removeprefix("module.")] = buffer.double()
    ema.save(tmp_path / "saved")
    for _ in range(2):
        state = ema.full_state_dict()
        for name, value in expected.items() if state else ():
            torch.testing.assert_close(state[name].double(), value, msg=name)
        if teacher is not None:
            kept = {name for name, mode in own.items() if mode != "ignore"}
            held = dict(teacher.named_buffers())
            assert all(torch.equal(held[name].double(), expected[name]) for name in kept)
        digest = ema.fingerprint()
        ema.reset()
        ema.update()  # what load() has to replace
        assert ema.fingerprint() != digest
        ema.load(tmp_path / "saved")
        assert ema.fingerprint() == digest
    other = ShardedEMA(model, decay=0.75, buffers=BY_PATTERN if rank == 0 else {**BY_PATTERN, "^norm": "copy"})
    with pytest.raises(EMAStateError, match=r"ShardedEMA's buffers=.*'\^norm', 'ignore'.* on rank 0"):
        other.metrics()


@pytest.mark.parametrize(("buffers", "expected"), [("copy", 8.0), ("average", 6.0), ("ignore", 99.0)])
def test_buffers_follow_their_option(buffers: str, expected: float) -> None:
    """Integer and bool buffers are never averaged (an average would truncate them)."""
    model = nn.Linear(1, 1)
    model.register_buffer("running", torch.tensor([4.0]))
    model.register_buffer("count", torch.tensor(1))
    model.register_buffer("flag", torch.tensor(False))
    ema = ShardedEMA(model, decay=0.5, buffers=buffers)
    ema.update()
    model.running.fill_(8.0)
    model.count.fill_(2)
    model.flag.fill_(True)
    ema.update()
    model.running.fill_(99.0)
    model.count.fill_(77)
    state = ema.full_state_dict()
    assert state["running"].item() == expected
    assert state["count"].item() == (77 if buffers == "ignore" else 2)
    assert state["count"].dtype == torch.int64
    assert state["flag"].item() is True
    with ema.average_parameters():
        assert model.running.item() == expected
        assert model.count.item() == state["count"].item()
    assert (model.running.item(), model.count.item()) == (99.0, 77)


def test_dtype_none_keeps_each_parameters_own() -> None:
    """A double-precision part must not be rounded to fp32 when the user asks for its own precision."""
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
    ema = ShardedEMA(model, decay=0.5, dtype=None)
    ema.update()
    dtypes = {name: value.dtype for name, value in ema.full_state_dict().items()}
    assert dtypes == {name: value.dtype for name, value in model.state_dict().items()}
    assert ema.full_state_dict(dtype=torch.bfloat16)["0.weight"].dtype == torch.bfloat16


def test_bf16_weights_come_back_bit_for_bit_and_their_average_keeps_moving() -> None:
    """An average in bf16 stops moving from a decay of .99 on; fp32 shadows of bf16 weights cannot change places."""
    model = nn.Linear(64, 64).bfloat16()
    ema = ShardedEMA(model, decay=0.999)
    ema.update()
    start = ema.full_state_dict()["weight"]
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(100):
        ema.update()
    moved = ema.full_state_dict()["weight"] - start
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**100), rtol=0.05, atol=0.01)
    before = copy.deepcopy(model.state_dict())
    digest = ema.fingerprint()
    with ema.average_parameters():
        assert torch.equal(model.weight, ema_weight(start, moved))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert ema.fingerprint() == digest


def ema_weight(start: Tensor, moved: Tensor) -> Tensor:
    """The average as the bf16 model sees it."""
    return (start + moved).bfloat16()


def test_constant_weights_move_no_element_of_the_average() -> None:
    """decay * s + (1 - decay) * p rounds twice and drifts; lerp does not."""
    model = nn.Linear(100, 100)
    ema = ShardedEMA(model, decay=0.9999)
    for _ in range(200):
        ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], model.weight)


def test_memory_formats_do_not_matter() -> None:
    """A channels_last or transposed weight has no flat view; averaging storage order would scramble an export."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(5, 7))
    model[0].to(memory_format=torch.channels_last)
    model[1].weight = nn.Parameter(torch.randn(5, 7).t())
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    plain[1].weight = nn.Parameter(plain[1].weight.detach().contiguous())
    emas = [ShardedEMA(candidate, decay=0.9) for candidate in (model, plain)]
    for step in range(3):
        for candidate, ema in zip((model, plain), emas, strict=True):
            with torch.no_grad():
                for parameter in candidate.parameters():
                    parameter.mul_(1.5 + step)
            ema.update()
    assert emas[0].fingerprint() == emas[1].fingerprint()
    with emas[0].average_parameters():
        assert torch.equal(model[0].weight, emas[1].full_state_dict()["0.weight"])


# The guard.


def test_nan_and_inf_sources_leave_the_average_as_it_was() -> None:
    """One NaN step poisons an average for ever."""
    model = _model(1.0, 1.0, 1.0, 1.0)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    _set(model, float("nan"), 3.0, float("inf"), -float("inf"))
    ema.update()
    assert _average(ema) == [1.0, 2.0, 1.0, 1.0]
    assert ema.metrics()["ema/skipped_elements"] == 3
    _set(model, 3.0, 2.0, 3.0, 3.0)
    ema.update()
    assert _average(ema) == [2.0, 2.0, 2.0, 2.0]


def test_element_that_was_not_finite_at_the_copy_takes_the_first_finite_weight() -> None:
    """There is nothing to keep at the first update, and NaN would stay for ever."""
    model = _model(float("nan"), 1.0)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    _set(model, 4.0, 3.0)
    ema.update()
    assert _average(ema) == [4.0, 2.0]
    assert ema.metrics()["ema/skipped_elements"] == 1


def test_huge_finite_weights_are_not_skipped() -> None:
    """The cheap check overflows on them; the element-wise one must decide."""
    model = _model(1e30, 3e38)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    ema.update()
    assert _average(ema) == _model(1e30, 3e38).weight.flatten().tolist()
    assert ema.metrics()["ema/skipped_elements"] == 0


def test_without_the_guard_sources_are_taken_as_they_are() -> None:
    """skip_nonfinite=False promises nothing but speed."""
    model = _model(1.0, 1.0)
    ema = ShardedEMA(model, decay=0.5, skip_nonfinite=False)
    ema.update()
    _set(model, float("nan"), 3.0)
    ema.update()
    first, second = _average(ema)
    assert first != first
    assert second == 2.0


# Steps and resets.


def test_step_that_a_grad_scaler_skips_is_not_averaged() -> None:
    """On overflow the weights did not change, and a step that was not taken must not move the clock."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=0.5)
    handle = ema.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for overflow in (False, True, False):
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        if overflow:
            model.weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert ema.num_updates == 2
    handle.remove()
    optimizer.step()
    assert ema.num_updates == 2


def test_reset_starts_anew_with_the_model_as_it_is() -> None:
    """After progressive unfreezing the newly trained parameters have to be averaged too."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].requires_grad_(False)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    assert set(ema.full_state_dict(include_untracked=False)) == {"0.weight", "0.bias"}
    model[1].requires_grad_(True)
    ema.reset()
    assert ema.num_updates == 0
    ema.update()
    assert set(ema.full_state_dict(include_untracked=False)) == set(model.state_dict())


def test_weights_loaded_or_materialized_after_construction_are_averaged() -> None:
    """Meta-device construction: there is nothing to copy when the average is made."""
    with torch.device("meta"):
        model = nn.Linear(3, 3)
    ema = ShardedEMA(model, decay=0.5)
    model.to_empty(device="cpu")
    model.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.zeros(3)})
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], torch.ones(3, 3))


def test_storage_that_moves_under_a_parameter_is_followed() -> None:
    """vector_to_parameters and others set .data: an average of the old memory would be stale without a word."""
    model = _model(1.0, 2.0)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    torch.nn.utils.vector_to_parameters(torch.tensor([3.0, 4.0]), model.parameters())
    ema.update()
    assert _average(ema) == [2.0, 3.0]


# What an update costs.


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full", "fsdp1-full-orig", "fsdp2", "hsdp", "fsdp2-tp"])
def test_update_makes_no_collective_call(case: str, rank: int) -> None:
    """A gather in every step is what makes others' averages slow, and what hangs them on uneven shards."""
    model = CASES[case].model()
    ema = ShardedEMA(model, averages={"a": 0.9, "b": 0.99}, buffers="average")
    with CommDebugMode() as calls:
        for _ in range(3):
            ema.update()
    assert calls.get_total_counts() == 0
    with CommDebugMode() as calls:
        ema.full_state_dict("a")
    assert calls.get_total_counts() > 0  # the counter counts


class _Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
        self.frozen = nn.Linear(8, 8)

    def forward(self) -> None:
        """fully_shard wants one."""


@pytest.mark.world_size(4)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full", "fsdp2", "hsdp", "fsdp1-hybrid"])
def test_every_rank_keeps_its_part_of_the_shadow_and_no_more(case: str, rank: int, world_size: int) -> None:
    """Also where the parameters are replicated: a full shadow per GPU is what sharding is to avoid."""
    model = CASES[case].wrap(_Wide())
    ema = ShardedEMA(model, decay=0.9)
    ema.update()
    held = sum(share.numel for share in ema._average.shares if share.mode == "average")
    total = torch.tensor(held)
    dist.all_reduce(total)
    assert int(total) == 4 * (64 * 64 + 64) + 8 * 8 + 8
    assert held <= int(total) / world_size * 1.1
    assert sum(ema._average.shadow.nbytes().values()) == 4 * held


def test_update_needs_no_memory_of_the_models_size(tmp_path: Path) -> None:
    """A temporary p.float() of a large tensor costs ten times the update, and memory that nobody has."""
    model = nn.Linear(8192, 4096, bias=False).bfloat16()  # 64 MiB
    ema = ShardedEMA(model, decay=0.9)
    ema.update()
    ema.update()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmHWM")
    ema.update()
    assert _status("VmHWM") - before < 4 << 20
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    model.weight.float()
    assert _status("VmHWM") - before > 64 << 20  # the gauge shows what it is to show


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


@torch.no_grad()
def _drift(model: nn.Module, how: str) -> None:
    """Weights of another rank, which differ from those of rank 0."""
    first, second = model.module.one.weight, model.module.norm.bias
    if how == "rounding":  # one bit up in one tensor and one down in another
        first.view(torch.int32)[0, 3] += 1
        second.view(torch.int32)[4] -= 1
    elif how == "places":  # the same bits, elsewhere
        first.copy_(first.roll(1))
    elif how == "tensors":
        first[0, 0], second[0] = second[0].clone(), first[0, 0].clone()
    else:
        for parameter in model.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize("how", ["everywhere", "rounding", "places", "tensors"])
@pytest.mark.world_size(2)
def test_replicas_that_drifted_apart_get_their_own_weights_back(how: str, rank: int) -> None:
    """Replicas send each other the live weights on leaving; where they differ that would overwrite one with another.

    Under tensor parallelism with different data on each rank two biases differed by a bit, one up and one down.
    """
    model = DDP(build())
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    if rank:
        _drift(model, how)
    ema.update()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.average_parameters():
        inside = model.module.embed.weight.clone()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    received = [inside]
    dist.broadcast_object_list(received, src=0)
    assert torch.equal(inside, received[0])


@pytest.mark.world_size(2)
def test_unsplit_replicas_keep_whole_shadows(rank: int) -> None:
    """shard_replicas=False trades memory for a context manager without communication, but for that of buffers."""
    model = DDP(build())
    ema = ShardedEMA(model, decay=0.5, shard_replicas=False, buffers="ignore")
    ema.update()
    with CommDebugMode() as calls, ema.average_parameters():
        pass
    assert calls.get_total_counts() == 0
    assert bool(ema.full_state_dict()) == (rank == 0)


@pytest.mark.world_size(3)
def test_pipeline_stages_with_different_names_make_one_state(rank: int, tmp_path: Path) -> None:
    """Ranks that hold different names hang in a gather that goes by the local list, or pair by position."""
    stages = {0: ["first"], 1: ["second", "third"], 2: ["fourth"]}
    modules = [nn.ModuleDict({name: nn.Linear(3, 1 + rank)}) for name in stages[rank]]
    ema = ShardedEMA(modules, decay=0.5)
    ema.update()
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                parameter.fill_(float(rank))
    ema.update()
    state = ema.full_state_dict()
    names = {f"{name}.{key}" for found in stages.values() for name in found for key in ("weight", "bias")}
    if rank == 0:
        assert set(state) == names
        assert state["third.weight"].shape == (2, 3)
    ema.export(tmp_path / "pipeline")
    assert set(ema.fingerprint()) == names
    with ema.average_parameters():
        pass


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["plain", "ddp", "fsdp1-full", "fsdp1-full-orig", "fsdp2", "hsdp"])
def test_functional_form_averages_two_models_sharded_alike(case: str, rank: int) -> None:
    """Composer's compute_ema gathers the whole model under FSDP, and truncates integer buffers."""
    model, average = CASES[case].model(), CASES[case].model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
        for module in (model, average):
            next(buffer for name, buffer in module.named_buffers() if name.endswith("steps")).fill_(7)
    with CommDebugMode() as calls:
        compute_ema(model, average, smoothing=0.75)
    assert calls.get_total_counts() == 0
    compute_ema(model, average, smoothing=1)  # Composer's range: nothing changes
    expected = CASES[case].plain().state_dict()
    state = ShardedEMA(average, decay=0.5).full_state_dict()
    for name, value in state.items():
        factor = 1.5 if value.is_floating_point() and "running" not in name else 1.0
        wanted = torch.tensor(7) if name == "steps" else expected[name] * factor if factor != 1.0 else expected[name]
        torch.testing.assert_close(value, wanted, msg=name)


# What a second look found.


def test_a_shape_that_changed_before_the_first_update_is_noticed() -> None:
    """resize_token_embeddings after construction: the wrong rows would be averaged."""
    model = nn.Linear(2, 3)
    ema = ShardedEMA(model, decay=0.5)
    model.weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(EMAStateError, match=r"'weight'.*\[3, 2\].*\[3, 4\]"):
        ema.update()


def test_a_buffer_that_went_away_does_not_shift_its_neighbours() -> None:
    """Pairing by position would average each tensor with the next one."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    model[0].running_mean = None
    with pytest.raises(EMAStateError, match=r"0\.running_mean"):
        ema.update()


def test_evaluation_under_inference_mode_leaves_nothing_unusable() -> None:
    """Scratch made inside of it could never be written to outside."""
    model = nn.Linear(4, 4)
    ema = ShardedEMA(model, decay=0.5)
    with torch.inference_mode():
        ema.update()
        with ema.average_parameters():
            model(torch.ones(1, 4))
    with ema.average_parameters():
        pass
    assert ema.update()


def test_autocast_sees_the_swap() -> None:
    """Inside one autocast region a forward would go on with the cast of the weights that were."""
    model = nn.Linear(64, 64)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        model.weight.add_(1.0)
    x = torch.ones(1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        live = model(x)
        with ema.average_parameters():
            averaged = model(x)
        again = model(x)
    assert not torch.equal(live, averaged)
    assert torch.equal(live, again)


def test_two_averages_of_one_model_do_not_read_each_others_swap() -> None:
    """b.update() while a's average stands in the model would average an average."""
    model = _model(1.0)
    first, second = ShardedEMA(model, decay=0.5), ShardedEMA(model, decay=0.9)
    first.update()
    second.update()
    with first.average_parameters():
        with pytest.raises(EMAStateError, match="inside average_parameters"):
            second.update()
        with pytest.raises(EMAStateError, match="inside average_parameters"), second.average_parameters():
            pass
    assert second.update()


@pytest.mark.parametrize("inner_first", [True, False])
def test_averages_of_a_model_and_of_a_part_of_it_do_not_read_each_others_swap(inner_first: bool) -> None:
    """Only the same root was noticed: the part's average was taken from, and written over, the whole's."""
    part = nn.Linear(3, 2)
    whole = nn.Sequential(part, nn.Linear(2, 2))
    shared = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))  # overlaps with neither, but for what holds no tensor
    whole.append(shared[0])
    averages = [ShardedEMA(model, decay=0.5) for model in ((part, whole) if inner_first else (whole, part))]
    apart = ShardedEMA(shared, decay=0.5)
    for ema in (*averages, apart):
        ema.update()
    first, second = averages
    with first.average_parameters():
        for call in (second.update, second.copy_to, second.full_state_dict, second.reset):
            with pytest.raises(EMAStateError, match="inside average_parameters"):
                call()
        assert apart.update()
    assert second.update() and second.full_state_dict()


def test_attaching_twice_is_refused() -> None:
    """Each step would count as two updates."""
    model = _model(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = ShardedEMA(model, decay=0.5)
    handle = ema.attach(optimizer)
    with pytest.raises(EMAStateError, match="counted twice"):
        ema.attach(optimizer)
    handle.remove()
    ema.attach(optimizer)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("kind", ["ddp", "fsdp1"])
def test_groups_that_hold_the_same_names_are_not_added_up(kind: str, rank: int) -> None:
    """Tied embeddings of the first and last stage, each with a group of its own: the lowest rank's are heard."""
    groups = [dist.new_group([index]) for index in range(2)]
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0 + rank)
    if kind == "ddp":
        wrapped: nn.Module = DDP(model, process_group=groups[rank])
    else:
        wrapped = FSDP(model, process_group=groups[rank], device_id=torch.device("cpu"))
    ema = ShardedEMA(wrapped, decay=0.5)
    ema.update()
    state = ema.full_state_dict()
    if rank == 0:
        assert torch.equal(state["weight"], torch.ones(2, 2))


@pytest.mark.world_size(2)
def test_a_mesh_without_rank_0_is_heard(rank: int) -> None:
    """A tensor that rank 0 has no part of would come out as zeros."""
    mesh = DeviceMesh("cpu", [1])
    model = nn.Linear(2, 2, bias=False)
    local = torch.full((2, 2), 7.0)
    model.weight = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], shape=(2, 2), stride=(2, 1)))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    state = ema.full_state_dict()
    if rank == 0:
        assert torch.equal(state["weight"], torch.full((2, 2), 7.0))


@pytest.mark.world_size(2)
def test_what_ddp_was_told_to_ignore_is_not_spliced_together(rank: int) -> None:
    """Model-parallel tables differ from rank to rank, and are nobody's replicas."""
    model = nn.ModuleDict({"table": nn.Embedding(4, 1), "linear": nn.Linear(2, 2)})
    with torch.no_grad():
        model["table"].weight.fill_(10.0 * (rank + 1))
    DDP._set_params_and_buffers_to_ignore_for_model(model, ["table.weight"])
    ema = ShardedEMA(DDP(model), decay=0.5)
    ema.update()
    state = ema.full_state_dict()
    if rank == 0:
        assert torch.equal(state["table.weight"], torch.full((4, 1), 10.0))
