"""Paths that a checkpoint or an export is written to: made where they are missing, refused if they are others'."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from support import DATA
from support.any_engine import average_ema, make_ema
from support.mounts import UNSHARE, can_mount

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from dist_ema import ShardedEMA, read_checkpoint, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats.manifest import NAME
from dist_ema.offline.export import export_checkpoint
from dist_ema.storage.staging import Staging

WRITERS = ["save", "export"]
FOREIGN = DATA / "imports" / "timm.pth.tar"


def _ema(updates: int = 1, model: nn.Module | None = None) -> ShardedEMA:
    torch.manual_seed(updates)
    ema = ShardedEMA(model or nn.Linear(5, 3), decay=0.5)
    for _ in range(updates):
        ema.update()
    return ema


def _names(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


# Parents.


@pytest.mark.parametrize("call", WRITERS)
def test_missing_parents_are_made(call: str, tmp_path: Path) -> None:
    """After days of training the last line failed: the folder did not exist."""
    path = tmp_path / "a" / "b" / "c"
    getattr(_ema(), call)(path)
    assert _names(path.parent) == ["c"]
    assert verify_checkpoint(path) if call == "save" else (path / "model.safetensors").is_file()


def test_the_command_line_makes_parents(tmp_path: Path) -> None:
    assert main(["import", str(FOREIGN), str(tmp_path / "a" / "b" / "c"), "--decay", ".5"]) == 0
    assert main(["export", str(tmp_path / "a" / "b" / "c"), str(tmp_path / "d" / "e" / "f")]) == 0
    assert (tmp_path / "d" / "e" / "f" / "model.safetensors").is_file()


@pytest.mark.parametrize("call", WRITERS)
def test_parents_that_were_made_for_nothing_are_removed(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no others: somebody's empty folder stays."""
    (tmp_path / "mine").mkdir()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Staging, "sync", fail)
    for path in (tmp_path / "a" / "b" / "c", tmp_path / "mine" / "c"):
        with pytest.raises(CheckpointError, match="Input/output error"):
            getattr(_ema(), call)(path)
    assert _names(tmp_path) == ["mine"]
    assert not _names(tmp_path / "mine")


# Paths that are none.


@pytest.mark.parametrize("path", ["", " ", "file://", "a\0b"])
def test_an_empty_path_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unset variable of a job script wrote among the files of the current directory."""
    monkeypatch.chdir(tmp_path)
    ema = _ema()
    calls: list[Callable[[str], Any]] = [ema.save, ema.export, ema.load, read_checkpoint, verify_checkpoint]
    for call in calls:
        with pytest.raises(EMAConfigError, match="path="):
            call(path)
    with pytest.raises(EMAConfigError, match="path="):
        export_checkpoint(path, "out")
    with pytest.raises(EMAConfigError, match="config_from=''"):
        ema.export("out", config_from="")
    assert not _names(tmp_path)


def test_an_empty_path_on_the_command_line_is_bad_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _ema().save("c")
    for arguments in (["import", str(FOREIGN), ""], ["import", "", "out"], ["export", "c", ""], ["export", "", "out"]):
        assert main(arguments) == 2
        assert "path=''" in capsys.readouterr().err
    assert _names(tmp_path) == ["c"]


def test_the_training_script_refuses_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from demo.options import Options

    with pytest.raises(ValueError, match="out=''"):
        Options(out="").check(1)


def test_the_current_directory_is_saved_to_if_it_is_empty_or_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renaming something else over it would leave this process, and the user's shell, in a directory that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for updates in (1, 2):
        _ema(updates).save(".")
        assert verify_checkpoint(".").seen.updates == updates
        assert verify_checkpoint(tmp_path / "here").seen.updates == updates
    (tmp_path / "here" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "here" / "sub")
    _ema(3).save("..")
    assert verify_checkpoint(tmp_path / "here").seen.updates == 3
    assert _names(tmp_path) == ["here"]


@pytest.mark.parametrize("call", WRITERS)
def test_the_root_is_refused(call: str) -> None:
    with pytest.raises(CheckpointError):
        getattr(_ema(), call)("/")


# Directories of somebody else.


def _foreign(path: Path, what: str) -> None:
    path.mkdir()
    if what == "files":
        (path / "notes.txt").write_text("mine")
        (path / ".hidden").write_text("mine")
    elif what == "a folder":
        (path / "sub").mkdir()
    else:
        (path / NAME).write_text('{"decay": 0.999}')


@pytest.mark.parametrize("what", ["files", "a folder", "an ema.json of another kind"])
def test_a_directory_that_is_no_checkpoint_is_refused_and_stays_as_it_was(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``save(".")`` in a home directory put the checkpoint's files among the user's."""
    path = tmp_path / "home"
    _foreign(path, what)
    before = {name: (path / name).read_bytes() if (path / name).is_file() else b"" for name in _names(path)}
    with pytest.raises(CheckpointError, match=r"home holds .* and is no checkpoint"):
        _ema().save(path)
    assert main(["import", str(FOREIGN), str(path), "--decay", ".5", "--overwrite"]) == 2
    assert "is no checkpoint" in capsys.readouterr().err
    assert before == {name: (path / name).read_bytes() if (path / name).is_file() else b"" for name in _names(path)}
    assert _names(tmp_path) == ["home"]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone", "newer"])
