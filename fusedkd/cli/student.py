"""The flags of ``fusedkd student``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedkd.errors import as_user_error
from fusedkd.parser import Parser, number

ABOUT = """\
Make a student out of its teacher: some of its layers, with its embeddings and head.

A student of full depth computes what the teacher does. DistilBERT and ALBERT students need a BERT
as teacher. With other widths there is nothing to copy, and the weights are random."""

EXAMPLES = """\
examples:
  DistilBERT, layers 0 2 4 7 9 11 of BERT:
    fusedkd student --from ./bert --to distilbert --layers 6 --output student
  Every other layer of a decoder (GPT-2, Llama, Qwen, ...):
    fusedkd student --from ./qwen --layers 12 --output student
  TinyBERT's sizes:
    fusedkd student --from ./bert --layers 4 --hidden 312 --intermediate 1200 --output student
  ALBERT: one layer, the mean of BERT's 12, applied 12 times:
    fusedkd student --from ./bert --to albert --layers 12 --output student"""


def main(argv: Sequence[str]) -> int:
    """Run ``fusedkd student``; returns the exit code."""
    args = _parser().parse_args(argv)
    with as_user_error("fusedkd student needs `pip install fusedkd[train]`"):
        from fusedkd.cli.make_student import make_student
        from fusedkd.students.copy import StudentPlan

    plan = StudentPlan(
        layers=args.layers,
        layer_map=args.map,
        to=args.to,
        hidden=args.hidden,
        intermediate=args.intermediate,
        heads=args.heads,
        groups=args.groups,
        embedding=args.embedding,
    )
    make_student(args.teacher, plan, args.output, args.tokenizer, args.seed)
    return 0


def _parser() -> Parser:
    parser = Parser("student", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("--from", dest="teacher", required=True, metavar="TEACHER", help="folder or hub name")
    add("--layers", type=number(1), required=True, help="how many (ALBERT: how many applications)")
    add("--output", type=Path, required=True, help="a new folder")
    add(
        "--map",
        default="spaced",
        help="spaced, first, last, or the teacher's layers from 0: 0,2,4 (ALBERT: spaced is the "
        "mean of each group's stretch)",
    )
    add("--to", choices=("same", "distilbert", "albert"), default="same", help="architecture")
    add("--hidden", type=number(1), help="another width: random weights")
    add(
        "--intermediate",
        type=number(1),
        help="of the feed-forward (default: in proportion to hidden)",
    )
    add("--heads", type=number(1), help="attention heads (default: as many as the teacher)")
    add("--groups", type=number(1), default=1, help="ALBERT: layers with weights of their own")
    add("--embedding", type=number(1), help="ALBERT: width of the table of words (default: 128)")
    add("--tokenizer", help="folder or hub name (default: the teacher's)")
    add("--seed", type=number(0, 2**32 - 1), default=0, help="of weights that are not copied")
    return parser
