"""A server of a teacher's log-probabilities that speaks vLLM's, SGLang's or TRL's protocol, and can
misbehave in every way that is known."""

from __future__ import annotations

import base64
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

LogProbs = Callable[[list[int]], np.ndarray]  # ids (L,) to (L, V), of the next token
FAULTS = (
    "429", "503", "500", "reset", "stall", "cut", "cut_unsaid", "html", "other", "duplicate",
    "nan", "null", "short", "twice", "mass", "no_choices",
)  # fmt: skip


@dataclass
class Behaviour:
    """``faults`` is the share of the questions that are answered by one of ``kinds``."""

    protocol: str = "vllm"
    flat: bool = True  # SGLang's base64
    max_logprobs: int = 20
    context: int = 1024
    model: str = "tiny"
    honours_temperature: bool = False
    tokenizes: bool = True
    latency: float = 0.0  # seconds; twice that at most
    stall: float = 1.0
    faults: float = 0.0
    kinds: Sequence[str] = FAULTS
    down: bool = False  # 503 to everything
    open: threading.Event = field(default_factory=threading.Event)  # closed: answers are held
    hold_after: float = float("inf")  # answers


class TeacherServer:
    """Within ``with``, answers at ``url``. ``asked`` and ``answered`` count sequences, without the
    token that a client asks once more."""

    def __init__(self, log_probs: LogProbs, tokenizer: Any, **behaviour: Any) -> None:
        self.log_probs, self.tokenizer = log_probs, tokenizer
        self.now = Behaviour(**behaviour)
        self.asked: Counter[tuple[int, ...]] = Counter()
        self.answered: Counter[tuple[int, ...]] = Counter()
        self.faults: Counter[str] = Counter()
        self.last: bytes | None = None
        self.dice = random.Random(0)
        self.lock = threading.Lock()

    def __enter__(self) -> TeacherServer:
        handler = type("Handler", (_Handler,), {"teacher": self})
        self.http = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.now.open.set()
        self.http.shutdown()
        self.http.server_close()

    # ---- answers ----

    def answer(self, ids: list[int], k: int, temperature: float) -> bytes:
        """As this server gives it, of all tokens of ``ids`` but the first."""
        logs = self.log_probs(ids)[:-1]
        if self.now.honours_temperature and temperature != 1:
            logs = logs / temperature
            logs = logs - np.log(np.exp(logs).sum(1, keepdims=True))
        top = np.argsort(-logs, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(logs, top, 1)
        return getattr(self, f"_{self.now.protocol}")(ids, logs, top, values)

    def _vllm(self, ids: list[int], logs: Any, top: Any, values: Any) -> bytes:
        steps: list[Any] = [None]
        for n, token in enumerate(ids[1:]):  # the token itself first, as vLLM does
            row = {token: logs[n, token]} | dict(zip(top[n].tolist(), values[n], strict=True))
            steps.append(
                {
                    str(i): {"logprob": float(v), "rank": r + 1, "decoded_token": f'"{i},{{'}
                    for r, (i, v) in enumerate(row.items())
                }
            )
        choice = {"index": 0, "text": "", "prompt_logprobs": steps, "prompt_token_ids": ids}
        return _json({"model": self.now.model, "choices": [choice], "usage": {"n": 1}})

    def _sglang(self, ids: list[int], logs: Any, top: Any, values: Any) -> bytes:
        own = [None, *(float(row[token]) for row, token in zip(logs, ids[1:], strict=True))]
        pairs = zip(own, ids, strict=True)
        told: dict[str, Any] = {"input_token_logprobs": [[v, i, None] for v, i in pairs]}
        if self.now.flat:
            for name, part in (("val", values.astype("<f4")), ("idx", top.astype("<i4"))):
                whole = f"input_top_logprobs_{name}_flat_b64"
                told[whole] = base64.b64encode(part.tobytes()).decode()
                told[f"{whole}_dtype"] = part.dtype.name
            told["input_top_logprobs_shape"] = [len(ids), top.shape[1]]
            told["input_top_logprobs_null_prefix"] = 1
        else:
            rows = zip(values.tolist(), top.tolist(), strict=True)
            told["input_top_logprobs"] = [
                None, *([[v, i, None] for v, i in zip(*row, strict=True)] for row in rows)
            ]  # fmt: skip
        return _json({"text": "", "meta_info": told})

    def _trl(self, ids: list[int], logs: Any, top: Any, values: Any) -> bytes:
        actual = [[float(row[token])] for row, token in zip(logs, ids[1:], strict=True)]
        return _json(
            {
                "logprobs": [values.tolist()],
                "logprob_token_ids": [top.tolist()],
                "actual_logprobs": [actual],
                "actual_token_ids": [[[token] for token in ids[1:]]],
            }
        )

    def spoilt(self, kind: str, ids: list[int], k: int) -> bytes:
        """A body that is wrong."""
        whole = self.answer(ids, k, 1.0)
        if kind == "other":
            return self.answer([(i + 1) % 60 for i in ids], k, 1.0)
        if kind == "duplicate":
            return self.last or b"{}"
        if kind == "html":
            return b"<html>502 Bad Gateway</html>"
        if kind == "no_choices":
            return _json({"object": "error", "choices": []})
        if kind == "cut_unsaid":
            return whole[: self.dice.randrange(1, len(whole))]
        told = json.loads(whole)
        step = told["choices"][0]["prompt_logprobs"][-1]
        entry = next(iter(step.values()))
        if kind == "nan":
            return whole.replace(json.dumps(entry["logprob"]).encode(), b"NaN")
        if kind == "null":
            entry["logprob"] = None
        if kind == "mass":
            entry["logprob"] = 0.0
        if kind == "short":
            del told["choices"][0]["prompt_logprobs"][-1]
        if kind == "twice":
            raw = _json(told)
            a, b = list(step)[-2:]
            head, _, tail = raw.rpartition(f'"{b}":{{'.encode())
            return head + f'"{a}":{{'.encode() + tail
        return _json(told)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *args: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    teacher: TeacherServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        now = self.teacher.now
        if now.down:
            return self._send(503, b"{}")
        path = {"vllm": "/v1/completions", "sglang": "/generate", "trl": "/get_sequence_logprobs/"}
        known: dict[str, Any] = {"/openapi.json": {"paths": {path[now.protocol]: {}}}}
        if now.protocol != "trl":
            entry = {"id": now.model, "parent": None, "max_model_len": now.context}
            known["/v1/models"] = {"data": [entry]}
        return self._send(*((200, _json(known[self.path])) if self.path in known else (404, b"{}")))

    def do_POST(self) -> None:
        teacher, now = self.teacher, self.teacher.now
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if now.down:
            return self._send(503, b"{}")
        if self.path == "/tokenize":
            if not now.tokenizes:
                return self._send(404, b"{}")
            ids = teacher.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return self._send(200, _json({"tokens": ids, "count": len(ids)}))
        ids, k, temperature = _question(now.protocol, body)
        size = len(teacher.tokenizer)
        if k > now.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: "
            return self._refuse(said + str(now.max_logprobs))
        if max(ids) >= size:
            return self._refuse(f"Token id {max(ids)} is out of vocabulary")
        if len(ids) >= now.context:
            return self._refuse("the prompt is too long")
        self._answer(ids, k, temperature)

    def _answer(self, ids: list[int], k: int, temperature: float) -> None:
        teacher, now = self.teacher, self.teacher.now
        with teacher.lock:
            teacher.asked[tuple(ids[:-1])] += 1
            bad = teacher.dice.random() < now.faults
            kind = teacher.dice.choice(list(now.kinds)) if bad else None
            wait = now.latency * (1 + teacher.dice.random())
        time.sleep(wait)
        if kind is not None:
            teacher.faults[kind] += 1
            return self._misbehave(kind, ids, k)
        content = teacher.answer(ids, k, temperature)
        with teacher.lock:
            held = sum(teacher.answered.values()) >= now.hold_after
            if not held:
                teacher.answered[tuple(ids[:-1])] += 1
        if held and not now.open.is_set():
            now.open.wait(60)
            self.close_connection = True
            return None
        self._send(200, content)
        teacher.last = content
        return None

    def _misbehave(self, kind: str, ids: list[int], k: int) -> None:
        if kind in ("429", "503", "500"):
            return self._send(int(kind), b'{"error":{"message":"later"}}', {"Retry-After": "0.01"})
        self.close_connection = kind in ("reset", "stall", "cut")
        if kind == "reset":
            return self.connection.shutdown(socket.SHUT_RDWR)
        if kind == "stall":
            return time.sleep(self.teacher.now.stall)
        whole = self.teacher.answer(ids, k, 1.0)
        if kind == "cut":
            return self._send(200, whole[: len(whole) // 2], {"Content-Length": str(len(whole))})
        return self._send(200, self.teacher.spoilt(kind, ids, k))

    def _refuse(self, said: str) -> None:
        self._send(400, _json({"error": {"message": said, "code": 400}}))

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()


def _question(protocol: str, body: dict[str, Any]) -> tuple[list[int], int, float]:
    if protocol == "vllm":
        assert body["max_tokens"] == 1 and body["return_token_ids"]
        return body["prompt"], body["prompt_logprobs"], body["temperature"]
    if protocol == "sglang":
        assert body["return_logprob"] and body["logprob_start_len"] == 0
        return body["input_ids"], body["top_logprobs_num"], body["sampling_params"]["temperature"]
    assert body["prompt_lengths"] == [1]
    return body["sequences"][0], body["top_logprobs"], body["temperature"]


def _json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def bigrams(vocabulary: int, seed: int = 0) -> LogProbs:
    """A teacher that looks at one token."""
    logits = np.random.default_rng(seed).normal(0, 3, (vocabulary, vocabulary))
    table = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return lambda ids: table[ids]


def model_log_probs(model: Any) -> LogProbs:
    """A decoder's."""
    import torch

    def log_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()

    return log_probs
