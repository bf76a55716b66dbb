"""What the student writes is drawn from its own distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import nn

from fusedkd.train import DistillationArguments
from fusedkd.train.on_policy import OnPolicy

TEMPERATURE, TOKENS, ROWS = 0.7, 12, 256
# what generation_config.json of models on the hub sets; Qwen's has the first three
DEFAULTS: dict[str, Any] = {
    "repetition_penalty": 5.0, "top_k": 2, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.2,
    "epsilon_cutoff": 0.3, "eta_cutoff": 0.3, "no_repeat_ngram_size": 1, "suppress_tokens": [5],
    "begin_suppress_tokens": [5], "bad_words_ids": [[5]], "forced_eos_token_id": 9,
    "min_new_tokens": 12, "min_length": 14, "max_length": 3, "max_time": 1e-9, "num_beams": 2,
    "sequence_bias": [[[5], -9.0]], "exponential_decay_length_penalty": [1, 9.0],
    "num_return_sequences": 2, "return_dict_in_generate": True, "temperature": 9.0,
    "do_sample": False, "stop_strings": ["x"], "renormalize_logits": True, "guidance_scale": 3.0,
}  # fmt: skip


def memoryless() -> tuple[nn.Module, torch.Tensor]:
    """A decoder that gives the same distribution at every position, and its logits."""
    model = build("llama", 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = nn.Parameter(2 * torch.randn(67, generator=generator))
        model.lm_head.bias[5] = 4.0
    return model, model.lm_head.bias.detach()


def written(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.randint(10, 60, (ROWS, 3), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return OnPolicy(1.0, 2, TOKENS, TEMPERATURE)(model, batch, seed=3)


@pytest.mark.parametrize("name", [None, *DEFAULTS])
def test_the_law_is_the_models_softmax(name: str | None) -> None:
    """Pearson's chi-square of the written tokens against the softmax, with a fixed seed: all of
    the defaults that would bend it leave the very same text."""
    model, logits = memoryless()
    plain = written(model)
    if name is not None:
        setattr(model.generation_config, name, DEFAULTS[name])
        changed = model.generation_config
        again = written(model)
        assert all(torch.equal(plain[key], again[key]) for key in plain)
        assert model.generation_config is changed
        return
    tokens = plain["input_ids"][plain["labels"] != -100]
    expected = len(tokens) * (logits.double() / TEMPERATURE).softmax(-1)
    counts = torch.bincount(tokens, minlength=67).double()
    rare = expected < 5  # Cochran's rule
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    degrees = len(wanted) - 1
    assert degrees > 15 and statistic < degrees + 3 * (2 * degrees) ** 0.5


def test_every_end_of_text_ends_a_row() -> None:
    model, _ = memoryless()
    model.generation_config.eos_token_id = [5, 9]
    batch = written(model)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        new = ids[labels != -100].tolist()
        ends = [n for n, token in enumerate(new) if token in (5, 9)]
        assert ends in ([], [len(new) - 1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "some"}, "objective='some': expected one of exact, sampled"),
        ({"loss_type": "k1"}, "loss_type='k1': expected one of k2, k3, policy.*2506.09477"),
        ({"on_policy_share": 0.5}, "on_policy_share=0.5.*expected 1"),
        ({"temperature": 2.0}, "temperature=2, on_policy_temperature=1: expected one number"),
        ({"schedules": ["temperature=cosine:2"]}, "without a schedule"),
        ({"kd_tokens": "all"}, "a prompt's tokens are not drawn"),
        ({"row_rule": "own_rules:entropy_gate"}, "no divergence of whole distributions"),
    ],
)
def test_what_a_sampled_objective_needs(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sampled = {"objective": "sampled", "on_policy_share": 1.0, "output_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        DistillationArguments(**{**sampled, **options})
