"""Checkpoints and folders whose files are links, as download caches and data version control keep them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from support.any_engine import small_ema

import pytest
import torch
from safetensors.torch import load_file

from dist_ema import ShardedEMA, merge, read_checkpoint, synthesize, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import CheckpointError
from dist_ema.importers.convert import import_checkpoint


def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hub_cache(folder: Path, store: Path, file: Path) -> tuple[Path, str]:
    """``models--org--name/snapshots/<commit>/file`` leads to ``../../blobs/<sha256>``."""
    return store / "blobs" / _content(file), "relative"


def dvc(folder: Path, store: Path, file: Path) -> tuple[Path, str]:
    """``cache.type = symlink``: an absolute path into ``.dvc/cache``, by the first two digits."""
    digest = _content(file)
    return store / ".dvc" / "cache" / "files" / "md5" / digest[:2] / digest[2:32], "absolute"


def annex(folder: Path, store: Path, file: Path) -> tuple[Path, str]:
    """A relative path into ``.git/annex/objects``, a folder for each file."""
    key = f"SHA256E-s{file.stat().st_size}--{_content(file)}{file.suffix}"
    return store / ".git" / "annex" / "objects" / key[-4:-2] / key / key, "relative"


def into_links(folder: Path, store: Path, place: Callable[[Path, Path, Path], tuple[Path, str]]) -> None:
    """Moves every file of a folder into a store, and leaves a link; the files in the store are read-only."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        blob, kind = place(folder, store, file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.replace(blob)
        blob.chmod(0o444)
        blob.parent.chmod(0o555)
        file.symlink_to(blob if kind == "absolute" else os.path.relpath(blob, file.parent))
        blob.parent.chmod(0o755)


@pytest.mark.parametrize("place", [hub_cache, dvc, annex], ids=lambda place: place.__name__)
def test_every_command_reads_a_checkpoint_of_links(
    place: Callable[[Path, Path, Path], tuple[Path, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    for updates in (3, 6):
        small_ema(updates).save(run / f"{updates}ba")
        small_ema(updates).export(run / f"export-{updates}")
    average = read_checkpoint(run / "6ba")
    torch.save({"model": average, "ema": average}, run / "train.pt")
    into_links(run, tmp_path / "models--org--name", place)
    assert (run / "6ba" / "ema.json").is_symlink() and (run / "train.pt").is_symlink()

    assert verify_checkpoint(run / "6ba").seen.updates == 6
    other = small_ema(1)
    other.load(run / "6ba")
    assert all(torch.equal(value, average[name]) for name, value in other.full_state_dict().items())
    for command in (
        ["verify", run / "6ba"],
        ["inspect", run / "6ba"],
        ["diff", run / "6ba", run / "6ba"],
        ["diff", run / "6ba", run / "export-6"],
        ["export", run / "6ba", tmp_path / "exported"],
        ["import", run / "train.pt", tmp_path / "from-file"],
        ["import", run / "export-6", tmp_path / "from-folder", "--format", "state-dict"],
        ["merge", run / "3ba", run / "6ba", "-o", tmp_path / "of-checkpoints"],
        ["merge", run / "export-3", run / "export-6", "-o", tmp_path / "of-folders"],
        ["merge", run / "train.pt", "-o", tmp_path / "of-files"],
        ["synthesize", run, "-o", tmp_path / "synthesized", "--target", "decay=.5"],
    ):
        assert main(list(map(str, command))) == 0, (command, capsys.readouterr().err)
    for out in ("exported", "of-files"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert all(torch.equal(value, average[name]) for name, value in found.items()), out
    assert not any(
        path.is_symlink() for out in tmp_path.iterdir() if out.name[:6] != "models" for path in out.rglob("*")
    )


def test_a_link_that_leads_nowhere_is_named_with_the_remedy(tmp_path: Path) -> None:
    """git-annex and DVC keep the link of a file that was never fetched."""
    small_ema(2).save(tmp_path / "c")
    small_ema(2).export(tmp_path / "export")
    into_links(tmp_path / "c", tmp_path, annex)
    into_links(tmp_path / "export", tmp_path, annex)
    link = next((tmp_path / "c").rglob("model.safetensors"))
    gone = link.resolve()
    blob = gone.read_bytes()
    gone.unlink()
    (tmp_path / "export" / "model.safetensors").resolve().unlink(missing_ok=True)
    (tmp_path / "model.safetensors.pt").symlink_to("nowhere")
    uses: list[Callable[[], object]] = [
        lambda: verify_checkpoint(tmp_path / "c"),
        lambda: small_ema(1).load(tmp_path / "c"),
        lambda: read_checkpoint(tmp_path / "c"),
        lambda: merge([tmp_path / "c", tmp_path / "c"], tmp_path / "out"),
        lambda: synthesize(tmp_path / "c", tmp_path / "out", target="decay=.5"),
        lambda: merge([tmp_path / "export"], tmp_path / "out"),
        lambda: import_checkpoint(tmp_path / "export", tmp_path / "out", format="state-dict"),
        lambda: import_checkpoint(tmp_path / "model.safetensors.pt", tmp_path / "out"),
    ]
    for use in uses:
        with pytest.raises(CheckpointError, match=r"model\.safetensors(\.pt)? is a symbolic link to .*Fetch the files"):
            use()
    assert not (tmp_path / "out").exists()
    gone.write_bytes(blob)
    for use in uses[:4]:
        use()


def test_a_save_over_a_checkpoint_of_links_leaves_the_store_alone(tmp_path: Path) -> None:
    small_ema(1).save(tmp_path / "c")
    into_links(tmp_path / "c", tmp_path / "store", dvc)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    ema: ShardedEMA = small_ema(2)
    ema.save(tmp_path / "c")
    assert verify_checkpoint(tmp_path / "c").seen.updates == 2
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
