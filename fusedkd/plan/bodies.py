"""What a model takes without its head, whose part is the loss's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from fusedkd.errors import UserError
from fusedkd.models.heads import PlainHead, tap
from fusedkd.models.saved import SavedModel
from fusedkd.plan.watch import Array, Line, Watch

ADAM = 2  # numbers that AdamW keeps of each weight, in its dtype


class Body:
    """A decoder, made of its config on tensors without memory.

    Args:
        saved: where its config is.
        length: tokens of a sequence.

    Raises:
        UserError: it is no decoder with a linear head, or what it does depends on the data.
    """

    def __init__(self, saved: SavedModel, length: int) -> None:
        self.saved, self.length, self.fake = saved, length, FakeTensorMode()
        with self.fake, no_init_weights():
            self.model = saved.make("AutoModelForCausalLM", use_cache=False)
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise UserError(
                f"--{saved.role} {saved.name}: its head is a {type(head).__name__}: expected a "
                "decoder with a linear output embedding."
            )
        self.head = head
        config = self.model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.vocab_size, self.hidden_size = head.weight.shape
        self.dtype: torch.dtype = head.weight.dtype
        parameters = {id(x): x for x in self.model.parameters()}  # tied ones once
        self.numbers = sum(x.numel() for x in parameters.values())
        self.weights = _bytes(*parameters.values(), *self.model.buffers())
        self.gradients = _bytes(*(x for x in parameters.values() if x.requires_grad))
        self.head_bytes = _bytes(*head.parameters())

    @property
    def state(self) -> int:
        """AdamW's."""
        return ADAM * self.gradients

    def answering(self) -> Line:
        """A forward without gradients."""

        def table(batch: int) -> Array:
            with self._sequences(batch) as ids, torch.no_grad(), Watch() as watch:
                self._hidden(ids)
            return watch.table()

        return Line(table)

    def training(self, checkpointing: bool) -> tuple[Line, Line]:
        """A forward, and the backward from the gradient of the hidden states on. Gradients are in
        it as they come, without the head's."""
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        turn = []

        def both(batch: int) -> Array:
            with self._sequences(batch) as ids:
                self.head.weight.grad = torch.empty_like(self.head.weight)  # from the loss
                with Watch() as watch:
                    hidden = self._hidden(ids)
                    turn.append(len(watch.rows))
                    hidden.backward(torch.empty_like(hidden))
            self.model.zero_grad()
            return watch.table()

        lines = Line(both)
        if checkpointing:
            self.model.gradient_checkpointing_disable()
        return lines.part(0, turn[0]), lines.part(turn[0], None)

    @contextmanager
    def _sequences(self, batch: int) -> Iterator[Tensor]:
        with self.fake:
            try:
                yield torch.zeros(batch, self.length, dtype=torch.long)
            except Exception as error:
                kind = type(error).__name__
                if kind not in ("DataDependentOutputException", "DynamicOutputShapeException"):
                    raise
                raise UserError(
                    f"--{self.saved.role} {self.saved.name}: what {type(self.model).__name__} "
                    f"computes depends on its data ({error}), as in a mixture of experts: that is "
                    "not planned."
                ) from error

    def _hidden(self, ids: Tensor) -> Tensor:
        found: list[Tensor] = []
        with tap(PlainHead(self.head), found.append):
            self.model(input_ids=ids, use_cache=False)
        return found[0]


def _bytes(*tensors: Any) -> int:
    return sum(x.numel() * x.itemsize for x in tensors)
