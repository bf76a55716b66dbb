"""Names of files, folders and data sets on the hub to their rows. Reading is ``datasets``' work;
here a name finds its reader."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
    load_from_disk,
)

from fusedkd.data.stdlib import stdlib_texts

Rows = Dataset | IterableDataset
Choose = Callable[[str, Any], Any]

STDLIB = "stdlib"  # in place of a path

_READERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".bz2", ".xz", ".zst")
# an empty cell is empty text, and "NA" is what is written there
_CSV = {"keep_default_na": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"sample_by": "document"},
    "csv": _CSV,
    "tsv": {**_CSV, "sep": "\t"},
}
_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Part:
    """Rows of one kind. ``weight`` is None where all of them are taken."""

    name: str
    rows: Any
    weight: float | None = None


def names_and_weights(
    data: Sequence[str], weights: Sequence[float] = ()
) -> tuple[list[str], list[float] | None]:
    """``["a.jsonl=0.7", "b/=0.3"]`` apart; the weights are None where there are none.

    Raises:
        ValueError: some have a weight and some have none, or it is no number above 0.
    """
    pairs = [_name_and_weight(name) for name in map(str, data)]
    given = [weight for _, weight in pairs if weight is not None]
    if given and (weights or len(given) < len(pairs)):
        raise ValueError(
            f"{' '.join(map(str, data))}: expected a weight for each, NAME=WEIGHT, or for none, "
            "and not --data_weights beside them."
        )
    names = [name for name, _ in pairs]
    return names, given or list(weights) or None


def _name_and_weight(name: str) -> tuple[str, float | None]:
    found = re.fullmatch(r"(.+)=([^=/]+)", name)
    if found is None or Path(name).exists():
        return name, None
    try:
        weight = float(found[2])
    except ValueError:
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ValueError(f"{name}: {found[2]} is no weight: expected a number above 0.")
    return found[1], weight


def read(paths: Sequence[str | Path], choose: Choose) -> Dataset:
    """Every row of every source, of each kind of file those columns that ``choose(name, rows)``
    gives.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing readable there, or sources with different columns.
    """
    names, weights = names_and_weights(list(map(str, paths)))
    if weights:
        raise ValueError(f"{' '.join(map(str, paths))}: weights are for text and conversations.")
    parts = [choose(part.name, part.rows) for part in read_parts(names)]
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise ValueError(
            f"the data mix {' and '.join(str(part.column_names) for part in parts)}: expected one "
            "kind."
        )
    return concatenate_datasets(parts)


def read_parts(
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    streaming: bool = False,
    revision: str | None = None,
) -> list[Part]:
    """The rows of every source; of a folder one part for each kind of file.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing readable there, or an unknown kind of file.
    """
    parts: list[Part] = []
    shares: Sequence[float | None] = weights or [None] * len(names)
    for name, weight in zip(names, shares, strict=True):
        found = [Part(part, rows, weight) for part, rows in _read(name, streaming, revision)]
        if weight is not None and len(found) > 1:
            raise ValueError(
                f"{name}={weight:g} holds several kinds of files: expected one kind where there "
                "are weights."
            )
        parts += found
    return parts


def _read(name: str, streaming: bool, revision: str | None) -> Iterator[tuple[str, Any]]:
    path = Path(name).expanduser()
    whole = Dataset.from_dict({"text": stdlib_texts()}) if name == STDLIB else _saved(name)
    if whole is not None:
        yield name, whole.to_iterable_dataset() if streaming else whole
    elif not path.exists() and _is_hub_name(name):
        yield name, _from_hub(name, streaming, revision)
    else:
        by_reader: dict[str, list[str]] = {}
        for file in _files(path):
            by_reader.setdefault(str(_reader(file)), []).append(str(file))
        for reader, files in by_reader.items():
            yield files[0], load_files(reader, files, streaming)


def _reader(path: Path) -> str | None:
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return _READERS.get(inner.suffix.lower())


def _files(path: Path) -> list[Path]:
    known = ", ".join(_READERS)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and _reader(p))
        if not found:
            raise ValueError(f"{path} is a directory without any {known} file.")
        return found
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not _reader(path):
        raise ValueError(f"{path}: expected a {known} file or a directory of them.")
    return [path]


def load_files(reader: str, files: list[str], streaming: bool = False) -> Any:
    """Their rows, through one of ``datasets``' readers.

    Raises:
        ValueError: they cannot be read.
    """
    options = _OPTIONS.get(reader, {})
    kind = "csv" if reader == "tsv" else reader
    try:
        return load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)
    except Exception as error:  # datasets wraps whatever its readers raise
        said = str(error.__cause__ or error) or "there are no rows"
        raise ValueError(f"cannot read {files[0]} as {reader}: {said}") from error


def _saved(name: str) -> Dataset | None:
    """What ``save_to_disk`` wrote, FOLDER or FOLDER:SPLIT."""
    folder, _, split = name.partition(":")
    path = Path(folder).expanduser()
    if not any((path / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return None
    try:
        found = load_from_disk(str(path))
    except Exception as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(found, DatasetDict):
        if split:
            raise ValueError(f"{name}: the data set has no splits: expected {folder}.")
        return found
    if not split and "train" in found:
        split = "train"
    if split not in found:
        raise ValueError(f"{name}: expected {folder}:SPLIT with one of {', '.join(found)}.")
    return found[split]


def _is_hub_name(name: str) -> bool:
    """By its form; a name that ends as a file or begins as a path is a path."""
    first = name.split(":")[0]
    path = name.startswith((".", "/", "~")) or _reader(Path(name)) is not None
    return not path and _HUB.fullmatch(first) is not None and name.count(":") <= 2


def _from_hub(name: str, streaming: bool, revision: str | None) -> Any:
    repository, *more = name.split(":")
    try:
        config, split = _config_and_split(repository, more, revision)
        return load_dataset(repository, config, split=split, streaming=streaming, revision=revision)
    except Exception as error:
        said = str(error.__cause__ or error).rstrip(".") or type(error).__name__
        raise ValueError(
            f"{name}: there is no such file or folder, and as the name of a data set on the hub "
            f"(NAME[:CONFIG][:SPLIT]) it cannot be read: {said}."
        ) from error


def _config_and_split(
    repository: str, more: list[str], revision: str | None
) -> tuple[str | None, str]:
    """One word after the name is a config where there is one of that name, or else a split."""
    if len(more) != 1:
        config, split = [*more, "", ""][:2]
    elif more[0] in get_dataset_config_names(repository, revision=revision):
        config, split = more[0], ""
    else:
        config, split = "", more[0]
    return config or None, split or "train"
