"""``python -m dist_ema``: the same program as ``dist-ema``."""

import sys

from dist_ema.cli import main

if __name__ == "__main__":
    sys.exit(main())
