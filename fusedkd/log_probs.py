"""Log-probabilities of given tokens and the entropy beside them, with gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedkd import backends, parallel, token_ops
from fusedkd.autograd import once_differentiable, roots
from fusedkd.checks import check_device, check_heat, check_temperature, check_tensor, check_whole
from fusedkd.distributions import LMHead, lone_side
from fusedkd.distributions.side import NOTHING, Side, autocast_dtype, true_vocabulary
from fusedkd.inputs import Wanted
from fusedkd.kernels import tokens as token_kernels
from fusedkd.kernels.tokens import Factors
from fusedkd.modes import stand_in
from fusedkd.token_rows import TokenInputs, TokenSpec

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenLogProbs(NamedTuple):
    """What :func:`token_log_probs` gives."""

    log_probs: Tensor  # (...,) or (..., K), nats
    entropy: Tensor | None  # (...,) nats


def token_log_probs(
    logits: Tensor | LMHead,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_bytes: int | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenLogProbs:
    """``log_softmax(logits / temperature)`` at ``tokens``, and the entropy of that distribution.

    Both have gradients in logits, hidden states, weight and bias. Of a head the logits never exist
    in full. Products with its weight, forward and backward together: 1 under ``torch.no_grad()``,
    so the same function reads a teacher; 2 where only the hidden states require grad and there is
    one token each (3 with ``entropy``; N x H numbers are kept for each output); 3 with K tokens
    each; 4 where weight or bias require grad.

    Args:
        logits: (..., V) fp64, fp32, bf16 or fp16, or a head.
        tokens: (...,) or (..., K) int64 or int32, aligned with the logits (nothing is shifted
            here). ``ignore_index``, and in the second form -1, is no token: its log-probability is
            0, without a gradient. A row without any is not multiplied, its entropy is 0.
        temperature: T of both results, at most 1000 (fp64: 1e6).
        entropy: whether it is wanted.
        ignore_index: see ``tokens``.
        vocab_size: the true vocabulary; columns beyond are padding.
        chunk_bytes: heads only, as in :func:`fusedkd.kd_loss`.
        group: vocabulary-parallel, as in :func:`fusedkd.kd_loss`.
        backend: as in :func:`fusedkd.kd_loss`.

    Returns:
        In nats, fp32 (fp64 for fp64 logits): log-probabilities of the shape of ``tokens``, -inf
        where the logit is; the entropy (...,), or None.

    Raises:
        ValueError, TypeError: naming the argument, what came, what was expected and the remedy. On
            a GPU a token out of range is a device-side assertion.
        RuntimeError: the backend cannot run here.
    """
    request = TokenRequest(
        logits, tokens, temperature, entropy, ignore_index, vocab_size, chunk_bytes, group, backend
    )
    if request.sharded:
        return _sharded_log_probs(request)
    return request.checked().log_probs()


@torch._disable_dynamo  # collectives whose number depends on the data's sizes
def _sharded_log_probs(request: TokenRequest) -> TokenLogProbs:
    return request.checked().log_probs()


class TokenRequest(NamedTuple):
    """What a function about single tokens was given."""

    logits: Any
    tokens: Any
    temperature: float
    entropy: bool
    ignore_index: int
    vocab_size: int | None
    chunk_bytes: int | None
    group: Any
    backend: Any
    name: str = "logits"
    lone: bool = False  # one token a row, and the entropy is a metric

    @property
    def sharded(self) -> bool:
        """Whether each rank of a group has some of the columns."""
        return self.group is not None or parallel.is_sharded(self.logits)

    def checked(self) -> CheckedTokens:
        """What is computed, of the columns that lie here."""
        if not self.sharded:
            return self._whole(None)
        lone_side(self.name, self.logits, 0)  # for its errors; a rank may have no columns
        if self.chunk_bytes is not None:
            check_whole("chunk_bytes", self.chunk_bytes, 1)
        if self.vocab_size is not None:
            check_whole("vocab_size", self.vocab_size, 1)
        backends.check_name(self.backend)
        shards = parallel.shards(
            self.logits, None, self.group, self.vocab_size, self.backend, self.chunk_bytes
        )
        local = self._replace(
            logits=shards.student, backend=shards.backend, chunk_bytes=shards.chunk_bytes
        )
        return local._whole(shards)

    def _whole(self, shards: parallel.Shards | None) -> CheckedTokens:
        side = lone_side(self.name, self.logits)
        if shards is None:
            size = true_vocabulary(side, NOTHING, self.vocab_size)
        else:
            size = shards.vocab_size
        if not isinstance(self.entropy, bool):
            raise TypeError(f"entropy={self.entropy!r}: expected True or False.")
        check_temperature("temperature", self.temperature)
        check_heat("temperature", self.temperature, result_dtype(side))
        check_whole("ignore_index", self.ignore_index, -(2**63), "the usual one is -100")
        if self.chunk_bytes is not None:
            check_whole("chunk_bytes", self.chunk_bytes, 1, "or None")
        backends.check_name(self.backend)
        tokens, shape = self._ids(side, size)
        spec = TokenSpec(
            size,
            float(self.temperature),
            side.transform,
            self.entropy,
            self.backend,
            self.chunk_bytes,
            None if shards is None else shards.chunk_columns,
            autocast_dtype(side, NOTHING),
        )
        counts = (tokens >= 0).any(-1)
        inputs = TokenInputs(side.tensor, side.weight, side.bias, tokens, counts, side.ids)
        grad = torch.is_grad_enabled()
        hidden, weight, bias = (
            grad and x is not None and x.requires_grad
            for x in (side.tensor, side.weight, side.bias)
        )
        wanted = Wanted(hidden, weight, bias, self.lone)
        return CheckedTokens(inputs, spec, wanted, shape, side.leading, result_dtype(side))

    def _ids(self, side: Side, size: int) -> tuple[Tensor, torch.Size]:
        """(N, K) int64, -1 where there is none, and the shape in which they came."""
        tokens = check_tensor("tokens", self.tokens)
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"tokens is {tokens.dtype}: expected torch.int64 or torch.int32 ids; use "
                "tokens.long()."
            )
        check_device("tokens", tokens, self.name, side.tensor)
        shape, leading = tokens.shape, side.leading
        columns = not self.lone and tokens.dim() == len(leading) + 1
        if (shape[:-1] if columns else shape) != leading:
            more = f" or {(*leading, 'K')}".replace("'", "") if not self.lone else ""
            raise ValueError(
                f"tokens has shape {tuple(shape)}: expected {tuple(leading)}{more}, the leading "
                f"dimensions of {self.name}."
            )
        ids = tokens.detach().reshape(leading.numel(), shape[-1] if columns else 1).long()
        nothing = ids == self.ignore_index
        if columns:
            nothing = nothing | (ids == -1)
        self._check_range(ids, nothing, size, columns)
        return ids.masked_fill(nothing, -1).contiguous(), shape

    def _check_range(self, ids: Tensor, nothing: Tensor, size: int, columns: bool) -> None:
        wrong = (ids != ids.clamp(0, size - 1)) & ~nothing
        padding = ", or -1 for padding" if columns else ""
        expected = f"expected 0 to {size - 1}"
        if ids.device.type != "cpu" or stand_in(ids):
            torch._assert_async(~wrong.any(), f"tokens: {expected}")
        elif wrong.any():
            raise ValueError(
                f"tokens holds {int(ids[wrong][0])}: {expected} (the vocabulary), or "
                f"ignore_index={self.ignore_index}{padding}."
            )


def result_dtype(side: Side) -> torch.dtype:
    """Of what comes out."""
    return torch.float64 if side.tensor.dtype == torch.float64 else torch.float32


class CheckedTokens(NamedTuple):
    """A checked call."""

    inputs: TokenInputs
    spec: TokenSpec
    wanted: Wanted  # the entropy is a metric, or has a gradient where anything has one
    shape: torch.Size  # of the tokens as they came
    leading: torch.Size
    dtype: torch.dtype  # of the results

    def log_probs(self) -> TokenLogProbs:
        """With a graph; the entropy without one where it is ``wanted`` as a metric."""
        found, entropy, *_ = _TokenLogProbs.apply(*self.inputs, self.spec, self.wanted, self.dtype)
        made = entropy.view(self.leading) if self.spec.entropy else None
        return TokenLogProbs(found.view(self.shape), made)


class _TokenLogProbs(torch.autograd.Function):
    """Inputs: the fields of TokenInputs, spec, wanted, dtype. Outputs: log-probabilities (N, K) and
    entropy (N,), then what the backward needs, which the caller drops."""

    @staticmethod
    def forward(  # dynamo binds the arguments one by one
        student: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        tokens: Tensor,
        counts: Tensor,
        ids: Tensor | None,
        spec: TokenSpec,
        wanted: Wanted,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        inputs = TokenInputs(student, weight, bias, tokens, counts, ids)
        known, *kept = token_ops.statistics(inputs, spec, _kept(inputs, spec, wanted))
        found = token_kernels.log_probs(known).masked_fill(tokens < 0, 0.0).to(dtype)
        entropy = token_kernels.entropy(known) if spec.entropy else known.new_zeros(len(known))
        return found, entropy.masked_fill(~counts, 0.0).to(dtype), known, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, spec, wanted, _ = inputs
        ctx.spec, ctx.wanted = spec, wanted
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1 if wanted.metrics else 2 :])
        if not wanted.any_gradient:
            return
        ctx.roots = roots(*tensors[:3])
        ctx.keeps = _kept(TokenInputs(*tensors), spec, wanted) > 0
        ctx.dtypes = [x.dtype for x, want in zip(tensors[:3], wanted, strict=False) if want]
        if ctx.keeps:
            ctx.save_for_backward(*output[3:], tensors[3])
        else:
            ctx.save_for_backward(*tensors, output[2])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_found: Tensor | None, d_entropy: Tensor | None, *rest: Any
    ) -> tuple[Any, ...]:
        none = (None,) * len(ctx.needs_input_grad)
        d_entropy = d_entropy if ctx.spec.entropy and not ctx.wanted.metrics else None
        if d_found is None and d_entropy is None:
            return none
        if ctx.keeps:
            *kept, tokens = ctx.saved_tensors
            return _scaled(kept, tokens, d_found, d_entropy).to(ctx.dtypes[0]), *none[1:]
        *tensors, known = ctx.saved_tensors
        inputs = TokenInputs(*tensors)
        factors = _factors(inputs.tokens, d_found, d_entropy)
        made = token_ops.gradients(inputs, ctx.spec, ctx.wanted, known, factors)
        found = iter(x.to(dtype) for x, dtype in zip(made, ctx.dtypes, strict=True))
        return *(next(found) if want else None for want in ctx.wanted[:3]), *none[3:]


def _kept(inputs: TokenInputs, spec: TokenSpec, wanted: Wanted) -> int:
    """Of how many outputs the forward makes the gradient of each row, which the backward only
    scales: where there is one token a row and the head is frozen."""
    alone = wanted.hidden and not wanted.weight and not wanted.bias
    if not alone or inputs.weight is None or inputs.tokens.shape[1] != 1:
        return 0
    return 2 if spec.entropy and not wanted.metrics else 1


def _factors(tokens: Tensor, d_found: Tensor | None, d_entropy: Tensor | None) -> Factors:
    """What comes for tokens that are none may be NaN."""
    nothing = tokens < 0
    if d_found is None:
        of_tokens = torch.zeros_like(tokens, dtype=torch.float64)
    else:
        of_tokens = d_found.double().masked_fill(nothing, 0.0)
    if d_entropy is not None:
        d_entropy = d_entropy.double().masked_fill(nothing.all(-1), 0.0).contiguous()
    return Factors(of_tokens, d_entropy)


def _scaled(
    kept: list[Tensor], tokens: Tensor, d_found: Tensor | None, d_entropy: Tensor | None
) -> Tensor:
    """The gradient of the hidden states, of those of each output."""
    factors = _factors(tokens, d_found, d_entropy)
    total = kept[0] * factors.tokens.view(*kept[0].shape[:-1], 1).to(kept[0].dtype)
    if factors.entropy is not None:
        of_rows = factors.entropy.view(*kept[1].shape[:-1], 1).to(kept[1].dtype)
        total = torch.addcmul(total, kept[1], of_rows)
    return total
