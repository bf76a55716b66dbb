"""How a tokenizer spells bytes: what is read off its description, once for each tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

LOWER = "▁"  # U+2581, SentencePiece's space
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ROLES = ("eos", "bos", "sep", "cls", "mask", "pad", "unk")  # one token may have several
_MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")

KINDS = "byte-level BPE, SentencePiece (BPE or Unigram with Metaspace), WordPiece and WordLevel"


@dataclass(frozen=True, eq=False)
class Spelling:
    """What the ids of a tokenizer stand for.

    Args:
        kind: "bytes" (GPT-2's map of bytes to characters), "sentencepiece" (a lower line is a
            space), or "characters" (tokens do not say which spaces they cover).
        pieces: the bytes of each id, None where nobody can say: special tokens, unknown ones.
        added: what is looked for in the text as it is, by id.
        special: those of them that belong to no text, and what stands for the unknown.
        roles: ids of "bos", "eos", ... of those that have them.
        fallback: ids of single bytes that stand in for what the vocabulary lacks.
        prefix: whether a space may be put before a text, or before what follows an added token.
        description: the tokenizer's own, of which :attr:`plain` is made.
    """

    kind: str
    tokens: dict[int, str]
    pieces: dict[int, bytes | None]
    added: dict[int, bytes]
    special: frozenset[int]
    roles: dict[str, int]
    fallback: frozenset[int]
    prefix: bool
    description: dict[str, Any]

    @cached_property
    def plain(self) -> Any:
        """The tokenizer without what it adds to a text, cuts off its spaces, or pads it with."""
        from tokenizers import Tokenizer

        bare = {"post_processor": None, "truncation": None, "padding": None}
        return Tokenizer.from_str(json.dumps(self.description | bare))


def spelling(tokenizer: Any) -> Spelling:
    """Of a fast tokenizer.

    Raises:
        TypeError: it is none, or of no kind that is known here.
    """
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(inner, "to_str") or not hasattr(inner, "get_vocab_size"):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}, of which nobody here knows which bytes "
            f"its tokens stand for: expected a fast tokenizer of transformers or tokenizers: "
            f"{KINDS}; AutoTokenizer.from_pretrained(..., use_fast=True) may make one."
        )
    special = tuple(getattr(tokenizer, "all_special_ids", ()))
    return _read(tokenizer, inner.get_vocab_size(with_added_tokens=True), special)


@lru_cache(maxsize=8)  # by identity; a tokenizer that has got new tokens is read anew
def _read(tokenizer: Any, size: int, special_ids: tuple[int, ...]) -> Spelling:
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    try:
        about = json.loads(inner.to_str())
    except Exception as error:  # a part that is written in Python
        raise TypeError(
            f"tokenizer ({type(tokenizer).__name__}) cannot be read: {error}: expected one whose "
            f"parts are all of the tokenizers library: {KINDS}."
        ) from None
    model = about["model"]
    if model.get("type") not in _MODELS:
        raise TypeError(
            f"tokenizer ({type(tokenizer).__name__}) has a model of type {model.get('type')!r}: "
            f"expected {KINDS}."
        )
    before, after = (
        [part for name in names for part in _parts(about[name])]
        for names in (("normalizer", "pre_tokenizer"), ("decoder",))
    )
    kind = _kind(model, before + after)
    tokens = {number: token for token, number in inner.get_vocab(with_added_tokens=True).items()}
    falls_back = kind == "sentencepiece" and model.get("byte_fallback")
    fallback = {i for i, token in tokens.items() if falls_back and _BYTE.fullmatch(token)}
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    roles["unk"] = _unknown(model, tokens) if roles["unk"] is None else roles["unk"]
    by_role = {role: number for role, number in roles.items() if number is not None}
    entries = [entry for entry in about["added_tokens"] if entry["id"] not in fallback]
    added = {entry["id"]: entry["content"].encode() for entry in entries}
    special = {entry["id"] for entry in entries if entry["special"]}
    special |= {*special_ids, *by_role.values()}
    pieces = {
        number: None
        if number in special
        else added.get(number) or _piece(kind, token, number in fallback)
        for number, token in tokens.items()
    }
    prefix = any(
        part["type"] == "Prepend"
        or part.get("add_prefix_space")
        or part.get("prepend_scheme", "never") != "never"
        for part in before
    )
    return Spelling(
        kind, tokens, pieces, added, frozenset(special), by_role, frozenset(fallback), prefix, about
    )


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """A step of a tokenizer, and those in it."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            for inner in part.get(name, ()):
                yield from _parts(inner)


def _kind(model: dict[str, Any], parts: list[dict[str, Any]]) -> str:
    if model["type"] in ("WordPiece", "WordLevel"):
        return "characters"
    if any(part["type"] == "ByteLevel" for part in parts):
        return "bytes"
    lowered = any(
        part["type"] == "Metaspace" or (part["type"] == "Replace" and LOWER in str(part))
        for part in parts
    )
    return "sentencepiece" if lowered else "characters"


def _unknown(model: dict[str, Any], tokens: dict[int, str]) -> int | None:
    if model["type"] == "Unigram":
        number = model.get("unk_id")
        return number if isinstance(number, int) else None
    name = model.get("unk_token")
    return next((number for number, token in tokens.items() if token == name), None)


def _piece(kind: str, token: str, fallback: bool) -> bytes | None:
    if kind == "characters":
        return None
    if kind == "sentencepiece":
        if fallback:
            return bytes([int(token[3:5], 16)])
        return token.replace(LOWER, " ").encode()
    try:
        return bytes(_BYTES[letter] for letter in token)
    except KeyError:  # an entry that the model never makes
        return None


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's map: printable bytes are their own characters, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _bytes_of_letters()
