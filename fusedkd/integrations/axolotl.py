"""axolotl's KD loss (written for axolotl 0.19.0): a head against a top-k teacher. In its YAML::

    plugins:
      - fusedkd.integrations.axolotl.KDPlugin      # instead of axolotl.integrations.kd.KDPlugin
    kd_trainer: true

The rest of the file stays. The value is axolotl's; what differs: its gradient lacks the T^2 that
its value has, and this one is the gradient of the value. The teacher's log-probabilities are those
of the student's temperature and sum to 1 over the top-k, as axolotl's collators make them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, SparseTeacher, kd_loss
from fusedkd.integrations.conventions import check_signature, generalized_jsd, stand_in

if TYPE_CHECKING:
    KDPlugin: Any

__all__ = ["KDPlugin", "LigerFusedLinearKLTopKLogprobLoss"]

CLOSE = 0.05  # of the teacher's mass to 1: its log-probabilities may be bf16


class LigerFusedLinearKLTopKLogprobLoss(nn.Module):
    """axolotl's module of that name. ``compiled`` and ``chunk_size`` have no effect.

    Raises:
        ValueError: a weight outside [0, 1]; a temperature that is not positive; ``normalize_topk``
            False with another ``beta`` than 0, whose value may be negative.
    """

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        temperature: float = 1.0,
        beta: float = 1.0,
        ignore_index: int = -100,
        compiled: bool = True,
        chunk_size: int = 1024,
        compute_ce_loss: bool = True,
        normalize_topk: bool = True,
    ) -> None:
        super().__init__()
        for name, weight in (("hard", weight_hard_loss), ("soft", weight_soft_loss)):
            if not 0 <= weight <= 1:
                raise ValueError(f"weight_{name}_loss={weight}: expected a number in [0, 1].")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: expected a positive number.")
        if beta and not normalize_topk:
            raise ValueError(
                f"beta={beta} with normalize_topk=False compares parts of two distributions, which "
                "may be negative: expected kd_normalize_topk: true, or kd_beta: 0."
            )
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.temperature, self.beta, self.ignore_index = temperature, beta, ignore_index
        self.compute_ce_loss, self.normalize_topk = compute_ce_loss, normalize_topk

    def forward(
        self,
        lm_head_weight: Tensor,
        student_hidden_states: Tensor,
        target_token_ids: Tensor,
        target_logprobs: Tensor,
        target_mask: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
    ) -> Tensor:
        """The sum over tokens: ``weight_soft_loss`` T^2 D + ``weight_hard_loss`` CE.

        Args:
            lm_head_weight: (V, H).
            student_hidden_states: (B, L, H).
            target_token_ids, target_logprobs, target_mask: (B, L, K), aligned with the states.
            true_labels: (B, L), shifted here.

        Raises:
            ValueError: a token is masked in part, or its teacher's probabilities do not sum to 1.
        """
        head = LMHead(student_hidden_states, lm_head_weight, student_bias)
        loss = student_hidden_states.new_zeros((), dtype=torch.float32)
        if self.weight_soft_loss:
            teacher, counts = self._teacher(target_token_ids, target_logprobs, target_mask)
            loss = loss + kd_loss(
                *(head, teacher),
                divergence=generalized_jsd(self.beta),
                temperature=self.temperature,
                token_weights=counts,
                kd_weight=self.weight_soft_loss,
                reduction="sum",
            )
        if self.compute_ce_loss and self.weight_hard_loss:
            labels = nn.functional.pad(true_labels, (0, 1), value=self.ignore_index)[:, 1:]
            loss = loss + kd_loss(
                *(head, None, labels),
                kd_weight=0.0,
                ce_weight=self.weight_hard_loss,
                ignore_index=self.ignore_index,
                reduction="sum",
            )
        return loss

    def _teacher(self, ids: Tensor, log_probs: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
        valid = mask.to(torch.bool)
        counts = valid.any(-1)
        if not torch.equal(counts, valid.all(-1)):
            raise ValueError(
                "target_mask is 1 for some of a token's top-k and 0 for others: expected whole "
                "tokens. Collect the same number of log-probabilities of each."
            )
        # What is padding has ids and numbers that mean nothing: any that are a distribution's.
        anything = torch.arange(ids.shape[-1], device=ids.device)
        ids = torch.where(valid, ids, anything)
        log_probs = torch.where(valid, log_probs.float(), -torch.tensor(ids.shape[-1]).log())
        if self.normalize_topk and ((log_probs.exp().sum(-1) - 1).abs() > CLOSE).any():
            raise ValueError(
                "target_logprobs of a token do not sum to 1 over its top-k: expected them "
                "normalised, as with kd_normalize_topk: true where they were collected."
            )
        tail = "conditional" if self.normalize_topk else "drop"
        return SparseTeacher(ids, log_probs, tail=tail), counts.float()


def __getattr__(name: str) -> Any:
    if name != "KDPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from axolotl.integrations.kd import KDPlugin as Theirs

    class KDPlugin(Theirs):  # type: ignore[misc]
        """axolotl's, whose trainer makes its loss from the class above."""

        def get_trainer_cls(self, cfg: Any) -> Any:
            """axolotl's trainer.

            Raises:
                ImportError: its loss is another version's.
            """
            trainer = super().get_trainer_cls(cfg)
            if trainer is not None:
                ours = LigerFusedLinearKLTopKLogprobLoss
                module = sys.modules[trainer.__module__]
                theirs = getattr(module, ours.__name__, None)
                if theirs is not None:
                    where = f"{module.__name__}.{ours.__name__}.forward"
                    check_signature(where, theirs.forward, ours.forward)
                stand_in(module, ours.__name__, ours)
            return trainer

    return KDPlugin
