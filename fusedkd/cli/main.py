"""The ``fusedkd`` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

from fusedkd import __version__
from fusedkd.cli.named import joined
from fusedkd.errors import UserError, as_user_error, of_the_machine
from fusedkd.parser import OneSentence, Parser, number, printable

ABOUT = """\
Distil language models with fused, memory-saving losses.

  fusedkd distill --teacher DIR --student DIR --data corpus/ --output_dir out
  fusedkd distill --config hinton --teacher DIR --student DIR --data corpus/
  fusedkd student --from DIR --layers 6 --output DIR      a student out of some of its layers
  fusedkd cache --teacher DIR --data corpus/ --output cache/     a teacher that runs only once
  fusedkd data --tokenizer DIR --data corpus/     what a run would train on, token by token
  fusedkd demo                     a whole distillation on real text, in about six minutes
  fusedkd plan --student DIR --teacher DIR --gpu h100  memory before there are weights
  fusedkd doctor                   what runs on this machine, and whether it is right
  fusedkd doctor --run out         what is wrong with a run
  fusedkd doctor --env             what to paste into a bug report
  fusedkd bench --quick            is it faster here than what I have? (two minutes)
  fusedkd warmup --vocab 151936    a loss's GPU kernels, compiled before the job starts
  fusedkd config                   the recipes that --config knows by name
  fusedkd completion bash          what a shell needs to complete commands, flags and names

`fusedkd COMMAND --help` explains a command; `fusedkd --version` says which one this is."""

DISTILL = """\
Train a student to match a teacher's next-token distribution, without ever making the logits.

What is needed: --teacher (or --teacher_cache, see fusedkd cache), --student and --data. The student
is saved to --output_dir with its tokenizer, for from_pretrained. Keys of a --config file are these
flags; flags given beside it win. Every flag of transformers.TrainingArguments is accepted;
--help-all lists them."""

EXAMPLES = """\
examples:
  Hinton's mix, from a recipe, with another learning rate:
    fusedkd distill --config hinton --learning_rate 1e-4 \\
      --teacher ./teacher --student ./student --data corpus/ --output_dir out
  A generalised JSD, in bf16, 4 x 8 sequences per step, evaluated every 100 steps on its own text:
    fusedkd distill --teacher ./teacher --student ./student --divergence 'jsd(beta=0.3)' --bf16 \\
      --per_device_train_batch_size 8 --gradient_accumulation_steps 4 \\
      --data train.jsonl --eval_data test.jsonl --eval_strategy steps --eval_steps 100
  A run that was killed:
    fusedkd distill ... --output_dir out --resume_from_checkpoint last
  From a teacher that ran before (fusedkd cache):
    fusedkd distill --teacher_cache cache/ --student ./student --data corpus/ --output_dir out
  On four GPUs:
    torchrun --nproc_per_node 4 --no-python fusedkd distill ..."""

CONFIG = "A recipe's name (fusedkd config lists them), or a YAML file with flags as keys."

# Of transformers' flags, those that the short help shows.
COMMON = {
    "output_dir",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "seed",
    "logging_steps",
    "eval_strategy",
    "save_strategy",
    "resume_from_checkpoint",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a user's mistake)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = OneSentence(
        prog="fusedkd", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    if not arguments:
        parser.print_help()
        return 2
    if arguments == ["--version"]:
        print(f"fusedkd {__version__}")
        return 0
    name = arguments[0] if arguments[0] in COMMANDS else ""
    try:
        if not name and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
            parser.refuse(arguments[0])
        if not name:
            parser.parse_args(arguments[:1])  # help, or an error
        return COMMANDS[name](arguments[1:])
    except KeyboardInterrupt:
        print("fusedkd: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        said = _last_line(str(error)) if isinstance(error, UserError) else of_the_machine(error)
        if said is None:  # a bug, which wants its traceback
            raise
        print(f"fusedkd{name and ' '}{name}: {printable(said)}", file=sys.stderr)
        return 2


def _last_line(text: str) -> str:
    """What a data loader's worker said: the process that waits for it raises it again, with the
    worker's traceback as its text."""
    caught = text.startswith("Caught ") and "Traceback" in text
    return text.rstrip().rpartition("\n")[2].partition(": ")[2] if caught else text


# ----------------------------------------------------------------------------------------------


