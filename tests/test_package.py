"""What a wheel and an sdist hold: what is forgotten is missed only by those who install them."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import hatchling.build
import pytest

ROOT = Path(__file__).parent.parent
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
