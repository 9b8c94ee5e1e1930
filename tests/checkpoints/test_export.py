"""Exports as others will read them: the plain model, safetensors' own loader, transformers; and exports that fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import ROOT
from support.exports import DECAY, FAMILIES, INDEX, average, everywhere, perturb, read, shard_layers
from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA
from dist_ema.errors import CheckpointError, EMAConfigError, EMAError, EMAStateError
from dist_ema.formats.layout import TensorPlan, parse_size, plan_files
from dist_ema.storage.local import RunWriter

pytestmark = pytest.mark.core

ENGINES = ["plain", "ddp", "fsdp1-full", "fsdp1-full-orig", "fsdp2"]
MATRIX = [(name, size) for name in ENGINES for size in (1, 2, 3)]
MATRIX += [("tp", 2), ("tp", 3), ("fsdp2-tp", 2), ("hsdp", 2)]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def live(model: nn.Module) -> list[Tensor]:
    """Copies of what this rank holds of the model."""
    tensors = [*model.parameters(), *model.buffers()]
    return [getattr(tensor, "_local_tensor", tensor).detach().clone() for tensor in tensors]


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), MATRIX)
def test_export_loads_into_the_plain_model_in_one_file_or_many(
    case: str, rank: int, world_size: int, tmp_path: Path
) -> None:
    """Uneven and empty shards, ties, frozen parts, 0-d, int and bool tensors, in files written by all ranks at once."""
    spec = CASES[case]
    model, plain = spec.model(), spec.plain()
    ema, oracle = average(model, plain)
    ema.export(tmp_path / "one")
    ema.export(tmp_path / "many", max_shard_size=1500)
    ema.export(tmp_path / "half", dtype=torch.bfloat16, max_shard_size="1.5KB")
    for name, options in {
        "one": {},
        "many": {"max_shard_size": 1500},
        "half": {"dtype": torch.bfloat16, "max_shard_size": 1500},
    }.items():
        ema.export(tmp_path / f"{name}-gathered", gather=True, **options)
    state = ema.full_state_dict()
    if rank != 0:
        return
    assert "cache" not in state, "a non-persistent buffer"
    oracle.check(read(tmp_path / "one"))
    for directory in ("one", "many"):
        exported = read(tmp_path / directory)
        plain.load_state_dict(exported, strict=True)
        assert torch.equal(exported["head.weight"], exported["embed.weight"])
        for name, value in state.items():
            assert exported[name].dtype == value.dtype and torch.equal(exported[name], value), name
    many = list((tmp_path / "many").glob("*.safetensors"))
    assert len(many) > 3
    assert all(file.stat().st_size <= 1500 or len(load_file(file)) == 1 for file in many)
    for name, value in read(tmp_path / "half").items():
        if state[name].is_floating_point():
            assert value.dtype == torch.bfloat16 and torch.equal(value, state[name].bfloat16()), name
        else:
            assert value.dtype == state[name].dtype and torch.equal(value, state[name]), name
    for directory in ("one", "many", "half"):
        assert contents(tmp_path / directory) == contents(tmp_path / f"{directory}-gathered"), "gathered, other bytes"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "staging was left behind"


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full", "fsdp2"])
def test_export_before_the_first_update_is_the_live_model(case: str, rank: int, tmp_path: Path) -> None:
    spec = CASES[case]
    ema = ShardedEMA(spec.model(), decay=DECAY, ema_start="10ba")
    ema.update()
    ema.export(tmp_path / "export")
    if rank == 0:
        exported = read(tmp_path / "export")
        for name, value in spec.plain().state_dict().items():
            assert torch.equal(exported.pop(name), value), name
        assert not exported


class Odd(nn.Module):
    """Every dtype and shape that a header has to get right."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.tensor([True]), requires_grad=False)  # an odd byte before wider tensors
        self.brain = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.scalar = nn.Parameter(torch.tensor(2.5))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.wide = nn.Parameter(torch.randn(7, dtype=torch.float64), requires_grad=False)  # the shadow is fp32
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.image = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
        for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint64):
            self.register_buffer(str(dtype).removeprefix("torch."), torch.tensor([[3], [1], [2]], dtype=dtype))
        self.register_buffer("flags", torch.tensor([True, False, True]))
        self.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("eighth", torch.randn(5).to(torch.float8_e4m3fn))
        self.register_buffer("naive", torch.tensor(float("nan")))
        self.register_buffer("gone", torch.ones(2), persistent=False)


