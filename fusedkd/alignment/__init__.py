"""Two tokenizers, one text: which tokens of either cover the same bytes, and what can be distilled
across them. Tokenizers are transformers' fast ones, or the ``tokenizers`` library's own.

:func:`byte_offsets` says which bytes each token covers, :func:`align` which tokens of both cover
the same, :func:`alm_loss` compares how probable the two models think those bytes;
:func:`shared_vocabulary` gives the tokens that both have."""

from fusedkd.alignment.likelihood import alm_loss
from fusedkd.alignment.offsets import byte_offsets
from fusedkd.alignment.rows import Retelling, Retold
from fusedkd.alignment.spans import align, pad_spans
from fusedkd.alignment.vocabulary import shared_vocabulary

__all__ = [
    "Retelling",
    "Retold",
    "align",
    "alm_loss",
    "byte_offsets",
    "pad_spans",
    "shared_vocabulary",
]
