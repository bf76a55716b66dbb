"""What identifies a sequence, a tokenizer and a model: hashes of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

KEY_BYTES = 16


def sha256(data: Any) -> str:
    """Of a buffer, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sequence_key(ids: Sequence[int] | np.ndarray, tokenizer: str) -> bytes:
    """The 16 bytes under which a sequence is found: BLAKE2b-128, keyed with the tokenizer's hash
    (its 32 bytes), of the token ids as little-endian int64."""
    data = np.ascontiguousarray(ids, dtype="<i8")
    return hashlib.blake2b(data.data, digest_size=KEY_BYTES, key=bytes.fromhex(tokenizer)).digest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary: the JSON of its sorted (id, token) pairs. Two tokenizers with the
    same hash mean the same by an id."""
    pairs = sorted((number, token) for token, number in tokenizer.get_vocab().items())
    return sha256(json.dumps(pairs, separators=(",", ":")).encode())


def weight_hash(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, as ``model.state_dict().items()`` gives them."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if isinstance(tensor, DTensor):  # by all processes that hold it
            tensor = tensor.full_tensor()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
