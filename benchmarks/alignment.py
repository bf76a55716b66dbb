"""Two tokenizers: what it takes to align a million tokens, and what ALM adds to the
log-probabilities that it compares. Times are the best of several rounds, in one process.

``python -m benchmarks.alignment [--tokens 1000000] [--vocab 151936] [--hidden 896]``
"""

from __future__ import annotations

import argparse

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusedkd import LMHead, token_log_probs
from fusedkd.alignment import align, alm_loss, byte_offsets
from fusedkd.benchmarks.tokens import best
from fusedkd.data.stdlib import stdlib_texts


def tokenizer(size: int, texts: list[str]) -> Tokenizer:
    """A byte-level BPE."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    about = trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(texts, about)
    return made


def alignment(tokens: int) -> None:
    """Print the seconds for so many tokens of each side."""
    texts = stdlib_texts()
    student, teacher = tokenizer(1000, texts[:50]), tokenizer(4000, texts[50:150])
    text = "".join(texts)
    while len(text) < 4 * tokens:
        text += text
    coarse = teacher.encode(text[: 4 * tokens])
    text = text[: coarse.offsets[min(tokens, len(coarse.ids)) - 1][1]]
    ids = [kind.encode(text).ids for kind in (student, teacher)]
    offsets = [byte_offsets(k, text, i) for k, i in zip((student, teacher), ids, strict=True)]
    times = best(
        {
            "byte_offsets, student": lambda: byte_offsets(student, text, ids[0]),
            "align": lambda: align(*offsets),
        },
        3,
    )
    spans = len(align(*offsets)[0])
    print(
        f"{len(ids[0]):,} and {len(ids[1]):,} tokens of {len(text.encode()):,} bytes: "
        f"{spans:,} spans"
    )
    for name, seconds in times.items():
        print(f"  {name}: {seconds:.3f} s")


def loss(vocabulary: int, hidden: int, tokens: int = 512) -> None:
    """Print the time of the log-probabilities with ALM on them over that without."""
    weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16) / hidden**0.5
    states = torch.randn(tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(vocabulary, (tokens,))
    teacher = -3 * torch.rand(tokens)
    spans = torch.arange(0, tokens - 2).view(-1, 2) + torch.tensor([0, 1])

    def run(with_alm: bool) -> None:
        found = token_log_probs(LMHead(states, weight), ids).log_probs
        value = alm_loss(found, teacher, spans, spans) if with_alm else found.sum()
        torch.autograd.grad(value, states)

    times = best({"alone": lambda: run(False), "with ALM": lambda: run(True)}, 5)
    print(
        f"{tokens} log-probabilities of {vocabulary:,} x {hidden}, forward and backward: with ALM "
        f"{times['with ALM'] / times['alone']:.3f}x"
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    flags = parser.parse_args()
    alignment(flags.tokens)
    loss(flags.vocab, flags.hidden)


if __name__ == "__main__":
    main()
