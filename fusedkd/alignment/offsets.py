"""Which bytes of a text each token covers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedkd.alignment.spelling import Spelling, spelling

Ranges = list[tuple[int, int]]


def byte_offsets(tokenizer: Any, text: str, ids: Sequence[int] | Tensor) -> Tensor:
    """Which bytes of ``text.encode()`` each token covers, also where a token ends inside of a
    character.

    What a tokenizer adds covers nothing: BOS and EOS that are not written in the text, the space
    that SentencePiece puts before it. A token that is written there, as of a chat template, covers
    its bytes. Bytes that no token covers (WordPiece drops spaces, normalizers drop more) belong to
    the token that follows, combining marks to the one before. Where a normalizer has merged
    characters, or the vocabulary lacks one, tokens share the bytes and their ranges overlap.

    Args:
        tokenizer: a fast one, of transformers or tokenizers: byte-level BPE, SentencePiece,
            WordPiece or WordLevel.
        text: all that was tokenized.
        ids: (L,) what it became, with or without special tokens.

    Returns:
        (L, 2) int64, on the CPU: first byte, and the one after the last.

    Raises:
        TypeError: another kind of tokenizer, ``text`` no str, or ``ids`` no whole numbers.
        ValueError: the tokens are not those of this text; it names the first that is not.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}: expected a str.")
    known, numbers = spelling(tokenizer), _numbers(ids)
    read = _read(known, text.encode(), numbers)
    if isinstance(read, _Lost):  # normalizers, unknown tokens, tokens that drop spaces
        ranges = np.array(_encoded(known, text, numbers, read), np.int64).reshape(-1, 2)
    else:
        ranges = np.stack([np.array([0, *read[:-1]][: len(read)]), read], 1).astype(np.int64)
    return torch.from_numpy(ranges)


def _numbers(ids: Sequence[int] | Tensor) -> list[int]:
    array = ids.detach().cpu().numpy() if isinstance(ids, Tensor) else np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"ids has shape {tuple(array.shape)} and is {array.dtype}: expected (L,) whole "
            "numbers, the tokens of one text."
        )
    numbers: list[int] = array.tolist()
    return numbers


class _Lost:
    """Where the bytes of the tokens are not the text's: the token, and the byte that it begins."""

    def __init__(self, token: int, byte: int) -> None:
        self.token, self.byte = token, byte


def _read(known: Spelling, data: bytes, ids: list[int]) -> list[int] | _Lost:
    """Where each token ends, and the next begins, read by their own bytes. Where there are two ways
    to go on, as at a special token that the text spells, too, the other is tried once the first has
    failed."""
    pieces, ends = known.pieces, [0] * len(ids)
    others: list[tuple[int, int]] = []  # what has not been tried: a token, and where it may end
    been: set[tuple[int, int]] = set()  # where ways have parted
    lost = _Lost(0, 0)
    i = at = 0
    while True:
        while i < len(ids):
            piece = pieces.get(ids[i])
            if piece is not None and not (known.prefix and _opens(known, ids, i)):  # nearly always
                if not data.startswith(piece, at):
                    break
                at += len(piece)
            else:
                found = _ends(known, data, ids[i], at, _opens(known, ids, i))
                if not found or (len(found) > 1 and (i, at) in been):
                    break
                been.add((i, at))
                others += [(i, other) for other in found[:0:-1]]
                at = found[0]
            ends[i] = at
            i += 1
        if i == len(ids) and at == len(data):
            return ends
        if i >= lost.token:
            lost = _Lost(i, at)
        if not others:
            return lost
        i, at = others.pop()
        ends[i] = at
        i += 1


def _opens(known: Spelling, ids: list[int], i: int) -> bool:
    """Whether a tokenizer may put a space before this token."""
    return i == 0 or ids[i - 1] in known.added or ids[i - 1] in known.special


def _ends(known: Spelling, data: bytes, number: int, at: int, opens: bool) -> list[int]:
    """Where a token that begins at a byte may end, the likeliest first."""
    piece = known.pieces.get(number)
    if number in known.special:
        written = known.added.get(number) or known.tokens[number].encode()
        ends = [at + len(written)] if data.startswith(written, at) else []
        return [at, *ends] if at == 0 else [*ends, at]  # before a text they are BOS, if anything
    if piece is None:
        return []
    ends = [at + len(piece)] if data.startswith(piece, at) else []
    if opens and known.prefix and piece[:1] == b" " and data.startswith(piece[1:], at):
        ends.append(at + len(piece) - 1)
    return ends


