"""What the trainer has to know about the two models before they meet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fusedkd import LMHead
from fusedkd.models.proof import NoPlainHead, NotTried, PlainHead, is_partitioned, plain_head

logger = logging.getLogger(__name__)


def refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError if training the student would change the teacher."""
    trained = {id(parameter) for parameter in student.parameters()}
    if any(id(parameter) in trained for parameter in teacher.parameters()):
        raise ValueError(
            "teacher and student share parameters, so training one would change the other: load "
            "the teacher separately, or copy.deepcopy it."
        )


def frozen(teacher: nn.Module, student: nn.Module, device: torch.device) -> nn.Module:
    refuse_shared(student, teacher)
    teacher.eval().requires_grad_(False)
    if any(map(is_partitioned, teacher.parameters())):  # by from_pretrained, under ZeRO-3
        import deepspeed

        # only for its hooks, which gather each layer as it runs
        dtype = next(teacher.parameters()).dtype
        config = {
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        }
        deepspeed.initialize(model=teacher, config=config)
        return teacher
    return teacher if is_placed(teacher) else teacher.to(device)


def is_placed(model: nn.Module) -> bool:
    """Whether where its weights lie is decided: by a device map, by quantisation, or by a
    tensor-parallel plan."""
    names = ("hf_device_map", "is_quantized", "tp_size")
    return any(getattr(model, name, None) for name in names)


def bare(model: nn.Module) -> Any:
    """The model out of what wraps it for several processes, and of what compiled it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _output_embedding(model: Any) -> nn.Module | None:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found if isinstance(found, nn.Module) else None


def is_compiled(model: Any) -> bool:
    """Whether torch.compile has the model, what wraps it or its head. Dynamo does not guard on
    hooks: a compiled forward keeps those of its first step."""
    while isinstance(model, nn.Module):
        called = [x for x in (model, _output_embedding(model)) if x is not None]
        if any(hasattr(x, "_orig_mod") or x._compiled_call_impl is not None for x in called):
            return True
        model = getattr(model, "module", None)
    return False


def plain_head_or_none(
    model: nn.Module, role: str, inputs: Mapping[str, Any] | None = None
) -> PlainHead | None:
    """The model's plain head; where there is none a warning says why.

    Raises:
        NotTried: from :func:`fusedkd.models.proof.plain_head`.
    """
    inner = bare(model)
    try:
        if is_compiled(model):
            raise NoPlainHead("torch_compile traces past hooks")
        return plain_head(inner, inputs)
    except NotTried:
        raise
    except NoPlainHead as reason:
        logger.warning(
            "%s %s: dense logits are used, because %s.", role, type(inner).__name__, reason
        )
        return None


class HeadOf:
    """The plain head of a model, if it has one: looked for anew whenever the model is another
    (``model_init``), its output embedding is (``resize_token_embeddings``), or it was compiled. A
    model that does not run on made-up ids is looked at with its first batch.

    Args:
        role: "student" or "teacher", for warnings.
        wanted: False where dense logits are few: nothing is looked for.
    """

    def __init__(self, role: str, wanted: bool = True) -> None:
        self.role, self.wanted = role, wanted
        self.found: PlainHead | None = None
        self._seen: tuple[Any, Any, bool] = (None, None, False)

    def look(self, model: nn.Module) -> None:
        """Look at ``model`` before its first step; not where ZeRO-3 has it in parts, which cannot
        run before DeepSpeed has wrapped it."""
        if not any(map(is_partitioned, model.parameters())):
            self.of(model)

    def of(self, model: nn.Module, inputs: Mapping[str, Any] | None = None) -> PlainHead | None:
        """The head of ``model``, which may be wrapped and is to be called with ``inputs``."""
        if not self.wanted:
            return None
        inner = bare(model)
        embedding = _output_embedding(inner)
        # which FSDP may have wrapped since
        seen = (inner, None if embedding is None else bare(embedding), is_compiled(model))
        if all(now is before for now, before in zip(seen, self._seen, strict=True)):
            return self.found
        try:
            self.found, self._seen = plain_head_or_none(model, self.role), seen
        except NotTried:
            self.found = None
            if inputs is not None:
                self.found, self._seen = plain_head_or_none(model, self.role, inputs), seen
        return self.found


_ROUTERS = {  # the names of a coefficient, and what it weighs
    ("router_aux_loss_coef", "aux_loss_coef"): ("aux_loss", "encoder_aux_loss", "decoder_aux_loss"),
    ("router_z_loss_coef",): ("encoder_z_loss", "decoder_z_loss"),
}


def router_loss(model: Any, outputs: Any) -> Any:
    """What a mixture of experts with ``output_router_logits`` adds to its own loss, so that tokens
    spread over its experts: a mean over the batch, weighted; 0.0 where it adds nothing.

    Raises:
        ValueError: the model makes it together with its own cross-entropy only.
    """
    found = {
        names: [x for part in parts if (x := getattr(outputs, part, None)) is not None]
        for names, parts in _ROUTERS.items()
    }
    if not any(found.values()):
        if getattr(outputs, "decoder_router_logits", None) is not None:
            raise ValueError(
                f"output_router_logits=True: {type(model).__name__} gives no loss of its routers "
                "without its own cross-entropy: expected output_router_logits=False in its config."
            )
        return 0.0
    # TRL sets the config's, after the model has read it
    places = (model.config.get_text_config(), model)
    total = 0.0
    for names, parts in found.items():
        given = [getattr(place, name, None) for place in places for name in names]
        total = total + next((x for x in given if x is not None), 0.0) * sum(parts)
    return total


_PADDING = 512  # tables are padded to multiples of 64-512; more is another vocabulary


def own_positions(model: Any, side: Any, length: int) -> Any:
    """A model's answers (B, P + L, ...) without those at the P virtual tokens that peft's prompt
    tuning puts before ``length`` others. A cache has none."""
    model = bare(model) if isinstance(model, nn.Module) else model
    if not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        return side
    if isinstance(side, LMHead):
        return replace(side, hidden=side.hidden[:, -length:])
    return side[:, -length:]


def vocabulary_size(model: Any) -> int:
    """The rows of the model's embedding, as its config says."""
    return int(model.config.get_text_config().vocab_size)


