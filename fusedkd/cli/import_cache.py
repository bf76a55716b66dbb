"""``fusedkd cache import``: finds the reader for what was given."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasets import load_dataset, load_from_disk
from rich.console import Console

from fusedkd.cache.importers import Record, import_records, read_columns, read_vllm
from fusedkd.cache.keys import tokenizer_hash
from fusedkd.data.text import load_files
from fusedkd.errors import UserError, as_user_error
from fusedkd.models.loading import load_tokenizer


def import_cache(args: Namespace) -> None:
    """Write the cache; ``args`` are the flags.

    Raises:
        UserError: what is not there, or not what it should be.
    """
    tokenizer = load_tokenizer(args.tokenizer)
    size = len(tokenizer) if args.vocab_size is None else args.vocab_size
    kind, read = _reader(args)
    facts = {
        "teacher": args.teacher,
        "teacher_hash": None,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "padded_vocab_size": size,
        "source": f"imported from {kind}",
    }
    import_records(
        args.output,
        read,
        facts=facts,
        vocab_size=size,
        temperature=args.temperature,
        k=args.top_k,
    )
    Console(markup=False, emoji=False).print(
        f"{args.output}: imported. `fusedkd cache info {args.output}` tells."
    )


def _reader(args: Namespace) -> tuple[str, Callable[[], Iterable[Record]]]:
    path = Path(args.source)
    looks = path.is_file() and path.suffix in (".jsonl", ".json") and _first_line_is_vllm(path)
    if args.format == "vllm" or (args.format == "auto" and looks):
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected JSON lines as vLLM answers.")
        return "vLLM's prompt_logprobs", lambda: read_vllm(path)
    if (args.ids_column is None) != (args.logprobs_column is None):
        raise UserError("--ids-column and --logprobs-column: expected both or none.")
    names = None if args.ids_column is None else (args.ids_column, args.logprobs_column)
    rows = _dataset(args.source, args.split)
    return "top-k columns", lambda: read_columns(rows, names, args.of_token)


def _first_line_is_vllm(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as lines:
        return "prompt_logprobs" in lines.readline()


def _dataset(source: str, split: str) -> Any:
    path = Path(source)
    with as_user_error(f"{source} cannot be read as a data set", Exception):
        if path.is_file():
            return load_files("parquet" if path.suffix == ".parquet" else "json", [source])
        if path.is_dir() and (path / "state.json").exists():
            return load_from_disk(source)
        if path.suffix in (".parquet", ".json", ".jsonl"):
            raise FileNotFoundError("no such file")
        return load_dataset(source, split=split)
