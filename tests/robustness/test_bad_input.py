"""What users get wrong: each an error that names the thing, what was found and what to do; on every rank, no hang."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA, compute_ema
from dist_ema.comm.collectives import gather_objects
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAError, EMAStateError
from dist_ema.options import Options
from dist_ema.schedules import HalfLife, Uniform


def says(error: BaseException, *parts: str) -> None:
    """The message holds every part."""
    for part in parts:
        assert part in str(error), f"{part!r} is not in: {error}"


# Options: the option's name, the value that was found, what is allowed.

UNITS = "ba, sp, tok, ep"
DTYPES = "torch.float32, torch.float64 and torch.bfloat16"
WRONG_OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"decay": 1.0}, ("decay=1.0", "[0, 1)")),
    ({"decay": -0.1}, ("decay=-0.1", "[0, 1)")),
    ({"decay": math.nan}, ("decay=nan", "[0, 1)")),
    ({"decay": "0.9"}, ("decay='0.9'", "[0, 1)")),
    ({"decay": True}, ("decay=True", "[0, 1)")),
    ({"decay": torch.tensor(0.9)}, ("decay=tensor(0.9", "[0, 1)")),
    ({"smoothing": 1.5}, ("smoothing=1.5", "[0, 1)")),
    ({"smoothing": -1}, ("smoothing=-1", "[0, 1)")),
    ({"half_life": "0ba"}, ("half_life='0ba'", "not positive", UNITS)),
    ({"half_life": "-5ba"}, ("half_life='-5ba'", "not positive", UNITS)),
    ({"half_life": "1000"}, ("half_life='1000'", "not a time string", UNITS)),
    ({"half_life": "10steps"}, ("half_life='10steps'", "unknown unit 'steps'", UNITS)),
    ({"half_life": "0.5dur"}, ("half_life='0.5dur'", "'dur' is not allowed here", UNITS)),
    ({"half_life": "1.5ba"}, ("half_life='1.5ba'", "fractional", UNITS)),
    ({"half_life": 2.5}, ("half_life=2.5", "a float is not a time", UNITS)),
    ({"half_life": 0}, ("half_life=0", "not positive", UNITS)),
    ({"schedule": 0.99}, ("schedule=0.99", "dist_ema.schedules", "HalfLife('1000ba')")),
    ({"schedule": HalfLife}, ("schedule=<class", "an object of dist_ema.schedules")),
    ({"decay": 0.9, "half_life": "10ba"}, ("decay=0.9", "half_life='10ba'", "exactly one of decay, half_life")),
    ({"smoothing": 0.9, "averages": {"a": 0.5}}, ("smoothing=0.9", "averages=", "exactly one of")),
    ({"averages": {}}, ("averages={}", "not empty")),
    ({"averages": [0.9]}, ("averages=[0.9]", "a dict of names to schedules or decays")),
    ({"averages": {"": 0.9}}, ("averages", "''", "letters, digits")),
    ({"averages": {"a/b": 0.9}}, ("averages", "'a/b'", "letters, digits")),
    ({"averages": {3: 0.9}}, ("averages", "3", "letters, digits")),
    ({"averages": {"fast": 1.5}}, ("averages['fast']", "1.5", "[0, 1)")),
    ({"averages": {"fast": True}}, ("averages['fast']", "True", "[0, 1)")),
    ({"averages": {"fast": "10ba"}}, ("averages['fast']='10ba'", "HalfLife('1000ba')", "decay in [0, 1)")),
    ({"update_interval": "0ba"}, ("update_interval='0ba'", "not positive", UNITS)),
    ({"update_interval": -3}, ("update_interval=-3", "not positive", UNITS)),
    ({"update_interval": "often"}, ("update_interval='often'", "not a time string", UNITS)),
    ({"update_interval": None}, ("update_interval=None", "a NoneType is not a time", UNITS)),
    ({"update_interval": "0.1dur"}, ("update_interval='0.1dur'", "needs max_duration", "'10000ba'")),
    ({"ema_start": "-1ba"}, ("ema_start='-1ba'", "negative", UNITS)),
    ({"ema_start": "1.5dur", "max_duration": "10ba"}, ("ema_start='1.5dur'", "at most 1")),
    ({"ema_start": "0.1dur"}, ("ema_start='0.1dur'", "needs max_duration")),
    ({"max_duration": "0ep"}, ("max_duration='0ep'", "not positive", UNITS)),
    ({"max_duration": "1dur"}, ("max_duration='1dur'", "'dur' is not allowed here", UNITS)),
    ({"dtype": "float32"}, ("dtype='float32'", DTYPES)),
    ({"dtype": torch.int32}, ("dtype=torch.int32", DTYPES)),
    ({"dtype": torch.bool}, ("dtype=torch.bool", DTYPES)),
    ({"dtype": torch.float16}, ("dtype=torch.float16", "stops moving", DTYPES)),
    ({"seed": -1}, ("seed=-1", "from 0 to 2**63 - 1")),
    ({"seed": 1 << 63}, ("seed=9223372036854775808", "from 0 to 2**63 - 1")),
    ({"dtype": torch.bfloat16, "seed": True}, ("seed=True", "from 0 to 2**63 - 1")),
    ({"offload": "gpu"}, ("offload='gpu'", "allowed")),
    ({"offload": True}, ("offload=True", "None and 'cpu'")),
    ({"offload": "cpu", "offload_threads": 0}, ("offload_threads=0", "from 1 on")),
    ({"offload": "cpu", "offload_threads": True}, ("offload_threads=True", "from 1 on")),
    ({"offload_threads": 2}, ("offload_threads=2", "offload is None")),
    ({"shard_replicas": 1}, ("shard_replicas=1", "True and False")),
    ({"skip_nonfinite": "no"}, ("skip_nonfinite='no'", "True and False")),
    ({"buffers": "mean"}, ("buffers='mean'", "'copy', 'average', 'ignore'")),
    ({"buffers": None}, ("buffers=None", "'copy', 'average', 'ignore'")),
    ({"buffers": {}}, ("buffers={}", "the dict is empty")),
    ({"buffers": {"mask": "mean"}}, ("buffers={'mask': 'mean'}", "'copy', 'average', 'ignore'")),
    ({"buffers": {"mask": None}}, ("buffers={'mask': None}", "'copy', 'average', 'ignore'")),
    ({"buffers": {"(": "copy"}}, ("buffers='('", "not a regular expression")),
    ({"buffers": {3: "copy"}}, ("buffers=[3]", "3 is not a regular expression")),
    ({"buffers": {"mask": "copy", "masc": "ignore"}}, ("buffers='masc'", "matches no buffer; buffers are", "mask")),
    ({"include": "("}, ("include='('", "not a regular expression")),
    ({"include": 3}, ("include=3", "regular expression or a list of them")),
    ({"include": b"head"}, ("include=b'head'", "not a regular expression")),
    ({"exclude": [r"head", 3]}, ("exclude=['head', 3]", "3 is not a regular expression")),
    ({"exclude": re.compile(b"head")}, ("exclude=", "not a regular expression")),
    ({"exclude": []}, ("exclude=[]", "empty", "leave the option out")),
    ({"include": "haed"}, ("include='haed'", "matches no name", "embed.weight")),
    ({"exclude": ["head", "haed"]}, ("exclude='haed'", "matches no name", "embed.weight")),
    ({"exclude": "."}, ("nothing to average", "include= and exclude= select none")),
    ({"include": "frozen"}, ("nothing to average", "include= and exclude= select none")),
]


@pytest.mark.parametrize(("options", "parts"), WRONG_OPTIONS, ids=[str(options) for options, _ in WRONG_OPTIONS])
def test_a_wrong_option_names_itself_its_value_and_what_is_allowed(
    options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    if options.get("exclude") == ["head", "haed"]:
        options = {"exclude": ["embed", "haed"]}
    with pytest.raises(EMAConfigError) as caught:
        ShardedEMA(build(), **options)
    says(caught.value, *parts)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_option_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="halflife"):
        ShardedEMA(build(), halflife="10ba")  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.99, "half_life": None},  # Composer crashes
        {"half_life": " 1_000BA "},
        {"half_life": 10},
        {"decay": 0},
        {"averages": {"a": 0, "b": Uniform()}},
        {"ema_start": "1dur", "max_duration": "3ep", "update_interval": "0.1dur"},
        {"include": ["embed", re.compile("module")], "exclude": "bias"},
        {"dtype": None},
        {"dtype": torch.float64},
    ],
    ids=str,
)
def test_what_is_unusual_but_right_is_taken(options: dict[str, Any]) -> None:
    ema = ShardedEMA(build(), **options)
    ema.update(samples=1, tokens=1, epochs=10.0)
    assert ema.full_state_dict(ema.names[0])


# Targets.


def _state_dict() -> object:
    return build().state_dict()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: "model", ("cannot average a str", "an nn.Module")),
        (lambda: None, ("cannot average a NoneType", "an nn.Module")),
        (lambda: torch.optim.SGD(build().parameters(), lr=0.1), ("cannot average a SGD", "an nn.Module")),
        (_state_dict, ("cannot average a OrderedDict", "an nn.Module")),
        (lambda: nn.Linear, ("cannot average a type", "pass the model itself", "an nn.Module")),
        (lambda: torch.ones(3), ("cannot average a Tensor", "an nn.Module")),
        (list, ("the list of modules is empty", "an nn.Module")),
        (lambda: [build(), "model"], ("cannot average a str", "an nn.Module")),
        (lambda: [build(), build()], ("several modules of the list hold", "embed.weight", "pipeline stage")),
    ],
)
def test_a_wrong_target_says_what_it_was_and_what_is_taken(make: Callable[[], object], parts: tuple[str, ...]) -> None:
    with pytest.raises(EMAEngineError) as caught:
        ShardedEMA(make())
    says(caught.value, *parts)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (nn.ReLU(), "0 of the model's 0 parameters"),
        (build().requires_grad_(False), "0 of the model's"),
        (nn.BatchNorm1d(3, affine=False), "0 of the model's 3 parameters"),
    ],
)
def test_a_model_with_nothing_to_average_is_refused(model: nn.Module, found: str) -> None:
    with pytest.raises(EMAConfigError) as caught:
        ShardedEMA(model)
    says(caught.value, "nothing to average", found)


def test_a_complex_parameter_of_half_precision_is_named() -> None:
    """torch lacks most operations of complex32, and safetensors has complex64 alone."""

    class Half(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.fine = nn.Linear(2, 2)
            self.turns = nn.Parameter(torch.ones(2, dtype=dtype))

    with pytest.raises(EMAConfigError) as caught:
        ShardedEMA(Half(torch.complex32))
    says(caught.value, "'turns'", "torch.complex32", "exclude='turns'", "freeze it")
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(EMAConfigError) as caught:
            ShardedEMA(Half(torch.complex64), dtype=dtype)
        says(caught.value, "'turns'", f"dtype={dtype}", "dtype=torch.float32")
    model = Half(torch.complex64)
    assert ShardedEMA(model, exclude="turns").full_state_dict().keys() == model.state_dict().keys()


def test_a_weight_that_torch_conjugates_lazily_is_refused() -> None:
    """Its memory holds other numbers than the tensor says, and kernels read the memory."""
    model = nn.Linear(2, 2)
    model.turns = nn.Parameter(torch.ones(2, dtype=torch.complex64).conj())
    with pytest.raises(EMAEngineError, match=r"'turns' is a view that torch has conjugated.*resolve_conj"):
        ShardedEMA(model)
    model.turns = nn.Parameter(torch.ones(2, dtype=torch.complex64).conj().imag)
    with pytest.raises(EMAEngineError, match="negated lazily"):
        ShardedEMA(model)


def test_compute_ema_names_its_option_and_what_differs() -> None:
    for smoothing in (1.5, -0.1, "0.9", None):
        with pytest.raises(EMAConfigError, match=re.escape(f"smoothing={smoothing!r}")):
            compute_ema(build(), build(), smoothing=smoothing)  # type: ignore[arg-type]
    with pytest.raises(EMAConfigError) as caught:
        compute_ema(build(hidden=7), build(hidden=8))
    says(caught.value, "not sharded alike", "module.0.up.weight", "Build both in the same way")
    with pytest.raises(EMAEngineError, match="cannot average a dict"):
        compute_ema(build(), {})  # type: ignore[arg-type]


# Calls.


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ({"batches": -1}, ("batches=-1", "an int, 0 or more")),
        ({"batches": 1.0}, ("batches=1.0", "an int, 0 or more")),
        ({"samples": True}, ("samples=True", "an int, 0 or more")),
        ({"samples": torch.tensor(3)}, ("samples=tensor(3)", "an int, 0 or more")),
        ({"tokens": "many"}, ("tokens='many'", "an int, 0 or more")),
        ({"epochs": -0.5}, ("epochs=-0.5", "a finite number, 0 or more")),
        ({"epochs": math.inf}, ("epochs=inf", "a finite number, 0 or more")),
    ],
    ids=str,
)
def test_a_wrong_count_is_refused_and_the_clock_stays(counts: dict[str, Any], parts: tuple[str, ...]) -> None:
    ema = ShardedEMA(build())
    ema.update(samples=5)
    before = ema.progress
    with pytest.raises(EMAConfigError) as caught:
        ema.update(**counts)
    says(caught.value, *parts)
    assert ema.progress == before and ema.num_updates == 1


def test_update_takes_counts_by_name_only() -> None:
    with pytest.raises(TypeError):
        ShardedEMA(build()).update(3)  # type: ignore[misc]


def test_a_wrong_name_lists_the_averages(tmp_path: Path) -> None:
    several = ShardedEMA(build(), averages={"fast": 0.5, "slow": 0.9})
    single = ShardedEMA(build())
    for ema, name, allowed in (
        (several, None, "'fast', 'slow'"),
        (several, "ema", "'fast', 'slow'"),
        (single, "x", "'ema'"),
    ):
        for call in (
            ema.full_state_dict,
            ema.fingerprint,
            ema.copy_to,
            lambda name, ema=ema: ema.export(tmp_path / "export", name=name),
            lambda name, ema=ema: ema.average_parameters(name).__enter__(),
        ):
            with pytest.raises(EMAConfigError) as caught:
                call(name)
            says(caught.value, f"name={name!r}", f"allowed are {allowed}")
    assert not list(tmp_path.iterdir())
    several.update()
    with pytest.raises(EMAConfigError, match="name=None"), several.average_parameters():
        pytest.fail("the body must not run")


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), "0.5", None, True])
def test_a_fraction_is_a_number_from_0_to_1(fraction: object) -> None:
    model = build()
    ema = ShardedEMA(model)
    ema.update()
    for into in (None, build(hidden=7)):
        with pytest.raises(EMAConfigError, match=re.escape(f"fraction={fraction!r}: allowed is a number from 0 to 1")):
            ema.copy_to(into=into, fraction=fraction)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", torch.int64, torch.bool, float], ids=str)
def test_a_dtype_that_is_not_floating_point_is_refused(dtype: object, tmp_path: Path) -> None:
    ema = ShardedEMA(build())
    for call in (lambda: ema.full_state_dict(dtype=dtype), lambda: ema.export(tmp_path / "x", dtype=dtype)):  # type: ignore[arg-type]
        with pytest.raises(EMAConfigError) as caught:
            call()
        says(caught.value, f"dtype={dtype!r}", "a floating-point torch.dtype, or None")


@pytest.mark.parametrize("wrong", [None, "sgd", build(), build().parameters()], ids=lambda value: type(value).__name__)
def test_attach_takes_an_optimizer(wrong: object) -> None:
    with pytest.raises(EMAConfigError) as caught:
        ShardedEMA(build()).attach(wrong)
    says(caught.value, f"attach(optimizer={type(wrong).__name__})", "torch.optim.Optimizer")


@pytest.mark.parametrize("options", [{"half_life": "10tok"}, {"update_interval": "1ep"}, {"ema_start": "5sp"}], ids=str)
def test_attach_cannot_count_what_it_does_not_see(options: dict[str, Any]) -> None:
    model = build()
    with pytest.raises(EMAConfigError) as caught:
        ShardedEMA(model, **options).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    unit = next(iter(options.values())).lstrip("0123456789")
    says(caught.value, f"the options count in {unit}", "Call update(samples=..., tokens=..., epochs=...)")


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), [("plain", 1), ("ddp", 2), ("fsdp1-full", 2), ("fsdp2", 2)])
@pytest.mark.parametrize("started", [True, False])
def test_calls_inside_average_parameters_are_refused_and_work_afterwards(
    case: str, world_size: int, started: bool, rank: int, tmp_path: Path
) -> None:
    """The shadow holds the live weights there: an update would be of the wrong ones."""
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5)
    if started:
        ema.update()
    digest = ema.fingerprint()
    calls: dict[str, Callable[[], object]] = {
        "update()": ema.update,
        "reset()": ema.reset,
        "copy_to()": ema.copy_to,
        "metrics()": ema.metrics,
        "load()": lambda: ema.load(tmp_path / "ema"),
        "rebind()": lambda: ema.rebind(model),
        "average_parameters()": lambda: ema.average_parameters().__enter__(),
    }
    with ema.average_parameters():
        for name, call in calls.items():
            with pytest.raises(EMAStateError) as caught:
                call()
            says(caught.value, name, "inside average_parameters('ema')", "call it after the with block")
        ema.memory_report()
    assert ema.fingerprint() == digest
    ema.save(tmp_path / "ema")
    for name, call in calls.items():
        if name != "average_parameters()":
            call()
    with ema.average_parameters():
        pass
    ema.update()


# The model changes under the average.


def _replace(model: nn.Module) -> None:
    model.one.weight = nn.Parameter(model.one.weight.detach().clone())


def _remove(model: nn.Module) -> None:
    model.one.weight = None


CHANGES = [
    (_replace, "'one.weight'", "was replaced after the average was created"),
    (_remove, "'one.weight'", "was replaced after"),
]


@pytest.mark.parametrize(("change", "name", "what"), CHANGES)
@pytest.mark.parametrize("started", [True, False])
def test_a_model_that_changed_is_noticed_and_reset_starts_anew(
    change: Callable[[nn.Module], None], name: str, what: str, started: bool, tmp_path: Path
) -> None:
    """LoRA: an average that goes on with the old tensor never moves again."""
    model = build()
    ema = ShardedEMA(model, decay=0.5)
    ema.metrics()
    if started:
        ema.update()
    change(model)
    for call in (
        ema.update,
        ema.full_state_dict,
        ema.fingerprint,
        ema.metrics,
        ema.update,
        lambda: ema.export(tmp_path / "export"),
    ):
        with pytest.raises(EMAStateError) as caught:
            call()
        says(caught.value, name, what, "Call reset()")
    if started:
        for call in (ema.copy_to, lambda: ema.average_parameters().__enter__()):
            with pytest.raises(EMAStateError) as caught:
                call()
            says(caught.value, name, "Call reset()")
    assert not list(tmp_path.iterdir()) and ema.num_updates == int(started)
    ema.reset()
    if change is not _remove:
        assert ema.update() and ema.num_updates == 1
        state = ema.full_state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_parameter_replaced_inside_the_context_does_not_lose_the_live_weights() -> None:
    model = build()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    ema.update()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shadow = ema.full_state_dict()
    old = model.one.weight
    with pytest.raises(EMAStateError, match=r"'one.weight'.*replaced"), ema.average_parameters():
        _replace(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "one.weight")
    assert torch.equal(old, before["one.weight"]), "the tensor that stood there has its live weights back"
    model.one.weight = old
    assert all(torch.equal(value, shadow[name]) for name, value in ema.full_state_dict().items())


def test_weights_on_the_meta_device_are_named_and_may_come_later(tmp_path: Path) -> None:
    """Nothing may be bound to the meta tensors by the calls that were refused."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = ShardedEMA(model, decay=0.5)
    for call in (ema.update, ema.full_state_dict, lambda: ema.export(tmp_path / "export"), ema.fingerprint):
        with pytest.raises(EMAStateError) as caught:
            call()
        says(caught.value, "'0.weight'", "meta device", "materialize the model")
    assert not list(tmp_path.iterdir()) and ema.num_updates == 0
    model.to_empty(device="cpu")
    for module in model:
        module.reset_parameters()
    assert ema.update()
    state = ema.full_state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


