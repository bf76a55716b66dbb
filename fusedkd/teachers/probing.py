"""What can be wrong with a server, before the first step: asked of every one of them, in a few
small questions."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fusedkd.cache.answers import Answers
from fusedkd.cache.layout import Layout
from fusedkd.teachers.asking import ask
from fusedkd.teachers.client import Client, Refused
from fusedkd.teachers.protocols import Protocol, Question, protocol_named, protocol_of
from fusedkd.teachers.service import Service, TeacherError

logger = logging.getLogger(__name__)

START = 60.0  # seconds for a server to be there at all
TOKENS = 16  # of the probe, over the whole vocabulary
TOP = 8  # of its entries make the fingerprint
FAR = 0.25  # nats, on average, that two answers of one model never differ: bf16 leaves 0.01
TEXT = "def f(x):\n    return x ** 2  # 12,345.67\n\tNaïve café, 東京 Ελλάδα ещё \U0001f642 don't"
Fingerprint = list[list[list[float]]]  # ids and log-probabilities, token by token


@dataclass(frozen=True)
class Served:
    """What was found."""

    protocol: Protocol
    question: Question
    most_tokens: int | None  # of a sequence
    fingerprint: Fingerprint

    @property
    def model(self) -> str:
        """The server's name for it."""
        return self.question.model


def probed(service: Service, layout: Layout, tokenizer: Any) -> Served:
    """Look at each server.

    Raises:
        TeacherError: see :class:`fusedkd.teachers.served.ServedTeacher`.
    """
    found = [_probed(url, service, layout, tokenizer) for url in service.urls]
    for url, other in zip(service.urls[1:], found[1:], strict=True):
        if (other.protocol, other.model) != (found[0].protocol, found[0].model):
            raise TeacherError(
                f"--teacher: {service.urls[0]} serves {found[0].model} by "
                f"{found[0].protocol.name}, {url} {other.model} by {other.protocol.name}: expected "
                "one teacher."
            )
        check_same_teacher(f"{service.urls[0]} and {url}", found[0].fingerprint, other.fingerprint)
    lengths = [server.most_tokens for server in found if server.most_tokens is not None]
    return replace(found[0], most_tokens=min(lengths, default=None))


def check_same_teacher(where: str, one: Fingerprint, other: Fingerprint) -> None:
    """
    Raises:
        TeacherError: two answers to the probe are not those of one model.
    """
    gaps = []
    for (ids, logs), (other_ids, other_logs) in zip(one, other, strict=True):
        theirs = dict(zip(other_ids, other_logs, strict=True))
        gaps += [abs(log - theirs[i]) for i, log in zip(ids, logs, strict=True) if i in theirs]
    if len(gaps) < sum(len(ids) for ids, _ in one) / 2 or np.mean(gaps) > FAR:
        raise TeacherError(
            f"--teacher: the answers to a probe differ ({where}), as those of two models do. "
            "Expected one teacher behind all addresses, and the same for one --teacher_answers."
        )


def _probed(url: str, service: Service, layout: Layout, tokenizer: Any) -> Served:
    limits = replace(service.limits, patience=min(START, service.limits.patience))
    client = Client((url,), limits)
    if service.protocol is None:
        described = _told(client, "/openapi.json") or {}
        protocol = protocol_of(described.get("paths"))
    else:
        protocol = protocol_named(service.protocol)
    model, length = _model(url, client, service.model)
    _check_tokenizer(url, client, model, tokenizer)
    question = Question(model, layout.k, service.temperature)
    probe = np.linspace(0, layout.vocab_size - 1, TOKENS).astype(np.int64)
    answers = _asked(url, client, protocol, question, layout, probe)
    if service.temperature != 1.0:
        plain = replace(question, temperature=1.0), replace(layout, temperatures=(1.0,))
        _check_temperature(
            url, service.temperature, answers, _asked(url, client, protocol, *plain, probe)
        )
    top = zip(answers.ids[:, :TOP], answers.values[:, :TOP], strict=True)
    fingerprint = [[ids.tolist(), np.round(logs, 4).tolist()] for ids, logs in top]
    return Served(protocol, question, None if length is None else length - 2, fingerprint)


