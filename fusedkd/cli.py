"""The ``fusedkd`` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from fusedkd.errors import UserError, as_user_error

__all__ = ["main"]

ABOUT = """\
Distil language models with fused, memory-saving losses.

  fusedkd distill --teacher DIR --student DIR --data corpus/ --output_dir out
  fusedkd distill --config recipes/hinton.yaml --teacher DIR --student DIR --data corpus/
  fusedkd student --from DIR --layers 6 --output DIR      a student out of some of its layers
  fusedkd cache --teacher DIR --data corpus/ --output cache/     a teacher that runs only once
  fusedkd demo                     a whole distillation on real text, in about six minutes
  fusedkd doctor                   what runs on this machine, and whether it is right
  fusedkd bench --quick            is it faster here than what I have? (two minutes)

`fusedkd COMMAND --help` explains a command."""

DISTILL = """\
Train a student to match a teacher's next-token distribution, without ever making the logits.

What is needed: --teacher (or --teacher_cache, see fusedkd cache), --student and --data. The student
is saved to --output_dir with its tokenizer, for from_pretrained. Keys of a --config file are these
flags; flags given beside it win. Every flag of transformers.TrainingArguments is accepted;
--help-all lists them."""

EXAMPLES = """\
examples:
  Hinton's mix, from a recipe, with another learning rate:
    fusedkd distill --config recipes/hinton.yaml --learning_rate 1e-4 \\
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
    commands = {
        "distill": _distill,
        "student": _student,
        "cache": _cache,
        "demo": _demo,
        "doctor": _doctor,
        "bench": _bench,
    }
    parser = argparse.ArgumentParser(
        prog="fusedkd", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands, help="what to do")
    if not arguments:
        parser.print_help()
        return 2
    if arguments[0] not in commands:
        parser.parse_args(arguments[:1])
    try:
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        print("fusedkd: interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print(f"fusedkd {arguments[0]}: {error}", file=sys.stderr)
        return 2


# ----------------------------------------------------------------------------------------------


def _distill(argv: list[str]) -> int:
    with as_user_error("fusedkd distill needs `pip install fusedkd[train]`"):
        from transformers import HfArgumentParser, TrainingArguments

        from fusedkd.train.arguments import DistillationArguments
        from fusedkd.train.run import RunArguments, distill

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:  # argparse would print 200 flags first
            raise UserError(f"{message} (see fusedkd distill --help)")

    parser = Parser(
        (RunArguments, DistillationArguments),  # type: ignore[arg-type]
        prog="fusedkd distill",
        usage="fusedkd distill [--config FILE.yaml] [flags]",
        description=DISTILL,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with flags as keys.")
    parser.add_argument("--help-all", action="help", help="Also every flag of transformers.")
    if "--help-all" not in argv:
        _hide(parser, {f.name for f in fields(TrainingArguments)} - COMMON)
    known = [flag[2:] for flag in parser._option_string_actions if flag.startswith("--")]
    path, rest = _take_config(argv)
    given = _flags_of(path, sorted({*known} - {"config", "help", "help-all"})) if path else []
    with as_user_error():
        run, args, _, unknown = parser.parse_args_into_dataclasses(
            [*given, *rest], return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        raise UserError(f"{unknown[0]}: not a flag{_near(unknown[0].lstrip('-'), known)}.")
    return distill(run, args)


def _student(argv: list[str]) -> int:
    from fusedkd.cli_student import main

    return main(argv)


def _cache(argv: list[str]) -> int:
    from fusedkd.cli_cache import main

    return main(argv)


def _hide(parser: argparse.ArgumentParser, names: set[str]) -> None:
    for action in parser._actions:
        if action.dest in names:
            action.help = argparse.SUPPRESS


def _take_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    found, rest = parser.parse_known_args(argv)
    return found.config, rest


def _flags_of(path: Path, known: list[str]) -> list[str]:
    """The YAML file as command-line flags."""
    import yaml

    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected `key: value` lines, got a {_kind(content)}.")
    flags: list[str] = []
    for key, value in content.items():
        if key not in known:
            raise UserError(f"--config {path}: {key!r} is not a flag{_near(str(key), known)}.")
        if value is not None:
            values = value if isinstance(value, list) else [value]
            flags += [
                f"--{key}",
                *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values),
            ]
    return flags


def _kind(value: Any) -> str:
    return type(value).__name__


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else " (see fusedkd distill --help)"


def _demo(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="fusedkd demo",
        description="Train a teacher on the Python standard library's sources, then the same "
        "student three ways on a small transfer set, and write a report, a plot and the student.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=5.0, help="about how long it may take")
    parser.add_argument("--smoke", action="store_true", help="a tiny run that only shows it works")
    args = parser.parse_args(argv)
    with as_user_error("fusedkd demo needs `pip install fusedkd[train]`"):
        from fusedkd.train.demo import run_demo

    run_demo(args.output, seed=args.seed, minutes=args.minutes, smoke=args.smoke)
    return 0


def _doctor(argv: list[str]) -> int:
    argparse.ArgumentParser(
        prog="fusedkd doctor",
        description="Versions, devices, which backend runs here and why another does not, and a "
        "check of each against the fp64 reference. Exit code 1 if a check fails.",
    ).parse_args(argv)
    from fusedkd.doctor import report

    return report()


def _bench(argv: list[str]) -> int:
    with as_user_error("fusedkd bench needs `pip install fusedkd[bench]`"):
        from fusedkd.benchmarks.__main__ import main

    return main(argv)
