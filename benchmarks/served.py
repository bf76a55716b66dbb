"""Served teachers, measured: ``python -m fusedkd.benchmarks.served``.

How fast answers of 4,096 tokens with 64 entries are decoded, against ``json.loads`` and loops; and
what a training step costs whose teacher is a server that takes a while, against one whose teacher
is a cache of the same answers. The server is a process of its own.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from fusedkd.cache import TeacherCache
from fusedkd.teachers import ServedTeacher, Service
from fusedkd.teachers.decoding import read_sglang, read_trl, read_vllm
from fusedkd.teachers.filling import fill
from fusedkd.train import DistillationArguments, DistillationTrainer

K, VOCABULARY = 64, 32_000
Arrays = tuple[np.ndarray, np.ndarray]  # ids and log-probabilities, (L, K)


def main() -> None:
    """Measure, and print tables."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedkd.benchmarks.served", description=__doc__
    )
    parser.add_argument("--only", choices=("decoding", "steps"), help="one part")
    parser.add_argument("--tokens", type=int, default=4096, help="of a decoded answer")
    parser.add_argument("--steps", type=int, default=24, help="of a run")
    parser.add_argument("--rounds", type=int, default=3, help="of each kind of run, taking turns")
    parser.add_argument("--latency", type=float, default=2.5, help="of the server, in steps")
    parser.add_argument("--hidden", type=int, default=384, help="of the student")
    args = parser.parse_args()
    console = Console(width=100)
    if args.only in (None, "decoding"):
        _decoding(console, args.tokens)
    if args.only in (None, "steps"):
        _steps(console, args)


# ---- decoding ----


def _answer(tokens: int, vocabulary: int, seed: int = 0) -> Arrays:
    dice = np.random.default_rng(seed)
    ids = dice.integers(0, vocabulary // K, (tokens, K)) * K + np.arange(K)  # no two alike
    gaps = np.sort(dice.exponential(3, (tokens, K)), axis=1) + 1
    return dice.permuted(ids, axis=1), -gaps - np.log(np.exp(-gaps).sum(1, keepdims=True))


def _vllm(asked: Sequence[int], ids: np.ndarray, logs: np.ndarray) -> bytes:
    steps = [
        {
            str(i): {"logprob": v, "rank": r, "decoded_token": f" t{i}"}
            for r, (i, v) in enumerate(zip(*row, strict=True), 1)
        }
        for row in zip(ids.tolist(), logs.tolist(), strict=True)
    ]
    choice = {"prompt_logprobs": [None, *steps], "prompt_token_ids": list(asked)}
    return json.dumps({"choices": [choice]}, separators=(",", ":")).encode()


def _sglang(asked: Sequence[int], ids: np.ndarray, logs: np.ndarray, flat: bool) -> bytes:
    told: dict[str, Any] = {"input_token_logprobs": [[-1.0, i, None] for i in asked]}
    if flat:
        for name, part in (("val", logs.astype("<f4")), ("idx", ids.astype("<i4"))):
            whole = f"input_top_logprobs_{name}_flat_b64"
            told |= {whole: base64.b64encode(part).decode(), f"{whole}_dtype": part.dtype.name}
        told |= {"input_top_logprobs_shape": [len(asked), K], "input_top_logprobs_null_prefix": 1}
    else:
        rows = zip(logs.tolist(), ids.tolist(), strict=True)
        told["input_top_logprobs"] = [
            None,
            *([[v, i, None] for v, i in zip(*row, strict=True)] for row in rows),
        ]
    return json.dumps({"meta_info": told}, separators=(",", ":")).encode()


def _trl(asked: Sequence[int], ids: np.ndarray, logs: np.ndarray) -> bytes:
    told: dict[str, Any] = {"logprobs": [logs.tolist()], "logprob_token_ids": [ids.tolist()]}
    told |= {"actual_token_ids": [[[i] for i in asked[1:]]]}
    return json.dumps(told, separators=(",", ":")).encode()


def _loops_vllm(content: bytes) -> Arrays:
    steps = json.loads(content)["choices"][0]["prompt_logprobs"][1:]
    ids, logs = np.full((len(steps), K), -1), np.full((len(steps), K), -np.inf)
    for n, step in enumerate(steps):
        for m, (key, entry) in enumerate(step.items()):
            ids[n, m], logs[n, m] = int(key), entry["logprob"]
    return ids, logs


def _loops_sglang(content: bytes) -> Arrays:
    steps = json.loads(content)["meta_info"]["input_top_logprobs"][1:]
    ids, logs = np.full((len(steps), K), -1), np.full((len(steps), K), -np.inf)
    for n, step in enumerate(steps):
        for m, (value, number, _) in enumerate(step):
            ids[n, m], logs[n, m] = number, value
    return ids, logs


def _loops_trl(content: bytes) -> Arrays:
    told = json.loads(content)
    steps = list(zip(told["logprob_token_ids"][0], told["logprobs"][0], strict=True))
    ids, logs = np.full((len(steps), K), -1), np.full((len(steps), K), -np.inf)
    for n, step in enumerate(steps):
        for m, (number, value) in enumerate(zip(*step, strict=True)):
            ids[n, m], logs[n, m] = number, value
    return ids, logs


def _decoding(console: Console, tokens: int) -> None:
    ids, logs = _answer(tokens, 151_936)
    asked = [0] * (tokens + 1)
    lists = _sglang(asked, ids, logs, flat=False)
    kinds: dict[str, tuple[bytes, Any, bytes, Any]] = {
        "vLLM": (_vllm(asked, ids, logs), read_vllm, _vllm(asked, ids, logs), _loops_vllm),
        "SGLang, lists": (lists, read_sglang, lists, _loops_sglang),
        "SGLang, base64": (_sglang(asked, ids, logs, True), read_sglang, lists, _loops_sglang),
        "TRL": (_trl(asked, ids, logs), read_trl, _trl(asked, ids, logs), _loops_trl),
    }
    table = Table("answer", "MB", "json and loops", "decoded", "times", title=f"{tokens:,} x {K}")
    for name, (content, read, plain, loops) in kinds.items():
        found, expected = read(content).matrices(), loops(plain)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)
        ours, theirs = _best(lambda f=read, c=content: f(c), lambda f=loops, c=plain: f(c))
        times = (f"{theirs * 1e3:.0f} ms", f"{ours * 1e3:.1f} ms", f"{theirs / ours:.1f}")
        table.add_row(name, f"{len(content) / 1e6:.1f}", *times)
    console.print(table)


