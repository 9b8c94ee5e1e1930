"""What a wheel and an sdist hold: what is forgotten is missed only by those who install them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

from support import ROOT

import hatchling.build
import pytest

import dist_ema

IGNORED = {".pyc", ".so"}


def files(*folders: str) -> set[str]:
    """Everything that is in the folders, but for what Python leaves there."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in found if path.suffix not in IGNORED}


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    """The kernels' sources, without which every update is eager, and the mark that says that it is typed."""
    with zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
        assert "dist-ema = dist_ema.cli:main" in wheel.read(entry_points).decode()
    assert names == files("dist_ema")
    assert {"dist_ema/py.typed", "dist_ema/kernels/fused.cpp", "dist_ema/kernels/digest.cpp"} <= names


def test_the_sdist_holds_all_that_its_tests_need(tmp_path: Path) -> None:
    """Helpers beside the tests, the demo that they run, its configurations."""
    with tarfile.open(tmp_path / hatchling.build.build_sdist(str(tmp_path))) as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert files("dist_ema", "tests", "launch", "configs") <= names
    assert {"pyproject.toml", "README.md"} <= names


def test_the_wheel_says_what_it_is(tmp_path: Path) -> None:
    """Version and licence, and a description whose links name files that the wheel has."""
    with zipfile.ZipFile(tmp_path / hatchling.build.build_wheel(str(tmp_path))) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
        said = message_from_string(wheel.read(metadata).decode())
        names = set(wheel.namelist())
    assert said["Version"] == dist_ema.__version__
    assert said["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("/licenses/.github/LICENSE") for name in names)
    links = re.findall(r"\]\((dist_ema/[^)#]+)", str(said.get_payload()))
    assert len(links) > 10
    assert set(links) <= names


@pytest.mark.long
@pytest.mark.parametrize("build", ["build_wheel", "build_sdist"])
def test_what_is_built_runs_the_guides_program_elsewhere(build: str, tmp_path: Path) -> None:
    """In a fresh environment with nothing but its dependencies, and outside of the checkout."""
    built = tmp_path / getattr(hatchling.build, build)(str(tmp_path))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    page = (ROOT / "dist_ema" / "guide" / "start.md").read_text()
    (folder / "example.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0])
    python = str(tmp_path / "venv" / "bin" / "python")

    def run(*command: str) -> str:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    run(python, "-m", "pip", "install", "-c", str(ROOT / "configs" / "constraints.txt"), str(built))
    assert dist_ema.__version__ in run(python, "-m", "dist_ema", "--version")
    assert "ShardedEMA on PlainEngine" in run(python, "example.py")
    (folder / "average").rename(folder / "earlier")
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert "ShardedEMA on DTensorEngine" in run(*torchrun, "example.py")