def _distill(argv: list[str]) -> int:
    path, rest = _take_config(argv)
    if path is not None:
        with as_user_error("fusedkd distill needs `pip install fusedkd[train]`"):
            from fusedkd.cli.recipe import check_code, flags_of, read_recipe, recipe_file
        path = recipe_file(path)
        recipe = read_recipe(path)  # before anything is loaded
    with as_user_error("fusedkd distill needs `pip install fusedkd[train]`"):
        from transformers import HfArgumentParser, TrainingArguments

        from fusedkd.data.arguments import DataArguments
        from fusedkd.models.arguments import ModelArguments
        from fusedkd.train.arguments import DistillationArguments
        from fusedkd.train.report.arguments import ReportArguments

    class Flags(OneSentence, HfArgumentParser):  # type: ignore[misc]
        pass

    parser = Flags(
        (ModelArguments, DataArguments, DistillationArguments, ReportArguments),  # type: ignore[arg-type]
        prog="fusedkd distill",
        usage="fusedkd distill [--config NAME|FILE.yaml] [flags]",
        description=DISTILL,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help=CONFIG)
    parser.add_argument("--help-all", action="help", help="Also every flag of transformers.")
    if "--help-all" not in argv:
        _hide(parser, {f.name for f in fields(TrainingArguments)} - COMMON)
    known = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    flags = sorted({*known} - {"config", "help", "help-all"})
    given = [] if path is None else flags_of(path, recipe, flags)
    if path is not None:
        check_code(path, given, rest)
    words = joined([*given, *rest])
    try:
        with as_user_error():
            models, data, args, report, _, unknown = parser.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
    except UserError as error:
        if isinstance(cause := error.__cause__, json.JSONDecodeError):
            flag = next((a for a, b in pairwise(words) if cause.doc == b), "one of the flags")
            raise UserError(f"{flag} {cause.doc}: expected JSON: {cause}") from None
        raise
    if unknown:
        parser.refuse(unknown[0])
    with as_user_error("fusedkd distill needs `pip install fusedkd[train]`"):
        from fusedkd.cli.distill import distill
        from fusedkd.cli.run_file import RunFile

    ours, theirs = ({f.name for f in fields(c)} for c in (DistillationArguments, TrainingArguments))
    run = RunFile(parser, words, (models, data, report), args, ours - theirs)
    return distill(models, data, args, report, run)


def _student(argv: list[str]) -> int:
    from fusedkd.cli.student import main

    return main(argv)


def _cache(argv: list[str]) -> int:
    from fusedkd.cli.cache import main

    return main(argv)


def _data(argv: list[str]) -> int:
    from fusedkd.cli.data import main

    return main(argv)


def _plan(argv: list[str]) -> int:
    from fusedkd.cli.plan import main

    return main(argv)


def _hide(parser: argparse.ArgumentParser, names: set[str]) -> None:
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def _take_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    parser = Parser("distill", "", add_help=False)
    parser.add_argument("--config", type=Path)
    found, rest = parser.parse_known_args(argv)
    return found.config, rest


def _demo(argv: list[str]) -> int:
    parser = Parser(
        "demo",
        "Train a teacher on the Python standard library's sources, then the same student three "
        "ways on a small transfer set, and write a report, a plot and the student.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--seed", type=number(0, 2**32 - 1), default=0)
    minutes = number(0, 10_000, float)
    parser.add_argument("--minutes", type=minutes, default=5.0, help="about how long it may take")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only shows it works")
    args = parser.parse_args(argv)
    with as_user_error("fusedkd demo needs `pip install fusedkd[train]`"):
        from fusedkd.demo.run import run_demo

    run_demo(args.output, seed=args.seed, minutes=args.minutes, smoke=args.smoke)
    return 0


def _doctor(argv: list[str]) -> int:
    parser = Parser(
        "doctor",
        "Versions, devices, which backend runs here and why another does not, and a check of each "
        "against the fp64 reference. Exit code 1 if a check fails. With --run: what the log of a "
        "run says is wrong with it, and what to do; exit code 1 if anything is. "
        "With --env: versions and backends alone.",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--run", type=Path, metavar="DIR", help="the --output_dir of a run")
    only.add_argument("--env", action="store_true", help="what to paste into a bug report")
    args = parser.parse_args(argv)
    if args.run is not None:
        from fusedkd.cli.diagnosis import report_on

        return report_on(args.run)
    from fusedkd.cli.doctor import environment, report

    return environment() if args.env else report()


def _warmup(argv: list[str]) -> int:
    from fusedkd.warmup import main

    return main(argv)


def _config(argv: list[str]) -> int:
    from fusedkd.cli.config import main

    return main(argv)


def _completion(argv: list[str]) -> int:
    from fusedkd.cli.completion import main

    return main(argv)


def _bench(argv: list[str]) -> int:
    with as_user_error("fusedkd bench needs `pip install fusedkd[bench]`"):
        from fusedkd.benchmarks.__main__ import main

    return main(argv)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "distill": _distill,
    "student": _student,
    "cache": _cache,
    "data": _data,
    "plan": _plan,
    "demo": _demo,
    "doctor": _doctor,
    "bench": _bench,
    "warmup": _warmup,
    "config": _config,
    "completion": _completion,
}
