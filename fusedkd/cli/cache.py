"""The flags of ``fusedkd cache``, and what its parts print."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedkd.data.arguments import DataArguments
from fusedkd.errors import as_user_error
from fusedkd.models.served import ServedArguments
from fusedkd.parser import Parser, add_fields, number, of_fields

ABOUT = """\
Run a teacher over the data once, and keep its answers on the disk.

  fusedkd cache --teacher DIR --data corpus/ --output cache/
  fusedkd distill --teacher_cache cache/ --student DIR --data corpus/ --output_dir out

The second command needs no teacher. Sequences are found by what they contain: batch size, order,
seed and number of processes may differ between the two, and any number of students may train from
one cache. Data, block size and evaluation share must be the same, and are checked before training.
Killed? The same command goes on where it was.

What is kept of each token, one of:
  --top-k 64      the 64 most probable entries, and the exact mass of all others (default)
  --top-p 0.98    of those, as many as reach 98 % together: fewer bytes where the teacher is sure
  --sample 50     50 ids drawn from the teacher (arXiv 2503.16870): fewer bytes, and unbiased for
                  forward KL, so better where the teacher is unsure; refused for divergences that
                  draws would bias
  --hidden bf16   the hidden states before the head, H numbers, and the head once: exact for every
                  divergence and temperature; --hidden int8 takes half the bytes
  --actual        how probable the token that is there is, 4 bytes: for --cross_tokenizer alm"""

EXAMPLES = """\
examples:
  For runs at T = 1 and at T = 2:
    fusedkd cache --teacher ./teacher --data corpus/ --output cache/ --temperatures 1,2
  For every divergence and temperature, from the teacher's hidden states:
    fusedkd cache --teacher ./teacher --data corpus/ --output cache/ --hidden int8
  For a student with another tokenizer (fusedkd distill --cross_tokenizer alm):
    fusedkd cache --teacher ./teacher --data corpus/ --output cache/ --actual \\
      --student_tokenizer ./student
  As small as it gets, for one tokenizer:
    fusedkd cache --teacher ./teacher --data corpus/ --output cache/ --sample 50
  From a teacher that is served (vLLM, SGLang), asked in token ids:
    fusedkd cache --teacher http://a:8000,http://b:8000 --tokenizer ./student \\
      --data corpus/ --output cache/
  By eight processes (or more, on machines that share the folder), each with shards of its own:
    torchrun --no-python --nproc-per-node 8 \
      fusedkd cache --teacher ./teacher --data corpus/ --output cache/
  What is in it, and whether every byte is as it was written:
    fusedkd cache info cache/
    fusedkd cache verify cache/
    fusedkd cache show cache/ --row 3
  From answers that vLLM gave (prompt_logprobs), or that a data set holds in columns:
    fusedkd cache import answers.jsonl --tokenizer ./teacher --output cache/
    fusedkd cache import topk.parquet --tokenizer ./teacher --output cache/ \\
      --ids-column top_ids --logprobs-column top_logprobs"""

# With 31 % of the mass outside, students on the demo's data ended 2 % above those of the live
# teacher, see README.
MUCH = 0.1

SHOW = """\
What the teacher said after each token of a sequence: the most probable next tokens, or those that
were drawn most often; of hidden states, what the head makes of them. A cache knows its sequences by
a hash: with the same flags for the data as were cached, the tokens themselves are shown too."""

IMPORT = """\
A cache from answers that were collected elsewhere.

.jsonl lines with prompt_logprobs are vLLM's (prompt_token_ids must be there too). Anything else is
a data set (.parquet, .jsonl, a folder of save_to_disk, or a hub name) with input_ids and, per
token, a list of ids and a list of natural log-probabilities of the next token. An entry of -inf,
which vLLM writes for what was masked, has probability 0 and is left out.