def true_vocabulary(student: Any, teacher: Any, given: int | None, tokenizer: Any) -> int | None:
    """How many columns of both models' logits are real; None: all of them.

    Checkpoints of one family pad the same vocabulary to different sizes (Qwen2.5: 151,936 columns
    up to 3B and 152,064 above, for 151,665 tokens). The number is, in this order: as given; the
    tokenizer's, if there is one and both models know all of it; the smaller of the two, if they
    differ by no more than padding, or tokens that were added for the student, explain. A teacher
    without a config is taken to have the student's columns.

    Raises:
        ValueError: ``given`` is more than both have, or they differ by more.
    """
    if getattr(teacher, "config", None) is None:
        return given
    sizes = [vocabulary_size(model) for model in (student, teacher)]
    if given is not None and given > min(sizes):
        raise ValueError(
            f"vocab_size={given}: expected at most {min(sizes)}, the entries that both have "
            f"(student {sizes[0]}, teacher {sizes[1]})."
        )
    if given is not None or sizes[0] == sizes[1]:
        return given
    tokens = len(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerBase) else min(sizes)
    # tokens that were added for the student are none of the teacher's
    explained = abs(sizes[0] - sizes[1]) <= _PADDING and tokens <= sizes[0]
    if explained or tokens < min(sizes):
        return min(tokens, *sizes)
    raise ValueError(
        f"the student's vocabulary has {sizes[0]:,} entries and the teacher's {sizes[1]:,}, which "
        "is more than padding explains: distillation by token needs one tokenizer. If there are "
        "two, --cross_tokenizer alm (shared_kl, both) compares them. If it is one, "
        f"pass vocab_size=<number of the tokens that both have, at most {min(sizes)}>."
    )
