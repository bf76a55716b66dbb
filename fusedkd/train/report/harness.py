"""Benchmarks of EleutherAI's lm-eval, which is optional."""

from __future__ import annotations

from typing import Any


def lm_eval_scores(model: Any, tokenizer: Any, tasks: list[str]) -> dict[str, str]:
    """The scores of a student in memory, by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks)
    return {
        task: ", ".join(
            f"{name.removesuffix(',none')} {value:.4f}"
            for name, value in scores.items()
            if isinstance(value, float) and "stderr" not in name
        )
        for task, scores in results["results"].items()
    }
