"""A checkpoint of any engine and world size, read by any other, bit for bit; and what the file format promises."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from support.any_engine import AVERAGES, average_ema, digests_of, make_ema, perturb_ema
from support.models import build

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ema import ShardedEMA, read_checkpoint, schedules, verify_checkpoint
from dist_ema.checkpoints.reader import RunReader
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, EMAConfigError
from dist_ema.formats.manifest import NAME, Manifest
from dist_ema.offline.compare import compare
from dist_ema.offline.export import export_checkpoint
from dist_ema.storage.local import RunWriter

pytestmark = pytest.mark.core

PAIRS = [
    ("plain", 1),
    ("ddp", 2),
    ("fsdp1-full", 3),
    ("fsdp1-full-orig", 4),
    ("fsdp1-hybrid", 4),
    ("fsdp2", 3),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2-tp", 4),
    ("zero0", 2),
    ("zero1", 3),
    ("zero2", 2),
    ("zero3", 3),
]


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the writers of all engines leave their checkpoints for the readers."""
    return tmp_path_factory.mktemp("shelf")


def write(case: str, shelf: Path) -> ShardedEMA:
    """Leaves a checkpoint of this engine on the shelf. Collective."""
    ema = make_ema(case)
    average_ema(ema, range(3))
    ema.save(shelf / case)
    return ema


@pytest.fixture
def full_shelf(shelf: Path, on_ranks: Callable[..., None]) -> Path:
    """The shelf with a checkpoint of every engine, whichever tests have run before."""
    for case, world_size in PAIRS:
        if not (shelf / case).exists():
            on_ranks(write, world_size, case=case, shelf=shelf)
    return shelf


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), PAIRS)
def test_checkpoint_of_every_engine_holds_the_same_bits(
    case: str, rank: int, world_size: int, shelf: Path, references: dict[int, list[dict[str, int]]]
) -> None:
    """A shard written to the wrong place, twice, or not at all."""
    ema = write(case, shelf)
    reference = references[3]
    assert [ema.fingerprint(name) for name in AVERAGES] == reference
    if rank == 0:
        manifest = verify_checkpoint(shelf / case)
        assert [digests_of(manifest, name) for name in AVERAGES] == reference
        assert set(manifest.live) == {"frozen.weight", "frozen.bias"}


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), PAIRS)
def test_every_engine_reads_what_every_other_wrote_and_goes_on_as_if_nothing_had_happened(
    case: str, rank: int, world_size: int, full_shelf: Path, references: dict[int, list[dict[str, int]]]
) -> None:
    """An average that is lost, or resharded wrongly, when engine or world size change."""
    expected = references[3]
    ema = make_ema(case)
    for step in range(3):
        perturb_ema(ema, step)
    for written, _ in PAIRS:
        ema.load(full_shelf / written)
        assert [ema.fingerprint(name) for name in AVERAGES] == expected, written
        assert (ema.num_updates, ema.progress.batches) == (3, 2)
    average_ema(ema, range(3, 5))
    assert [ema.fingerprint(name) for name in AVERAGES] == references[5]


def _small(**options: object) -> tuple[nn.Module, ShardedEMA]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 40))
    model[2].weight = nn.Parameter(model[0].weight.detach().t().contiguous())
    if "averages" not in options:
        options.setdefault("decay", 0.9)
    ema = ShardedEMA(model, **options)
    for _ in range(3):
        _train(model, ema)
    return model, ema


@torch.no_grad()
def _train(model: nn.Module, ema: ShardedEMA) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))
    ema.update(samples=4, tokens=128, epochs=0.25)


def _data(path: Path) -> Path:
    return path / Manifest.from_bytes((path / NAME).read_bytes()).data


def test_reading_in_one_process_gives_the_full_state(tmp_path: Path) -> None:
    """Offline tools must see ties, buffers and what is not averaged."""
    model = build()
    ema = ShardedEMA(model, decay=0.9)
    ema.update()
    ema.save(tmp_path / "c")
    state = read_checkpoint(tmp_path / "c")
    build().load_state_dict(state, strict=True)
    for name, value in ema.full_state_dict().items():
        assert torch.equal(state[name], value), name
    with pytest.raises(EMAConfigError, match=r"'nope'.*'ema'"):
        read_checkpoint(tmp_path / "c", "nope")


