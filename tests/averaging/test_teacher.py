"""A second model that is the average: at every step against a dense float64 teacher, forward by forward."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.models import CASES, batch, build, live_weights
from support.oracle import DenseAverage
from support.zero_models import DTYPES, THRESHOLD, Net, make_engine, plain_fused_adam
from support.zero_models import batch as zero_batch
from support.zero_models import train as zero_train

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from dist_ema import Cosine, ShardedEMA
from dist_ema.errors import CheckpointCorruptError, EMAEngineError, EMAError, EMAStateError

DECAY = 0.7
MATRIX = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp1-full", 3),
    ("fsdp1-grad-op-orig", 2),
    ("fsdp1-hybrid", 4),
    ("fsdp2", 1),
    ("fsdp2", 3),
    ("fsdp2", 4),
    ("fsdp2-keep", 2),
    ("fsdp2-mixed", 2),
    ("fsdp2-compiled", 2),
    ("fsdp2-checkpointed", 2),
    ("hsdp", 4),
    ("tp", 3),
    ("fsdp2-tp", 4),
]


def make_teacher(case: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Wrapped as the student, with other weights; what DDP wraps has to train, so there the plain model."""
    model = CASES[case].plain()
    for parameter in model.parameters():
        if parameter.requires_grad:  # frozen weights are no part of the average: they stay the user's
            parameter.detach().mul_(3.0)
    model.requires_grad_(False)
    model = model if dtype is None else model.to(dtype)
    return model.eval() if case.startswith("ddp") else CASES[case].wrap(model).eval()


def live(model: nn.Module) -> dict[str, Tensor]:
    return live_weights(model.module if isinstance(model, DistributedDataParallel) else model)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model.train()
    model(batch(step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.2)


@torch.no_grad()
def forward(model: nn.Module, number: int = 99) -> Tensor:
    return model(batch(number)).double()


def trained() -> set[str]:
    named = build().named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if parameter.requires_grad}


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_teacher_is_the_dense_average_at_every_step(case: str, rank: int, world_size: int, tmp_path: Path) -> None:
    """A forward between two steps leaves full weights behind under some engines, and sees the next update under all."""
    student, teacher, third = CASES[case].model(), make_teacher(case), make_teacher(case)
    optimizer = sgd(student)
    before = forward(teacher)
    ema = ShardedEMA(student, into=teacher, decay=DECAY)
    ema.attach(optimizer)
    assert torch.equal(forward(teacher), before)  # until the first update it is the user's
    oracle, reference = DenseAverage(trained(), DECAY), CASES[case].plain().double().eval()
    close = {"rtol": 1e-4, "atol": 1e-5} if "mixed" not in case else {"rtol": 0.05, "atol": 0.05}
    for step in range(3):
        train(student, optimizer, step)
        oracle.update(live(student))
        found = forward(teacher)
        if rank == 0:
            reference.load_state_dict(oracle.average)
            with torch.no_grad():
                torch.testing.assert_close(found, reference(batch(99)), **close)
        ema.copy_to(into=third)
        assert torch.equal(forward(third), found)
    held, full = live(teacher), ema.full_state_dict()
    if rank == 0:
        oracle.check(full)
        assert all(torch.equal(held[name], full[name]) for name in full)

    with ema.average_parameters():
        student.eval()
        assert torch.equal(forward(teacher), found)
        assert torch.equal(forward(student), found)
        digests = ema.fingerprint()
    ema.save(tmp_path / "saved")
    assert ema.fingerprint() == digests
    train(student, optimizer, 3)
    assert not torch.equal(forward(teacher), found)
    ema.load(tmp_path / "saved")
    assert torch.equal(forward(teacher), found)
    assert ema.fingerprint() == digests


def zero_teacher(dtype: str, **zero: Any) -> Any:
    """A DeepSpeed engine without optimizer, of other weights, beside one that trains."""
    import deepspeed

    torch.manual_seed(8)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": THRESHOLD, **zero},
    }
    if dtype == "bf16":
        config["bf16"] = {"enabled": True}
    model = Net().requires_grad_(False).eval()
    return deepspeed.initialize(model=model, config=config, dist_init_required=False)[0]


