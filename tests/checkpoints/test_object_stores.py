"""Checkpoints at URLs: read by ranges and committed by their manifest, as object stores allow."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from support.any_engine import AVERAGES, average_ema, digests_of, make_ema, reference_digests, small_ema

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dist_ema import read_checkpoint, verify_checkpoint
from dist_ema.checkpoints import versions
from dist_ema.cli import main
from dist_ema.errors import CheckpointCorruptError, CheckpointError, EMAConfigError
from dist_ema.formats.manifest import BEGIN, NAME
from dist_ema.storage import paths, remote, remote_commit, storage_reader
from dist_ema.storage.remote_commit import RemoteWriter


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL under which nothing is yet."""
    root = f"memory://{uuid.uuid4().hex}/checkpoint"
    yield root
    MemoryFileSystem.store.clear()


def _files(url: str) -> list[str]:
    system, root = fsspec.core.url_to_fs(url)
    return sorted(str(name)[len(root) + 1 :] for name in system.find(root))


@pytest.mark.world_size(2)
def test_ranks_save_to_and_load_from_a_store_that_rank_0_alone_sees(rank: int) -> None:
    """Every rank would write its own elements into objects that cannot be written to twice."""
    url = "memory://shared/by/nobody"  # each process has a memory of its own
    ema = make_ema("fsdp2")
    average_ema(ema, range(3))
    ema.save(url)
    ema.save(url, block=False)
    ema.wait()
    other = make_ema("zero3")
    other.load(url)
    reference = reference_digests(3)
    assert [other.fingerprint(name) for name in AVERAGES] == reference
    assert bool(_files(url)) == (rank == 0)
    if rank == 0:
        manifest = verify_checkpoint(url)
        assert [digests_of(manifest, name) for name in AVERAGES] == reference
        MemoryFileSystem().rm("/shared", recursive=True)
    ema.close()


@pytest.mark.world_size(2)
def test_a_rank_that_cannot_open_urls_is_sent_to(rank: int) -> None:
    """The package of a file system may be missing on one node: its error left the others waiting."""
    url = "memory://opened/by/one"
    ema = make_ema("fsdp2")
    average_ema(ema, range(3))
    ema.save(url)
    other = make_ema("fsdp2")
    missing = mock.Mock(side_effect=EMAConfigError("Install s3fs to access S3"))
    with mock.patch.object(paths, "file_system", missing) if rank == 1 else nullcontext():
        other.load(url)
    assert [other.fingerprint(name) for name in AVERAGES] == reference_digests(3)
    ema.close()


def test_file_urls_are_directories(tmp_path: Path) -> None:
    """A URL of the local disk goes the fast way, with its fsyncs and renames."""
    ema = small_ema()
    ema.save(f"file://{tmp_path}/c")
    assert (tmp_path / "c" / NAME).is_file()
    other = small_ema(2)
    other.load(f"file://{tmp_path}/c")
    assert other.fingerprint() == ema.fingerprint()


def test_a_save_replaces_the_checkpoint_and_leaves_nothing_of_the_old(memory: str) -> None:
    """A store that keeps every checkpoint that there ever was."""
    for updates in (1, 2):
        ema = small_ema(updates)
        ema.save(memory)
        assert verify_checkpoint(memory).seen.updates == updates
        assert len({name.partition("/")[0] for name in _files(memory)}) == 2  # the manifest and its data
    assert torch.equal(read_checkpoint(memory)["0.weight"], ema.full_state_dict()["0.weight"])


