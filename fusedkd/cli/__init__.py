"""The ``fusedkd`` command, one module a sub-command. Heavy imports wait until one needs them."""

from fusedkd.cli.main import main

__all__ = ["main"]