def test_export_keeps_every_dtype_and_shape(tmp_path: Path) -> None:
    """0-d tensors that became 0.0, integers through floats, misaligned data, transposed weights in memory order."""
    torch.manual_seed(0)
    model = Odd()
    ema = ShardedEMA(model, decay=DECAY)
    for started in (False, True):
        if started:
            ema.update()
        path = tmp_path / f"export-{started}"
        ema.export(path)
        exported = read(path)
        for name, value in model.state_dict().items():
            found = exported.pop(name)
            assert (found.dtype, found.shape) == (value.dtype, value.shape), name
            as_bytes = [tensor.contiguous().view(-1).view(torch.uint8).tolist() for tensor in (found, value)]
            assert as_bytes[0] == as_bytes[1], name
        assert not exported
    assert set(ema.fingerprint()) == set(model.state_dict())


def test_export_has_the_live_weights_dtype_unless_told_otherwise(tmp_path: Path) -> None:
    """The shadow is fp32; a bf16 model's export twice the size would be a surprise."""
    model = build().bfloat16()
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    perturb(model, 1)
    ema.update()
    ema.export(tmp_path / "own")
    ema.export(tmp_path / "wide", dtype=torch.float32)
    shadow = ema.full_state_dict()
    own, wide = read(tmp_path / "own"), read(tmp_path / "wide")
    for name, value in model.state_dict().items():
        assert own[name].dtype == value.dtype, name
        assert torch.equal(own[name], shadow[name].to(value.dtype)), name
        assert torch.equal(wide[name], shadow[name].float() if value.is_floating_point() else value), name
    assert shadow["one.weight"].dtype == torch.float32


def test_each_average_has_its_own_export(tmp_path: Path) -> None:
    model = build()
    ema = ShardedEMA(model, averages={"fast": 0.1, "slow": 0.9})
    for step in (0, 1):
        perturb(model, step)
        ema.update()
    for name in ("fast", "slow"):
        ema.export(tmp_path / name, name=name)
        exported = read(tmp_path / name)
        assert all(torch.equal(exported[key], value) for key, value in ema.full_state_dict(name).items())
    assert contents(tmp_path / "fast") != contents(tmp_path / "slow")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), (17, 17), ("17", 17), (" 1TB ", 10**12)],
)
def test_sizes_are_read_as_hugging_face_reads_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0", "0.1B", "5 apples", "1e3", 0, -1, 2.5, True, None])
def test_a_wrong_size_is_refused_by_name(text: object) -> None:
    if text == "5":
        assert parse_size(text) == 5
        return
    with pytest.raises(EMAConfigError, match=r"max_shard_size=.*allowed is a positive number of bytes"):
        parse_size(text)  # type: ignore[arg-type]


def test_every_tensor_begins_at_a_multiple_of_its_element_size() -> None:
    """One odd byte before a float32 tensor, and whoever maps the file reads it misaligned."""
    dtypes = [torch.bool, torch.float32, torch.uint8, torch.float64, torch.bfloat16, torch.int8, torch.int64]
    for order in (dtypes, dtypes[::-1]):
        (plan,) = plan_files([TensorPlan(str(dtype), dtype, (3,)) for dtype in order], 10**6)
        assert all(plan.offsets[tensor.name] % tensor.dtype.itemsize == 0 for tensor in plan.tensors)


