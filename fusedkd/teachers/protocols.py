"""What a client must speak to a server that scores tokens: how a question is put, and how an answer
is read. Facts of vLLM 0.32, SGLang and TRL as of November 2026.

All of them say what was expected *of* token n, so of token n + 1 one learns the distribution after
token n. Every sequence is therefore asked with its last token once more, whose entry is the
distribution after the last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fusedkd.teachers.decoding import (
    Actual,
    Entries,
    actual_sglang,
    actual_trl,
    actual_vllm,
    read_sglang,
    read_trl,
    read_vllm,
)


@dataclass(frozen=True)
class Question:
    """What is asked about every sequence alike."""

    model: str
    k: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Protocol:
    """One server's.

    Args:
        name: for ``--teacher_protocol``.
        path: where questions go.
        mark: a path of ``/openapi.json`` that tells this server from those after it.
        ask: token ids and the question to a JSON body.
        read: the bytes of an answer to its entries; raises ValueError, LookupError or TypeError
            about anything else.
        actual: the same, to what is said of the tokens that were asked.
        limit: how the server is started so that it gives more entries.
    """

    name: str
    path: str
    mark: str
    ask: Callable[[list[int], Question], dict[str, Any]]
    read: Callable[[bytes], Entries]
    actual: Callable[[bytes], Actual]
    limit: str


def _ask_vllm(ids: list[int], question: Question) -> dict[str, Any]:
    return {
        "model": question.model,
        "prompt": ids,
        "max_tokens": 1,  # 0 is refused
        "temperature": question.temperature,
        "prompt_logprobs": question.k,
        "return_token_ids": True,
    }


def _ask_sglang(ids: list[int], question: Question) -> dict[str, Any]:
    return {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": question.temperature},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": question.k,
        "return_text_in_logprobs": False,
        "return_flat_raw_top_logprobs": True,  # a server that is too old ignores both
        "return_flat_raw_top_logprobs_b64": True,
    }


def _ask_trl(ids: list[int], question: Question) -> dict[str, Any]:
    return {
        "sequences": [ids],
        "prompt_lengths": [1],
        "top_logprobs": question.k,
        "temperature": question.temperature,
        "response_format": "json",
    }


PROTOCOLS = (
    # TRL's own application, up to August 2026 (trl#6765): `trl vllm-serve` is vLLM's since
    Protocol(
        "trl",
        "/get_sequence_logprobs/",
        "/get_sequence_logprobs/",
        _ask_trl,
        read_trl,
        actual_trl,
        "trl vllm-serve of another version",
    ),
    Protocol(
        "sglang",
        "/generate",
        "/generate",
        _ask_sglang,
        read_sglang,
        actual_sglang,
        "sglang.launch_server without prefill-decode disaggregation",
    ),
    Protocol(
        "vllm",
        "/v1/completions",
        "/v1/completions",
        _ask_vllm,
        read_vllm,
        actual_vllm,
        "vllm serve --max-logprobs",
    ),
)


def protocol_named(name: str) -> Protocol:
    """One of ``fusedkd.teachers.service.PROTOCOLS``."""
    return next(protocol for protocol in PROTOCOLS if protocol.name == name)


def protocol_of(paths: Any) -> Protocol:
    """By the paths of a server's ``/openapi.json``; vLLM's, where it has none."""
    found = (protocol for protocol in PROTOCOLS if protocol.mark in (paths or ()))
    return next(found, PROTOCOLS[-1])
