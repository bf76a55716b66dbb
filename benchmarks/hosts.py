"""Other libraries' trainers and losses before and after their import is replaced.

    python -m fusedkd.benchmarks.hosts --tokens 512 --vocabulary 151936

Each line is measured in a fresh process on the CPU: one forward and backward of a loss, or of a
trainer's ``compute_loss`` on one-layer models, after one of few tokens to warm up. Memory is the
peak resident set over what was resident before. The numbers of the two must agree.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from .child import in_child
from .peak import peak, reset_peak

HIDDEN = 256  # of both models: the vocabulary is what is measured
Step = Callable[[], Tensor]  # makes the loss
TIMEOUT = 900  # seconds


def _liger(after: bool, n: int, v: int) -> Step:
    name = "fusedkd.integrations.liger" if after else "liger_kernel.chunked_loss"
    loss = __import__(name, fromlist=["x"]).LigerFusedLinearJSDLoss(compiled=True)
    tensors = _heads(n, v)
    return lambda: loss(*tensors[:4], tensors[4])


def _trl_op(after: bool, n: int, v: int) -> Step:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    from fusedkd.integrations.trl import chunked_divergence_loss as ours

    s, w, t, u, y = _heads(n, v)
    mask = torch.ones_like(y)[None]
    function: Any = ours if after else theirs
    return lambda: function(s[None], t[None], w, u, mask, 0.5)[0]


def _torchtune(after: bool, n: int, v: int) -> Step:
    """torchtune is not asked for: its forward KL is these lines."""
    from fusedkd.integrations.torchtune import ForwardKLLoss

    make = torch.Generator().manual_seed(0)
    s, t = (torch.randn(n, v, generator=make) for _ in range(2))
    s.requires_grad_()
    y = torch.zeros(n, dtype=torch.int64)
    if after:
        return lambda: ForwardKLLoss()(s, t, y)

    def plain() -> Tensor:
        p, lq = t.softmax(-1, dtype=torch.float32), s.log_softmax(-1, dtype=torch.float32)
        return -(p * lq).sum(-1).mean()

    return plain


def _heads(n: int, v: int) -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, HIDDEN, generator=make) / 8 for rows in (n, v, n, v)]
    for student in tensors[:2]:
        student.requires_grad_()
    return [*tensors, torch.randint(0, v, (n,), generator=make)]


def _trainer(kind: str) -> Callable[[bool, int, int], Step]:
    def make(after: bool, n: int, v: int) -> Step:
        from trl.experimental import gkd, gold

        from fusedkd.integrations import trl as ours

        host: Any = {"GKD": gkd, "GOLD": gold}[kind]
        args = getattr(host, f"{kind}Config")(
            tempfile.mkdtemp(), **PLAIN, dataset_kwargs={"skip_prepare_dataset": True}
        )
        trainer = getattr(ours if after else host, f"{kind}Trainer")(
            *(_model(v, 1), _model(v, 2), args),
            data_collator=list,
            train_dataset=Dataset.from_list([{"messages": []}]),
            processing_class=_tokenizer(),
        )
        ids = torch.randint(0, v, (2, n // 2), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        return lambda: trainer.compute_loss(trainer.model, batch)

    return make


# of both trainers: one step on given rows, in fp32, and nothing around it
PLAIN: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "lmbda": 0.0,
    "temperature": 1.0,
}


def _tokenizer() -> Any:
    """Of a few words: the trainers want one, but get ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, "<unk>")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), **special)


def _model(v: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=v, **sizes, **heads, initializer_range=0.1))


HOSTS: dict[str, Callable[[bool, int, int], Step]] = {
    "TRL GKDTrainer": _trainer("GKD"),
    "TRL GOLDTrainer, JSD": _trainer("GOLD"),
    "TRL _chunked_divergence_loss": _trl_op,
    "Liger LigerFusedLinearJSDLoss": _liger,
    "torchtune ForwardKLLoss": _torchtune,
}


def measure(host: str, after: bool, n: int, v: int) -> dict[str, float]:
    """One step on ``n`` tokens of a vocabulary of ``v``: its loss, seconds, and bytes at most."""
    HOSTS[host](after, 8, 1000)().backward()
    step = HOSTS[host](after, n, v)
    if host.startswith("Liger") and not after:
        step().backward()  # compiles for the shape
    before, start = reset_peak(), time.perf_counter()
    loss = step()
    loss.backward()
    seconds = time.perf_counter() - start
    return {"loss": float(loss.detach()), "seconds": seconds, "bytes": peak() - before}


COLUMNS = (("loss", 1, ".6g"), ("seconds", 1, ".2f"), ("bytes", 2**30, ".2f"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hosts", nargs="*", default=list(HOSTS), choices=HOSTS)
    options = parser.parse_args(arguments)
    print("| host | loss | seconds | GiB |\n|---|---|---|---|")
    for host in options.hosts:
        size = (options.tokens, options.vocabulary)
        pair = [in_child(measure, host, after, *size, timeout=TIMEOUT) for after in (False, True)]
        cells = [
            " → ".join(f"{x[name] / scale:{digits}}" for x in pair)
            for name, scale, digits in COLUMNS
        ]
        print(f"| {' | '.join([host, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