@pytest.mark.world_size()
@pytest.mark.parametrize(("dtype", "world_size"), [("fp32", 1), ("fp32", 3), ("bf16", 2)])
def test_zero3_teacher_computes_with_every_update(dtype: str, rank: int, world_size: int) -> None:
    """Small parameters stay whole after a forward, and the next one would not gather what was written."""
    from support.zero_models import assembled

    student = make_engine(3, dtype)
    teacher = zero_teacher(dtype)
    third = zero_teacher(dtype)
    before = teacher.module(zero_batch(0, 0))
    ema = ShardedEMA(student, into=teacher, decay=DECAY)
    ema.attach(student)
    assert torch.equal(teacher.module(zero_batch(0, 0)), before)
    named = Net().named_parameters(remove_duplicate=False)
    oracle = DenseAverage({name for name, parameter in named if parameter.requires_grad}, DECAY)
    reference = Net().to(DTYPES[dtype]).eval()
    resolution = {"fp32": 1e-5, "bf16": 2**-7}[dtype]  # of outputs below 2
    for step in range(3):
        zero_train(student, range(step, step + 1))
        source = assembled(ema._average.engine)
        source["head.weight"] = source["embed.weight"]
        oracle.update(source)
        with torch.no_grad():
            found = teacher(zero_batch(99, 0))
        if rank == 0:
            ema._average.shadow.tensors("ema")  # finds the teacher's pieces as an update does: alone, or it would hang
        full = ema.full_state_dict()
        held = gathered(teacher)
        if rank == 0:
            oracle.check(full)
            full |= {name: value for name, value in held.items() if name.startswith("frozen")}
            reference.load_state_dict(full)
            filled = dict(reference.named_parameters())
            assert all(torch.equal(held[name], filled[name]) for name in filled)
            with torch.no_grad():  # under ZeRO-3 torch.nn.functional.linear adds biases in another step, so in bf16
                torch.testing.assert_close(found, reference(zero_batch(99, 0)), rtol=0.016, atol=resolution)
        ema.copy_to(into=third)
        with torch.no_grad():
            third(zero_batch(99, 0))
        copied = gathered(third)
        assert all(torch.equal(copied[name], held[name]) for name in held)
    saved = copy.deepcopy(ema.state_dict())
    zero_train(student, range(3, 4))
    assert not torch.equal(gathered(teacher)["up.weight"], held["up.weight"])
    ema.load_state_dict(saved)
    with torch.no_grad():
        assert torch.equal(teacher(zero_batch(99, 0)), found)


