"""The terms of one training, where they are computed, and what is trained for them beside the
student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusedkd.models.capture import Captured, capture, expose_attention
from fusedkd.train.meter import Mean, Measured
from fusedkd.train.terms import Term, parse_term

_ATTRIBUTE = "fusedkd_projections"
_FILE = "projections.safetensors"


@dataclass
class Extra:
    """What the terms came to in one forward pass: the weighted sum, and each before its weight."""

    loss: Tensor | float = 0.0
    values: dict[str, Tensor] = field(default_factory=dict)

    def measured(self, tokens: Tensor | None, normalizer: float | Tensor | None) -> Measured:
        """The values as means over these tokens, whatever they were divided by."""
        if tokens is None:
            return {}
        here = tokens.sum().clamp(min=1)
        share = 1.0 if normalizer is None else normalizer / here
        return {name: Mean(value * share, here) for name, value in self.values.items()}


class TermSet:
    """Terms by name, bound to a student and a teacher. While one's weight is 0, training does not
    compute it.

    Projections are put into the student as a submodule, so that optimizer, DDP and device placement
    see them; the student's own ``save_pretrained`` leaves them out, and :meth:`save` and
    :meth:`load` keep them beside a checkpoint.

    Args:
        texts: see :func:`fusedkd.train.terms.parse_term`; a name may occur once.

    Raises:
        ValueError: from parsing, or a name that occurs twice.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.terms: dict[str, Term] = {}
        for text in texts:
            name, term = parse_term(text)
            if name in self.terms:
                raise ValueError(f"terms: {name} occurs twice: give it pairs of layers instead.")
            self.terms[name] = term
        self.attention = any(term.attention for term in self.terms.values())

    def __bool__(self) -> bool:
        return bool(self.terms)

    def attach(self, student: Any, teacher: Any) -> None:
        """Bind the terms to two models, and give the student their projections.

        Raises:
            ValueError: the two do not fit a term, or the teacher is a cache.
        """
        if not self.terms:
            return
        if not isinstance(teacher, nn.Module):
            raise ValueError(
                f"terms: {', '.join(self.terms)} need the teacher's own states, which a cache does "
                "not hold: pass a model as teacher."
            )
        models: dict[str, Any] = {"student": student, "teacher": teacher}
        for role, model in models.items():
            if getattr(model, "config", None) is None or model.config.is_encoder_decoder:
                raise ValueError(
                    f"terms: the {role} is a {type(model).__name__}: expected a transformers "
                    "encoder or decoder, whose hidden states can be seen."
                )
        bound = {
            name: term.bind(student.config, teacher.config) for name, term in self.terms.items()
        }
        modules = nn.ModuleDict({n: m for n, m in bound.items() if m is not None})
        if len(modules):
            student.add_module(_ATTRIBUTE, modules.to(student.device, student.dtype))
            ignored = {f"{_ATTRIBUTE}.{name}" for name in modules.state_dict()}
            student._keys_to_ignore_on_save = {*(student._keys_to_ignore_on_save or ()), *ignored}
        if self.attention:
            expose_attention(student)
            expose_attention(teacher)

    def watch(self, model: Any) -> Any:
        """A context in which a forward pass of ``model`` fills a :class:`Captured`."""
        return capture(model, self.attention) if self.terms else nullcontext(Captured())

    @contextmanager
    def in_forward(
        self,
        student: Any,
        teacher: Captured,
        tokens: Tensor | None,
        normalizer: float | Tensor | None,
        weights: Mapping[str, float],
    ) -> Iterator[Extra]:
        """While open, a forward pass of ``student`` computes the terms at its end, and adds them to
        the loss that it returns, if it does. Within the forward, so that DDP sees them used."""
        extra = Extra()
        if not self.terms:
            yield extra
            return

        def compute(module: nn.Module, args: Any, outputs: Any) -> Any:
            for name, term in self.terms.items():
                if not weights[name] and module.training:
                    # its projections stay in the graph, where DDP looks for them
                    extra.loss = extra.loss + sum(0.0 * p.sum() for p in self._trained(name))
                    continue
                value = term(seen, teacher, tokens, normalizer)
                extra.values[name] = value.detach()
                extra.loss = extra.loss + weights[name] * value
            if outputs.get("loss") is not None:
                outputs["loss"] = outputs["loss"] + extra.loss
            return outputs

        # hooks put in front later run earlier: the loss, what is seen, the terms, then others'
        handle = student.register_forward_hook(compute, prepend=True)
        try:
            with self.watch(student) as seen:
                yield extra
        finally:
            handle.remove()

    def _trained(self, name: str) -> Iterator[nn.Parameter]:
        modules = getattr(self.terms[name], "projections", None)
        return iter(()) if modules is None else modules.parameters()

    def save(self, student: Any, folder: str) -> None:
        """Write the projections, if there are any."""
        modules = getattr(student, _ATTRIBUTE, None)
        if modules is not None:
            save_file(
                {k: v.contiguous() for k, v in modules.state_dict().items()}, Path(folder) / _FILE
            )

    def load(self, student: Any, folder: str) -> None:
        """Read them again, if they were written."""
        path = Path(folder) / _FILE
        if (modules := getattr(student, _ATTRIBUTE, None)) is not None and path.is_file():
            modules.load_state_dict(load_file(path))


def own_parameters(student: Any) -> int:
    """How many the student has, without the projections, which are in it and not of it."""
    modules = getattr(student, _ATTRIBUTE, None)
    projected = 0 if modules is None else sum(p.numel() for p in modules.parameters())
    return int(student.num_parameters()) - projected


def real_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """(B, L) bool: which tokens of a batch are not padding."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return mask.bool()
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool)


def as_labels(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A batch that the Trainer counts as it counts labels, whose every real token has one."""
    labels = torch.where(real_tokens(inputs), 0, -100)
    return {"labels": labels, "shift_labels": labels}
