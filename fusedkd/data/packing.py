"""Rows of tokens to the rows that a model gets: as they are, cut into blocks, or several in one."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, default_data_collator

from fusedkd.data.chat import IGNORED
from fusedkd.data.rows import mapped


def cut_blocks(rows: Any, size: int) -> Any:
    """Join the rows and cut them every ``size`` tokens.

    Returns:
        ``input_ids`` and ``labels``. What does not fill a last block is dropped, unless it is all
        there is.

    Raises:
        ValueError: there are fewer than two tokens.
    """
    rows = rows.select_columns(["input_ids", "labels"])
    for short in (False, True):
        # the remainder is dropped once per batch
        blocks = mapped(
            rows, _cut, f"Cutting blocks of {size}", batch_size=10_000, size=size, short=short
        )
        if not isinstance(blocks, Dataset) or len(blocks):
            return blocks
    raise ValueError("the data are empty: expected at least two tokens of text.")


def _cut(rows: dict[str, list[list[int]]], size: int, short: bool) -> dict[str, list[list[int]]]:
    joined = {name: list(chain.from_iterable(values)) for name, values in rows.items()}
    length = len(joined["input_ids"])
    last = length if short and length > 1 else length - length % size
    return {
        name: [values[start : start + size] for start in range(0, last, size)]
        for name, values in joined.items()
    }


def flatten(rows: Any, size: int) -> Any:
    """Put whole rows together, up to ``size`` tokens.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, which begin anew with each row; its first
        token is not the next one of what stands before it, so it has no label.
    """
    rows = rows.select_columns(["input_ids", "labels"])
    return mapped(rows, _flatten, f"Packing rows of {size}", size=size)


def _flatten(rows: dict[str, list[list[int]]], size: int) -> dict[str, list[list[int]]]:
    ids, labels = rows["input_ids"], [[IGNORED, *row[1:]] for row in rows["labels"]]
    bins = best_fit([len(row) for row in ids], size)
    return {
        "input_ids": [[token for n in members for token in ids[n]] for members in bins],
        "labels": [[label for n in members for label in labels[n]] for members in bins],
        "position_ids": [[i for n in members for i in range(len(ids[n]))] for members in bins],
    }


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Bins of places whose lengths add up to at most ``size``: best-fit decreasing (Ding et al.
    2024, arXiv 2404.10830)."""
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # what is left, and in which bin, in order
    for place in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        at = bisect_left(spaces, (lengths[place], -1))
        if at == len(spaces):
            bins.append([])
            left, number = size, len(bins) - 1
        else:
            left, number = spaces.pop(at)
        bins[number].append(place)
        insort(spaces, (left - lengths[place], number))
    return bins


def one_row(features: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch as one row, whose ``position_ids`` tell its sequences apart; no mask."""
    return {
        name: torch.tensor([list(chain.from_iterable(row[name] for row in features))])
        for name in ("input_ids", "labels", "position_ids")
    }


def collator(packing: str, tokenizer: Any) -> Any:
    """What makes batches of such rows.

    Raises:
        ValueError: rows have to be padded, and the tokenizer has nothing to pad with.
    """
    if packing != "none":
        return one_row if packing == "flatten" else default_data_collator
    padding = deepcopy(tokenizer)
    padding.padding_side = "right"
    if padding.pad_token_id is None:
        if padding.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no padding and no end-of-text token, which rows of different "
                "lengths need: expected --packing blocks or flatten."
            )
        padding.pad_token = padding.eos_token  # masked, and without a label
    return DataCollatorForSeq2Seq(padding)
