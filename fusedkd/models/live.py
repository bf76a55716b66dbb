"""A teacher that is run: a model as a function from a batch to its distributions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from fusedkd import LMHead
from fusedkd.models.heads import PlainHead, tap
from fusedkd.models.kinds import HeadOf


class LiveTeacher:
    """A model as a function from a batch to its distributions, as a head where it has a plain one.

    Args:
        model: in ``eval()``, without gradients.
        context: what its forward runs in, such as ``accelerator.autocast``.
        logits: of its outputs, where no head is used.
        head: whether a plain head is looked for.
    """

    def __init__(
        self,
        model: nn.Module,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        logits: Callable[[Any], Tensor] = attrgetter("logits"),
        head: bool = True,
    ) -> None:
        self.model, self.context, self.logits = model, context, logits
        self._head = HeadOf("teacher", wanted=head)
        self._head.of(model)
        self._parameters = inspect.signature(model.forward).parameters
        self._copies: tuple[Tensor, Tensor | None] | None = None

    @property
    def head(self) -> PlainHead | None:
        """The model's plain head; set to None, its logits are used from now on."""
        return self._head.found

    @head.setter
    def head(self, found: PlainHead | None) -> None:
        self._head.found = found

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any]) -> Tensor | LMHead:
        """Logits (B, L, V), or a head with hidden states (B, L, H)."""
        names = self._parameters
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in names.values()):
            inputs = {name: value for name, value in inputs.items() if name in names}
        if "use_cache" in names:  # nothing is generated: no keys and values to keep
            inputs = {**inputs, "use_cache": False}
        hidden: list[Tensor] = []
        device = next(x.device for x in inputs.values() if isinstance(x, Tensor))
        head = self._head.of(self.model, inputs)
        with self.context():
            if head is None:
                return self.logits(self.model(**inputs)).to(device)
            with tap(head, hidden.append):
                self.model(**inputs)
        return self._here(head.of(hidden[0]), device)

    def _here(self, head: LMHead, device: torch.device) -> LMHead:
        """The head where the student's loss is computed. Its weight, which does not change, is
        copied there once."""
        if head.hidden.device == device:
            return head
        if self._copies is None:
            weight, bias = head.weight, head.bias
            self._copies = weight.to(device), None if bias is None else bias.to(device)
        return LMHead(head.hidden.to(device), *self._copies, head.logit_scale, head.softcap)