--from vllm-hidden DIR --head MODEL: what vLLM's extract_hidden_states wrote, .safetensors files
with token_ids and hidden_states (L, layers, H). Which layer it is, and whether the final norm is
still to be applied, is found by comparing 100 tokens with the model; where none fits, nothing is
written."""


def main(argv: list[str]) -> int:
    """``fusedkd cache ...``; the exit code."""
    parts: dict[str, Callable[[list[str]], int]] = {
        "verify": _verify,
        "info": _info,
        "show": _show,
        "import": _import,
    }
    if argv and argv[0] in parts:
        return parts[argv[0]](argv[1:])
    return _build(argv)


def _build(argv: list[str]) -> int:
    parser = Parser("cache", ABOUT, EXAMPLES)
    parser.usage = (
        "fusedkd cache --teacher T --data D --output DIR [flags] | verify | info | show | import"
    )
    add = parser.add_argument
    add("--teacher", help="folder or hub name of the teacher, a decoder, or where it is served")
    add("--output", type=Path, required=True, metavar="DIR", help="where the cache goes")
    add("--top-k", type=int, metavar="K", help="entries per token (default: 64)")
    add("--top-p", type=float, metavar="P", help="no more of them than reach this probability")
    add("--sample", type=int, metavar="N", help="draws per token, instead of the top entries")
    add("--hidden", choices=("bf16", "int8"), help="hidden states, instead of entries")
    add("--actual", action="store_true", help="of the token that is there alone how probable it is")
    add("--temperatures", type=_numbers, default=(1.0,), metavar="T,...", help="to serve; 1")
    add_fields(parser, DataArguments, NOT_CACHED)
    add_fields(parser, ServedArguments)
    for name, more in _TEACHER_FLAGS.items():  # spelt as those of fusedkd distill, or with a dash
        add(f"--{name}", f"--{name.replace('_', '-')}", **more)
    add("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    add(
        "--batch-size", type=number(1), default=8, metavar="B", help="sequences per forward pass; 8"
    )
    shard = number(0.000001, 1_000_000, float)
    add("--shard-mb", type=shard, default=64, help="size of a file: what a kill costs at most; 64")
    args = parser.parse_args(argv)
    with as_user_error("fusedkd cache needs `pip install fusedkd[train]`"):
        from fusedkd.cache.policy import Policy
        from fusedkd.cli.make_cache import CacheArguments, make_cache
    data, served = of_fields(DataArguments, args), of_fields(ServedArguments, args)
    policy = Policy.of(
        args.top_k, args.top_p, args.sample, args.hidden, args.temperatures, args.actual
    )
    values = {**vars(args), "data": data, "served": served, "policy": policy}
    for name in ("top_k", "top_p", "sample", "hidden", "actual"):
        del values[name]
    make_cache(CacheArguments(**values))
    return 0


NOT_CACHED = ("data_streaming", "teacher_column", "mlm_probability", "mlm_smoothing")
_TEACHER_FLAGS: dict[str, dict[str, Any]] = {
    "tokenizer": {"help": "folder or hub name (default: the teacher's)"},
    "student_tokenizer": {"help": "of a student with another: its rows, read to the teacher's"},
    "teacher_dtype": {"default": "auto", "help": "float32, bfloat16, float16 or auto: as saved"},
    "teacher_device_map": {"help": "over devices, memory and disk: auto, ... or JSON"},
    "teacher_load_in_4bit": {"action": "store_true", "help": "its weights in NF4 (bitsandbytes)"},
    "teacher_load_in_8bit": {"action": "store_true", "help": "its weights in 8 bits"},
    "teacher_tp": {"action": "store_true", "help": "split it over torchrun's processes"},
    "vocab_size": {"type": int, "help": "true vocabulary (default: the tokenizer's)"},
}


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers such as 1,2") from None


def _verify(argv: list[str]) -> int:
    parser = Parser("cache verify", "Read every byte and every answer. Exit code 1: damage.")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    with as_user_error("fusedkd cache needs `pip install fusedkd[train]`"):
        from fusedkd.cache.verify import verify
    manifest, wrong = verify(args.folder)
    for line in wrong:
        print(line)
    if manifest is not None and not wrong:
        print(f"{args.folder}: {len(manifest.shards)} shards, every byte as it was written.")
    return 1 if wrong else 0


def _info(argv: list[str]) -> int:
    parser = Parser(
        "cache info", "What a cache holds and what it was made from. Exit code 1: it is damaged."
    )
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    with as_user_error("fusedkd cache needs `pip install fusedkd[train]`"):
        from rich.console import Console
        from rich.table import Table

        from fusedkd.cache.errors import Damaged
        from fusedkd.cache.manifest import Manifest
        from fusedkd.cache.reader import TeacherCache
        from fusedkd.cache.sums import known
    found = Manifest.load(args.folder)
    tails: tuple[float, ...] = ()
    damaged = False
    try:
        if found.complete:
            tails = TeacherCache(args.folder).tail_masses()
    except Damaged as error:
        damaged = True
        print(error)
    shards = known(args.folder, found)
    files = [found.index, *shards.values(), *([] if found.head is None else [found.head])]
    size = sum(file.bytes for file in files)
    table = Table(show_header=False, title=str(args.folder))
    state = "" if found.complete else f" of {found.number_of_shards}: incomplete"
    for name, value in {
        "teacher": found.teacher,
        "its weights": found.teacher_hash or "not seen",
        "tokenizer": found.tokenizer_hash,
        "made by": found.source,
        "vocabulary": f"{found.vocab_size:,} (logits have {found.padded_vocab_size:,} columns)",
        "kept": str(found.policy),
        "not kept": _outside(found.temperatures, tails),
        "temperatures": "all"
        if found.policy.hidden
        else ", ".join(f"{t:g}" for t in found.temperatures),
        "sequences": f"{found.sequences:,}",
        "tokens": f"{found.tokens:,}",
        "shards": f"{len(shards)}{state}",
        "size": f"{size:,} bytes, {size / found.tokens:.1f} per token",
    }.items():
        table.add_row(name, value)
    Console(markup=False, emoji=False).print(table)  # names may have brackets
    if max(tails, default=0.0) > MUCH and found.teacher_hash:  # a teacher that could be asked again
        print(
            f"More than {MUCH:.0%} of the teacher's probability lies outside the entries that were "
            "kept, and how it is\ndistributed there is not taught. For forward KL, --sample "
            "misses nothing on average."
        )
    return int(damaged)


def _outside(temperatures: tuple[float, ...], tails: tuple[float, ...]) -> str:
    """The mean mass of all other entries, in words."""
    pairs = zip(temperatures, tails, strict=False)  # draws have no tails
    return ", ".join(f"{tail:.1%} of the probability at T = {t:g}" for t, tail in pairs) or "-"


def _show(argv: list[str]) -> int:
    parser = Parser("cache show", SHOW)
    add = parser.add_argument
    add("folder", type=Path)
    add("--row", type=number(0), default=0, metavar="N", help="sequence of the cache; 0")
    add("--top-k", type=number(1), default=5, metavar="K", help="entries of each token; 5")
    add("--temperature", type=number(0.0001, 1000, float), default=1.0, metavar="T", help="1")
    add("--first", type=number(0), default=0, metavar="N", help="token to begin with; 0")
    add("--tokens", type=number(1), default=20, metavar="N", help="that are shown; 20")
    add("--tokenizer", help="folder or hub name (default: the teacher's, if its folder is here)")
    add_fields(parser, DataArguments, NOT_CACHED)
    args = parser.parse_args(argv)
    with as_user_error("fusedkd cache needs `pip install fusedkd[train]`"):
        from fusedkd.cli.show_cache import show_cache
    show_cache(args, of_fields(DataArguments, args))
    return 0


def _import(argv: list[str]) -> int:
    parser = Parser("cache import", IMPORT)
    add = parser.add_argument
    add("source", help="file, folder or hub name")
    add("--output", type=Path, required=True, metavar="DIR", help="where the cache goes")
    add("--tokenizer", required=True, help="folder or hub name of the teacher's tokenizer")
    add("--teacher", default="unknown", help="its name, for the record")
    kinds = ("auto", "vllm", "columns", "vllm-hidden")
    add("--format", "--from", dest="format", choices=kinds, default="auto")
    add("--head", help="with vllm-hidden: folder or hub name of the model, for its norm and head")
    add("--hidden", choices=("bf16", "int8"), help="with vllm-hidden: how they are kept; bf16")
    add("--split", default="train", help="of a data set on the hub; train")
    add("--ids-column", help="lists of ids (default: the usual names)")
    add("--logprobs-column", help="lists of log-probabilities (default: the usual names)")
    add("--of-token", action="store_true", help="entry n is of token n, not of the next one")
    heat = number(0.0001, 10_000, float)
    add("--temperature", type=heat, default=1.0, help="that the answers were made at; 1")
    add("--top-k", type=number(1, 4096), help="keep at most so many per token (default: all)")
    add("--vocab-size", type=number(2), help="true vocabulary (default: the tokenizer's)")
    args = parser.parse_args(argv)
    with as_user_error("fusedkd cache needs `pip install fusedkd[train]`"):
        from fusedkd.cli.import_cache import import_cache
        from fusedkd.cli.import_hidden import import_hidden
    (import_hidden if args.format == "vllm-hidden" else import_cache)(args)
    return 0
