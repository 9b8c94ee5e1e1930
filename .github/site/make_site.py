"""Builds the guide as a site: ``pip install -e '.[docs]' && python .github/site/make_site.py``, into ``build/site``.

Fails for a link or an anchor that leads nowhere, and for a public name without a docstring.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import reference

HERE = Path(__file__).parent


def build(out: Path) -> None:
    """Makes the site in ``out``, which is replaced. Raises CalledProcessError with the findings on stderr."""
    shutil.rmtree(out, ignore_errors=True)
    # zensical takes pages from below its configuration only.
    work = out.parent / f".{out.name}-pages"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(reference.PAGE.parent, work / "docs")
    (work / "docs" / reference.PAGE.name).write_text(reference.page())
    shutil.copy(HERE / "zensical.toml", work)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(work / "zensical.toml")]
    try:
        subprocess.run(command, check=True)
        (work / "site").rename(out)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    build(reference.ROOT / "build" / "site")