def test_a_damaged_checkpoint_can_be_saved_over(damage: str, tmp_path: Path) -> None:
    """It is what one would do about it."""
    path = tmp_path / "c"
    _ema().save(path)
    text = (path / NAME).read_bytes()
    if damage == "gone":
        (path / NAME).unlink()
    else:
        damaged = {"cut": text[:40], "empty": b"", "flipped": b"X" + text[1:]}
        damaged["newer"] = text.replace(b'"version":1', b'"version":2')
        (path / NAME).write_bytes(damaged[damage])
    (path / "notes.txt").write_text("mine")
    _ema(2).save(path)
    assert verify_checkpoint(path).seen.updates == 2
    assert len(_names(path)) == 3 and (path / "notes.txt").read_text() == "mine"


def test_an_import_replaces_a_checkpoint_only_if_it_is_told_to(tmp_path: Path) -> None:
    """It replaced the average of another model without a word."""
    path = tmp_path / "c"
    _ema(2).save(path)
    arguments = ["import", str(FOREIGN), str(path), "--decay", ".5"]
    assert main(arguments) == 2
    assert verify_checkpoint(path).seen.updates == 2
    assert main([*arguments, "--overwrite"]) == 0
    assert read_checkpoint(path).keys() != _ema().full_state_dict().keys()
    (tmp_path / "empty").mkdir()
    assert main(["import", str(FOREIGN), str(tmp_path / "empty"), "--decay", ".5"]) == 0


def test_what_is_no_checkpoint_is_refused_at_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://somebody/else"
    system, root = fsspec.core.url_to_fs(url)
    try:
        system.pipe_file(f"{root}/notes.txt", b"mine")
        with pytest.raises(CheckpointError, match=r"holds 'notes\.txt' and is no checkpoint"):
            _ema().save(url)
        assert system.find(root) == [f"{root}/notes.txt"]
        _ema(2).save(f"{url}/c")
        assert main(["import", str(FOREIGN), f"{url}/c", "--decay", ".5"]) == 2
        assert "--overwrite" in capsys.readouterr().err
        assert verify_checkpoint(f"{url}/c").seen.updates == 2
        assert main(["import", str(FOREIGN), f"{url}/c", "--decay", ".5", "--overwrite"]) == 0
    finally:
        MemoryFileSystem.store.clear()


# Names of tensors.


@pytest.mark.parametrize("name", ["a\tb", "a\u00a0b", "a\u200bb", "\x1b[2J", "ü/\\\"'", " "])
def test_a_parameter_of_any_name_comes_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``save`` took them, replaced a good checkpoint, and ``load`` refused what it had written."""

    def model() -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_parameter(name, nn.Parameter(torch.rand(3)))
        return module

    ema = _ema(1, model())
    ema.save(tmp_path / "c")
    verify_checkpoint(tmp_path / "c")
    other = _ema(1, model())
    other.load(tmp_path / "c")
    assert other.fingerprint() == ema.fingerprint()
    assert name in read_checkpoint(tmp_path / "c")
    for arguments in (["inspect", "C"], ["diff", "C", "C"], ["verify", "C"], ["export", "C", str(tmp_path / "out")]):
        assert main([argument.replace("C", str(tmp_path / "c")) for argument in arguments]) == 0
        assert "\x1b[2J" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["__metadata__", "a\nb", "a\udc80b"])
def test_a_name_that_no_file_can_hold_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    _ema(1, module).save(tmp_path / "c")
    module.register_parameter(name, nn.Parameter(torch.rand(3)))
    ema = _ema(2, module)
    for call, target in ((ema.save, "c"), (ema.save, "a/d"), (ema.export, "a/e")):
        with pytest.raises(CheckpointError, match="cannot store a tensor of the name"):
            call(tmp_path / target)
    assert _names(tmp_path) == ["c"]
    assert verify_checkpoint(tmp_path / "c").seen.updates == 1


def test_what_cannot_be_read_again_does_not_replace_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: the manifest is read before it is put in place."""
    from dist_ema.formats import stored

    _ema(1).save(tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr(stored, "is_tensor_name", lambda _: False)
        with pytest.raises(CheckpointError, match="could be written but not read again"):
            _ema(2).save(tmp_path / "c")
        assert _names(tmp_path) == ["c"]
    assert verify_checkpoint(tmp_path / "c").seen.updates == 1


# Names of directories.


@pytest.mark.parametrize("call", WRITERS)
@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "日" * 85, "x" + "🐟" * 63, os.fsdecode(b"\xff" * 40), "a\nb"])
def test_a_name_may_be_as_long_as_the_file_system_allows(call: str, name: str, tmp_path: Path) -> None:
    """The temporary name was longer than that, or cut in the middle of a character."""
    for _ in range(2 if call == "save" else 1):
        getattr(_ema(), call)(tmp_path / name)
    assert _names(tmp_path) == [name]