def gathered(engine: Any) -> dict[str, Tensor]:
    """Full weights of a ZeRO-3 engine, by DeepSpeed's own gathering, which then holds what it held."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        gather = parameter.ds_status.name == "NOT_AVAILABLE"
        if gather:
            parameter.all_gather()
        found[name] = parameter.detach().clone()
        if gather:
            parameter.partition()
    return found


@pytest.mark.world_size(2)
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_reference_policy_follows_the_policy_and_nothing_is_gathered(engine: str, rank: int, world_size: int) -> None:
    """trl's own synchronization gathers both models on every rank under ZeRO-3."""
    policy: Any
    if engine == "zero3":
        policy, reference = make_engine(3, "fp32"), zero_teacher("fp32")
        weights: Callable[[Any], dict[str, Tensor]] = gathered
        names = {name for name, parameter in policy.module.named_parameters() if parameter.requires_grad}
    else:
        policy, reference = CASES["fsdp2"].model(), make_teacher("fsdp2")
        optimizer, weights, names = sgd(policy), live, trained()
    kept = 0.4
    ema = ShardedEMA(policy, into=reference, smoothing=kept, update_interval="2ba")
    ema.update(batches=0, due=True)
    expected = {name: value.double() for name, value in weights(policy).items() if name in names}
    first = dict(expected)
    for step in range(1, 6):
        with torch.no_grad():  # for the KL penalty; it leaves full weights behind
            reference(zero_batch(step, rank) if engine == "zero3" else batch(step))
        if engine == "zero3":
            zero_train(policy, range(step, step + 1))
        else:
            train(policy, optimizer, step)
        with CommDebugMode() as calls:
            assert ema.update() == (step % 2 == 0)
        assert calls.get_total_counts() == 0
        if step % 2 == 0:
            source = weights(policy)
            expected = {name: kept * value + (1 - kept) * source[name].double() for name, value in expected.items()}
        found = weights(reference)
        for name, value in expected.items():
            torch.testing.assert_close(found[name].double(), value, rtol=4e-6, atol=1e-7, msg=name)
    if rank == 0:  # FSDP2's full weights are gathered there alone
        assert all(not torch.equal(expected[name], first[name]) for name in expected)
        assert expected


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["plain", "fsdp2"])
def test_memory_is_the_teachers_and_does_not_grow(case: str, rank: int, world_size: int) -> None:
    """No second shadow where dtypes agree; an fp32 one beside a bf16 teacher, which every update writes whole."""
    student, teacher, narrow = CASES[case].model(), make_teacher(case), make_teacher(case, torch.bfloat16)
    emas = [ShardedEMA(student, into=into, decay=DECAY, buffers="ignore") for into in (teacher, narrow)]
    optimizer = sgd(student)

    def held() -> list[int]:
        return [size for ema in emas for size in ema._average.shadow.nbytes().values()]

    sizes, places = [], []
    for step in range(3):
        train(student, optimizer, step)
        forward(teacher)  # whose full weights are not gathered again, but dropped
        with CommDebugMode() as calls:
            for ema in emas:
                ema.update()
        assert calls.get_total_counts() == 0
        sizes.append(held())
        places.append([parameter.data_ptr() for parameter in teacher.parameters()])
        sizes[-1] += [ema._average.shadow.scratch.nbytes() for ema in emas]
        average, written = live(teacher), live(narrow)
        for name in trained() & average.keys():
            assert torch.equal(average[name].bfloat16(), written[name]), name
    assert places[0] == places[-1]
    mine = sum(share.numel for share in emas[0]._average.shares if share.mode == "average")
    assert [size[:2] for size in sizes] == [[0, 4 * mine]] * 3
    assert sizes[1] == sizes[2]
    if case == "fsdp2":
        full = sum(share.spec.numel for share in emas[0]._average.shares if share.mode == "average")
        assert mine < 0.6 * full
    assert "in no other memory" in emas[0].memory_report()
    with emas[1].average_parameters():  # the shadow goes into the student, and the teacher keeps its own
        inside = live(narrow)
        assert all(torch.equal(inside[name], written[name]) for name in inside)


