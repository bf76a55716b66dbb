"""``python -m fusedkd``: the ``fusedkd`` command."""

import sys

from fusedkd.cli import main

if __name__ == "__main__":
    sys.exit(main())