def test_files_stay_within_the_limit_with_their_headers() -> None:
    """Long names and many small tensors: the header is most of the file."""
    tensors = [TensorPlan(f"layer.{'x' * 80}.{i}", torch.float32, (i % 7, 3)) for i in range(200)]
    for limit in (200, 1000, 4096, 10**6):
        plans = plan_files(tensors, limit)
        assert [tensor for plan in plans for tensor in plan.tensors] == tensors
        assert all(plan.size <= limit or len(plan.tensors) == 1 for plan in plans), limit
        assert len(plans) <= 2 + sum(plan.size for plan in plans) // (limit / 2), "files are not half empty"


def test_configurations_come_along_and_weights_do_not(tmp_path: Path) -> None:
    ema = ShardedEMA(build(), decay=DECAY)
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", INDEX, "model.safetensors"):
        (source / name).write_text(name)
    (source / "deeper.json").mkdir()
    ema.export(tmp_path / "one", config_from=str(source / "config.json"))
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"model.safetensors", "config.json", "README.md"}
    ema.export(tmp_path / "all", config_from=source)
    copied = {"config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"}
    assert {file.name for file in (tmp_path / "all").iterdir()} == {"model.safetensors", "README.md", *copied}
    assert (tmp_path / "all" / "config.json").read_text() == "config.json"
    assert read(tmp_path / "all").keys() == build().state_dict().keys(), "its own weights, not the copied ones"


def test_a_config_that_cannot_be_copied_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    ema = ShardedEMA(build(), decay=DECAY)
    (tmp_path / "model.safetensors").write_text("other weights")

    class Failing:
        def save_pretrained(self, path: str) -> None:
            raise OSError("no")

    for wrong, kind, message in [
        (tmp_path / "absent", EMAConfigError, r"config_from='.*absent'.*no such file or directory"),
        (3, EMAConfigError, "config_from=3: allowed is a file, a directory, or an object with save_pretrained"),
        (nn.Linear(1, 1), EMAConfigError, "config_from=Linear.*allowed is a file"),
        (tmp_path / "model.safetensors", EMAConfigError, "config_from=.*writes a file of this name itself"),
        (Failing(), CheckpointError, "export to .* failed: rank 0: OSError: no"),
    ]:
        with pytest.raises(kind, match=message):
            ema.export(tmp_path / "export", config_from=wrong)
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


# transformers: random weights, no download.


@pytest.mark.world_size(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000])
def test_transformers_loads_the_export_with_no_key_missing_or_unexpected(
    family: str, max_shard_size: int | str, rank: int, tmp_path: Path
) -> None:
    make, engine, layers = FAMILIES[family]
    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    plain = make()
    config, kind = model.config, type(model)
    ema, oracle = average(shard_layers(model, layers(model), engine), plain)
    ema.export(tmp_path / "export", max_shard_size=max_shard_size, config_from=config)
    expected = ema.full_state_dict()
    if rank == 0:
        assert (tmp_path / "export" / INDEX).exists() == (max_shard_size != "5GB")
        loaded, info = kind.from_pretrained(tmp_path / "export", output_loading_info=True)
        assert {name: list(keys) for name, keys in info.items() if keys} == {}
        oracle.check(loaded.state_dict())
        for name, value in loaded.state_dict().items():
            assert torch.equal(value, expected[name]), name
        fresh = make()  # has its own non-persistent buffers, as the loaded one
        fresh.load_state_dict(expected, strict=True)
        tokens = torch.arange(8).view(1, 8)
        assert torch.equal(loaded.eval()(tokens).logits, fresh.eval()(tokens).logits)


# Ranks that share no disk.


