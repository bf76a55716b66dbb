"""The tokens that two vocabularies share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fusedkd.alignment.spelling import Spelling, spelling


def shared_vocabulary(student_tokenizer: Any, teacher_tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Tokens of the same bytes, as one id in either vocabulary.

    Spaces count: "Ġthe" and "▁the" are " the", "the" is another. Of several tokens with the same
    bytes, those that stand for single bytes (``<0x41>``) go with each other, and with another's
    only if that has no better one. Special tokens go by their role (EOS with EOS, whatever they are
    called), those without one by their text; with what the other side spells in ordinary tokens,
    never. WordPiece and WordLevel do not say whether a space lies before a word: between two such
    all tokens of the same text are shared; with other tokenizers only those that continue a word.

    Args:
        student_tokenizer, teacher_tokenizer: fast ones, of transformers or tokenizers; roles are
            known of transformers' only.

    Returns:
        student_ids, teacher_ids: (V',) int64 on the CPU, each id once, rising for the student.

    Raises:
        TypeError: a tokenizer of which nobody here knows which bytes its tokens stand for.
    """
    student, teacher = spelling(student_tokenizer), spelling(teacher_tokenizer)
    words = student.kind == teacher.kind == "characters"
    ours, theirs = _ordinary(student, words), _ordinary(teacher, words)
    pairs = [pair for key in ours.keys() & theirs.keys() for pair in _pairs(ours[key], theirs[key])]
    pairs = sorted(pairs + list(shared_special(student, teacher).items()))
    found = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
    return found[:, 0].contiguous(), found[:, 1].contiguous()


Ids = tuple[list[int], list[int]]  # those that are tokens of their own, and those of single bytes


def _ordinary(known: Spelling, words: bool) -> dict[Hashable, Ids]:
    """Ids by their bytes; by how they are written where nobody knows these."""
    found: dict[Hashable, Ids] = defaultdict(lambda: ([], []))
    mark = known.description["model"].get("continuing_subword_prefix") or ""
    for number in sorted(known.tokens.keys() - known.special):
        token, key = known.tokens[number], known.pieces[number]
        if key is None and known.kind == "characters":
            continues = mark != "" and token.startswith(mark)
            text = token[len(mark) :] if continues else token
            if words:
                found[text, continues][0].append(number)
            elif continues:
                found[text.encode()][0].append(number)
        else:  # a str is no bytes: what no text becomes is shared with the same only
            found[token if key is None else key][number in known.fallback].append(number)
    return found


def _pairs(ours: Ids, theirs: Ids) -> list[tuple[int, int]]:
    """Like with like; a single byte with a token only if there is nothing else."""
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a, b, strict=False)]
    return pairs or [((ours[0] + ours[1])[0], (theirs[0] + theirs[1])[0])]


def shared_special(student: Spelling, teacher: Spelling) -> dict[int, int]:
    """Special tokens of the teacher's by those of the student's: by role, then by text."""
    found: dict[int, int] = {}

    def share(ours: dict[str, int], theirs: dict[str, int]) -> None:
        for name, number in ours.items():
            other = theirs.get(name)
            if other is not None and number not in found and other not in found.values():
                found[number] = other

    share(student.roles, teacher.roles)
    texts = ({known.tokens[i]: i for i in sorted(known.special)} for known in (student, teacher))
    share(*texts)
    return found
