"""Whether the rows of a run fit its models, which neither knows by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from fusedkd.data.arguments import DataArguments
from fusedkd.data.columns import column_names
from fusedkd.data.text import check_ids
from fusedkd.errors import UserError, as_user_error
from fusedkd.models.kinds import vocabulary_size
from fusedkd.models.positions import check_keeps_apart, check_length


def check_fits(rows: Any, models: dict[str, Any], flags: DataArguments, labels: bool = True) -> Any:
    """The rows, after looking whether the models by role have a position for every token and an
    embedding for every id; those of a stream are looked at when they come.

    Args:
        rows: of a data set with ``input_ids``, or None.
        models: "student", and "teacher" where it is a model.
        flags: where the rows came from.
        labels: whether labels are ids.

    Raises:
        UserError: they do not, or flattened rows do not stay apart in a model.
    """
    if rows is None:
        return None
    names = column_names(rows)
    if "input_ids" not in names:
        return rows
    longest = _longest(rows) if isinstance(rows, Dataset) else flags.max_length
    for role, model in models.items():
        with as_user_error():
            if not model.config.is_encoder_decoder:
                check_length(role, model.config, longest)
        if "position_ids" in names:
            with as_user_error(f"--packing flatten: the {role}", RuntimeError), as_user_error():
                check_keeps_apart(role, model)
    smallest = min(map(vocabulary_size, models.values()))
    if isinstance(rows, IterableDataset):
        return rows.map(_checked, batched=True, fn_kwargs={"vocabulary": smallest})
    check_ids(rows, smallest, labels and "labels" in names)
    return rows


def check_prompts(rows: Any, held_out: Any, flags: DataArguments, share: float) -> None:
    """Look whether a run in which the student writes ``share`` of the batches has prompts, and one
    in which it does not has labels; evaluation needs labels in any case.

    Raises:
        UserError: a prompt's end is not known, or nothing is there to learn from.
    """
    if share and flags.train_on == "all":
        raise UserError(
            "--train_on all with --on_policy_share: where a prompt ends would not be known: "
            "expected --train_on assistant or last."
        )
    if share < 1 and _labelled(rows) == "none":
        raise UserError(
            "--data: no token carries a label, as of prompts without an answer: expected "
            "--on_policy_share 1, by which the student writes all answers, or a completion."
        )
    if _labelled(held_out) == "none":
        raise UserError("--eval_data: no token carries a label: expected rows with answers.")
    if share and flags.packing == "blocks" and _labelled(rows) == "some":
        raise UserError(
            "--packing blocks with --on_policy_share: conversations that are cut have no prompts: "
            "expected --packing none or flatten."
        )


def _labelled(rows: Any) -> str | None:
    """Which tokens carry a label: none, some, all; None where that is not to be said."""
    if not isinstance(rows, Dataset) or "labels" not in rows.column_names:
        return None
    if not pa.types.is_nested(rows.data.schema.field("labels").type):  # a class for each row
        return None
    there = [pc.not_equal(pc.list_flatten(column), -100) for column in _columns(rows, "labels")]
    if all(pc.all(here).as_py() for here in there):
        return "all"
    return "some" if any(pc.any(here).as_py() for here in there) else "none"


def _columns(rows: Dataset, name: str) -> Iterator[pa.ChunkedArray]:
    for batch in rows.select_columns(name).with_format("arrow").iter(1000):
        yield batch[name]


def _longest(rows: Dataset) -> int:
    """Tokens of the longest sequence."""
    if "position_ids" in rows.column_names:
        found = [pc.max(pc.list_flatten(column)) for column in _columns(rows, "position_ids")]
        return 1 + max(most.as_py() for most in found)
    found = [pc.max(pc.list_value_length(column)) for column in _columns(rows, "input_ids")]
    return max((most.as_py() for most in found), default=0)


def _checked(rows: dict[str, list[Any]], vocabulary: int) -> dict[str, list[Any]]:
    check_ids(Dataset.from_dict({k: rows[k] for k in ("input_ids", "labels")}), vocabulary, True)
    return rows
