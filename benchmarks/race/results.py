"""What was measured and on what: rows that are plain data, files that are never half written."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedkd.files import replace_file, write_json

from .case import Case


@dataclass
class Row:
    """One provider on one case. Times in milliseconds, memory in bytes."""

    case: dict[str, Any]
    label: str
    provider: str
    forward_ms: float | None = None
    total_ms: float | None = None  # forward + backward; evaluation: forward
    p10_ms: float | None = None
    p90_ms: float | None = None
    host_ms: float | None = None  # until the call returns, without waiting for a GPU
    samples: int = 0
    floor_ms: float | None = None
    loss_error: float | None = None
    grad_error: float | None = None
    verdict: str | None = None
    peak_bytes: int | None = None
    reason: str | None = None  # why it has no time
    memory_reason: str | None = None
    note: str | None = None


@dataclass
class BarResult:
    """A bar of the project and what was measured against it."""

    label: str
    value: float | None
    limit: float
    at_most: bool
    unit: str = "x"

    @property
    def passed(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass
class GroupResult:
    """The rows of one group, by case and provider; None where something is missing."""

    title: str
    rows: list[Row] = field(default_factory=list)
    bars: list[BarResult] = field(default_factory=list)

    def row(self, case: Case, provider: str) -> Row | None:
        fields = dataclasses.asdict(case)
        rows = (row for row in self.rows if row.provider == provider and row.case == fields)
        return next(rows, None)

    def time(self, case: Case, provider: str) -> float | None:
        row = self.row(case, provider)
        return row.total_ms if row else None

    def peak(self, case: Case, provider: str) -> int | None:
        row = self.row(case, provider)
        return row.peak_bytes if row else None


@dataclass
class Report:
    machine: dict[str, Any]
    command: str
    groups: list[GroupResult] = field(default_factory=list)
    end_to_end: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group.rows]

    def save_json(self, path: Path) -> None:
        data = dataclasses.asdict(self)
        for group, result in zip(data["groups"], self.groups, strict=True):
            for bar, measured in zip(group["bars"], result.bars, strict=True):
                bar["passed"] = measured.passed
        write_json(path, data)

    def save_csv(self, path: Path) -> None:
        rows = [_flat(group.title, row) for group in self.groups for row in group.rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, _flat("", Row(dataclasses.asdict(Case()), "", "")).keys())
        writer.writeheader()
        writer.writerows(rows)
        replace_file(path, text.getvalue())


def _flat(group: str, row: Row) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    return {"group": group, **fields.pop("case"), **fields}


def load(path: Path) -> Report:
    """A report that ``save_json`` wrote; ValueError says what is wrong with the file."""
    try:
        data = json.loads(path.read_text())
        groups = [
            GroupResult(
                group["title"],
                [Row(**row) for row in group["rows"]],
                [BarResult(**{k: v for k, v in b.items() if k != "passed"}) for b in group["bars"]],
            )
            for group in data["groups"]
        ]
        return Report(data["machine"], data["command"], groups, data["end_to_end"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--replot {path}: not a result of this benchmark ({type(error).__name__}: {error}). "
            "Expected the results.json of an earlier run."
        ) from None


def file_name(info: dict[str, Any], end_to_end: bool = False) -> str:
    """e.g. amd-epyc-avx512-2-threads.json: one file per machine, overwritten by the next run there.
    The other suite has its own.
    """
    name = info.get("gpu") or f"{info['cpu']} {info['instruction_set']} {info['threads']} threads"
    name += " end to end" * end_to_end
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"