@pytest.mark.world_size(3)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full", "fsdp2"])
def test_ranks_that_share_no_disk_send_everything_to_rank_0(case: str, rank: int, tmp_path: Path) -> None:
    """A relative path in a directory of one's own stands for a disk of one's own."""
    model, plain = CASES[case].model(), CASES[case].plain()
    ema, oracle = average(model, plain)
    ema.export(tmp_path / "shared", max_shard_size=1500)
    own, before = tmp_path / f"disk{rank}", Path.cwd()
    own.mkdir()
    os.chdir(own)
    try:
        ema.export("export", max_shard_size=1500)
        with pytest.raises(CheckpointError, match=r"gather=False, but not all ranks see .*disk") as caught:
            ema.export("refused", gather=False)
    finally:
        os.chdir(before)
    assert everywhere(str(caught.value))
    assert [path.name for path in own.iterdir()] == (["export"] if rank == 0 else [])
    if rank == 0:
        oracle.check(read(own / "export"))
        assert contents(own / "export") == contents(tmp_path / "shared")


# Failures.


@contextmanager
def _small_files(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond ``limit`` bytes: a disk that is full, without a disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def _failing_write(after: int = 2) -> Iterator[None]:
    """The writer of this rank raises at its third write."""
    original = RunWriter.write
    calls = []

    def write(self: RunWriter, *args: object) -> None:
        calls.append(args)
        if len(calls) > after:
            raise RuntimeError("the disk caught fire")
        original(self, *args)  # type: ignore[arg-type]

    RunWriter.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        RunWriter.write = original  # type: ignore[method-assign]


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _occupy(path: Path, how: str) -> Path:
    """Makes ``path``, or what it stands in, one that cannot be exported to; returns the path to try."""
    if how == "directory":
        path.mkdir()
    elif how == "file":
        path.write_text("mine")
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "file as parent":
        path.write_text("mine")
        return path / "export"
    else:
        return Path("/proc/export")  # refuses new directories, also to root
    return path


@pytest.mark.world_size(2)
@pytest.mark.parametrize("gather", [None, True])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("directory", "exists already: give a path that does not, or remove it first"),
        ("file", "exists already"),
        ("dangling link", "exists already"),
        ("file as parent", "export is not a directory"),
        ("unwritable parent", "/proc/.dist_ema-saving-"),
    ],
)
def test_a_path_that_cannot_be_written_is_an_error_on_every_rank_and_stays_as_it_was(
    how: str, message: str, gather: bool | None, rank: int, tmp_path: Path
) -> None:
    model = CASES["fsdp2"].model()
    ema, _ = average(model, CASES["fsdp2"].plain())
    path = tmp_path / "export"
    if rank == 0:
        path = _occupy(path, how)
    path = everywhere(path)[0]
    with pytest.raises(CheckpointError) as caught:
        ema.export(path, gather=gather)
    assert message in str(caught.value) and "rank 0" in str(caught.value)
    assert everywhere("reached") == ["reached"] * 2
    assert {file.name for file in tmp_path.iterdir()} <= {"export"}
    if how == "directory":
        assert not list(path.iterdir())
    if how == "file":
        assert path.read_text() == "mine"
    dist.barrier()
    ema.export(tmp_path / "another", gather=gather)
    assert (tmp_path / "another" / "model.safetensors").exists()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    ("gather", "failing", "how"),
    [
        (None, 0, "full disk"),
        (None, 1, "full disk"),
        (None, 0, "write"),
        (None, 1, "write"),
        (True, 0, "full disk"),
        (True, 0, "write"),
    ],
)
def test_a_write_that_fails_on_one_rank_is_an_error_on_every_rank_and_leaves_nothing(
    case: str, gather: bool | None, failing: int, how: str, rank: int, tmp_path: Path
) -> None:
    """Not a rank that waits for ever, not a directory that looks complete, not a changed weight."""
    model, plain = CASES[case].model(), CASES[case].plain()
    ema, oracle = average(model, plain)
    weights, digest = live(model), ema.fingerprint()
    trouble = _nothing()
    if rank == failing:
        trouble = _small_files(3000) if how == "full disk" else _failing_write()
    with trouble, pytest.raises(CheckpointError) as caught:
        ema.export(tmp_path / "export", gather=gather)
    reason = "File too large" if how == "full disk" else "RuntimeError: the disk caught fire"
    for text in everywhere(str(caught.value)):
        assert f"rank {failing}" in str(text) and reason in str(text), text
        assert str(tmp_path / "export") in str(text)
    assert not list(tmp_path.iterdir()), "the final place and staging must be gone"
    assert all(torch.equal(now, then) for now, then in zip(live(model), weights, strict=True))
    assert ema.fingerprint() == digest
    ema.export(tmp_path / "export", gather=gather)
    if rank == 0:
        oracle.check(read(tmp_path / "export"))


