"""The benchmark: `fusedkd bench`, or `python -m benchmarks` in a checkout."""

import sys
from pathlib import Path

if __name__ == "benchmarks":
    # Started from a checkout, whose root on sys.path would hide Hugging Face's `kernels` package
    # behind ours and break `import transformers`. This package is found by its own __path__.
    _root = Path(__file__).resolve().parent.parent
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != _root]