def test_clock_in_all_units_skipped_elements_and_schedules_survive(tmp_path: Path) -> None:
    """A counter that is not saved makes a resumed warm-up start again."""
    model, ema = _small(averages={"a": schedules.Warmup(0.999), "b": schedules.HalfLife("100tok")})
    with torch.no_grad():
        model[0].weight[0, :3] = float("nan")
    ema.update(tokens=5)
    ema.save(tmp_path / "c")
    _, resumed = _small(averages={"a": schedules.Warmup(0.999), "b": schedules.HalfLife("100tok")})
    resumed.load(tmp_path / "c")
    assert resumed.progress == ema.progress
    assert resumed.metrics()["ema/skipped_elements"] == 3
    assert Manifest.from_bytes((tmp_path / "c" / NAME).read_bytes()).schedules["a"] == schedules.Warmup(0.999)


def test_a_save_before_the_first_update_keeps_the_clock_and_the_live_model(tmp_path: Path) -> None:
    """A run that stops before ema_start must not start its average from nothing, or from zero."""
    model, ema = _small(ema_start="10ba")
    ema.save(tmp_path / "c")
    assert torch.equal(read_checkpoint(tmp_path / "c")["0.weight"], model[0].weight)
    _, resumed = _small(ema_start="10ba")
    resumed.load(tmp_path / "c")
    done = [resumed.update() for _ in range(8)]
    assert done.index(True) == 6


def test_a_changed_schedule_keeps_the_clock_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Silently continuing with another decay makes runs that cannot be compared."""
    _, ema = _small()
    ema.save(tmp_path / "c")
    _, resumed = _small(decay=0.99)
    resumed.load(tmp_path / "c")
    assert resumed.progress == ema.progress
    assert "0.9)" in caplog.text and "0.99)" in caplog.text


def test_all_that_does_not_fit_is_listed_and_nothing_changes(tmp_path: Path) -> None:
    """One name at a time is no help; half a load is worse."""
    _, ema = _small()
    ema.save(tmp_path / "c")
    torch.manual_seed(5)
    other = nn.Sequential(nn.Linear(40, 31), nn.BatchNorm1d(31), nn.Linear(31, 40), nn.Linear(40, 2))
    theirs = ShardedEMA(other, decay=0.9)
    theirs.update()
    before = theirs.fingerprint()
    with pytest.raises(CheckpointMismatchError) as caught:
        theirs.load(tmp_path / "c")
    text = str(caught.value)
    assert all(part in text for part in ("shape mismatch for '0.weight'", "(30, 40)", "(31, 40)", "missing '3.weight'"))
    assert theirs.fingerprint() == before
    theirs.load(tmp_path / "c", strict=False)
    assert theirs.fingerprint()["2.bias"] == ema.fingerprint()["2.bias"]
    assert theirs.num_updates == 3


def test_a_format_of_the_future_is_refused_naming_both_versions(tmp_path: Path) -> None:
    """Reading what one does not understand is worse than refusing."""
    _, ema = _small()
    ema.save(tmp_path / "c")
    text = (tmp_path / "c" / NAME).read_text()
    (tmp_path / "c" / NAME).write_text(text.replace('"version":1', '"version":7'))
    with pytest.raises(CheckpointError, match=r"version 7.*version 1"):
        ema.load(tmp_path / "c")


def test_saving_over_a_checkpoint_leaves_one_whole_checkpoint(tmp_path: Path) -> None:
    """Stale files of an earlier save are silently mixed in by readers that take what they find."""
    model, ema = _small()
    ema.save(tmp_path / "c")
    _train(model, ema)
    ema.save(tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2
    assert [found.name for found in tmp_path.iterdir()] == ["c"]
    assert digests_of(verify_checkpoint(tmp_path / "c"), "ema") == ema.fingerprint()


@pytest.mark.parametrize("seed", range(8))
def test_every_flipped_bit_is_found(seed: int, tmp_path: Path) -> None:
    """One flipped bit is noticed by none of DCP, torch.load and safetensors."""
    _, ema = _small()
    ema.save(tmp_path / "c")
    files = [found for found in (tmp_path / "c").rglob("*") if found.is_file()]
    draw = random.Random(seed)
    before = ema.fingerprint()
    for trial in range(125):
        file = draw.choice(files) if trial % 2 else draw.choice([f for f in files if f.name == NAME])
        data = bytearray(file.read_bytes())
        place = draw.randrange(len(data) if trial % 4 else min(len(data), 600))
        data[place] ^= 1 << draw.randrange(8)
        original = file.read_bytes()
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            verify_checkpoint(tmp_path / "c")
        if file.parent.name != "live":
            with pytest.raises(CheckpointError):
                ema.load(tmp_path / "c")
            assert ema.fingerprint() == before
        file.write_bytes(original)
    verify_checkpoint(tmp_path / "c")


def test_truncated_extended_missing_and_swapped_files_are_found_and_named(tmp_path: Path) -> None:
    """A reader that believes directory listings takes all of these."""
    model, ema = _small(averages={"a": 0.5, "b": 0.9})
    ema.save(tmp_path / "old")
    _train(model, ema)
    ema.save(tmp_path / "c")
    file = _data(tmp_path / "c") / "averages/a/model.safetensors"
    original = file.read_bytes()
    other = (_data(tmp_path / "c") / "averages/b/model.safetensors").read_bytes()
    stale = (_data(tmp_path / "old") / "averages/a/model.safetensors").read_bytes()
    assert len(other) == len(stale) == len(original)
    for damaged in (original[:-1], original + b"\0", b"", other, stale, None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        with pytest.raises(CheckpointCorruptError, match=r"averages/a/model\.safetensors"):
            verify_checkpoint(tmp_path / "c")
        with pytest.raises(CheckpointCorruptError, match=r"averages/a/model\.safetensors"):
            ema.load(tmp_path / "c")
    file.write_bytes(original)
    ema.load(tmp_path / "c")


def test_two_equal_shaped_tensors_that_changed_places_are_found(tmp_path: Path) -> None:
    """Sums that do not see positions and names would not."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(8, 8, bias=False)})
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    ema.save(tmp_path / "c")
    file = _data(tmp_path / "c") / "averages/ema/model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-512] + data[-256:] + data[-512:-256])
    with pytest.raises(CheckpointCorruptError, match=r"'a\.weight'.*'b\.weight'"):
        verify_checkpoint(tmp_path / "c")


