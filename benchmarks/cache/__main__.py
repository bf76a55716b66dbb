"""``python -m fusedkd.benchmarks.cache``."""

from .measure import main

if __name__ == "__main__":
    main()
