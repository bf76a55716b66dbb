"""Losses on tokens that the student has drawn: what on-policy distillation minimises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import divergences, token_ops
from fusedkd.autograd import once_differentiable, roots, scaled
from fusedkd.call import row_scale_of
from fusedkd.checks import (
    check_constant,
    check_device,
    check_divides,
    check_logits,
    check_tensor,
    is_finite,
    with_defaults,
)
from fusedkd.distributions import LMHead
from fusedkd.inputs import Plan, Wanted
from fusedkd.kernels import tokens as token_kernels
from fusedkd.log_probs import CheckedTokens, TokenRequest
from fusedkd.modes import stand_in
from fusedkd.spec import LossSpec
from fusedkd.token_rows import Judged, TokenInputs, TokenSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LOSS_TYPES = ("k2", "k3", "policy")
K1 = (
    "loss_type='k1' is refused: the gradient of log q(y) - log p(y) is that of log q(y), whose "
    "mean over y drawn from q is 0, so it teaches nothing (arXiv 2506.09477): expected 'k2', "
    "whose gradient has the mean of the reverse KL's, or 'policy', which uses k1 as an advantage."
)
ROUNDING = 1e-2  # how far above 0 a log-probability may be that half precision has rounded


class SampledMetrics(NamedTuple):
    """What :func:`sampled_kd_loss_and_metrics` measures: 0-d tensors without a graph, means over
    the tokens that count.

    ``log_ratio`` is log q(y) - log p(y), an estimate of the reverse KL (k1); ``k3`` an estimate of
    the same with less variance, never negative; both NaN without a teacher. ``clip_fraction`` is
    the share of tokens without a gradient because of ``clip``. With nothing counted all are 0.
    """

    log_ratio: Tensor
    k3: Tensor
    student_entropy: Tensor
    clip_fraction: Tensor
    num_tokens: Tensor


def sampled_kd_loss(
    student: Tensor | LMHead,
    teacher_log_probs: Tensor | None,
    tokens: Tensor,
    *,
    loss_type: str = "k2",
    old_log_probs: Tensor | None = None,
    advantages: Tensor | None = None,
    clip: Sequence[float] | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """A loss on what the student wrote, of the teacher's log-probabilities of it.

    With s = log q(y) of the token y that was drawn, t the teacher's and o that under the student
    that drew it (Schulman 2020, "Approximating KL divergence", for the names):

    * ``"k2"``: (s - t)^2 / 2, whose gradient (s - t) ds has, over y drawn from q, the mean of the
      gradient of the reverse KL;
    * ``"k3"``: e^(t - s) - 1 - (t - s). Its value is an estimate of the reverse KL, its gradient
      (1 - e^(t - s)) ds one of the *forward* KL's;
    * ``"policy"``: -min(rho A, clamp(rho, *clip) A) with rho = e^(s - o) (Schulman et al. 2017,
      arXiv 1707.06347), A = ``advantages``, or t - s, as a constant; without ``clip`` -rho A.

    ``"k1"``, s - t, is an error: see arXiv 2506.09477. A head's logits are made once, with the
    gradient in the forward: 3 products with its weight if it is trained, 2 if it is frozen. With
    ``reduction="none"`` its cost is that of :func:`fusedkd.token_log_probs`.

    Args:
        student: logits (..., V) or a head, aligned with ``tokens``. Has the gradient.
        teacher_log_probs: (...,) natural logarithms, a constant; :func:`fusedkd.token_log_probs` of
            a teacher. None with ``advantages``.
        tokens: (...,) int64 or int32, drawn from the student; ``ignore_index`` does not count.
        loss_type: "k2", "k3" or "policy".
        old_log_probs: (...,) o, a constant; "policy" only. None: s, so that rho is 1.
        advantages: (...,) A, a constant; "policy" only.
        clip: (low, high), with low <= 1 <= high; "policy" only.
        temperature: of the student's distribution, that at which the tokens were drawn.
        token_weights, ignore_index, reduction, normalizer: as in :func:`fusedkd.kd_loss`.
        vocab_size, chunk_bytes, group, backend: as in :func:`fusedkd.kd_loss`.

    Returns:
        0-d fp32 (fp64 for a student in fp64), or (...,) for ``reduction="none"``.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected and the remedy;
            also for a token that counts and has log-probability -inf (on a GPU a device-side
            assertion).
        RuntimeError: the backend cannot run here.
    """
    return _compute(
        Arguments(
            student=student,
            teacher_log_probs=teacher_log_probs,
            tokens=tokens,
            loss_type=loss_type,
            old_log_probs=old_log_probs,
            advantages=advantages,
            clip=clip,
            temperature=temperature,
            token_weights=token_weights,
            ignore_index=ignore_index,
            reduction=reduction,
            normalizer=normalizer,
            vocab_size=vocab_size,
            chunk_bytes=chunk_bytes,
            group=group,
            backend=backend,
        ),
        metrics=False,
    )[0]


DEFAULTS: dict[str, Any] = dict(sampled_kd_loss.__kwdefaults__ or {})


def sampled_kd_loss_and_metrics(
    student: Tensor | LMHead, teacher_log_probs: Tensor | None, tokens: Tensor, **kwargs: Any
) -> tuple[Tensor, SampledMetrics]:
    """:func:`sampled_kd_loss` with the same arguments, and :class:`SampledMetrics` from the same
    sweeps.

    Returns:
        ``(loss, metrics)``; only the loss has a graph.
    """
    keywords = with_defaults("sampled_kd_loss_and_metrics", kwargs, DEFAULTS)
    given = Arguments(student, teacher_log_probs, tokens, **keywords)
    loss, metrics = _compute(given, metrics=True)
    assert metrics is not None
    return loss, metrics


class Arguments(NamedTuple):
    """What :func:`sampled_kd_loss` was given, by its names."""

    student: Tensor | LMHead
    teacher_log_probs: Tensor | None
    tokens: Tensor
    loss_type: str
    old_log_probs: Tensor | None
    advantages: Tensor | None
    clip: Sequence[float] | None
    temperature: float
    token_weights: Tensor | None
    ignore_index: int
    reduction: str
    normalizer: float | Tensor | None
    vocab_size: int | None
    chunk_bytes: int | None
    group: Any
    backend: Any

    def request(self, metrics: bool) -> TokenRequest:
        return TokenRequest(
            self.student,
            self.tokens,
            self.temperature,
            metrics,
            self.ignore_index,
            self.vocab_size,
            self.chunk_bytes,
            self.group,
            self.backend,
            name="student",
            lone=True,
        )

    def check(self) -> None:
        """Raise where something is wrong that no tensor's numbers have a say in."""
        if self.loss_type == "k1":
            raise ValueError(K1)
        if not isinstance(self.loss_type, str) or self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type={self.loss_type!r}: expected one of {', '.join(map(repr, LOSS_TYPES))}."
            )
        policy = self.loss_type == "policy"
        for name in ("old_log_probs", "advantages", "clip"):
            if getattr(self, name) is not None and not policy:
                raise ValueError(
                    f"{name} was given with loss_type={self.loss_type!r}, which has no use for it: "
                    "expected None, or loss_type='policy'."
                )
        if self.teacher_log_probs is None and self.advantages is None:
            raise ValueError(
                f"teacher_log_probs is None with loss_type={self.loss_type!r}: expected (...,) "
                "log-probabilities of the tokens, or loss_type='policy' with advantages."
            )
        if self.clip is not None:
            _check_clip(self.clip)