@pytest.mark.parametrize("call", WRITERS)
def test_a_name_that_is_too_long_is_an_error_before_anything_is_written(call: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="File name too long"):
        getattr(_ema(), call)(tmp_path / "a" / ("日" * 86))
    assert not _names(tmp_path)


def test_long_names_with_the_same_beginning_do_not_share_a_staging_directory(tmp_path: Path) -> None:
    """A save takes away what other saves to the same place have ready, and only to the same."""
    names = [Staging(tmp_path / ("x" * 200 + end), "0" * 32).path.name for end in "ab"]
    assert len({*names}) == 2
    assert max(map(len, names)) < 143  # what encrypting file systems allow


# Closing, mounting.


@contextmanager
def _failing_close(file: str) -> Iterator[None]:
    """A quota or a server that says only at the end that there was no room."""
    close = os.close

    def fail(descriptor: int) -> None:
        path = os.fspath(Path(f"/proc/self/fd/{descriptor}").readlink())
        close(descriptor)
        if path.endswith(file):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with mock.patch.object(os, "close", fail):
        yield


@pytest.mark.world_size(2)
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("call", WRITERS)
def test_a_file_that_cannot_be_closed_is_an_error_on_every_rank(
    call: str, failing: int, rank: int, tmp_path: Path
) -> None:
    """An export raised it on that rank alone, and the others waited for it until their timeout."""
    ema = make_ema("fsdp2")
    average_ema(ema, range(1))
    options = {} if call == "save" else {"name": ema.names[0]}
    trouble = _failing_close(".safetensors") if rank == failing else nullcontext()
    with trouble, pytest.raises(CheckpointError, match=f"rank {failing}.*Disk quota exceeded"):
        getattr(ema, call)(tmp_path / "a" / "c", **options)
    torch.distributed.barrier()
    assert not _names(tmp_path)
    getattr(ema, call)(tmp_path / "a" / "c", **options)


MOUNTED = """
import subprocess, sys
from pathlib import Path
from torch import nn
from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.storage.local import RunWriter
from dist_ema.errors import CheckpointError

disk = Path(sys.argv[1])
ema = ShardedEMA(nn.Linear(3, 3), decay=.5)
ema.update()
ema.save(disk / "bound")
for name in ("other", "source"):
    (disk / name).mkdir()
subprocess.run(["mount", "-t", "tmpfs", "none", disk / "other"], check=True)
subprocess.run(["mount", "--bind", disk / "bound", disk / "bound"], check=True)
ema.update()
def write(*_):
    raise SystemExit("written before it was known")
real, RunWriter.write = RunWriter.write, write
for name in ("other", "bound"):
    before = sorted((disk / name).iterdir())
    try:
        ema.save(disk / name)
        raise SystemExit("saved")
    except CheckpointError as error:
        assert f"{name} is a mount point" in str(error) and "give a directory below it" in str(error), error
    assert sorted((disk / name).iterdir()) == before
    assert sorted(found.name for found in disk.iterdir()) == ["bound", "other", "source"]
assert verify_checkpoint(disk / "bound").seen.updates == 1
RunWriter.write = real
ema.save(disk / "other" / "c")
"""


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """What is written beside it is on another disk, and cannot be renamed into it."""
    if not can_mount(tmp_path):
        pytest.skip("this user may not mount a file system here")
    command = [*UNSHARE, sys.executable, "-c", MOUNTED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr


# What killed processes leave; more of it in test_two_writers.


def test_a_young_directory_without_a_lock_is_no_leftover_yet(tmp_path: Path) -> None:
    """A process is between making it and locking it; after a minute it is dead."""
    other = Staging(tmp_path / "other", "0" * 32)
    other.path.mkdir()
    _ema().export(tmp_path / "out")
    assert other.path.exists()
    os.utime(other.path, (time.time() - 100,) * 2)
    shutil.rmtree(tmp_path / "out")
    _ema().export(tmp_path / "out")
    assert _names(tmp_path) == ["out"]
