"""An average in torch.distributed.checkpoint: saved under any engine and world size, loaded under any other."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

from support.any_engine import AVERAGES, average_ema, make_ema, perturb_ema
from support.models import CASES, WIDTH, Block, build

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from dist_ema import ShardedEMA, schedules
from dist_ema.dcp.boxed import BoxedTensor
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, EMAStateError

pytestmark = pytest.mark.core

WRITERS = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp1-full", 2),
    ("fsdp2", 2),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2-tp", 4),
    ("zero2", 2),
    ("zero3", 2),
]
READERS = [
    ("plain", 1),
    ("ddp", 3),
    ("fsdp1-full-orig", 3),
    ("fsdp1-hybrid", 2),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("tp", 3),
    ("zero0", 3),
    ("zero1", 3),
    ("zero3", 3),
]


def _save(path: Path, ema: ShardedEMA, **others: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that there is no process group
        dcp.save({"ema": ema, **others}, checkpoint_id=path)


def _load(path: Path, ema: ShardedEMA, **others: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load({"ema": ema, **others}, checkpoint_id=path)


def _metadata(path: Path) -> Metadata:
    return pickle.loads((path / ".metadata").read_bytes())


@pytest.fixture(scope="session")
def dcp_shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the writers of all engines leave their checkpoints for the readers."""
    return tmp_path_factory.mktemp("dcp")


def write(case: str, dcp_shelf: Path) -> None:
    """Leaves a checkpoint of this engine on the shelf. Collective."""
    ema = make_ema(case)
    average_ema(ema, range(3))
    _save(dcp_shelf / case, ema)


@pytest.fixture
def full_dcp_shelf(dcp_shelf: Path, on_ranks: Callable[..., None]) -> Path:
    """The shelf with a checkpoint of every engine, whichever tests have run before."""
    for case, world_size in WRITERS:
        if not (dcp_shelf / case / ".metadata").exists():
            on_ranks(write, world_size, case=case, dcp_shelf=dcp_shelf)
    return dcp_shelf


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), WRITERS)
def test_every_engine_writes_full_shapes_each_element_once_and_tensors_only(
    case: str, rank: int, world_size: int, dcp_shelf: Path
) -> None:
    """What DCP writes as bytes it reads by running what they say; what replicas write twice is time and space."""
    write(case, dcp_shelf)
    if rank != 0:
        return
    found = _metadata(dcp_shelf / case).state_dict_metadata
    assert not any(isinstance(entry, BytesStorageMetadata) for entry in found.values())
    plain = build(scalar=False, hidden=12).state_dict()
    names = {key.removeprefix("ema.averages.slow."): key for key in found if key.startswith("ema.averages.slow.")}
    assert names.keys() == plain.keys() - {"frozen.weight", "frozen.bias", "head.weight", "mask", "steps"} - {
        "norm.num_batches_tracked"
    }
    for name, key in names.items():
        assert found[key].size == plain[name].shape, name
        assert sum(chunk.sizes.numel() for chunk in found[key].chunks) == plain[name].numel(), name
    assert {key for key in found if key.startswith("ema.buffers.")} == {
        f"ema.buffers.{name}" for name in ("mask", "steps", "norm.num_batches_tracked")
    }


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), READERS)
def test_every_engine_reads_what_every_other_wrote_and_goes_on_as_if_nothing_had_happened(
    case: str, rank: int, world_size: int, full_dcp_shelf: Path, references: dict[int, list[dict[str, int]]]
) -> None:
    """An average that is lost, or resharded wrongly, when engine or world size change."""
    expected = references[3]
    ema = make_ema(case)
    for step in range(3):
        perturb_ema(ema, step)
    for written, _ in WRITERS:  # the first into an average that has not started
        _load(full_dcp_shelf / written, ema)
        assert [ema.fingerprint(name) for name in AVERAGES] == expected, written
        assert (ema.num_updates, ema.progress.batches) == (3, 2)
    average_ema(ema, range(3, 5))
    assert [ema.fingerprint(name) for name in AVERAGES] == references[5]