@pytest.mark.world_size(2)
def test_zero0_masters_go_into_a_plain_teacher(rank: int, world_size: int) -> None:
    """Each rank averages all of them, whole as its teacher is, and sends nothing. Buffers are bf16 there, fp32 here."""
    student, teacher = make_engine(0, "bf16", optimizer=plain_fused_adam), Net().requires_grad_(False)
    ema = ShardedEMA(student, into=teacher, decay=DECAY)
    ema.attach(student)
    calls = []
    named = [name for name, _ in teacher.named_parameters() if not name.startswith("frozen")]
    for step in range(2):
        zero_train(student, range(step, step + 1))
        masters = dict(
            zip([spec.name for spec in ema._average.engine.specs()], ema._average.engine.sources(), strict=True)
        )
        calls.append([masters[name].clone() for name in named])
    first, second = calls
    for name, old, new in zip(named, first, second, strict=True):
        found = teacher.get_parameter(name)
        torch.testing.assert_close(found.view(-1), (DECAY * old + (1 - DECAY) * new).view(-1), rtol=1e-5, atol=1e-6)
        assert found.dtype == new.dtype == torch.float32
    assert torch.equal(teacher.norm.running_mean, student.module.norm.running_mean.float())


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), [("zero2", 3), ("ddp", 2), ("fsdp2", 2)])
def test_gathered_teacher_is_whole_on_every_rank(case: str, rank: int, world_size: int, tmp_path: Path) -> None:
    """Of students that no teacher is sharded as: ZeRO's sliced masters, shadows that replicas share, or any other."""
    zero = case.startswith("zero")
    student = make_engine(2, "bf16") if zero else CASES[case].model()
    teacher = Net().requires_grad_(False) if zero else CASES["plain"].wrap(build(scalar=case == "ddp"))
    teacher.requires_grad_(False)
    optimizer = None if zero else sgd(student)
    ema = ShardedEMA(student, into=teacher, sync="gather", decay=DECAY)
    names = trained() if not zero else {name for name, _ in Net().named_parameters() if not name.startswith("frozen")}

    def step(number: int) -> None:
        if optimizer is None:
            zero_train(student, range(number, number + 1))
        else:
            train(student, optimizer, number)
        ema.update()

    def check() -> None:
        full = [ema.full_state_dict()]
        dist.broadcast_object_list(full)
        held = teacher.state_dict()
        assert names & held.keys()
        assert all(torch.equal(held[name], full[0][name]) for name in names & held.keys())

    for number in range(3):
        step(number)
        check()
    mine = sum(share.numel for share in ema._average.shares if share.mode == "average")
    assert mine < 0.6 * sum(share.spec.numel for share in ema._average.shares if share.mode == "average")
    kept = {name: value.clone() for name, value in teacher.state_dict().items()}
    ema.save(tmp_path / "saved")
    with ema.average_parameters():
        assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    saved = copy.deepcopy(ema.state_dict())
    step(3)
    assert not torch.equal(kept["embed.weight"], teacher.state_dict()["embed.weight"])
    check()
    ema.load(tmp_path / "saved")
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())
    step(4)
    ema.load_state_dict(saved)
    assert all(torch.equal(kept[name], value) for name, value in teacher.state_dict().items())


def small(**options: Any) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5, **options), nn.Linear(5, 6))


def squares(tied: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    if tied:
        model[1].weight = model[0].weight
    return model


def refused() -> dict[str, Callable[[], object]]:
    """What cannot be a teacher of ``small()``, by what the error has to say."""

    def make(into: nn.Module, student: nn.Module | None = None, **options: Any) -> ShardedEMA:
        return ShardedEMA(small() if student is None else student, into=into, **options)

    def frozen(model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)

    def in_optimizer() -> None:
        student, teacher = small(), frozen(small())
        make(teacher, student).attach(torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1))

    def twice() -> None:
        teacher = frozen(small())
        first = make(teacher)
        make(teacher)
        del first

    def same_memory() -> ShardedEMA:
        student, teacher = small(), frozen(small())
        teacher[1].weight.data = student[1].weight.data
        return make(teacher, student)

    def itself() -> ShardedEMA:
        student = small()
        return make(student, student)

    shape = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    two = frozen(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 1)))
    return {
        "'0.weight' it has the shape (4, 6) and not (5, 6)": lambda: make(frozen(shape)),
        "'0.weight' it has no tensor with that name": lambda: make(frozen(nn.Sequential(nn.Identity(), small()))),
        "'0.bias' it has no tensor with that name": lambda: make(frozen(small(bias=False))),
        "has a parameter '2.weight'": lambda: make(two),
        "'0.weight' requires a gradient": lambda: make(small()),
        "is the model that is averaged": itself,
        "shares the memory of '1.weight'": same_memory,
        "has 'weight' of the teacher": in_optimizer,
        "another ShardedEMA already averages into 'weight'": twice,
        "offload='cpu'": lambda: make(frozen(small()), offload="cpu"),
        "into= takes one average": lambda: make(frozen(small()), averages={"a": 0.5, "b": 0.9}),
        "it does not tie it to '1.weight'": lambda: make(frozen(squares(False)), squares(True)),
        "it has the same tensor as for '0.weight'": lambda: make(frozen(squares(True)), squares(False)),
        "rename='head[.]' matches no name": lambda: make(frozen(small()), rename={"head[.]": ""}),
        "is no replacement": lambda: make(frozen(small()), rename={"0": "\\7"}),
        "rename=['0']: allowed is a dict": lambda: make(frozen(small()), rename=["0"]),
        "rename={None: ''}: allowed is a dict": lambda: make(frozen(small()), rename={None: ""}),
        "sync='often': allowed are": lambda: make(frozen(small()), sync="often"),
        "sync='gather': allowed are": lambda: ShardedEMA(small(), sync="gather"),
        "cannot average a OrderedDict": lambda: make(frozen(small()).state_dict()),
    }


