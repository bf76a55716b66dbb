"""``head.safetensors``: what turns the hidden states of a cache into logits."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import safetensors.torch

from fusedkd.cache.errors import Damaged
from fusedkd.cache.files import check_plain
from fusedkd.cache.keys import sha256
from fusedkd.cache.manifest import HEAD, HeadFile
from fusedkd.distributions import LMHead

REMEDY = "Run the `fusedkd cache` command that made it again: it writes the head anew."


class SavedHead(NamedTuple):
    """A teacher's head as it is written, and what the manifest says of it."""

    data: bytes
    file: HeadFile

    @classmethod
    def of(cls, head: LMHead) -> SavedHead:
        """Of a head with any hidden states."""
        named = {"weight": head.weight, "bias": head.bias}
        there = {n: x.detach().cpu().contiguous() for n, x in named.items() if x is not None}
        data = safetensors.torch.save(there)
        more = float(head.logit_scale), None if head.softcap is None else float(head.softcap)
        return cls(data, HeadFile(HEAD, len(data), sha256(data), *more))


def open_head(folder: Path, file: HeadFile, columns: int, width: int) -> LMHead:
    """The head, with no hidden states (0, H).

    Raises:
        Damaged: the file is missing, not what was written, or not what is written.
    """
    path = folder / file.name
    try:
        if check_plain(path, REMEDY) != file.bytes:
            raise ValueError(f"expected {file.bytes:,} bytes")
        data = path.read_bytes()
        if sha256(data) != file.sha256:
            raise ValueError("its checksum differs")
        found = safetensors.torch.load(data)
        weight, bias = found.pop("weight"), found.pop("bias", None)
        if found or weight.shape != (columns, width) or not weight.is_floating_point():
            raise ValueError(f"expected a weight ({columns}, {width}) and perhaps a bias")
        if bias is not None and (bias.shape != (columns,) or bias.dtype != weight.dtype):
            raise ValueError(f"expected a bias ({columns},) of {weight.dtype}")
    except Damaged:
        raise
    except Exception as error:  # safetensors raises one of many things about foreign bytes
        said = ascii(str(error).split("\n")[0].rstrip("."))[1:-1]
        raise Damaged(f"{path} is damaged: {said}. {REMEDY}") from None
    return LMHead(weight.new_empty(0, width), weight, bias, file.logit_scale, file.softcap)
