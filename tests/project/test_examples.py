"""The examples in docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

from support import ROOT

import pytest

MODULES = {
    file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
    for file in ROOT.glob("dist_ema/**/*.py")
    if ">>>" in file.read_text()
}
#: What users meet: each has an example.
PUBLIC = {"ema", "functional", "options", "integrations.composer_timing", "kernels.rounding"}
PUBLIC |= {f"comm.{name}" for name in ("agreement", "catalogue", "collectives", "windows")}
PUBLIC |= {f"geometry.{name}" for name in ("runs", "shares", "spec")}
PUBLIC |= {f"schedules.{name}" for name in ("clock", "constant", "half_life", "power", "profile", "ramps", "state")}
PUBLIC |= {f"schedules.{name}" for name in ("warmup", "window")}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_examples_give_what_they_say(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example that fails teaches the wrong thing."""
    monkeypatch.chdir(tmp_path)  # those that write files write them here
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed, "the output above says which"


def test_what_users_meet_has_an_example() -> None:
    assert not {f"dist_ema.{name}" for name in PUBLIC} - MODULES