@pytest.mark.parametrize("says", refused())
def test_what_cannot_be_a_teacher_is_refused_by_name(says: str) -> None:
    with pytest.raises(EMAError) as error:
        refused()[says]()
    assert says in str(error.value)


@pytest.mark.world_size(2)
def test_other_sharding_is_refused_on_every_rank(rank: int, world_size: int) -> None:
    """Also where one rank alone finds a difference: the others would wait for it in the next collective call."""
    mesh = init_device_mesh("cpu", (2,))
    student = CASES["fsdp2"].model()
    kept = [parameter.detach().clone() for parameter in student.parameters()]
    with pytest.raises(EMAEngineError, match=r"embed.weight.* of 75 elements on this rank, and not .*a plain module"):
        ShardedEMA(student, into=make_teacher("plain"))
    with pytest.raises(EMAEngineError, match=r"'w' it holds other elements|rank 1"):
        replicated, columns = nn.Module(), nn.Module()
        replicated.w = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        columns.w = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]), requires_grad=False)
        ShardedEMA(replicated, into=columns)
    only = make_teacher("fsdp2")
    if rank == 1:
        only.one.weight.requires_grad_(True)
    with pytest.raises(EMAEngineError, match=r"rank 1: .*'one.weight' requires a gradient"):
        ShardedEMA(student, into=only)
    zero2 = make_engine(2)
    with pytest.raises(EMAEngineError, match="ZeRO-1 and 2 cut"):
        ShardedEMA(zero2, into=Net().requires_grad_(False))
    ema = ShardedEMA(student, into=make_teacher("fsdp2"), decay=DECAY)
    ema.update()
    with pytest.raises(EMAEngineError, match="the model to copy into"):
        ema.copy_to(into=make_teacher("plain"))
    with pytest.raises(EMAStateError, match="inside average_parameters"), ema.average_parameters():
        ema.copy_to(into=make_teacher("fsdp2"))
    assert all(torch.equal(a, b) for a, b in zip(kept, student.parameters(), strict=True))
    assert ema.metrics()["ema/num_updates"] == 1  # every rank is still where the others are


def test_teacher_that_changes_is_followed_or_named() -> None:
    """Weights that come after the constructor, that move, or whose layout is another; never one that was replaced."""
    with torch.device("meta"):
        student, teacher = small(), small().requires_grad_(False)
    ema = ShardedEMA(student, into=teacher, decay=0.5)
    student.to_empty(device="cpu").load_state_dict(small().state_dict())
    with pytest.raises(EMAStateError, match=r"of the teacher .* is on the meta device"):
        ema.update()
    teacher.to_empty(device="cpu")
    ema.update()

    def moves() -> None:
        """By half a step of the student."""
        kept = [parameter.float().clone() for parameter in teacher.parameters()]
        with torch.no_grad():
            for parameter, old in zip(student.parameters(), kept, strict=True):
                parameter.copy_(old + 1.0)
        ema.update()
        for old, now in zip(kept, teacher.parameters(), strict=True):
            torch.testing.assert_close(now.float(), old + 0.5, rtol=0, atol=0.02)

    moves()
    for parameter in teacher.parameters():
        parameter.data = parameter.data.clone()  # as teacher.to(device) and back
    moves()
    teacher.bfloat16()
    with pytest.raises(EMAStateError, match=r"'0.weight' of the teacher .* has another dtype"):
        ema.update()
    ema.reset()
    ema.update()
    moves()
    teacher[0].weight = nn.Parameter(torch.zeros(6, 5).bfloat16().t(), requires_grad=False)  # not contiguous
    with pytest.raises(EMAStateError, match=r"the teacher \(into=\): parameter '0.weight' was replaced"):
        ema.update()
    ema.reset()
    ema.update()
    moves()
    teacher.requires_grad_(True)
    with pytest.raises(EMAStateError, match=r"the teacher \(into=\): parameter '0.weight' was frozen"):
        ema.update()
    assert ema.num_updates == 2


