"""What subclasses of ``transformers.Trainer`` share whose loss is made from the student's head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fusedkd.models.heads import loss_in_forward, next_labels
from fusedkd.models.kinds import HeadOf, bare, router_loss

__all__ = ["FromHeads"]


class FromHeads:
    """To be named before a subclass of ``transformers.Trainer``, for its ``compute_loss``: labels
    in, a micro-batch's share of an optimizer step out."""

    # what the Trainer has
    accelerator: Any
    args: Any
    compute_loss_func: Any
    current_gradient_accumulation_steps: int = 1  # before there are any
    get_tp_size: Any
    loss_is_scaled_for_ga: bool | None
    model: Any

    _student_head: HeadOf
    _loss_shifts_labels: bool  # the Trainer counts a step's tokens in the alignment used here

    def call_model_init(self, trial: Any = None) -> Any:
        """As the Trainer's; the new model's head is looked up before anything wraps it."""
        host: Any = super()
        model = host.call_model_init(trial)
        if getattr(self, "_student_head", None) is not None:
            self._student_head.look(model)
        return model

    def _refuse_other_losses(self) -> None:
        """Raises ValueError if the Trainer was given a loss that nothing would call."""
        if self.compute_loss_func is not None:
            raise ValueError(
                f"compute_loss_func={self.compute_loss_func}: distillation has a loss of its own, "
                "which would take its place: expected None. To add to the loss, override "
                "compute_loss in a subclass."
            )

    def _aligned_labels(self, inputs: dict[str, Any]) -> Tensor:
        """Take the labels out of ``inputs`` and align them with the logits: label n is the target
        of position n. The decoder of an encoder-decoder gets its inputs, if it has none.

        Raises:
            ValueError: there are no labels.
        """
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        if shifted is not None:
            return shifted
        if labels is None:
            raise ValueError(
                f"the batch has no 'labels', only {', '.join(inputs)}: use a collator that makes "
                "them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False), or "
                "DataCollatorForSeq2Seq for an encoder-decoder."
            )
        given = inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}
        if self.model.config.is_encoder_decoder and not given:
            inputs["decoder_input_ids"] = _decoder_inputs(bare(self.model), labels)
        return next_labels(labels) if self._loss_shifts_labels else labels

    def _in_forward(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        compute: Callable[[Any], tuple[Tensor, Any]],
        dense: bool,
    ) -> tuple[Tensor, Any, Any]:
        """:func:`fusedkd.models.heads.loss_in_forward` of the student's head, or of its logits
        where ``dense``."""
        head = None if dense else self._student_head.of(model)
        return loss_in_forward(model, bare(model), head, inputs, compute)

    def _in_step(self, loss: Tensor, num_items: Any, model: nn.Module, outputs: Any) -> Tensor:
        """The micro-batch's part of the step's loss: gradients are averaged over processes, all of
        whose tokens ``num_items`` counts, and losses are added up over micro-batches, or averaged
        where there is no ``num_items``. A mixture of experts' routers are in it."""
        self.loss_is_scaled_for_ga = num_items is not None
        if num_items is not None and self.args.average_tokens_across_devices:
            # tp ranks share one batch
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        routers = router_loss(bare(model), outputs)
        if not isinstance(routers, Tensor):
            return loss
        summed = model.training and num_items is not None
        steps = self.current_gradient_accumulation_steps if summed else 1
        return loss + routers.to(loss.device) / steps


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What the model's own forward makes of labels (B, L) for its decoder."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    config = model.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"decoder_start_token_id={start}, pad_token_id={pad}: expected both in the config of "
            f"{type(model).__name__}, or 'decoder_input_ids' in the batch: "
            "DataCollatorForSeq2Seq(tokenizer, model) may make them."
        )
    shifted = F.pad(labels, (1, 0), value=start)[..., :-1]
    return shifted.masked_fill(shifted == -100, pad)
