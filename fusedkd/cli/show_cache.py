"""``fusedkd cache show``: what the teacher said after each token of a sequence."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fusedkd.cache.errors import CacheError
from fusedkd.cache.keys import tokenizer_hash
from fusedkd.cache.reader import TeacherCache
from fusedkd.cli.make_cache import Sequences
from fusedkd.data.arguments import DataArguments
from fusedkd.data.loading import load_rows
from fusedkd.errors import UserError
from fusedkd.models.loading import load_tokenizer


def show_cache(args: argparse.Namespace, data: DataArguments) -> None:
    """Print a table of one sequence.

    Raises:
        UserError: no such row or temperature, or data and a tokenizer of something else.
    """
    cache = TeacherCache(args.folder)
    found = cache.top(args.row, args.top_k, args.temperature)
    if args.first >= len(found.ids):
        raise UserError(f"--first {args.first}: row {args.row} has {len(found.ids)} tokens.")
    tokenizer = _tokenizer(args.tokenizer, cache)
    ids = _ids(cache, args.row, data, tokenizer) if data.data else None
    said = f"{cache.layout.policy} of {cache.manifest.teacher}, T = {args.temperature:g}"
    table = Table(title=f"{args.folder}, row {args.row}: {said}")
    for name in ("", *([] if ids is None else ["token"]), "others"):
        table.add_column(name, justify="right")
    for place in range(found.ids.shape[1]):
        table.add_column(str(place + 1))
    end = min(len(found.ids), args.first + args.tokens)
    for token in range(args.first, end):
        known = [] if ids is None else [_text(ids[token], tokenizer)]
        mass = float(np.exp(found.log_probs[token]).sum())
        pairs = zip(found.ids[token].tolist(), found.log_probs[token].tolist(), strict=True)
        entries = ("" if i < 0 else f"{_text(i, tokenizer)} {math.exp(p):.1%}" for i, p in pairs)
        table.add_row(str(token), *known, f"{max(0.0, 1 - mass):.1%}", *entries)
    console = Console(markup=False, emoji=False, highlight=False)
    console.print(table)
    if end < len(found.ids):
        print(f"{len(found.ids) - end:,} more tokens: --first {end}.")
    if tokenizer is None:
        print("What the ids mean, the teacher's tokenizer tells: --tokenizer.")
    if ids is None:
        print("Which tokens these are, the data tell: --data, with the flags of `fusedkd cache`.")


def _tokenizer(name: str | None, cache: TeacherCache) -> Any:
    """The one that was given, or else the teacher's where it is here; None if it is not."""
    if name is not None:
        found = load_tokenizer(name)
        cache.check_tokenizer(tokenizer_hash(found))
        return found
    if not Path(cache.manifest.teacher).is_dir():  # nothing is fetched that a cache names
        return None
    try:
        found = load_tokenizer(cache.manifest.teacher)
    except UserError:
        return None
    return found if tokenizer_hash(found) == cache.manifest.tokenizer_hash else None


def _ids(cache: TeacherCache, row: int, data: DataArguments, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise UserError("--tokenizer is missing: expected the teacher's, to read --data.")
    rows = load_rows(data, tokenizer, "none" if data.packing == "flatten" else None)
    for ids in Sequences(rows.train, rows.test):
        if cache.find(ids) == row:
            return list(map(int, ids))
    raise CacheError(
        f"--data {' '.join(data.data or [])}: row {row} of the cache {cache.folder} is not in it. "
        "Give the same flags for the data as were cached."
    )


def _text(number: int, tokenizer: Any) -> str:
    return str(number) if tokenizer is None else repr(tokenizer.decode([number]))
