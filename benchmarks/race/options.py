"""The command line: what can be asked for, and what is said when it cannot be."""

from __future__ import annotations

import argparse
from typing import Any

from fusedkd import divergences
from fusedkd.parser import Parser, number

from .case import Case
from .providers import PROVIDERS

EXAMPLES = """\
examples:
  fusedkd bench --quick                             two minutes: is it worth my time?
  fusedkd bench                                     every promise of the README, with its bar
  fusedkd bench --device cuda                       the same on a GPU
  fusedkd bench --divergence jsd "skew_forward_kl(lam=0.3)" --vocab 32000 151936 --n 256
  fusedkd bench --form head --n 2048 --hidden-student 2048 --hidden-teacher 4096 --memory
  fusedkd bench --form head --kd-weight 0 --providers fusedkd cce torch-lce floor
  fusedkd bench --form head --counted 0.1 0.5 1     labels on a share of the tokens, as in chat data
  fusedkd bench --end-to-end                        a whole training step, and the largest batch
  fusedkd bench --replot outputs/bench/results.json

Any axis turns the suite off: the cases are then all combinations of the values given. Peers that
are not installed are skipped; `pip install "fusedkd[bench]"` brings them. Each answer is checked
against fp64 before it is timed; if fusedkd's own is wrong, nothing is timed and the exit code is 1.
Times are medians of interleaved rounds. "floor" is the least the machine could take: for logits,
moving the bytes (two tensors read, one written); for heads, the bare matrix products.
"""


LEAST = 1e-6  # of numbers that have to be above 0
_count, _weight = number(1), number(0, 1e6, float)
_positive, _share = number(LEAST, 1e6, float), number(LEAST, 1, float)


def _divergence(text: str) -> str:
    try:
        divergences.make(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """
    Raises:
        UserError: an argument that cannot be.
    """
    about = "Time fusedkd against what else there is, and check everybody's answer."
    parser = Parser("bench", about, EXAMPLES)
    _add_runs(parser)
    _add_axes(parser.add_argument_group("axes (several values: all combinations)"))
    _add_output(parser.add_argument_group("output"))
    options = parser.parse_args(argv)
    if options.kd_weight == [0.0] and options.ce_weight == [0.0]:
        parser.error("--kd-weight 0 --ce-weight 0 leaves no loss: expected one of them above 0.")
    return options


def _add_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--quick", action="store_true", help="the short suite: two minutes on two cores")
    add("--suite", choices=["headline"], default="headline", help="what runs without other flags")
    add("--end-to-end", action="store_true", help="a training step, with fusedkd and with logits")
    add("--memory-limit", type=_positive, default=2.0, metavar="GIB", help="of --end-to-end (2)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda also means AMD (cpu)")
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=", ".join(PROVIDERS))
    add("--repeats", type=_count, default=7, metavar="N", help="rounds of every race (7)")
    add(
        "--budget",
        type=_positive,
        default=20.0,
        metavar="S",
        help="seconds after which a slow provider sits out, after three rounds at least (20)",
    )


# The options that choose cases, all of them fields of `Case`: what is taken, and what it is.
AXES: dict[str, tuple[Any, str]] = {
    "form": (("dense", "head"), "logits, or LMHead"),
    "divergence": (_divergence, 'name or "name(number)"'),
    "n": (_count, "tokens"),
    "vocab": (_count, "32000, 50257, 128256, 151936, 262144 are those of models"),
    "dtype": (("bf16", "fp16", "fp32"), "of the inputs"),
    "temperature": (_positive, "of both sides"),
    "kd_weight": (_weight, "of the divergence; 0 leaves cross-entropy alone"),
    "ce_weight": (_weight, "of the cross-entropy"),
    "mode": (("train", "eval"), "with gradients or not"),
    "frozen": (True, "LMHead without a weight gradient"),
    "counted": (_share, "share of the tokens with a label; the others are ignored"),
    "reduction": (("mean", "none"), "none: fusedkd's loss per token"),
    "hidden_student": (_count, "LMHead: the student's width"),
    "hidden_teacher": (_count, "LMHead: the teacher's width"),
    "chunk_bytes": (_count, "LMHead: fusedkd's budget for logits; by the device"),
    "threads": (_count, "CPU threads; as torch chooses"),
}


def _add_axes(group: argparse._ArgumentGroup) -> None:
    for name, (values, text) in AXES.items():
        flag, default = "--" + name.replace("_", "-"), getattr(Case(), name)
        if values is True:
            group.add_argument(flag, action="store_const", const=[True], help=text)
        elif isinstance(values, tuple):
            group.add_argument(flag, nargs="+", choices=values, help=f"{text} ({default})")
        else:
            text += "" if default is None else f" ({default})"
            group.add_argument(flag, type=values, nargs="+", metavar="X", help=text)
    group.add_argument("--memory", action="store_true", help="peak extra memory of every row too")


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output", default="outputs/bench", metavar="DIR", help="results.json, .csv, plots")
    add("--save", action="store_true", help="keep the JSON as benchmarks/results/<machine>.json")
    add("--replot", metavar="FILE.json", help="draw the plots of an earlier run again, and end")