def test_teacher_that_begins_before_the_first_step_moves_as_dinos() -> None:
    """The first real step used the second momentum; also after a resume, which has only the clock to go by."""
    student, teacher = small(), small().requires_grad_(False)
    options: dict[str, Any] = {"schedule": Cosine(0.9, 1.0, "8ba"), "dtype": torch.float64}
    ema = ShardedEMA(student.double(), into=teacher.double(), **options)
    ema.update(batches=0, due=True)
    expected = [parameter.detach().clone() for parameter in student.parameters()]
    for it in range(10):
        if it == 4:
            saved = ema.state_dict()
            ema.close()
            ema = ShardedEMA(student, into=teacher, **options)
            ema.load_state_dict(saved)
        momentum = 1 - 0.1 * (1 + math.cos(math.pi * min(it, 8) / 8)) / 2
        with torch.no_grad():
            for value, parameter in zip(expected, student.parameters(), strict=True):
                parameter.add_(1.0)
                value.mul_(momentum).add_(parameter, alpha=1 - momentum)
        ema.update()
        assert ema.metrics()["ema/decay"] == pytest.approx(momentum)
        for value, parameter in zip(expected, teacher.parameters(), strict=True):
            torch.testing.assert_close(parameter, value, rtol=1e-12, atol=1e-12)


def test_closed_average_leaves_its_teacher_to_another() -> None:
    student, teacher = small(), small().requires_grad_(False)
    first = ShardedEMA(student, into=teacher, decay=DECAY)
    first.update()
    first.close()
    second = ShardedEMA(student, into=teacher, decay=DECAY)
    with pytest.raises(EMAStateError, match="another ShardedEMA"):
        first.update()
    second.update()


def test_backbone_goes_into_a_teacher_of_other_names() -> None:
    """And an adapter into another of the same model; what is not renamed right is found by its name."""
    student = nn.ModuleDict({"backbone": small(), "head": nn.Linear(6, 2)})
    teacher = small().requires_grad_(False)
    ema = ShardedEMA(student, into=teacher, include="^backbone", rename={r"^backbone\.": ""}, decay=0.5)
    start = copy.deepcopy(student)
    ema.update(batches=0, due=True)  # the first copy, before any step
    assert all(torch.equal(a, b) for a, b in zip(start["backbone"].parameters(), teacher.parameters(), strict=True))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    ema.update()
    for old, now in zip(start["backbone"].parameters(), teacher.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.5)
    shown = r"'backbone.0.weight' \('1.0.weight' in the second model\) it has no tensor"
    with pytest.raises(EMAEngineError, match=shown):
        ShardedEMA(student, into=small().requires_grad_(False), include="^backbone", rename={"backbone": "1"})

    first, second = nn.ModuleDict({"0": nn.Linear(2, 2)}), nn.ModuleDict({"1": nn.Linear(2, 2)})  # stages of a pipeline
    teachers = [copy.deepcopy(first).requires_grad_(False), copy.deepcopy(second).requires_grad_(False)]
    with torch.no_grad():
        second["1"].weight.add_(1.0)
    ShardedEMA([first, second], into=teachers).update()
    assert torch.equal(teachers[1]["1"].weight, second["1"].weight)

    both = nn.ModuleDict({"base": nn.Linear(3, 3), "default": nn.Linear(3, 3), "teacher": nn.Linear(3, 3)})
    both["base"].requires_grad_(False), both["teacher"].requires_grad_(False)
    one = ShardedEMA(both, into=both, rename={"^default": "teacher"}, decay=0.5)
    one.update()
    assert torch.equal(both["teacher"].weight, both["default"].weight)
    kept = both["default"].weight.detach().clone()
    with torch.no_grad():
        both["default"].weight.add_(1.0)
    one.update()
    torch.testing.assert_close(both["teacher"].weight, kept + 0.5)
    with one.average_parameters():
        assert torch.equal(both["teacher"].weight, both["default"].weight)
    assert torch.equal(both["default"].weight, kept + 1.0)


