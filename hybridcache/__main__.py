"""`python -m hybridcache`: the command line of `cli`; owns nothing else."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
