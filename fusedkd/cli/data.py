"""``fusedkd data``: rows as the models will see them."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from fusedkd.data.arguments import DataArguments
from fusedkd.errors import UserError, as_user_error
from fusedkd.parser import Parser, add_fields, number, of_fields, printable

ABOUT = """\
Show what a run would train on: counts, and rows as the models will see them. Takes the same flags
for the data as fusedkd distill and cache; needs a tokenizer, and no model.

Tokens that carry a label, on which the student is trained, are coloured (between [[ and ]] where
there is no colour); the others are only read.

With --output, write what a run will ask its teacher, for a teacher that is asked elsewhere: a line
{"prompt_token_ids": [...]} for each sequence, as vLLM's offline engine takes them. Its answers
become a cache (fusedkd cache import), which serves fusedkd distill with the same flags for the
data."""

EXAMPLES = """\
examples:
  Is it the answers that are trained on, and do they end?
    fusedkd data --tokenizer ./student --data chat.jsonl
  For a teacher that answers elsewhere:
    fusedkd data --tokenizer ./student --data corpus/ --output blocks.jsonl
  A data set of the hub, packed, each token on a line:
    fusedkd data --tokenizer ./student --data HuggingFaceH4/ultrachat_200k:train_sft \\
      --data_streaming --packing flatten --max_length 4096 --tokens --samples 1"""

LABELLED, READ = "bold green", "dim"


def main(argv: list[str]) -> int:
    """``fusedkd data ...``; the exit code."""
    parser = Parser("data", ABOUT, EXAMPLES)
    parser.usage = "fusedkd data --tokenizer DIR --data D [flags]"
    add = parser.add_argument
    add("--tokenizer", metavar="DIR", help="folder or hub name")
    add("--student", metavar="DIR", help="instead: a model that has one")
    add("--teacher", metavar="DIR", help="instead, or beside it: they must agree")
    add("--samples", type=number(0), default=3, metavar="N", help="rows to show; 3")
    add("--tokens", action="store_true", help="a line for each token: position, id, label")
    add("--output", type=Path, metavar="FILE", help="write the sequences that a run will ask for")
    add_fields(parser, DataArguments, ("teacher_column", "mlm_probability", "mlm_smoothing"))
    args = parser.parse_args(argv)
    flags = of_fields(DataArguments, args)
    with as_user_error("fusedkd data needs `pip install fusedkd[train]`"):
        from fusedkd.data.loading import load_rows
        from fusedkd.models.loading import load_tokenizer
        from fusedkd.models.saved import SavedModel
    named = {role: getattr(args, role) for role in ("student", "teacher")}
    models = {role: SavedModel(role, name) for role, name in named.items() if name}
    if not (args.tokenizer or models):
        raise UserError("--tokenizer is missing: expected a folder or hub name, or --student.")
    tokenizer = load_tokenizer(args.tokenizer, **models)
    if args.output is not None:
        return _write(args.output, flags, tokenizer)
    rows = load_rows(flags, tokenizer)
    _show(rows, tokenizer, args.samples, args.tokens)
    return 0


def _write(path: Path, flags: DataArguments, tokenizer: Any) -> int:
    """Every sequence once, in the order of its first appearance."""
    from fusedkd.cache.keys import sequence_key, tokenizer_hash
    from fusedkd.data.loading import load_rows
    from fusedkd.files import replace_file

    if flags.data_streaming:
        raise UserError("--output with --data_streaming: a stream has no end: expected no stream.")
    # rows that are flattened are asked for sequence by sequence
    rows = load_rows(flags, tokenizer, "none" if flags.packing == "flatten" else None)
    name = tokenizer_hash(tokenizer)
    lines: dict[bytes, str] = {}
    for part in (rows.train, rows.test):
        for row in part or ():
            ids = row["input_ids"]
            lines.setdefault(sequence_key(ids, name), json.dumps({"prompt_token_ids": ids}))
    replace_file(path, "".join(f"{line}\n" for line in lines.values()))
    print(f"{path}: {len(lines):,} sequences; {rows.summary}")
    return 0


def _show(rows: Any, tokenizer: Any, samples: int, tokens: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, emoji=False, highlight=False)
    table = Table(show_header=False, title="Data")
    for name, value in rows.summary.table().items():
        table.add_row(name, value)
    if rows.test is not None and not rows.summary.streamed:
        table.add_row("put aside for evaluation", f"{len(rows.test):,} rows")
    console.print(table)
    for place, row in enumerate(rows.train.take(samples), 1):
        length, labels = len(row["input_ids"]), sum(label != -100 for label in row["labels"])
        console.rule(f"row {place}: {length:,} tokens, {labels:,} with a label", style=READ)
        for ids, marks in _sequences(row):
            console.print((_table if tokens else _text)(ids, marks, tokenizer, console))


def _sequences(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each of the sequences in a row."""
    import torch

    from fusedkd.models.columns import spans

    names = [x for x in ("input_ids", "labels", "position_ids") if row.get(x) is not None]
    batch = {name: torch.tensor([row[name]]) for name in names}
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    return [(ids[span].tolist(), labels[span].tolist()) for span in spans(batch, 0)]


def _text(ids: list[int], labels: list[int], tokenizer: Any, console: Any) -> Any:
    """Runs of tokens with and without a label; whole runs, as a character may be several tokens."""
    from rich.text import Text

    text = Text()
    for labelled, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != -100):
        said = printable(tokenizer.decode([token for token, _ in run]))
        said = said.replace("\n", "\\n\n")
        mark = labelled and console.color_system is None
        text.append(f"[[{said}]]" if mark else said, LABELLED if labelled else READ)
    return text


def _table(ids: list[int], labels: list[int], tokenizer: Any, console: Any) -> Any:
    from rich.table import Table

    table = Table("position", "id", "token", "label", box=None)
    for place, (token, label) in enumerate(zip(ids, labels, strict=True)):
        labelled = label != -100
        said = tokenizer.decode([token])
        if not said.strip() or not said.isprintable() or "\ufffd" in said:  # part of a character
            said = ascii(tokenizer.convert_ids_to_tokens(token))[1:-1]
        mark = "" if not labelled else "yes" if label == token else str(label)
        table.add_row(str(place), str(token), said, mark, style=LABELLED if labelled else READ)
    return table
