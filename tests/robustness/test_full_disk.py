"""Saves on disks that are full or read-only: real ones, mounted for a process of their own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from support.mounts import UNSHARE, can_mount

import pytest
from torch import nn

from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.errors import CheckpointError
from dist_ema.storage import local_commit
from dist_ema.storage.local_commit import LocalWriter
from dist_ema.storage.staging import remove_leftovers

#: Fills the disk so far that the save fails at another place each time.
FULL = """
import os, random, subprocess, sys, torch
from pathlib import Path
from torch import nn
from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.errors import CheckpointError

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk], check=True)
torch.manual_seed(0)
model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(20)))  # 0.8 MB, and less than a file system's page each
ema = ShardedEMA(model, averages={"fast": .5, "slow": .9})
ema.update()
ema.save(disk / "c")
taken = sum(file.stat().st_size for file in disk.rglob("*") if file.is_file())
generator = random.Random(0)
failed = 0
for attempt in range(25):
    before = ema.num_updates
    block = attempt % 2 == 0
    free = os.statvfs(disk).f_bavail * 4096
    (disk / "filler").write_bytes(bytes(max(free - generator.randrange(int(1.1 * taken)), 0)))
    old = verify_checkpoint(disk / "c").seen.updates
    ema.update()
    try:
        ema.save(disk / "c", block=block)
        ema.wait()
        expected = ema.num_updates
    except CheckpointError as error:
        assert "No space left on device" in str(error), error
        failed += 1
        expected = old
    assert verify_checkpoint(disk / "c").seen.updates == expected
    assert sorted(found.name for found in disk.iterdir()) == ["c", "filler"], list(disk.iterdir())
    assert len(list((disk / "c").iterdir())) == 2
    (disk / "filler").unlink()
ema.save(disk / "c")
assert verify_checkpoint(disk / "c").seen.updates == ema.num_updates
assert 10 <= failed < 25, failed
print("failed", failed)
"""

READ_ONLY = """
import subprocess, sys
from pathlib import Path
from torch import nn
from dist_ema import ShardedEMA, verify_checkpoint
from dist_ema.errors import CheckpointError

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", disk], check=True)
ema = ShardedEMA(nn.Linear(3, 3), decay=.5)
ema.update()
ema.save(disk / "c")
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
for path in (disk / "c", disk / "new"):
    for block in (True, False):
        ema.update()
        try:
            ema.save(path, block=block)
            ema.wait()
            raise SystemExit("saved")
        except CheckpointError as error:
            assert "Read-only file system" in str(error), error
ema.load(disk / "c")
assert ema.num_updates == 1
assert [found.name for found in disk.iterdir()] == ["c"]
verify_checkpoint(disk / "c")
"""


def test_a_save_under_way_is_no_leftover_if_its_lock_cannot_be_opened(tmp_path: Path) -> None:
    """A process that has too many files open cannot open a lock; it took the save of another for a dead one."""
    other = LocalWriter(tmp_path / "other", "0" * 32)
    other.create({})
    (staging,) = tmp_path.iterdir()
    os.utime(staging, (0, 0))
    real = os.open

    def full(path: object, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("lock"):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *arguments, **options)  # type: ignore[arg-type]

    with mock.patch.object(os, "open", full):
        remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [staging]
    other.abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", [1, 2])
def test_a_save_that_fails_in_its_last_steps_leaves_whole_data_and_no_other(step: int, tmp_path: Path) -> None:
    """The new data are in the old checkpoint's directory then, and named by its manifest or not."""
    ema = ShardedEMA(nn.Linear(3, 3))
    ema.update()
    ema.save(tmp_path / "c")
    ema.update()
    synced = []

    def fail(path: Path) -> None:
        synced.append(path)
        if path == tmp_path / "c" and synced.count(path) == step:
            raise OSError(errno.EIO, "Input/output error")

    with mock.patch.object(local_commit, "sync", fail), pytest.raises(CheckpointError, match="Input/output error"):
        ema.save(tmp_path / "c")
    manifest = verify_checkpoint(tmp_path / "c")
    assert manifest.seen.updates == step
    others = {path.name for path in (tmp_path / "c").iterdir()} - {manifest.data, "ema.json"}
    assert len(others) == step - 1  # the old data, if the new are named: the next save removes them
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    ema.save(tmp_path / "c")
    assert len(list((tmp_path / "c").iterdir())) == 2


@pytest.mark.parametrize("script", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_cannot_be_written_to_costs_no_checkpoint(script: str, tmp_path: Path) -> None:
    """The error is raised, the old checkpoint stands whole, and nothing half-written is left to fill the disk."""
    if not can_mount(tmp_path):
        pytest.skip("this user may not mount a file system here")
    result = subprocess.run(
        [*UNSHARE, sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
