"""Moved to :mod:`fusedkd.models.heads`; this path goes with release 0.3."""

import sys

import fusedkd.models.heads

sys.modules[__name__] = fusedkd.models.heads
