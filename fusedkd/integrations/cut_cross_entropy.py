"""Apple's cut-cross-entropy by its name and signature: cross-entropy of a head whose logits never
exist in full.

Replacing the import is the whole migration; cut-cross-entropy need not be installed::

    from fusedkd.integrations.cut_cross_entropy import linear_cross_entropy

The signature is the repository's, with ``bias`` and ``return_lse``. The release on the index
(25.1.1) has no ``bias``: there ``ignore_index`` is the fourth argument, which is refused here
unless it comes by name. What differs is what was lost there:

* gradients are exact: none is left out for being small. ``filter_eps``, ``filter_e_grad`` and
  ``filter_c_grad`` have no effect, neither have ``accum_e_fp32`` and ``accum_c_fp32`` (sums are in
  fp32) and ``impl`` (it runs on CPUs as on GPUs);
* a batch of which nothing counts gives 0 and zero gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead, kd_loss, token_ops
from fusedkd.autograd import once_differentiable, roots
from fusedkd.kernels import tokens as token_kernels
from fusedkd.kernels.tokens import Factors
from fusedkd.log_probs import TokenRequest
from fusedkd.spec import REDUCTIONS
from fusedkd.token_rows import TokenInputs

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Any = None,
    vocab_parallel_options: Any = None,
) -> Any:
    """Cross-entropy of ``e @ c.T + bias`` with ``targets``.

    Args:
        e: (..., H), the hidden states.
        c: (V, H), the head's weight; ``bias`` (V,) or None.
        targets: (...,) int64.
        ignore_index: tokens with this target do not count.
        softcap: logits are ``softcap * tanh(logits / softcap)``.
        reduction: "mean" over the tokens that count, "sum" or "none".
        shift: compare ``e[..., :-shift, :]`` with ``targets[..., shift:]``; True is 1.
        return_lse: also each token's logsumexp, which has a gradient, as for a z-loss. (One that is
            a mean or a sum costs less as ``z_loss_weight`` of :func:`fusedkd.kd_loss`.)

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), 0-d, or of the shape of the shifted targets for
        "none"; with ``return_lse`` (loss, lse), the latter of that shape and 0 where the target is
        ``ignore_index``.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected and the remedy.
    """
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(
            f"bias={bias!r}: expected a tensor (V,) or None. The fourth argument was ignore_index "
            "in cut-cross-entropy 25.1.1: give it by name."
        )
    if vocab_parallel_options is not None:
        raise ValueError(
            "vocab_parallel_options: expected None. fusedkd.kd_loss(LMHead(e, c), None, targets, "
            "kd_weight=0, ce_weight=1, group=...) takes a head that is split over a group."
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: expected one of {', '.join(REDUCTIONS)}.")
    by = int(shift)
    if not 0 <= by < max(1, targets.shape[-1]):
        raise ValueError(f"shift={shift}: expected 0 to {targets.shape[-1] - 1}, below the length.")
    if by:
        e, targets = e[..., :-by, :], targets[..., by:]
    head = LMHead(e, c, bias, softcap=softcap)
    if not return_lse:
        alone: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "reduction": reduction}
        return kd_loss(head, None, targets, ignore_index=ignore_index, **alone)
    loss, lse = _of_each(head, targets, ignore_index)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (targets != ignore_index).sum().clamp(min=1)
    return loss, lse


@torch._disable_dynamo
def _of_each(head: LMHead, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each token's cross-entropy and logsumexp, from one round of products."""
    whole = (None, None, None, None)  # vocabulary, default chunks, no group, default backend
    call = TokenRequest(head, targets, 1.0, False, ignore_index, *whole, name="e").checked()
    none = torch.full_like(call.inputs.tokens, -1)
    inputs = call.inputs._replace(tokens=torch.cat([call.inputs.tokens, none], -1))
    log_probs, lse = _LogProbs.apply(*inputs, call.spec, call.wanted, call.dtype)
    return -log_probs.view(targets.shape), lse.view(targets.shape)


class _LogProbs(torch.autograd.Function):
    """Of TokenInputs with a second token a row, which is none, TokenSpec, Wanted and a dtype: (N,)
    log-probabilities of the first, and logsumexps, whose derivative, q, is that second token's."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, spec, wanted, dtype = arguments
        inputs = TokenInputs(*tensors)
        known = token_ops.statistics(inputs, spec, 0)[0]
        ctx.save_for_backward(*inputs, known)
        ctx.spec, ctx.wanted = spec, wanted
        ctx.roots = roots(*inputs[:3])
        lse = known[:, 0] + known[:, 1].log()
        found = token_kernels.log_probs(known)[:, 0], lse
        log_probs, lse = (x.masked_fill(~inputs.counts, 0.0).to(dtype) for x in found)
        return log_probs, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_log_probs: Tensor, of_lse: Tensor) -> tuple[Any, ...]:
        *tensors, known = ctx.saved_tensors
        inputs = TokenInputs(*tensors)
        upstream = torch.stack([of_log_probs, -of_lse], -1).double()
        factors = Factors(upstream.masked_fill(~inputs.counts[:, None], 0.0), None)
        made = iter(token_ops.gradients(inputs, ctx.spec, ctx.wanted, known, factors))
        grads = [
            next(made).to(x.dtype) if want and x is not None else None
            for x, want in zip(inputs[:3], ctx.wanted, strict=False)
        ]
        return *grads, *(None,) * len(tensors)


class LinearCrossEntropy(nn.Module):
    """:func:`linear_cross_entropy` as a module, called with (e, c, targets, bias=None)."""

    def __init__(
        self,
        ignore_index: int = -100,
        softcap: float | None = None,
        reduction: str = "mean",
        shift: bool | int = 0,
        return_lse: bool = False,
        **without_effect: Any,
    ) -> None:
        super().__init__()
        self.ignore_index, self.softcap, self.reduction = ignore_index, softcap, reduction
        self.shift, self.return_lse, self.rest = shift, return_lse, without_effect

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Any:
        """The loss, or (loss, lse)."""
        return linear_cross_entropy(
            e, c, targets, bias, self.ignore_index, self.softcap, self.reduction, self.shift,
            self.return_lse, **self.rest,
        )  # fmt: skip