@pytest.mark.world_size(2)
def test_model_and_average_go_together_and_memory_is_shared(rank: int, tmp_path: Path) -> None:
    """As users write it: FSDP2's DTensors and the average in one checkpoint; state_dict() must not copy a shadow."""
    model = CASES["fsdp2"].model()
    ema = ShardedEMA(model, decay=0.5)
    for step in range(3):
        perturb_ema(ema, step)
        ema.update()
    parts = ema.state_dict()["averages"]["ema"]
    shadows = {
        share.spec.name: shadow
        for share, shadow in zip(ema._average.shares, ema._average.shadow.tensors("ema"), strict=True)
    }
    assert parts and all(part.held.data_ptr() == shadows[name].data_ptr() for name, part in parts.items())
    _save(tmp_path / "c", ema, model=model)
    other = CASES["fsdp2"].model()
    resumed = ShardedEMA(other, decay=0.5)
    _load(tmp_path / "c", resumed, model=other)
    for each in (ema, resumed):
        perturb_ema(each, 3)
        each.update()
    assert resumed.fingerprint() == ema.fingerprint()
    assert resumed.metrics() == ema.metrics()


@pytest.mark.world_size(2)
def test_what_each_rank_holds_for_itself_is_rank_0s(rank: int, tmp_path: Path) -> None:
    """DCP takes what several ranks offer from any of them: a BatchNorm's statistics would be from two of them."""
    model = CASES["plain"].model()
    names = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "steps")
    for name in names:
        model.get_buffer(name).fill_(rank + 5)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    _save(tmp_path / "c", ema)
    _load(tmp_path / "c", ema)
    parts = ema.state_dict()["buffers"]
    assert all((parts[name].held == 5).all() for name in names)


@pytest.mark.world_size(2)
def test_an_average_in_host_memory_is_saved_and_loaded_as_any_other(rank: int, tmp_path: Path) -> None:
    """A thread may still be at work on what is saved, and must not be at work on what is loaded into."""
    offloaded, beside = (ShardedEMA(CASES["fsdp2"].model(), decay=0.5, offload=offload) for offload in ("cpu", None))
    _save(tmp_path / "live", offloaded)
    for step in range(3):
        perturb_ema(offloaded, step)
        offloaded.update()
    _save(tmp_path / "c", offloaded)
    _load(tmp_path / "c", beside)
    assert beside.fingerprint() == offloaded.fingerprint() and beside.num_updates == 3
    expected = beside.fingerprint()
    perturb_ema(offloaded, 3)
    offloaded.update()
    _load(tmp_path / "c", offloaded)
    assert offloaded.fingerprint() == expected and offloaded.num_updates == 3
    _load(tmp_path / "live", offloaded)
    assert not offloaded._average.shadow.started
    offloaded.close()