def test_an_interrupted_upload_leaves_the_old_checkpoint(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost connection in the middle of a file must not cost the checkpoint that was there."""
    old = small_ema(1)
    old.save(memory)
    before = _files(memory)

    def fail(system: MemoryFileSystem, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "wb" and "live" not in path:
            raise ConnectionResetError("connection reset by peer")
        return original(system, path, mode, **options)

    original = MemoryFileSystem._open
    monkeypatch.setattr(MemoryFileSystem, "_open", fail)
    with pytest.raises(CheckpointError, match="connection reset by peer"):
        small_ema(2).save(memory)
    monkeypatch.undo()
    assert _files(memory) == before
    assert verify_checkpoint(memory).seen.updates == 1


def test_an_upload_that_arrives_shorter_is_no_checkpoint(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a store says to have taken is looked at before the manifest names it."""
    monkeypatch.setattr(MemoryFileSystem, "size", lambda self, path: 3)
    with pytest.raises(CheckpointError, match="has 3 bytes after writing"):
        small_ema().save(memory)
    monkeypatch.undo()
    assert _files(memory) == []


def test_what_a_killed_save_left_is_removed_by_the_next(memory: str) -> None:
    """Nobody else would ever remove it, and it is paid for by the month."""
    system, root = fsspec.core.url_to_fs(memory)
    system.pipe_file(f"{root}/data-{'0' * 32}/averages/ema/model.safetensors", b"half of it")
    system.pipe_file(f"{root}/notes.txt", b"of somebody else")
    small_ema().save(memory)
    names = _files(memory)
    assert "notes.txt" in names
    assert not any(name.startswith("data-0000") for name in names)


def test_a_manifest_that_is_too_large_is_not_read(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's URL could give more bytes than there is memory; a save to it reads the old manifest too."""
    system, root = fsspec.core.url_to_fs(memory)
    system.pipe_file(f"{root}/{NAME}", BEGIN + bytes(5000))
    system.pipe_file(f"{root}/data-{'0' * 32}/live/model.safetensors", b"old")
    original, asked = MemoryFileSystem.cat_file, []

    def count(self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
        asked.append(end)
        found: bytes = original(self, path, start, end)
        return found

    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)
    for module in (versions, remote_commit):
        monkeypatch.setattr(module, "MAX_BYTES", 3000)
    with pytest.raises(CheckpointCorruptError, match=r"has 5021 bytes; the limit is 3000"):
        verify_checkpoint(memory)
    assert asked == []
    small_ema().save(memory)  # it replaces a damaged checkpoint, as everywhere
    assert all(end is not None and end <= 3000 for end in asked)
    monkeypatch.undo()
    verify_checkpoint(memory)
    assert not any(name.startswith("data-0000") for name in _files(memory))


def test_damage_in_a_store_is_found(memory: str) -> None:
    """A flipped bit, an object that is gone, one of another size."""
    ema = small_ema()
    ema.save(memory)
    system, root = fsspec.core.url_to_fs(memory)
    victim = next(f"{root}/{name}" for name in _files(memory) if name.endswith("ema/model.safetensors"))
    whole = system.cat_file(victim)
    flipped = bytearray(whole)
    flipped[-1] ^= 4
    for content in (bytes(flipped), whole[:-8], whole + b"00000000"):
        system.pipe_file(victim, content)
        with pytest.raises(CheckpointCorruptError):
            ema.load(memory)
        with pytest.raises(CheckpointCorruptError):
            verify_checkpoint(memory)
    system.rm(victim)
    with pytest.raises(CheckpointCorruptError, match="listed but cannot be read"):
        ema.load(memory)
    system.pipe_file(victim, whole)
    ema.load(memory)


def test_ranges_that_lie_close_are_asked_for_at_once(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor-parallel shard has a run in every row: a request for each would take hours."""
    system, root = fsspec.core.url_to_fs(memory)
    data = bytes(range(256)) * 64
    system.pipe_file(f"{root}/file", data)
    requests = []
    original = MemoryFileSystem.cat_file

    def count(self: MemoryFileSystem, path: str, **span: Any) -> bytes:
        requests.append(span)
        content: bytes = original(self, path, **span)
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", count)
    monkeypatch.setattr(remote, "_GAP", 100)
    outs = [bytearray(3) for _ in range(60)] + [bytearray(0), bytearray(5)]
    starts = [100 * row for row in range(60)] + [7000, 9000]
    file = storage_reader(memory).file("file")
    assert file.read([(start, memoryview(out)) for start, out in zip(starts, outs, strict=True)])
    assert [bytes(out) for out in outs] == [
        data[start : start + len(out)] for start, out in zip(starts, outs, strict=True)
    ]
    assert len(requests) == 2
    assert not file.read([(len(data) - 1, memoryview(bytearray(2)))])


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("nosuch://bucket/c", EMAConfigError, "nosuch"),
        ("memory://", CheckpointError, "a path of its own"),
        ("http://127.0.0.1:9/c", CheckpointError, "http"),
        (7, EMAConfigError, "path=7"),
    ],
)
def test_a_url_that_cannot_be_written_to_is_a_clear_error(url: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        small_ema().save(url)
    with pytest.raises((CheckpointError, EMAConfigError)):
        small_ema().load(url)


def test_an_export_refuses_a_url(memory: str) -> None:
    """It would make a directory whose name begins with ``memory:``."""
    with pytest.raises(EMAConfigError, match="save\\(\\) takes URLs"):
        small_ema().export(memory)


def test_the_command_line_takes_urls(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_ema().save(memory)
    assert main(["verify", memory]) == 0
    assert main(["inspect", memory, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["path"] == memory
    assert main(["diff", memory, memory]) == 0
    assert main(["export", memory, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server in a thread, with one bucket."""
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "nobody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        try:
            system = fsspec.filesystem("s3", skip_instance_cache=True)
            system.mkdir("models")
            yield "s3://models"
        finally:
            server.stop()


def test_s3_takes_a_checkpoint_and_gives_it_back(bucket: str) -> None:
    """Real requests: multipart uploads of more than one part, ranges, listings that must not be out of date."""
    url = f"{bucket}/run/ema"
    ema = small_ema(1, size=2_000_000)  # 24 MB: two parts
    ema.save(url)
    again = small_ema(2, size=2_000_000)
    again.save(url, block=False)
    again.wait()
    assert verify_checkpoint(url).seen.updates == 2
    assert len({name.partition("/")[0] for name in _files(url)}) == 2
    other = small_ema(3, size=2_000_000)
    other.load(url)
    assert other.fingerprint() == again.fingerprint()
    with pytest.raises(CheckpointError, match="no-such-bucket"):
        ema.save("s3://no-such-bucket/ema")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        ema.load(f"{bucket}/nothing")


# Two writers; more of them in test_two_writers.

#: Updates of the checkpoint that is there, of the writer that comes late, and of the one that is in time.
OLD, LATE, NEW = 1, 2, 3


def _overtake(monkeypatch: pytest.MonkeyPatch, method: str, url: str) -> None:
    """Lets another save come between what an upload does before the method and what it does there."""
    original: Callable[..., Any] = getattr(RemoteWriter, method)

    def overtaken(self: RemoteWriter, *arguments: Any) -> Any:
        monkeypatch.setattr(RemoteWriter, method, original)
        small_ema(NEW).save(url)
        return original(self, *arguments)

    monkeypatch.setattr(RemoteWriter, method, overtaken)


@pytest.mark.parametrize("old", [False, True])
def test_an_upload_that_was_overtaken_is_an_error(old: bool, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote its manifest over the other, which had removed its data."""
    if old:
        small_ema(OLD).save(memory)
    _overtake(monkeypatch, "commit", memory)
    with pytest.raises(CheckpointError, match="another save"):
        small_ema(LATE).save(memory)
    assert verify_checkpoint(memory).seen.updates == NEW
    assert len({name.partition("/")[0] for name in _files(memory)}) == 2


def test_an_upload_that_sleeps_before_the_first_manifest_does_no_harm(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every store can write an object only if there is none."""
    _overtake(monkeypatch, "_put", memory)
    with pytest.raises(CheckpointError, match="another save"):
        small_ema(LATE).save(memory)
    assert verify_checkpoint(memory).seen.updates == NEW


def test_an_upload_that_sleeps_before_it_replaces_a_manifest_says_so(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store takes no conditions the harm is done, but not in silence."""
    small_ema(OLD).save(memory)
    _overtake(monkeypatch, "_put", memory)
    with pytest.raises(CheckpointError, match=r"another save.*was running"):
        small_ema(LATE).save(memory)


@pytest.mark.parametrize("old", [False, True])
def test_s3_replaces_a_manifest_only_if_it_is_still_the_same(
    old: bool,
    bucket: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{bucket}/two/{old}"
    if old:
        small_ema(OLD).save(url)
    _overtake(monkeypatch, "_put", url)
    with pytest.raises(CheckpointError, match="was replaced by another save"):
        small_ema(LATE).save(url)
    assert verify_checkpoint(url).seen.updates == NEW
    assert len({name.partition("/")[0] for name in _files(url)}) == 2
    small_ema(LATE).save(url)
    assert verify_checkpoint(url).seen.updates == LATE


def test_an_answer_that_is_lost_does_not_cost_the_checkpoint(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest is there; whoever then removes the data as those of a failed save leaves nothing readable."""
    original = MemoryFileSystem.pipe_file

    def lose(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        original(self, path, value, mode, **options)
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", lose)
    small_ema(NEW).save(memory)
    monkeypatch.undo()
    assert verify_checkpoint(memory).seen.updates == NEW


def test_a_connection_that_is_lost_with_the_answer_does_not_cost_the_checkpoint(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell whether the manifest is there: that is an error, and the data stay."""
    original = MemoryFileSystem.pipe_file

    def lose(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("connection reset by peer")

    def put(self: MemoryFileSystem, path: str, value: bytes, mode: str = "overwrite") -> None:
        original(self, path, value, mode)
        monkeypatch.setattr(MemoryFileSystem, "info", lose)
        lose()

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", put)
    with pytest.raises(CheckpointError, match="connection reset by peer"):
        small_ema(NEW).save(memory)
    monkeypatch.undo()
    assert verify_checkpoint(memory).seen.updates == NEW


def test_a_store_that_does_not_know_conditions_is_written_to(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's file systems are of many hands and ages."""
    original = MemoryFileSystem.pipe_file

    def old_one(self: MemoryFileSystem, path: str, value: bytes) -> None:
        original(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", old_one)
    for updates in (OLD, NEW):
        small_ema(updates).save(memory)
        assert verify_checkpoint(memory).seen.updates == updates
