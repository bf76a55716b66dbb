"""How long a sequence a model takes, and whether several in one row stay apart in it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from fusedkd.models.heads import is_partitioned
from fusedkd.models.kinds import bare

# Their position ids begin after the padding token's.
_AFTER_PADDING = {
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "esm", "ibert"),
    *("longformer", "roberta-prelayernorm", "xmod", "data2vec-text", "luke"),
}
_NAMES = ("max_position_embeddings", "n_positions")
_VARLEN = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
SIZE = 8  # tokens of each of the two sequences of the trial
# Of the norm of what is compared: rounding is below. Another sequence before it changes nothing in
# a dense model, and in a mixture of experts the sizes of its products; alone it has another shape.
FINE, COARSE = (1e-5, 1e-3), (1e-2, 5e-2)


def most_positions(config: Any) -> int | None:
    """Tokens in a sequence that the model was made for, as its config says; None: it does not."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _NAMES)
    most = next((n for n in found if isinstance(n, int) and n > 0), None)
    if most is None or text.model_type not in _AFTER_PADDING:
        return most
    return most - (text.pad_token_id or 0) - 1


def check_length(role: str, config: Any, longest: int) -> None:
    """
    Raises:
        ValueError: the model has fewer positions than a sequence of the data has tokens.
    """
    most = most_positions(config)
    if most is not None and longest > most:
        raise ValueError(
            f"--max_length (--block_size): the data have sequences of {longest:,} tokens, but the "
            f"{role} has {most:,} positions: expected --max_length {most} or less."
        )


def check_keeps_apart(role: str, model: Any) -> None:
    """Try two sequences in one row: the second must give what it gives alone, whatever the first
    one is. Models that were not made for it read on, or count positions on.

    Raises:
        ValueError: they do not stay apart, or it cannot be tried.
    """
    inner = bare(model)
    if getattr(inner.config, "_attn_implementation", None) in _VARLEN:
        return
    about = f"--packing flatten: the {role} {type(inner).__name__}"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError(f"{about} takes no position_ids: expected --packing none or blocks.")
    if any(map(is_partitioned, inner.parameters())):
        raise ValueError(
            f"{about} lies in parts (ZeRO-3), so that it cannot be tried whether its sequences "
            "stay apart: expected attn_implementation flash_attention_2, or --packing none."
        )
    most = FINE if inner.dtype in (torch.float32, torch.float64) else COARSE
    if any(found > bound for found, bound in zip(_differences(inner), most, strict=True)):
        raise ValueError(
            f"{about} ({inner.config._attn_implementation}) does not keep the sequences of a row "
            "apart: expected --packing none or blocks, or a model that does."
        )


@torch.no_grad()
def _differences(model: Any) -> tuple[float, float]:
    """Of the second sequence's logits after another first one, and from those alone, relative to
    their own size."""
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(3 * SIZE, device=model.device) * 7919 % vocabulary
    first, other, second = ids.split(SIZE)
    training = model.training
    model.eval()
    try:
        alone = _logits(model, [second])
        after, again = (_logits(model, [before, second])[SIZE:] for before in (first, other))
    finally:
        model.train(training)
    size = alone.norm()
    return float((after - again).norm() / size), float((after - alone).norm() / size)


def _logits(model: Any, sequences: list[Tensor]) -> Tensor:
    positions = torch.cat([torch.arange(len(s), device=s.device) for s in sequences])
    found = model(
        input_ids=torch.cat(sequences)[None], position_ids=positions[None], use_cache=False
    )
    logits = found.logits[0].double()
    return logits - logits.mean(-1, keepdim=True)
