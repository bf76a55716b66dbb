"""What one short visit to a GPU can tell, in one command and at most 400 seconds.

    python3 -m benchmarks.device                            # everything, into outputs/gpu/
    python3 -m benchmarks.device --only smoke shares
    python3 -m benchmarks.device --resume                   # what an earlier call here left undone
    python3 -m benchmarks.device --device cpu               # dry run: the interpreter, tiny sizes
    python3 -m benchmarks.device.publish outputs/gpu        # the report into the repository

From a checkout's root, with the machine's own Python, torch, triton and numpy: nothing is
installed, and the C++ extension is not needed. Peers are raced where they are installed, or lie as
wheels in the checkout's ``.whl/``: pip download --no-deps -d .whl liger-kernel trl packaging.

Each step is a child process with a limit; what it finds is in report.json item by item, tracebacks
and tools' output in log.txt, and the table, which is printed last, in table.txt. A child that
crashes, hangs or loses its CUDA context is started again behind the item that did it. The exit code
is 1 if anything failed or was left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from . import place
from .steps import STEPS
from .supervisor import Supervisor, say
from .table import table


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/gpu"), help="folder for what is found")
    add("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"these alone: {', '.join(STEPS)}")
    add("--skip", nargs="+", choices=STEPS, metavar="STEP", default=[], help="not these")
    add("--resume", nargs="?", const="", metavar="REPORT", help="keep what is done")
    add("--budget", type=float, default=400, help="seconds in all (400)")
    add("--limit-scale", type=float, default=1.0, help="factor on the limits of steps and items")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    add("--state", type=Path, help="caches and journals (default: a temporary folder, kept)")
    add("--show", type=Path, metavar="REPORT", help="print a report's table, nothing else")
    add("--fault", nargs="+", default=[], help=argparse.SUPPRESS)  # smoke=crash facts=hang
    args = parser.parse_args(argv)
    args.steps = [s for s in STEPS if s in (args.only or STEPS) and s not in args.skip]
    here = hashlib.sha256(str(place.checkout()).encode()).hexdigest()[:8]
    kept = Path(tempfile.gettempdir()) / f"fusedkd-{os.getuid()}-{args.device}-{here}"
    args.state = (args.state or kept).resolve()
    args.out = args.out.resolve()
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.show:
        say(*table(json.loads(args.show.read_text())))
        return 0
    visit = Supervisor(args)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, visit.stop)
    return visit.go()


if __name__ == "__main__":
    sys.exit(main())