# ----------------------------------------------------------------------------------------------
# where bytes alone do not tell


def _encoded(known: Spelling, text: str, ids: list[int], lost: _Lost) -> Ranges:
    """By the offsets, in characters, of the text when it is tokenized again."""
    found = known.plain.encode(text, add_special_tokens=False)
    at = np.array([0, *np.cumsum([len(letter.encode()) for letter in text])]).tolist()
    own = [(at[start], at[end]) for start, end in found.offsets]
    matched = _matched(known, ids, found.ids)
    if isinstance(matched, int):
        if lost.token < len(ids) and known.kind == "characters":
            lost = _Lost(matched, own[matched][0] if matched < len(own) else at[-1])
        raise _other_text(known, text, ids, lost)
    kept = _shared(known, text.encode(), _without_gaps(own, text, at), found.ids)
    ranges, end = [], 0
    for place in matched:
        start, end = (end, end) if place is None else kept[place]
        ranges.append((start, end))
    return ranges


def _matched(known: Spelling, ids: list[int], own: list[int]) -> list[int | None] | int:
    """The place of each token in those that the text alone becomes; special tokens may be there
    besides. Or the first that is neither."""
    places: list[int | None] = []
    place = 0
    for i, number in enumerate(ids):
        same = place < len(own) and own[place] == number
        more = i == 0 and len(ids) > len(own)  # BOS before a text that begins with it
        skips = number in known.special and (more or not same)
        if not same and not skips:
            return i
        places.append(None if skips else place)
        place += not skips
    return places if place == len(own) else len(ids)


def _without_gaps(ranges: Ranges, text: str, at: list[int]) -> Ranges:
    """Each byte with a token: what nobody covers with the next, its combining marks with the
    last."""
    letters = {byte: i for i, byte in enumerate(at)}
    ends, follows = [0] * len(ranges), at[-1]
    for i in range(len(ranges) - 1, -1, -1):
        start, end = ranges[i]
        letter = letters[end]
        while at[letter] < follows and unicodedata.category(text[letter])[0] == "M":
            letter += 1
        ends[i] = at[letter]
        follows = follows if i and ranges[i - 1][1] > start else start  # those that share an end
    filled, reached = [], 0
    for (start, _), end in zip(ranges, ends, strict=True):
        filled.append((min(start, reached), end))
        reached = max(reached, end)
    return filled


def _shared(known: Spelling, data: bytes, ranges: Ranges, ids: list[int]) -> Ranges:
    """Cut what tokens share, as the bytes of one character, where their own bytes tell how."""
    starts = np.array([start for start, _ in ranges] + [len(data)])
    ends = np.maximum.accumulate([0] + [end for _, end in ranges])
    later = np.minimum.accumulate(starts[::-1])[::-1]
    cuts = np.flatnonzero(later >= ends)  # before which tokens nothing is shared
    cut = list(ranges)
    for first, last in pairwise(cuts.tolist()):
        pieces = [known.pieces.get(number) or b"" for number in ids[first:last]]
        start, end = int(starts[first]), int(ends[last])
        if last - first > 1 and b"".join(pieces) == data[start:end]:
            for i, piece in enumerate(pieces, first):
                cut[i] = start, start + len(piece)
                start += len(piece)
    return cut


def _other_text(known: Spelling, text: str, ids: list[int], lost: _Lost) -> ValueError:
    data = text.encode()
    there = data[lost.byte : lost.byte + 12]
    if lost.token == len(ids):
        return ValueError(
            f"ids: {len(ids):,} tokens that end at byte {lost.byte:,} of {len(data):,}, before "
            f"{there!r}: expected those of the whole text; cut the text, too, or give all ids."
        )
    number = ids[lost.token]
    token = known.tokens.get(number)
    name = f"{number}, which the tokenizer does not have" if token is None else repr(token)
    rest = repr(there) if there else "nothing more"
    return ValueError(
        f"ids[{lost.token}] is {name}, and at byte {lost.byte:,} of {len(data):,} the text has "
        f"{rest}: expected the tokens that this tokenizer makes of this text."
    )