def _check_clip(clip: Any) -> None:
    pair = tuple(clip) if isinstance(clip, (tuple, list)) else ()
    if len(pair) != 2 or not all(map(is_finite, pair)) or not 0 <= pair[0] <= 1 <= pair[1]:
        raise ValueError(
            f"clip={clip!r}: expected the smallest and the largest ratio, such as (0.8, 1.2)."
        )


def _compute(given: Arguments, metrics: bool) -> tuple[Tensor, SampledMetrics | None]:
    given.check()
    request = given.request(metrics)
    if request.sharded:
        return _compute_sharded(given, request)
    return _run(given, request.checked())


@torch._disable_dynamo  # collectives whose number depends on the data's sizes
def _compute_sharded(
    given: Arguments, request: TokenRequest
) -> tuple[Tensor, SampledMetrics | None]:
    return _run(given, request.checked())


def _run(given: Arguments, call: CheckedTokens) -> tuple[Tensor, SampledMetrics | None]:
    call, judged = _judged(given, call)
    none = given.reduction == "none"
    if none or call.inputs.weight is None:
        found = call.log_probs()
        log_probs = found.log_probs.reshape(-1)
        loss = _Scored.apply(log_probs, judged)
        entropy = None if found.entropy is None else found.entropy.reshape(-1)
        loss = loss.view(call.leading) if none else _sum(loss)
    else:
        loss, log_probs, entropy, *_ = _SampledHead.apply(
            *call.inputs[:3],
            *judged[:4],
            *call.inputs[3:],
            call.spec,
            call.wanted,
            judged[4:],
        )
    if entropy is None or not call.spec.entropy:
        return loss, None
    return loss, _metrics(log_probs.detach(), entropy.detach(), judged, call.inputs.counts)


