"""``python -m fusedkd.benchmarks``: what ``fusedkd bench`` does."""

import sys

from .race.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
