"""Whether two tokenizers are one: the same ids for the same tokens, and the same tokens for the
same text."""

from __future__ import annotations

import json
from typing import Any

from fusedkd.errors import UserError

# Where normalizers and pre-tokenizers part: case, accents, digits, spaces, scripts, code
_PROBES = (
    "The quick BROWN fox, isn't it? We'll see.", "  two  spaces\tand\n\nlines \r\n end ",
    "1 12 123 1234 12345 3.14159 1,000,000", "naïve café Å Å ﬁ ½ ＡＢＣ",
    "für Öl, ελληνικά, русский",
    "你好，世界。こんにちは 안녕하세요", "שלום مرحبا हिन्दी ไทย", "🙂👩‍👩‍👧 ∑∫≠ “quotes” —",
    "def f(x):\n    return x**2  # ok\n\tif a!=b:", "https://example.com/a?b=c&d=%20 a_b-c.d@e",
)  # fmt: skip


def check_same(student: Any, teacher: Any, names: dict[str, str]) -> None:
    """Compare all that decides which ids a text becomes.

    Args:
        student, teacher: tokenizers.
        names: of their folders or on the hub, by role, for the remedy.

    Raises:
        UserError: how they differ, and what helps.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    for token, number in sorted(ours.items(), key=lambda item: item[1]):  # always the same one
        if theirs.get(token, number) != number:
            raise _differ(
                f"{token!r} is {number} for the student and {theirs[token]} for the teacher"
            )
    _check_extra(ours, theirs, names)
    if (merges := _merges(student)) != _merges(teacher):
        n = sum(1 for a, b in zip(merges, _merges(teacher), strict=False) if a != b)
        raise _differ(
            f"their ids are the same and their merges are not ({max(n, 1):,} of {len(merges):,}), "
            "so that one text becomes other tokens"
        )
    for text in _PROBES:
        a, b = (kind(text, add_special_tokens=False)["input_ids"] for kind in (student, teacher))
        if a != b:
            parts = _parts(student, teacher)
            raise _differ(
                f"their vocabularies are the same{parts}, and {text[:30]!r} becomes {a[:8]} for "
                f"the student and {b[:8]} for the teacher"
            )


def _differ(how: str) -> UserError:
    return UserError(
        f"the tokenizers differ: {how}. Distillation by token needs one vocabulary: expected one "
        "tokenizer, or --cross_tokenizer alm (shared_kl, both), which compares what both read of "
        "the same bytes; if you know better, say which with --tokenizer."
    )


def _check_extra(ours: dict[str, int], theirs: dict[str, int], names: dict[str, str]) -> None:
    """A few tokens more, as of padding, are no other vocabulary, but the other side cannot read
    them."""
    more = {"student": ours.keys() - theirs.keys(), "teacher": theirs.keys() - ours.keys()}
    sides = [side for side, tokens in more.items() if tokens]
    if not sides:
        return
    side = sides[0]
    other = "teacher" if side == "student" else "student"
    vocabulary = ours if side == "student" else theirs
    some = sorted(more[side], key=vocabulary.__getitem__)[:3]
    shown = ", ".join(f"{token!r} = {vocabulary[token]}" for token in some)
    count = len(more[side])
    what = (
        f"{count:,} token{'s' if count > 1 else ''} of the {side}'s ({shown}) the {other}'s lacks"
    )
    if len(sides) == 2:
        raise _differ(f"{what}, and {len(more[other]):,} the other way round")
    raise UserError(
        f"the tokenizers differ: {what}. Where the data do not need them, take the one that both "
        f"models can read: --tokenizer {names[other]}; where they do, --cross_tokenizer alm."
    )


def _backend(tokenizer: Any) -> dict[str, Any]:
    inner = getattr(tokenizer, "backend_tokenizer", None)
    return {} if inner is None else json.loads(inner.to_str())


def _merges(tokenizer: Any) -> list[Any]:
    """In the order in which they are applied; none of a tokenizer that is no BPE."""
    return _backend(tokenizer).get("model", {}).get("merges") or []


def _parts(student: Any, teacher: Any) -> str:
    """Which steps of the two differ."""
    ours, theirs = _backend(student), _backend(teacher)
    names = [n for n in ("normalizer", "pre_tokenizer", "model") if ours.get(n) != theirs.get(n)]
    return f", their {' and '.join(names)} not" if names else ""