# One rank meets it, every rank raises it.


COLLECTIVE = {
    "full_state_dict": lambda ema, path: ema.full_state_dict(),
    "export": lambda ema, path: ema.export(path),
    "fingerprint": lambda ema, path: ema.fingerprint(),
    "metrics": lambda ema, path: ema.metrics(),
}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["plain", "ddp", "fsdp1-full-orig", "fsdp2"])
def test_a_parameter_replaced_on_one_rank_is_an_error_on_every_rank(case: str, rank: int, tmp_path: Path) -> None:
    """The other ranks would wait for the one that raised until the group's timeout."""
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    digest = ema.fingerprint()
    inner = model.module if isinstance(model, DDP) else model
    old = inner.one.weight
    if rank == 1:
        _replace(inner)
    calls = dict(COLLECTIVE)
    if case == "ddp":  # where swapping is collective
        calls |= {
            "average_parameters": lambda ema, path: ema.average_parameters().__enter__(),
            "copy_to": lambda ema, path: ema.copy_to(),
        }
    for name, call in calls.items():
        with pytest.raises(EMAStateError) as caught:
            call(ema, tmp_path / "export")
        says(caught.value, f"{name}() failed", "rank 1: EMAStateError", "'one.weight'", "Call reset()")
        dist.barrier()
        assert not list(tmp_path.iterdir())
    if rank == 1:
        inner.one.weight = old
    assert ema.fingerprint() == digest
    with ema.average_parameters():
        pass
    ema.export(tmp_path / "export")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_ranks_that_averaged_at_different_times_are_told(case: str, rank: int, tmp_path: Path) -> None:
    """Samples counted per rank, an update in a branch of rank 0: the parts would be of different averages."""
    model = CASES[case].model()
    ema = ShardedEMA(model, decay=0.5, update_interval="10sp")
    ema.update(samples=10 if rank == 0 else 9)
    calls = dict(COLLECTIVE)
    if case == "ddp":
        calls |= {
            "average_parameters": lambda ema, path: ema.average_parameters().__enter__(),
            "copy_to": lambda ema, path: ema.copy_to(),
        }
    for call in calls.values():
        with pytest.raises(EMAStateError) as caught:
            call(ema, tmp_path / "export")
        says(
            caught.value,
            "the number of updates differs between ranks: 1, 0",
            "Call update() on every rank with the same counts",
        )
    ema.update(samples=0 if rank == 0 else 1)
    assert ema.fingerprint() and not list(tmp_path.iterdir())