def _forged(path: Path, **changes: object) -> None:
    """Writes a manifest that has been tampered with, with a checksum that fits."""
    from dist_ema.formats.manifest import _seal

    body = json.loads((path / NAME).read_bytes())
    body.pop("checksum")
    (path / NAME).write_bytes(_seal(body | changes))


@pytest.mark.parametrize(
    "attack",
    [
        "data",
        "dots",
        "link-to-other-size",
        "link-to-other-file",
        "link-to-device",
        "shape",
        "negative",
        "overlap",
        "newline",
        "header",
        "bomb",
        "fifo",
    ],
)
def test_a_malicious_checkpoint_is_refused(attack: str, tmp_path: Path) -> None:
    """A checkpoint comes from anywhere; nothing outside of it may be read, and nothing absurd be allocated."""
    _, ema = _small()
    path = tmp_path / "c"
    ema.save(path)
    body = json.loads((path / NAME).read_bytes())
    tensors = body["averages"]["ema"]["tensors"]
    first = next(iter(tensors))
    file = _data(path) / "averages/ema/model.safetensors"
    if attack == "data":
        _forged(path, data="../../../etc")
    elif attack == "dots":
        tensors[first]["file"] = "averages/../../model.safetensors"
        _forged(path, averages=body["averages"])
    elif attack == "link-to-other-size":
        file.unlink()
        file.symlink_to("/etc/passwd")
    elif attack == "link-to-other-file":
        (tmp_path / "private").write_bytes(bytes(file.stat().st_size))
        file.unlink()
        file.symlink_to(tmp_path / "private")
    elif attack == "link-to-device":
        file.unlink()
        file.symlink_to("/dev/zero")
    elif attack == "shape":
        tensors[first]["shape"] = [1 << 40, 1 << 40]
        _forged(path, averages=body["averages"])
    elif attack == "negative":
        tensors[first]["shape"] = [-5]
        _forged(path, averages=body["averages"])
    elif attack == "newline":
        tensors["a\nb"] = tensors.pop(first)
        _forged(path, averages=body["averages"])
    elif attack == "bomb":
        (path / NAME).write_bytes(b"[" * 1_000_000)
    elif attack == "fifo":
        file.unlink()
        os.mkfifo(file)
    else:
        _attack_header(attack, file, body, path)
    for reader in (verify_checkpoint, read_checkpoint, ema.load):
        with pytest.raises(CheckpointCorruptError):
            reader(path)


