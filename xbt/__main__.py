"""``python -m xbt``, and ``accelerate launch -m xbt`` for several processes."""

from __future__ import annotations

import sys

from xbt.cli import main

if __name__ == "__main__":
    sys.exit(main())
