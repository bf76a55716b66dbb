"""``fusedkd cache import --from vllm-hidden``: hidden states that vLLM wrote."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn

from fusedkd.cache.build import NO_HEAD, plan
from fusedkd.cache.head import SavedHead
from fusedkd.cache.hidden import HiddenLayout, layout_of
from fusedkd.cache.keys import tokenizer_hash
from fusedkd.cache.policy import Policy
from fusedkd.cache.writer import per_shard, write_cache
from fusedkd.distributions import LMHead
from fusedkd.errors import UserError, as_user_error
from fusedkd.models.loading import load_tokenizer, required
from fusedkd.models.saved import SavedModel
from fusedkd.teachers import LiveTeacher
from fusedkd.train.tasks import saved_task

TOKENS = 100  # whose distributions are compared with the live model's
FAR = 0.02  # nats per token; bf16 on both sides leaves some 0.001
NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "final_norm")


class Choice(NamedTuple):
    """Which of the states are the head's input, and what is still to be done with them."""

    layer: int
    norm: nn.Module | None


def import_hidden(args: Namespace) -> None:
    """Write the cache; ``args`` are the flags.

    Raises:
        UserError: no such files, or states that the head does not turn into what the model says.
    """
    tokenizer = load_tokenizer(args.tokenizer)
    files = sorted(Path(args.source).rglob("*.safetensors"))
    if not files:
        raise UserError(f"{args.source}: no .safetensors files there, as vLLM's connector writes.")
    name = required("head", args.head)
    model = _model(name)
    size = len(tokenizer) if args.vocab_size is None else args.vocab_size
    head, choice = _chosen(files, model)
    ids = [_read(path, size)[0] for path in files]
    hidden = head.weight.shape[1]
    layout = layout_of(Policy(args.hidden or "bf16", hidden), size, (1.0,))
    assert isinstance(layout, HiddenLayout)
    found, first = plan(ids, tokenizer_hash(tokenizer))
    facts = {
        "teacher": name if args.teacher == "unknown" else args.teacher,
        "teacher_hash": None,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "vocab_size": size,
        "padded_vocab_size": head.weight.shape[0],
        "temperatures": layout.temperatures,
        "policy": layout.policy,
        "source": "imported from vLLM's hidden states",
        "per_shard": per_shard(found, layout.most_bytes_per_token),
    }

    def rows(numbers: range) -> Iterator[dict[str, bytes]]:
        for place in numbers:
            states = _states(_read(files[first[place]], size)[1], choice, head)
            yield layout.encode_states(states)

    write_cache(args.output, found, facts, rows, SavedHead.of(head))
    Console(markup=False, emoji=False).print(
        f"{args.output}: imported. `fusedkd cache info {args.output}` tells."
    )


def _model(name: str) -> Any:
    saved = SavedModel("head", name)
    task = saved_task(saved)
    if task is None or task.no_cache:
        raise UserError(f"--head {name}: expected a causal language model.")
    return saved.load(task.loader(saved.config())).eval().requires_grad_(False)


def _read(path: Path, size: int) -> tuple[np.ndarray, Tensor]:
    """Token ids (L,) and states (L, layers, H).

    Raises:
        UserError: the file is something else.
    """
    with as_user_error(f"{path} has no hidden states as vLLM writes them", Exception):
        with safe_open(path, "pt") as file:
            ids, states = file.get_tensor("token_ids"), file.get_tensor("hidden_states")
        if ids.dim() != 1 or states.dim() != 3 or len(ids) != len(states) or not len(ids):
            raise ValueError(
                f"token_ids {tuple(ids.shape)}, hidden_states {tuple(states.shape)}: expected (L,) "
                "and (L, layers, H)."
            )
        if int(ids.min()) < 0 or int(ids.max()) >= size:
            raise ValueError(f"an id {int(ids.max())}: expected 0 to {size - 1}, the vocabulary.")
    return ids.numpy().astype(np.int64), states


def _states(states: Tensor, choice: Choice, head: LMHead) -> Tensor:
    chosen = states[:, choice.layer].to(head.weight.dtype)
    with torch.inference_mode():
        return chosen if choice.norm is None else choice.norm(chosen)


def _chosen(files: list[Path], model: Any) -> tuple[LMHead, Choice]:
    """The head, and what of the states it turns into the live model's distributions.

    Raises:
        UserError: none of them: they are of other layers, or of another model.
    """
    run, known = LiveTeacher(model), TOKENS
    columns = model.get_input_embeddings().weight.shape[0]
    distances: dict[Choice, list[float]] = {}
    base = model.base_model
    norm = next((x for n in NORMS if (x := getattr(base, n, None)) is not None), None)
    head: LMHead | None = None
    for path in islice(files, TOKENS):
        ids, states = _read(path, columns)
        ids, states = ids[:known], states[:known]
        live = run({"input_ids": torch.from_numpy(ids)[None]})
        if not isinstance(live, LMHead):
            raise UserError(NO_HEAD)
        head = live
        if states.shape[-1] != head.weight.shape[1]:
            raise UserError(
                f"{path}: states of {states.shape[-1]} numbers, and the head takes "
                f"{head.weight.shape[1]}: expected the model that they are of."
            )
        expected = _logs(head, head.hidden[0])
        for layer in range(states.shape[1]):
            for choice in (Choice(layer, None), Choice(layer, norm)):
                logs = _logs(head, _states(states, choice, head))
                apart = (expected.exp() * (expected - logs)).sum(-1)
                distances.setdefault(choice, []).extend(apart.tolist())
        known -= len(ids)
        if known <= 0:
            break
    assert head is not None
    best = min(distances, key=lambda choice: float(np.mean(distances[choice])))
    if not (far := float(np.mean(distances[best]))) <= FAR:
        raise UserError(
            f"{files[0].parent}: no layer of the states gives, with or without the final norm, "
            f"what the model says: {far:.3f} nats per token at best, expected at most {FAR}. Have "
            "vLLM extract the last layer, of the model that --head names."
        )
    return head, best


def _logs(head: LMHead, hidden: Tensor) -> Tensor:
    product = torch.nn.functional.linear(hidden, head.weight, head.bias)
    found = product.float() * head.logit_scale
    if head.softcap is not None:
        found = (found / head.softcap).tanh() * head.softcap
    return found.log_softmax(-1)