def _as_links(source: Path, target: Path, blobs: Path) -> None:
    """Makes ``target`` a copy of a checkpoint in which every file is a relative link into ``blobs``."""
    blobs.mkdir()
    for number, file in enumerate(sorted(found for found in source.rglob("*") if found.is_file())):
        blob = blobs / str(number)
        shutil.copy(file, blob)
        link = target / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))


@pytest.mark.parametrize("kind", ["files", "folder"])
def test_a_checkpoint_of_links_is_read(kind: str, tmp_path: Path) -> None:
    """The Hub's cache, DVC and git-annex keep a checkpoint as links to files that lie elsewhere."""
    model, ema = _small()
    ema.save(tmp_path / "c")
    before = ema.fingerprint()
    if kind == "files":
        _as_links(tmp_path / "c", tmp_path / "links", tmp_path / "blobs")
    else:
        (tmp_path / "links").mkdir()
        shutil.copy(tmp_path / "c" / NAME, tmp_path / "links" / NAME)
        data = _data(tmp_path / "c")
        (tmp_path / "links" / data.name).symlink_to(data)
    verify_checkpoint(tmp_path / "links")
    again = ShardedEMA(model)
    again.load(tmp_path / "links")
    assert again.fingerprint() == before
    # A save replaces the links, and not what they point to.
    kept = {path: path.read_bytes() for path in tmp_path.glob("blobs/*")}
    again.update()
    again.save(tmp_path / "links")
    assert kept == {path: path.read_bytes() for path in tmp_path.glob("blobs/*")}
    assert not (tmp_path / "links" / NAME).is_symlink()
    verify_checkpoint(tmp_path / "links")
    assert len(list((tmp_path / "links").iterdir())) == 2


@pytest.mark.parametrize("where", ["manifest", "tensors"])
def test_a_link_to_nothing_is_named_with_what_to_do(where: str, tmp_path: Path) -> None:
    """Without the fetched file the system says only that there is no such file, and the link is there."""
    _, ema = _small()
    ema.save(tmp_path / "c")
    _as_links(tmp_path / "c", tmp_path / "links", tmp_path / "blobs")
    name = NAME if where == "manifest" else "model.safetensors"
    link = next((tmp_path / "links").rglob(name))
    link.resolve().unlink()
    for reader in (verify_checkpoint, read_checkpoint, ema.load):
        with pytest.raises(CheckpointError, match=rf"{link.name} is a symbolic link to .*git annex get"):
            reader(tmp_path / "links")


def _attack_header(attack: str, file: Path, body: dict, path: Path) -> None:
    """A header that fits the manifest's checksum and lies."""
    from dist_ema.formats.manifest import checksum

    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if attack == "header":
        new = (1 << 62).to_bytes(8, "little") + data[8 : 8 + length]
    else:
        weights = [name for name in header if name.endswith("weight")]
        header[weights[0]]["data_offsets"] = header[weights[1]]["data_offsets"]
        text = json.dumps(header, separators=(",", ":")).encode()
        new = length.to_bytes(8, "little") + text + b" " * (length - len(text))
    file.write_bytes(new + data[8 + length :])
    body["files"]["averages/ema/model.safetensors"] = {"size": file.stat().st_size, "header": checksum(new)}
    _forged(path, files=body["files"])


# In the background.