@pytest.mark.world_size(2)
def test_reset_on_one_rank_does_not_leave_the_ranks_out_of_step(rank: int) -> None:
    """The list of full tensors is agreed once and kept; a rank that forgot it must not exchange it alone."""
    model = CASES["fsdp2"].model()
    ema = ShardedEMA(model, decay=0.5)
    before = ema.fingerprint()
    if rank == 1:
        ema.reset()
    assert ema.fingerprint() == before
    ema.update()
    assert ema.metrics()["ema/num_updates"] == 1


@pytest.mark.world_size(2)
def test_ranks_with_different_models_are_told(rank: int) -> None:
    ema = ShardedEMA(build(hidden=7 + rank), decay=0.5)
    with pytest.raises(EMAEngineError) as caught:
        ema.full_state_dict()
    says(caught.value, "ranks must hold parts of one model", "module.0.up.weight")


@pytest.mark.world_size(2)
def test_an_unforeseen_error_of_one_rank_keeps_its_words(rank: int) -> None:
    """Errors that are not the library's own become one of its kinds, with the rank and the original text."""
    from dist_ema.comm.agreement import agreed

    def fail() -> None:
        if rank == 1:
            raise KeyError("a bug")

    words = "trying failed: rank 1: KeyError: 'a bug'"
    with pytest.raises(EMAError, match=words) as caught, agreed(dist.group.WORLD, "trying"):
        fail()
    assert (caught.value.__cause__ is not None) == (rank == 1)