@pytest.mark.world_size(2)
def test_a_load_that_fails_midway_changes_nothing(
    rank: int, tmp_path: Path, references: dict[int, list[dict[str, int]]]
) -> None:
    """DCP reads tensor by tensor into what it is given; a half-read average would be used without a word."""
    ema = make_ema("fsdp2")
    average_ema(ema, range(2))
    _save(tmp_path / "c", ema)
    average_ema(ema, range(2, 4))
    before = [ema.fingerprint(name) for name in AVERAGES]
    if rank == 0:
        file = tmp_path / "c" / "__1_0.distcp"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    dist.barrier()
    with pytest.raises(CheckpointException):
        _load(tmp_path / "c", ema)
    assert [ema.fingerprint(name) for name in AVERAGES] == before
    assert ema.num_updates == 4
    average_ema(ema, range(4, 5))
    assert [ema.fingerprint(name) for name in AVERAGES] == references[5]


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["fsdp2", "ddp"])
@pytest.mark.parametrize("stager", ["default", "writer", "blocking"])
def test_async_save_holds_the_average_of_its_moment(case: str, stager: str, rank: int, tmp_path: Path) -> None:
    """Updates go on meanwhile and must not show; a 0-d parameter is one rank's alone, and stagers treat it apart."""
    ema = ShardedEMA(CASES[case].model(), averages=AVERAGES)
    average_ema(ema, range(2))
    expected = ema.fingerprint("slow")
    options = {
        "default": {"checkpoint_id": tmp_path / "c"},
        "writer": {"storage_writer": dcp.FileSystemWriter(tmp_path / "c")},
        "blocking": {"checkpoint_id": tmp_path / "c", "async_stager": BlockingAsyncStager()},
    }
    written = dcp.async_save({"ema": ema}, **options[stager])
    average_ema(ema, range(2, 4))
    written.result()
    assert ema.fingerprint("slow") != expected
    other = ShardedEMA(CASES[case].model(), averages=AVERAGES)
    average_ema(other, range(2))
    average_ema(other, range(2, 3))
    _load(tmp_path / "c", other)
    assert other.fingerprint("slow") == expected


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["fsdp2", "ddp"])
def test_before_the_first_update_the_live_weights_are_saved_and_not_loaded_into(
    case: str, rank: int, tmp_path: Path
) -> None:
    """The average is the live model then: keys must exist, and weights in training must not be overwritten."""
    path, options = tmp_path / "c", {"decay": 0.5, "ema_start": "3ba"}
    ema = ShardedEMA(CASES[case].model(), **options)
    perturb_ema(ema, 0)
    assert not ema.update()
    live = ema.fingerprint()
    _save(path, ema)
    assert not ema._average.shadow.started
    dist.barrier()
    if rank == 0:
        dcp_to_torch_save(path, tmp_path / "full.pt")
        state = torch.load(tmp_path / "full.pt")["ema"]["averages"]["ema"]
        assert torch.equal(state["one.weight"], CASES[case].plain().one.weight * 1.25)
    dist.barrier()
    started = ShardedEMA(CASES[case].model(), decay=0.5)
    for step in range(2):
        perturb_ema(started, step)
        started.update()
    weights = [source.clone() for source in started._average.engine.sources()]
    _load(path, started)
    assert started.num_updates == 0 and not started._average.shadow.started
    assert all(
        torch.equal(now, before) for now, before in zip(started._average.engine.sources(), weights, strict=True)
    ), "the model was loaded into"
    resumed = ShardedEMA(CASES[case].model(), **options)
    perturb_ema(resumed, 0)
    _load(path, resumed)
    assert resumed.fingerprint() == live
    assert [resumed.update() for _ in range(3)] == [False, True, True], "the clock was lost"


def test_clocks_in_all_units_schedules_and_skipped_elements_survive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A counter that is not saved makes a resumed warm-up start again; another decay has to be said."""

    def make(decay: float) -> tuple[nn.Module, ShardedEMA]:
        model = build()
        return model, ShardedEMA(model, averages={"a": schedules.Warmup(decay), "b": schedules.HalfLife("100tok")})

    model, ema = make(0.999)
    for step in range(3):
        if step == 2:
            with torch.no_grad():
                model.one.weight[0, :3] = float("nan")
        ema.update(samples=4, tokens=128, epochs=0.25)
    _save(tmp_path / "c", ema)
    _, resumed = make(0.9)
    _load(tmp_path / "c", resumed)
    assert resumed.progress == ema.progress
    assert resumed.metrics()["ema/skipped_elements"] == ema.metrics()["ema/skipped_elements"] == 3
    assert "0.999" in caplog.text and "continues with" in caplog.text and "HalfLife" not in caplog.text
    only = ShardedEMA(build(), averages={"b": schedules.HalfLife("100tok")})
    _load(tmp_path / "c", only)
    assert only.fingerprint("b") == ema.fingerprint("b") | {
        name: only.fingerprint("b")[name] for name in ("frozen.weight", "frozen.bias")
    }


@pytest.mark.parametrize("other", ["names", "shapes", "averages", "no EMA"])
def test_what_does_not_fit_is_named_and_changes_nothing(other: str, tmp_path: Path) -> None:
    """Half a load is worse than none."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))
    if other == "no EMA":
        with pytest.warns(UserWarning, match="single process"):
            dcp.save({"model": model}, checkpoint_id=tmp_path / "c")
    else:
        theirs = ShardedEMA(model, averages={"a": 0.5})
        theirs.update()
        _save(tmp_path / "c", theirs)
    wide = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 5 if other == "shapes" else 4))
    mine = ShardedEMA(
        nn.ModuleList([*wide, nn.Linear(2, 2)]) if other == "names" else wide,
        averages={"b" if other == "averages" else "a": 0.5},
    )
    mine.update()
    before = mine.fingerprint()
    expected = {
        "names": r"Missing key.*ema\.averages\.a\.2\.weight",
        "shapes": r"Size mismatch.*ema\.averages\.a\.1\.weight",
        "averages": r"Missing key.*ema\.schedules\.b",
        "no EMA": r"Missing key.*ema\.progress",
    }
    with pytest.raises(CheckpointException, match=expected[other]):
        _load(tmp_path / "c", mine)
    assert mine.fingerprint() == before and mine.num_updates == 1