@pytest.mark.world_size(2)
def test_a_background_save_holds_the_average_of_its_moment(rank: int, tmp_path: Path) -> None:
    """Updates go on meanwhile, and must not show in what is saved."""
    ema = make_ema("fsdp2")
    for step in range(4):
        average_ema(ema, range(step, step + 1))
        expected = ema.fingerprint("slow")
        ema.save(tmp_path / "c", block=False)
        perturb_ema(ema, 9)
        ema.update()
        ema.wait()
        if rank == 0:
            assert digests_of(verify_checkpoint(tmp_path / "c"), "slow") == expected
    ema.close()


def _full_disk(writer: RunWriter) -> None:
    """What is live is written before save() returns; the averages after."""
    if "averages" in str(writer._directory):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.world_size(2)
def test_a_failed_background_save_is_raised_on_every_rank(rank: int, tmp_path: Path) -> None:
    """A failed save that nobody awaits would be found out when it is needed."""
    monkeypatch = pytest.MonkeyPatch()
    ema = make_ema("fsdp2")
    average_ema(ema, range(1))
    ema.save(tmp_path / "c")
    kept = (tmp_path / "c" / NAME).read_bytes()
    if rank == 1:
        monkeypatch.setattr("dist_ema.storage.local.RunWriter.sync", _full_disk)
    ema.save(tmp_path / "c", block=False)
    with pytest.raises(CheckpointError, match=r"rank 1.*No space left"):
        ema.wait()
    monkeypatch.undo()
    assert (tmp_path / "c" / NAME).read_bytes() == kept
    if rank == 0:
        verify_checkpoint(tmp_path / "c")
        assert [found.name for found in tmp_path.iterdir()] == ["c"]


def _wait_for(condition: Callable[[], bool]) -> None:
    """For what another rank does. AssertionError if it hangs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.world_size(2)
def test_a_rank_that_hangs_is_an_error_on_the_others_in_time(rank: int, tmp_path: Path) -> None:
    """A save must not wait for ever for a rank that does not come."""
    ema = make_ema("fsdp2")
    average_ema(ema, range(1))
    dist.barrier()
    ema.save(tmp_path / "c", timeout=6)
    if rank == 1:
        _wait_for((tmp_path / "given up").exists)
        return
    with pytest.raises(CheckpointError, match="did not answer within 6 s"):
        ema.save(tmp_path / "c", timeout=6)
    verify_checkpoint(tmp_path / "c")
    (tmp_path / "given up").touch()


@pytest.mark.world_size(2)
def test_ranks_that_share_no_disk_save_and_load_through_rank_0(rank: int, tmp_path: Path) -> None:
    """Each node may have a disk of its own."""
    own = tmp_path / f"node{rank}"
    own.mkdir()
    here = Path.cwd()
    ema = make_ema("fsdp2")
    average_ema(ema, range(2))
    os.chdir(own)
    try:
        ema.save("c")
        assert Path("c").exists() == (rank == 0)
        other = make_ema("fsdp2")
        other.load("c")
    finally:
        os.chdir(here)
    assert other.fingerprint("slow") == ema.fingerprint("slow")
    if rank == 0:
        verify_checkpoint(own / "c")


@pytest.mark.world_size(2)
def test_a_failed_save_that_one_rank_has_seen_already_keeps_no_other_waiting(rank: int, tmp_path: Path) -> None:
    """Threads end at different moments, so update() may raise the failure on one rank before the others have it."""
    for attempt, call in enumerate(("save", "load", "load_state_dict")):
        ema = make_ema("fsdp2")
        average_ema(ema, range(1))
        ema.save(tmp_path / "c")
        state = ema.state_dict()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dist_ema.storage.local.RunWriter.sync", _full_disk)
            ema.save(tmp_path / "c", block=False)
            if rank == 0:
                with pytest.raises(CheckpointError, match="No space left"):
                    ema.wait()
            else:
                ema._average.background.drain()
        argument = state if call == "load_state_dict" else tmp_path / "c"
        with pytest.raises(
            CheckpointError, match=r"rank 1: CheckpointError: the previous save failed: .*No space left"
        ):
            getattr(ema, call)(argument)
        getattr(ema, call)(argument)  # told once
        assert verify_checkpoint(tmp_path / "c").seen.updates == 1, attempt


def test_the_next_update_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An fsync takes seconds on a busy disk; the shadow has been read long before."""
    ema = ShardedEMA(nn.Linear(3, 2), averages=AVERAGES)
    ema.update()
    synced, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.wait(120), real(descriptor))[1])
    ema.save(tmp_path / "c", block=False)
    ema.update()
    assert not (tmp_path / "c").exists()
    synced.set()
    ema.wait()
    assert verify_checkpoint(tmp_path / "c").seen.updates == 1