@pytest.mark.world_size(2)
def test_memory_that_one_rank_lacks_for_a_swap_is_an_error_on_every_rank(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken after the ranks have agreed, the others would wait in the exchange between replicas."""
    model = DDP(build().to(torch.bfloat16))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    digest = ema.fingerprint()

    def full(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        if rank == 1:
            patch.setattr("dist_ema.core.swap.Swap._allocate_kept", full)
        with pytest.raises(EMAStateError, match=r"average_parameters\(\) failed: rank 1: .*MemoryError: no room"):
            ema.average_parameters().__enter__()
        ema.copy_to()  # needs none
    with ema.average_parameters():
        pass
    assert ema.fingerprint() == digest


def test_an_update_that_failed_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warmup would go on without it, and ranks would no longer have averaged equally often."""
    model = build()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    state, metrics = ema.full_state_dict(), ema.metrics()

    def full(*_: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("dist_ema.kernels.lerp", full)
        with pytest.raises(MemoryError):
            ema.update()
    assert (ema.num_updates, ema.progress.batches) == (1, 0)
    torch.testing.assert_close(ema.full_state_dict(), state, rtol=0, atol=0)
    assert ema.metrics() == metrics


@pytest.mark.world_size(2)
def test_a_load_ends_what_an_update_that_failed_on_one_rank_began(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That rank has averaged less often than the other; and it is told to load a checkpoint."""
    ema = ShardedEMA(CASES["fsdp2"].model(), decay=0.5)
    ema.update()
    digest = ema.fingerprint()
    ema.save(tmp_path / "c")
    state = copy.deepcopy(ema.state_dict())

    def full(*_: object) -> None:
        raise MemoryError("no room")

    for restore in (lambda: ema.load(tmp_path / "c"), lambda: ema.load_state_dict(state)):
        with monkeypatch.context() as patch:
            if rank == 1:
                patch.setattr("dist_ema.kernels.lerp", full)
            with pytest.raises(MemoryError) if rank == 1 else nullcontext():
                ema.update()
        with pytest.raises(EMAStateError, match="number of updates differs between ranks: 2, 1"):
            ema.save(tmp_path / "d")
        restore()
        assert (ema.num_updates, ema.fingerprint()) == (1, digest)


@pytest.mark.world_size(3)
def test_what_ranks_tell_each_other_arrives_whole_however_long_it_is(rank: int) -> None:
    """Short messages share one exchange of fixed size; a longer one of a single rank must not be cut off."""
    for length in (0, *range(200, 260), 1000):  # of 256 bytes
        found = gather_objects("x" * length if rank == 1 else rank, dist.group.WORLD)
        assert found == [0, "x" * length, 2]


def test_options_that_are_checked_early_have_the_defaults_of_those_that_count() -> None:
    """A trainer's user gives options before there is a model, and they are checked then."""
    checked = inspect.signature(Options.parse).parameters
    given = inspect.signature(ShardedEMA).parameters
    assert {name: given[name].default for name in checked} == {name: one.default for name, one in checked.items()}
    assert given.keys() - checked.keys() == {"target", "group"}