def _judged(given: Arguments, call: CheckedTokens) -> tuple[CheckedTokens, Judged]:
    """With the tokens that count, and what they are judged by."""
    dtype, inputs = call.dtype, call.inputs
    named = {
        "teacher_log_probs": given.teacher_log_probs,
        "old_log_probs": given.old_log_probs,
        "advantages": given.advantages,
        "token_weights": given.token_weights,
    }
    for name, tensor in named.items():
        _check_per_token(name, tensor, call)
    spec = LossSpec(
        divergences.reverse_kl(),
        call.spec.vocab_size,
        given.temperature,
        ignore_index=-1,
        reduction=given.reduction,
    ).checked()
    check_divides(given.normalizer, given.reduction)
    weights = inputs.counts.to(dtype)
    if given.token_weights is not None:
        heavy = given.token_weights.detach().reshape(-1).to(dtype)
        weights = heavy.masked_fill(~inputs.counts, 0.0)
    counts = weights != 0
    tokens = inputs.tokens.masked_fill(~counts[:, None], -1)
    scale = row_scale_of(weights, given.normalizer, spec, Plan(call.wanted))
    flat = {name: None if x is None else x.detach().reshape(-1) for name, x in named.items()}
    for name in ("teacher_log_probs", "old_log_probs"):
        _check_log_probs(name, flat[name], counts, inputs.tokens[:, 0])
    judged = Judged(
        scale.double(),
        flat["teacher_log_probs"],
        flat["old_log_probs"],
        flat["advantages"],
        given.loss_type,
        None if given.clip is None else (float(given.clip[0]), float(given.clip[1])),
    )
    return call._replace(inputs=inputs._replace(tokens=tokens, counts=counts)), judged


def _check_per_token(name: str, tensor: Tensor | None, call: CheckedTokens) -> None:
    if tensor is None:
        return
    check_tensor(name, tensor)
    if tensor.shape != call.leading:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}: expected {tuple(call.leading)}, one number "
            "per token of the student."
        )
    check_device(name, tensor, "student", call.inputs.student)
    if name == "token_weights":
        return check_constant(name, tensor, "real numbers or bool")
    check_logits(name, tensor)
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires grad, but it is a constant here: make it under torch.no_grad(), or "
            "detach it."
        )