class _Stage(nn.Module):
    """A part of a pipeline, with the names that it has in the whole model."""

    def __init__(self, *numbers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Block(5) for number in numbers})
        self.shift = nn.Parameter(torch.zeros(WIDTH)) if 0 in numbers else None
        with torch.no_grad():
            for number, layer in zip(numbers, self.layers.values(), strict=True):
                for parameter in layer.parameters():
                    parameter.fill_(number + 1.0)


@pytest.mark.world_size(3)
def test_pipeline_stages_hold_other_names_on_each_rank(rank: int, tmp_path: Path) -> None:
    """A planner that expects the same keys everywhere would drop the other stages, or hang."""
    stages = [_Stage(0, 1), _Stage(2), _Stage(3)]
    ema = ShardedEMA([stages[rank]], decay=0.5)
    for step in range(3):
        perturb_ema(ema, step)
        ema.update()
    _save(tmp_path / "c", ema)
    other = ShardedEMA([_Stage(*((3,), (0, 2), (1,))[rank])], decay=0.5)
    _load(tmp_path / "c", other)
    assert other.fingerprint() == dict(sorted(ema.fingerprint().items())) and other.num_updates == 3
    expected = 0.5 * (0.5 * 1.25 + 0.5 * 1.25 * 1.5) + 0.5 * 1.25 * 1.5 * 1.75
    full = other.full_state_dict()
    if rank == 0:
        assert torch.equal(full["layers.2.up.weight"], torch.full((5, WIDTH), 3 * expected))


@pytest.mark.world_size(2)
def test_a_torch_saved_state_dict_fits_its_own_rank_and_no_other(rank: int, tmp_path: Path) -> None:
    """Trainers save what state_dict() returns; another rank's shard has the same names, and often the same size."""
    ema = make_ema("fsdp2")
    average_ema(ema, range(3))
    torch.save(ema.state_dict(), tmp_path / f"{rank}.pt")
    kept = copy.deepcopy(ema.state_dict())
    expected = ema.fingerprint("slow")
    average_ema(ema, range(3, 4))
    for state in (torch.load(tmp_path / f"{rank}.pt"), kept):
        resumed = make_ema("fsdp2")
        resumed.load_state_dict(state)
        assert resumed.fingerprint("slow") == expected and resumed.num_updates == 3
        average_ema(resumed, range(1))  # must not write into the dict
    resumed.load_state_dict(kept)
    assert resumed.fingerprint("slow") == expected
    dist.barrier()
    with pytest.raises(CheckpointMismatchError, match="the part of another rank"):
        resumed.load_state_dict(torch.load(tmp_path / f"{1 - rank}.pt"))
    assert resumed.fingerprint("slow") == expected


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp2", "hsdp"])
def test_what_rank_0_alone_has_saved_says_at_load_how_one_file_is_written(rank: int, case: str, tmp_path: Path) -> None:
    """Under DDP each rank's dict has only its share of the average; the load said that names are missing."""
    ema = make_ema(case)
    average_ema(ema, range(3))
    expected, state, full = ema.fingerprint("slow"), ema.state_dict(), ema.state_dict(full=True)
    if rank == 0:
        torch.save(state, tmp_path / "part.pt")
        torch.save(full, tmp_path / "full.pt")
    dist.barrier()
    resumed = make_ema(case)
    if case != "hsdp":  # on two ranks each holds the same there
        words = r"rank 1: .*another rank has saved it.*state_dict\(full=True\) on every rank; ShardedEMA\.save\(\)"
        with pytest.raises(CheckpointMismatchError, match=words):
            resumed.load_state_dict(torch.load(tmp_path / "part.pt"))
        assert resumed.num_updates == 0
    resumed.load_state_dict(torch.load(tmp_path / "full.pt"))
    assert resumed.fingerprint("slow") == expected


