"""Moved to :mod:`fusedkd.cli.distill`; this path goes with release 0.3."""

import sys

import fusedkd.cli.distill

sys.modules[__name__] = fusedkd.cli.distill