def _replace_while_reading(ema: ShardedEMA, path: Path, patch: pytest.MonkeyPatch, times: int) -> None:
    """The next readers find the manifest of a checkpoint whose data are gone when they open them."""
    from dist_ema.checkpoints.reader import RunReader

    left = [times]
    original = RunReader.__init__

    def init(self: RunReader, *args: object) -> None:
        if left[0]:
            left[0] -= 1
            ema.update()
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(RunReader, "__init__", original)
                ema.save(path)
        original(self, *args)  # type: ignore[arg-type]

    patch.setattr(RunReader, "__init__", init)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluation jobs read while training saves; a healthy checkpoint must not be called damaged."""
    path = tmp_path / "c"
    ema = ShardedEMA(nn.Linear(3, 2), decay=0.5)
    ema.update()
    ema.save(path)
    other = ShardedEMA(nn.Linear(3, 2), decay=0.5)
    readers = {
        "load": lambda: other.load(path),
        "read": lambda: read_checkpoint(path),
        "verify": lambda: verify_checkpoint(path),
        "export": lambda: export_checkpoint(path, tmp_path / "out"),
        "diff": lambda: compare(path, path),
    }
    for read in readers.values():
        with monkeypatch.context() as patch:
            _replace_while_reading(ema, path, patch, 1)
            read()
    assert other.num_updates == 2
    with monkeypatch.context() as patch:  # there is an end to it
        _replace_while_reading(ema, path, patch, 9)
        with pytest.raises(CheckpointError, match="a save replaced the checkpoint each of the 3 times"):
            read_checkpoint(path)


def test_a_checkpoint_of_more_files_than_a_process_may_open_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, references: dict[int, list[dict[str, int]]]
) -> None:
    """A large model has hundreds of files of each average; threads must not close what others read from."""
    monkeypatch.setattr("dist_ema.checkpoints.contents.FILE_LIMIT", 300)  # a tensor a file
    monkeypatch.setattr("dist_ema.checkpoints.parts.IO_CHUNK", 5)
    monkeypatch.setattr("dist_ema.checkpoints.reader._OPEN_FILES", 2)
    most = 0
    held: set[int] = set()
    lock = threading.Lock()
    real_open, real_close = os.open, os.close

    def open_(path: object, *arguments: object, **options: object) -> int:
        nonlocal most
        descriptor = real_open(path, *arguments, **options)  # type: ignore[arg-type]
        if str(path).endswith(".safetensors"):
            with lock:
                held.add(descriptor)
                most = max(most, len(held))
        return descriptor

    def close(descriptor: int) -> None:
        with lock:
            held.discard(descriptor)
        real_close(descriptor)

    ema = make_ema("plain")
    average_ema(ema, range(3))
    ema.save(tmp_path / "c")
    manifest = verify_checkpoint(tmp_path / "c")
    assert len(manifest.files) > 20
    other = make_ema("plain")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_)
        patch.setattr(os, "close", close)
        patch.setattr(torch, "get_num_threads", lambda: 4)
        other.load(tmp_path / "c")
    assert 2 <= most <= 2 + 4
    assert [other.fingerprint(name) for name in AVERAGES] == references[3]
    with RunReader.of(tmp_path / "c", manifest) as reader:
        shutil.rmtree(tmp_path / "c" / manifest.data)  # by a save that replaces it: to be read anew
        key = next(iter(manifest.tensors()))
        with pytest.raises(CheckpointCorruptError, match="listed but cannot be read"):
            reader.read(key, ((0, 1),), torch.empty(1))