@pytest.mark.world_size(3)
def test_full_tensors_of_a_converted_checkpoint_load_under_any_engine(
    rank: int, tmp_path: Path, references: dict[int, list[dict[str, int]]]
) -> None:
    """dcp_to_torch_save is how a DCP checkpoint leaves the cluster, and how it may come back."""
    ema = make_ema("zero2")
    average_ema(ema, range(3))
    _save(tmp_path / "c", ema)
    if rank == 0:
        dcp_to_torch_save(tmp_path / "c", tmp_path / "full.pt")
    dist.barrier()
    state = torch.load(tmp_path / "full.pt")["ema"]
    for case in ("fsdp2", "ddp"):
        other = make_ema(case)
        other.load_state_dict(state)
        assert [other.fingerprint(name) for name in AVERAGES] == references[3]


@pytest.mark.world_size(2)
def test_nothing_is_loaded_inside_average_parameters(rank: int) -> None:
    """There the shadow holds the live weights: they would be lost."""
    ema = make_ema("fsdp2")
    average_ema(ema, range(1))
    state = ema.state_dict()
    with ema.average_parameters("fast"), pytest.raises(EMAStateError, match=r"load_state_dict\(\) inside"):
        ema.load_state_dict(state)


def test_a_damaged_or_foreign_state_dict_is_refused_and_changes_nothing() -> None:
    """Nothing that comes from outside is believed before it is looked at."""
    ema = ShardedEMA(build(), decay=0.5)
    ema.update()
    before = ema.fingerprint()

    def progress(**changes: object) -> dict:
        state = ema.state_dict()
        body = json.loads(bytes(state["progress"].tolist()))
        text = json.dumps(body | changes).encode().ljust(2048)
        return state | {"progress": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    state = ema.state_dict()
    part = state["averages"]["ema"]["one.weight"]
    refused = [
        ({"a": 1}, CheckpointMismatchError, "missing 'progress'.*missing 'averages'"),
        (state | {"progress": torch.zeros(2048, dtype=torch.uint8)}, CheckpointCorruptError, "'progress'"),
        (state | {"progress": "{}"}, CheckpointCorruptError, "'progress'"),
        (progress(clock={}), CheckpointCorruptError, "'progress'"),
        (progress(skipped=None), CheckpointCorruptError, "'progress'"),
        (progress(version=7), CheckpointError, "version 7.*version 1"),
        (state | {"schedules": {"ema": progress()["progress"]}}, CheckpointCorruptError, "'schedules/ema'"),
        (state | {"averages": {"ema": {"x": part}}}, CheckpointMismatchError, "missing 'one.weight'.*unexpected 'x'"),
        (
            state | {"averages": {**state["averages"], "b": {}}},
            CheckpointMismatchError,
            "unexpected average 'b'",
        ),
        (
            state | {"averages": {"ema": {**state["averages"]["ema"], "one.weight": torch.ones(2)}}},
            CheckpointMismatchError,
            r"shape mismatch for 'one.weight': checkpoint \(2,\)",
        ),
    ]
    for bad, kind, text in refused:
        with pytest.raises(kind, match=text):
            ema.load_state_dict(bad)
    with pytest.raises(EMAStateError, match="pass what state_dict"):
        ema.load_state_dict(part)  # type: ignore[arg-type]
    assert ema.fingerprint() == before


def test_a_part_can_be_copied_and_not_computed_with() -> None:
    """A part that passed for the full tensor would give wrong numbers without an error."""
    held = torch.arange(5.0)
    part = BoxedTensor((3, 4), held, (((0, 3), (1, 1)), ((1, 0), (1, 4))), is_writer=True, spare=False)
    assert (part.size(), part.dtype, part.device) == (torch.Size([3, 4]), held.dtype, held.device)
    for copied in (part.clone(), copy.deepcopy(part), part.detach().to(torch.float64).float()):
        assert isinstance(copied, BoxedTensor) and copied.boxes == part.boxes
        assert torch.equal(copied.held, held) and copied.held.data_ptr() != held.data_ptr()
    computed: list = [lambda: part + 1, lambda: part.sum(), lambda: part.view(-1), lambda: part[0]]
    computed += [
        lambda: torch.zeros(3, 4).copy_(part),
        lambda: part.copy_(torch.zeros(3, 4)),
        lambda: part.new_empty(2),
    ]
    for compute in computed:
        with pytest.raises(EMAStateError, match="full_state_dict"):
            compute()
    assert "boxes" in repr(part)
