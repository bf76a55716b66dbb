"""Does it help? Students of the recipes on real text, each with three controls, over seeds.

    python -m fusedkd.benchmarks.evidence --output outputs/evidence --minutes 60

A BERT-style and a GPT-style teacher are trained on the standard library's sources, then students of
four kinds, with all of the text and with little of it: with distillation; without it for as many
steps; without it for as long; and not trained at all. Every result is written as soon as it is
there, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from .plan import SMOKE, Setting, make_text
from .report import write_report
from .run import Evidence


def main() -> None:
    """Run everything that is not there yet; write ``results.json``, ``report.md`` and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/evidence"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, help="default: 3")
    parser.add_argument("--smoke", action="store_true", help="tiny: only shows that it works")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    size = SMOKE if args.smoke else Setting()
    size = size if args.seeds is None else replace(size, seeds=args.seeds)
    evidence = Evidence(size, make_text(size), args.output, 60 * args.minutes)
    evidence.run()
    write_report(args.output, evidence.results, size.__dict__)


if __name__ == "__main__":
    main()
