"""Models, the dense reference, worker processes and injected faults, for tests: ``from support.oracle import ...``."""

from __future__ import annotations

from pathlib import Path

#: The checkout.
ROOT = Path(__file__).parents[2]
#: Files of other libraries and of earlier versions, which tests read.
DATA = ROOT / "tests" / "data"
#: The folders of test files. Worker processes import a test by its module's name, so they need them all.
FOLDERS = sorted({path.parent for path in (ROOT / "tests").glob("*/test_*.py")})