@pytest.mark.world_size(2)
def test_a_rank_that_cannot_read_its_shard_is_an_error_on_every_rank(rank: int, tmp_path: Path) -> None:
    """While tensors are gathered the others wait for what this rank sends: it has to go on sending."""
    from dist_ema.comm.gather import LocalValues

    model = CASES["fsdp2"].model()
    ema, oracle = average(model, CASES["fsdp2"].plain())
    original = LocalValues.runs.fget

    def runs(self: LocalValues) -> object:
        if self.share.spec.name == "frozen.weight":
            raise MemoryError("no room")
        return original(self)

    if rank == 1:
        LocalValues.runs = property(runs)  # type: ignore[assignment]
    try:
        for call in (
            ema.full_state_dict,
            lambda: ema.export(tmp_path / "export", gather=True),
            lambda: ema.export(tmp_path / "export"),
        ):
            with pytest.raises(EMAError, match="rank 1: MemoryError: no room"):
                call()
            dist.barrier()
            assert not list(tmp_path.iterdir())
    finally:
        LocalValues.runs = property(original)  # type: ignore[assignment]
    state = ema.full_state_dict()
    if rank == 0:
        oracle.check(state)


@pytest.mark.world_size(2)
def test_a_wrong_option_of_one_rank_is_an_error_on_every_rank(rank: int, tmp_path: Path) -> None:
    ema, _ = average(CASES["fsdp2"].model(), CASES["fsdp2"].plain())
    wrong: list[dict] = [{"max_shard_size": "5 apples"}, {"dtype": torch.int8}, {"name": "slow"}, {"gather": "yes"}]
    wrong += [{"config_from": tmp_path / "absent"}]
    for options in wrong:
        ((option, value),) = options.items()
        with pytest.raises(EMAConfigError, match=f"{option}=.*{value}"):
            ema.export(tmp_path / "export", **options)
        # Given by one rank only, it is what the ranks differ in. (config_from is rank 0's.)
        with pytest.raises(EMAConfigError if option == "config_from" else EMAStateError, match=f"{option}=.*{value}"):
            ema.export(tmp_path / "export", **(options if rank == 0 else {}))
        dist.barrier()
        assert not list(tmp_path.iterdir())
    with pytest.raises(EMAConfigError, match="path=None: allowed is a str or a path"):
        ema.export(None if rank == 1 else tmp_path / "export")  # type: ignore[arg-type]


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from support.models import build
from dist_ema import ShardedEMA
from dist_ema.storage.local import RunWriter

write, calls = RunWriter.write, []
def dying(self, *args):
    calls.append(args)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *args)
RunWriter.write = dying
ShardedEMA(build(), decay=.5).export(sys.argv[1])
"""


def test_a_process_killed_in_the_middle_leaves_no_directory_under_the_final_name(tmp_path: Path) -> None:
    target = tmp_path / "export"
    arguments = [sys.executable, "-c", KILLED, str(target), str(ROOT / "tests")]
    result = subprocess.run(arguments, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not target.exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".dist_ema-saving-"), "it says what it is"
    ShardedEMA(build(), decay=DECAY).export(target)
    assert read(target).keys() == build().state_dict().keys()
    assert list(tmp_path.iterdir()) == [target], "a model's worth of bytes lies there for ever"


def test_export_says_what_safetensors_expects(tmp_path: Path) -> None:
    """transformers refuses a file without the format; data must begin at a multiple of eight bytes."""
    ShardedEMA(build(), decay=DECAY).export(tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    data = (tmp_path / "export" / "model.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
