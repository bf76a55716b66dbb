"""The YAML file of ``fusedkd distill --config``: flags as keys, with one value or a list of them.

Values are the words that are written there, as on a command line: YAML's own types would make a
number of 12:30 and False of ``save_strategy: no``. Only mappings, for flags that take JSON, have
YAML's. A recipe may come from anybody, so what none needs is refused before it is expanded: anchors
and aliases, tags, depth, size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from fusedkd.errors import UserError
from fusedkd.parser import near
from fusedkd.shipped import shipped

MOST_BYTES = 1 << 16
MOST_DEPTH = 8
# YAML's words that are not the command line's, by kind.
_WORDS = {
    "bool": {"on": "true", "off": "false"},
    "float": {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"},
}


Recipe = list[tuple[yaml.ScalarNode, yaml.Node]]


def recipe_file(name: Path) -> Path:
    """What ``--config`` asks for: a file, or else a recipe that comes with the package."""
    return name if name.is_file() else shipped("recipes").get(str(name), name)


def read_recipe(path: Path) -> Recipe:
    """The entries of a recipe, as they are written.

    Raises:
        UserError: the file is not there, not YAML, or more than flags and their values.
    """
    if not path.is_file():
        names = ", ".join(shipped("recipes"))
        raise UserError(f"--config {path}: no such file: expected one, or a recipe: {names}.")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise UserError(f"--config {path}: {size:,} bytes: expected at most {MOST_BYTES:,}.")
    with _as_user_error(path):
        text = path.read_text(encoding="utf-8")
        _check_plain(text)
        return list(_pairs(yaml.compose(text, Loader=yaml.SafeLoader)))


def flags_of(path: Path, recipe: Recipe, known: Sequence[str]) -> list[str]:
    """A recipe as arguments.

    Args:
        path: of the file, for messages.
        recipe: its entries.
        known: the flags that there are.

    Raises:
        UserError: it has keys or values that no flag has.
    """
    with _as_user_error(path):
        return [word for key, value in recipe for word in _words(key, value, known)]


def check_code(path: Path, words: Sequence[str], given: Sequence[str]) -> None:
    """A recipe may come from anybody: it brings no code unless whoever runs it says so.

    Args:
        path: of the file, for messages.
        words: the recipe, as arguments.
        given: those of the command line.

    Raises:
        UserError: the recipe would import a module, and there is no ``--trust_remote_code``.
    """
    from fusedkd.divergences import split_module

    trusted = _value("trust_remote_code", given)
    if trusted is not None and trusted.lower() not in _NO:
        return
    asked, what = _value("trust_remote_code", words), ""
    if asked is not None and asked.lower() not in _NO:
        what = "trust_remote_code"
    for flag in ("divergence", "row_rule"):
        value = _value(flag, words) or ""
        module = split_module(value)[0] if flag == "divergence" else value.partition(":")[0]
        if module:
            what = f"{flag} {value} imports {module}"
    if what:
        raise UserError(
            f"--config {path}: {what}, and a recipe runs no code by itself: read it, then give "
            "--trust_remote_code on the command line."
        )


_NO = ("false", "no", "f", "n", "0")  # transformers' words


def _value(flag: str, words: Sequence[str]) -> str | None:
    """The last one of ``flag`` among arguments, ``""`` for a bare flag; None: it is not there."""
    value = None
    for word, after in pairwise((*words, "--")):
        name, equals, same = word.partition("=")
        if name.replace("-", "_") == f"__{flag}":
            value = same if equals else "" if after.startswith("--") else after
    return value


@contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f" line {mark.line + 1}"
        said = str(error.problem or error.context).rstrip(".")
        end = "" if said.endswith("?") else "."
        raise UserError(f"--config {path}{where}: {said}{end}") from None
    except (yaml.YAMLError, ValueError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--config {path} is not valid YAML: {said}") from None


def _check_plain(text: str) -> None:
    """Nothing that becomes more than what is written. Events come one by one: none is expanded."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _refused(event, "anchors and aliases (& and *) are not for recipes: write it out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise _refused(event, f"{tag}: tags (!) are not for recipes")
        if depth > MOST_DEPTH:
            raise _refused(event, f"nested more than {MOST_DEPTH} deep")


def _refused(where: Any, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _kind(node: yaml.Node) -> str:
    return type(node).__name__.removesuffix("Node").lower()


def _pairs(node: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The entries of a mapping, each key once."""
    if node is None:  # an empty file
        return
    if not isinstance(node, yaml.MappingNode):
        raise _refused(node, f"expected `key: value` lines, got a {_kind(node)}")
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused(key, f"a {_kind(key)} as key: expected a word")
        if (name := key.value.replace("-", "_")) in seen:
            raise _refused(key, f"{key.value!r} is there twice")
        seen.add(name)
        yield key, value


def _words(key: yaml.ScalarNode, value: yaml.Node, known: Sequence[str]) -> list[str]:
    """``--key=word``, or ``--key word ...`` for a list."""
    if key.value not in known:
        hint = near(key.value, known, "fusedkd distill")
        raise _refused(key, f"{key.value[:80]!r} is not a flag{hint}")
    if not isinstance(value, yaml.SequenceNode):
        word = _word(key, value)
        return [] if word is None else [f"--{key.value}={word}"]
    words = [_word(key, item) for item in value.value]
    for item, word in zip(value.value, words, strict=True):
        if word is None or word.startswith("--"):
            raise _refused(item, f"{key.value}: {word or 'nothing'!r} in a list: expected a value")
    return [f"--{key.value}", *map(str, words)] if words else []


def _word(key: yaml.ScalarNode, node: yaml.Node) -> str | None:
    """A value as it is written; None for null."""
    if isinstance(node, yaml.SequenceNode):
        raise _refused(node, f"{key.value}: a list in a list: expected values")
    if isinstance(node, yaml.MappingNode):
        return _json(key, node)
    kind, word = node.tag.rpartition(":")[2], str(node.value)
    if not word.replace("\n", "").replace("\t", "").isprintable():
        raise _refused(node, f"{key.value}: {word[:40]!a}: expected what can be printed")
    if kind == "null":
        return None
    return _WORDS.get(kind, {}).get(word.lower(), word)


def _json(key: yaml.ScalarNode, node: yaml.MappingNode) -> str:
    """For the flags of transformers that take JSON."""
    _check_keys(node)
    try:
        return json.dumps(yaml.SafeLoader("").construct_object(node, deep=True))
    except (TypeError, ValueError, OverflowError) as error:  # dates; what Python has no number for
        raise _refused(node, f"{key.value}: expected what JSON can hold ({error})") from None


def _check_keys(node: yaml.Node) -> None:
    if isinstance(node, yaml.MappingNode):
        for _, value in _pairs(node):
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value)