@pytest.mark.world_size(2)
def test_adapter_is_the_teacher_of_another_in_one_peft_model(rank: int, world_size: int) -> None:
    """peft switches adapters by requires_grad: between two updates that may be any."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.add_adapter("teacher", config)
    model.set_adapter("default")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".default." in name)
    fully_shard(model)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    ema = ShardedEMA(model, into=model, rename={r"[.]default[.]": ".teacher."}, decay=0.5)
    ema.attach(optimizer)
    average: dict[str, Tensor] = {}
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for name, value in full.items():
            if ".default." in name:
                old = average.get(name, value.double())
                average[name] = 0.5 * old + 0.5 * value.double()
                torch.testing.assert_close(full[name.replace("default", "teacher")].double(), average[name])
        with torch.no_grad():
            students = model(x)
            model.set_adapter("teacher")
            teachers = model(x)
            model.set_adapter("default")
        assert not torch.equal(students, teachers) or ema.num_updates == 1
    with ema.average_parameters(), torch.no_grad():
        assert torch.equal(model(x), teachers)


@pytest.mark.world_size(2)
def test_saved_average_fills_the_teacher_of_another_run(rank: int, world_size: int, tmp_path: Path) -> None:
    """From another sharding, from torch.distributed.checkpoint, into bf16; a damaged file changes nothing in it."""
    plain = ShardedEMA(CASES["plain"].wrap(build(scalar=False)), decay=DECAY)
    plain.update()
    with torch.no_grad():
        for parameter in plain._average.engine.modules()[0].parameters():
            parameter.mul_(1.5 if parameter.requires_grad else 1.0)
    plain.update()
    plain.save(tmp_path / "plain")
    expected = plain.full_state_dict()

    student, teacher = CASES["fsdp2"].model(), make_teacher("fsdp2")
    ema = ShardedEMA(student, into=teacher, decay=DECAY)
    forward(teacher)
    ema.load(tmp_path / "plain")  # before any update of its own
    held = live(teacher)
    if rank == 0:
        assert all(torch.equal(held[name], expected[name]) for name in expected)
    narrow = make_teacher("fsdp2", torch.bfloat16)
    other = ShardedEMA(student, into=narrow, decay=DECAY)
    other.load(tmp_path / "plain")
    written = live(narrow)
    if rank == 0:
        names = trained() & expected.keys()
        assert all(torch.equal(written[name], expected[name].bfloat16()) for name in names)

    dcp.save({"ema": ema}, checkpoint_id=tmp_path / "dcp")
    before, digests = forward(teacher), ema.fingerprint()
    optimizer = sgd(student)
    train(student, optimizer, 0)
    ema.update()
    assert not torch.equal(forward(teacher), before)
    dcp.load({"ema": ema}, checkpoint_id=tmp_path / "dcp")
    assert torch.equal(forward(teacher), before)
    ema.export(tmp_path / "export")
    assert ema.fingerprint() == digests

    dist.barrier()
    if rank == 0:
        file = next((tmp_path / "plain").rglob("*.safetensors"))
        with file.open("r+b") as opened:
            opened.seek(-5, 2)
            opened.write(b"\xff\x0f")
    dist.barrier()
    with pytest.raises(CheckpointCorruptError):
        ema.load(tmp_path / "plain")
    assert torch.equal(forward(teacher), before)

    ema.reset()  # the teacher stays until the next update copies the weights
    assert torch.equal(forward(teacher), before)
    ema.update()
    assert not torch.equal(forward(teacher), before)
    after = forward(teacher)
    ema.rebind(student)
    assert torch.equal(forward(teacher), after)
    with pytest.raises(EMAEngineError, match="the teacher"):
        ema.rebind(build(scalar=False))
    ema.update()