def _best(*functions: Callable[[], Any], rounds: int = 7) -> list[float]:
    """The shortest time of each, taking turns."""
    best = [float("inf")] * len(functions)
    for _ in range(rounds):
        for place, function in enumerate(functions):
            start = time.perf_counter()
            function()
            best[place] = min(best[place], time.perf_counter() - start)
    return best


# ---- steps ----


_END = b"}]}"  # of an answer of vLLM's


def _tokenizer() -> Any:
    words = {f"w{n}": n for n in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0", pad_token="w1")


def _serve(latency: Any, ready: Any) -> None:
    """vLLM's protocol, at no cost to this machine: what is said of the tokens is made once."""
    known: dict[int, tuple[bytes, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            told = {"/v1/models": {"data": [{"id": "tiny"}]}}.get(self.path)
            self._send(404 if told is None else 200, json.dumps(told).encode())

        def do_POST(self) -> None:
            start = time.perf_counter()
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if "max_tokens" not in body:
                return self._send(404, b"{}")
            tokens = len(body["prompt"]) - 1
            if tokens not in known:
                whole = _vllm([], *_answer(tokens, VOCABULARY))
                known[tokens] = whole.removesuffix(b"[]" + _END), _END
            content = json.dumps(body["prompt"]).encode().join(known[tokens])
            time.sleep(max(0.0, latency.value - (time.perf_counter() - start)))
            return self._send(200, content)

        def _send(self, status: int, content: bytes) -> None:
            self.send_response_only(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    ready.put(server.server_address[1])
    server.serve_forever()


@contextmanager
def _server() -> Iterator[tuple[str, Any]]:
    context = multiprocessing.get_context("spawn")
    latency, ready = context.Value("d", 0.0), context.Queue()
    process = context.Process(target=_serve, args=(latency, ready), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ready.get(timeout=120)}", latency
    finally:
        process.terminate()
        process.join()


class _Times(TrainerCallback):
    """When steps end."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Seconds from one end to the next: its median, without the first steps, for which nothing
        could be asked ahead."""
        return statistics.median(np.diff(self.ends)[len(self.ends) // 4 :].tolist())


def _run(teacher: Any, folder: Path, args: argparse.Namespace, data: list[Any]) -> float:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=args.hidden,
        intermediate_size=2 * args.hidden,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    options: dict[str, Any] = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    options |= {"save_strategy": "no", "logging_strategy": "no"}
    # the cached run has a worker, too: so that batches are made elsewhere in both
    options |= {"per_device_train_batch_size": 4, "dataloader_num_workers": 1}
    times = _Times()
    DistillationTrainer(
        LlamaForCausalLM(config),
        teacher,
        DistillationArguments(str(folder), max_steps=args.steps, **options),
        train_dataset=data,
        processing_class=_tokenizer(),
        data_collator=_collate,
        callbacks=[times],
    ).train()
    return times.step


def _collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(np.stack([row["input_ids"] for row in rows]))
    return {"input_ids": ids, "labels": ids.clone()}


def _steps(console: Console, args: argparse.Namespace) -> None:
    dice = np.random.default_rng(0)
    ids = dice.integers(0, VOCABULARY, (4 * args.steps, 128))
    data = [{"input_ids": row} for row in ids]
    with tempfile.TemporaryDirectory() as work, _server() as (url, latency):
        service = Service.at(url, top_k=K)
        full = ServedTeacher(service, _tokenizer(), Path(work, "answers"))
        fill(Path(work, "cache"), list(ids), full)
        cache = TeacherCache(Path(work, "cache"))
        step = _run(cache, Path(work, "warm"), args, data)
        cached, served = [], []
        for round_ in range(args.rounds):
            cached.append(_run(cache, Path(work, f"c{round_}"), args, data))
            latency.value = args.latency * min([step, *cached])
            fresh = ServedTeacher(service, _tokenizer(), Path(work, f"answers{round_}"))
            served.append(_run(fresh, Path(work, f"s{round_}"), args, data))
            latency.value = 0.0
    table = Table("teacher", "step", "of the cached one", title="a training step, best of rounds")
    table.add_row("cached", f"{min(cached) * 1e3:.0f} ms", "1.00")
    ratio = f"{min(served) / min(cached):.3f}"
    table.add_row(f"served, {args.latency:g} steps late", f"{min(served) * 1e3:.0f} ms", ratio)
    console.print(table)


if __name__ == "__main__":
    main()