def _told(client: Client, path: str, body: Any = None) -> Any:
    """What the server says there; None if it has no such place."""
    try:
        return client.tell(path, body)
    except Refused:
        return None


def _model(url: str, client: Client, name: str | None) -> tuple[str, int | None]:
    """(its name there, the longest sequence)."""
    listed = (_told(client, "/v1/models") or {}).get("data") or []
    models = {entry["id"]: entry for entry in listed}
    own = [key for key, entry in models.items() if not entry.get("parent")]  # no adapters
    if not models:  # TRL's has no list
        return name or "the only one", None
    if name is None and len(own) != 1:
        raise TeacherError(
            f"--teacher {url} serves {', '.join(models)}: choose by --teacher_model."
        )
    name = own[0] if name is None else name
    if name not in models:
        raise TeacherError(
            f"--teacher_model {name}: {url} has no such model, only {', '.join(models)}."
        )
    return name, models[name].get("max_model_len")


def _check_tokenizer(url: str, client: Client, model: str, tokenizer: Any) -> None:
    spread = np.linspace(0, len(tokenizer) - 1, 256).astype(int).tolist()
    text = f"{TEXT} {tokenizer.decode(spread, skip_special_tokens=True)}"
    body = {"model": model, "prompt": text, "add_special_tokens": False}
    told = _told(client, "/tokenize", body)
    if not isinstance(told, dict) or "tokens" not in told:
        logger.warning(
            "%s does not tell how it tokenizes (POST /tokenize): its vocabulary is only compared "
            "by size.",
            url,
        )
        return
    ours = tokenizer(text, add_special_tokens=False)["input_ids"]
    if told["tokens"] != ours:
        raise TeacherError(
            f"--teacher {url}: its tokenizer makes {len(told['tokens'])} other ids of a text than "
            f"the one given, which makes {len(ours)}: distillation by token needs one tokenizer. "
            "With --cross_tokenizer alm, --teacher_tokenizer is to be the teacher's."
        )


def _asked(
    url: str,
    client: Client,
    protocol: Protocol,
    question: Question,
    layout: Layout,
    probe: np.ndarray,
) -> Answers:
    try:
        return ask(client, protocol, question, layout, probe)
    except TeacherError as error:
        refused = error.__cause__
        if not isinstance(refused, Refused):
            raise
        said = refused.said.lower()
        if "logprobs" in said:
            raise TeacherError(
                f"--teacher_top_k {question.k}: {url} gives fewer entries of a token: "
                f"{refused.said}. Ask for fewer, or start it with more ({protocol.limit} "
                f"{question.k})."
            ) from error
        if "vocab" in said or "token id" in said:
            raise TeacherError(
                f"--teacher {url}: it does not know the id {int(probe[-1])}, the last of the "
                f"tokenizer's: {refused.said}. Expected the teacher's tokenizer, or its "
                "--vocab_size."
            ) from error
        raise


def _check_temperature(url: str, heat: float, at: Answers, plain: Answers) -> None:
    """Whether answers at a temperature are the plain ones' powers. Values of a cache are those of
    T = 1, so they are to be equal but for the normaliser."""
    gaps = [part.values[:, :1] - part.values[:, :TOP] for part in (at, plain)]
    with np.errstate(invalid="ignore"):
        far = np.abs(gaps[0] - gaps[1]) > 0.02 + 0.05 * np.abs(gaps[1])
    if far[np.isfinite(gaps[0]) & np.isfinite(gaps[1])].any():
        raise TeacherError(
            f"--teacher_temperature {heat:g}: {url} ignores it, and gives log-probabilities at "
            "another temperature (vLLM's and SGLang's of a prompt are always at 1). Expected 1: "
            "--temperature 1, or --teacher_temperature 1, or a cache (fusedkd cache "
            "--temperatures)."
        )
