"""Moved to :mod:`fusedkd.data.text`; this path goes with release 0.3."""

import sys

import fusedkd.data.text

sys.modules[__name__] = fusedkd.data.text