def _check_log_probs(name: str, x: Tensor | None, counts: Tensor, tokens: Tensor) -> None:
    """Raise where a token that counts cannot have been drawn, or where they are none."""
    if x is None:
        return
    nothing, positive = counts & (x == -math.inf), counts & (x > ROUNDING)
    if x.device.type != "cpu" or stand_in(x):
        torch._assert_async(
            ~(nothing | positive).any(), f"{name}: expected log-probabilities above -inf"
        )
    elif nothing.any():
        n = int(nothing.nonzero()[0])
        raise ValueError(
            f"{name} is -inf at token {n} (id {int(tokens[n])}): the loss is infinite where it "
            "gives what was drawn no probability. Leave the token out (ignore_index, or "
            "token_weights 0), or bound the log-probabilities from below."
        )
    elif positive.any():
        raise ValueError(
            f"{name} holds {float(x[positive][0]):g}: expected natural logarithms of "
            "probabilities, at most 0 (fusedkd.token_log_probs makes them), not logits."
        )


def _sum(rows: Tensor) -> Tensor:
    return rows.sum(dtype=torch.float64).to(rows.dtype)


def _metrics(log_probs: Tensor, entropy: Tensor, judged: Judged, counts: Tensor) -> SampledMetrics:
    count = counts.sum()
    s = log_probs.double()

    def mean(rows: Tensor | None) -> Tensor:
        if rows is None:
            return entropy.new_full((), math.nan)
        return (rows.masked_fill(~counts, 0.0).sum() / count.clamp(min=1)).to(entropy.dtype)

    t = None if judged.teacher is None else judged.teacher.double()
    k3 = None if t is None else torch.expm1(t - s) - (t - s)
    return SampledMetrics(
        mean(None if t is None else s - t), mean(k3), mean(entropy), mean(judged.clipped(s)), count
    )


class _Scored(torch.autograd.Function):
    """Rows of the loss, of the log-probabilities (N,)."""

    @staticmethod
    def forward(log_probs: Tensor, judged: Judged) -> Tensor:
        value, _ = judged(log_probs, slice(None))
        return value.to(log_probs.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        log_probs, ctx.judged = inputs
        ctx.roots = roots(log_probs)
        ctx.save_for_backward(log_probs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        (log_probs,) = ctx.saved_tensors
        slope = ctx.judged(log_probs, slice(None))[1]
        none = ctx.judged.scale == 0
        return (upstream.double() * slope).masked_fill(none, 0.0).to(log_probs.dtype), None


class _SampledHead(torch.autograd.Function):
    """The sum of the loss, the gradients made in the forward. Outputs: it, the log-probabilities
    and the entropy (N,), then what the backward needs, which the caller drops."""

    @staticmethod
    def forward(  # dynamo binds the arguments one by one
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor,
        teacher: Tensor | None,
        old: Tensor | None,
        advantages: Tensor | None,
        tokens: Tensor,
        counts: Tensor,
        ids: Tensor | None,
        spec: TokenSpec,
        wanted: Wanted,
        how: tuple[str, tuple[float, float] | None],
    ) -> tuple[Tensor, ...]:
        inputs = TokenInputs(student, weight, bias, tokens, counts, ids)
        judged = Judged(scale, teacher, old, advantages, *how)
        known, *grads = token_ops.judged(inputs, spec, wanted, judged)
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        found = token_kernels.log_probs(known)[:, 0].masked_fill(~counts, 0.0).to(dtype)
        loss = _sum(judged(found, slice(None))[0]).to(dtype)
        entropy = token_kernels.entropy(known).masked_fill(~counts, 0.0).to(dtype)
        return loss, found, entropy, *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.spec, ctx.wanted = inputs[10:12]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.roots = roots(*inputs[:3])
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        ctx.save_for_backward(*output[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor | None, *rest: Any) -> tuple[Any, ...]:
        none = (None,) * len(ctx.needs_input_grad)
        if upstream is None:
            return none
        made = iter(ctx.saved_tensors)
        grads = [
            scaled(next(made), upstream, dtype, ctx.spec.backend) if want else None
            for want, dtype in zip(ctx.wanted[:3], ctx.dtypes, strict=True)
        ]
        return *grads, *none[3:]
