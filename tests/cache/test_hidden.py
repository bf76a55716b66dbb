"""Caches of hidden states, of tiny models of the real library."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fusedkd import LMHead, divergences, kd_loss
from fusedkd.cache import CacheError, Damaged, Job, TeacherCache, build, verify
from fusedkd.cache.hidden import GROUP, HiddenLayout
from fusedkd.cache.manifest import _render
from fusedkd.cache.policy import Policy
from fusedkd.teachers import CachedTeacher, LiveTeacher

V, H, LENGTH, BATCH = 130, 96, 24, 4
FACTS = {"teacher": "t", "teacher_hash": None, "tokenizer_hash": "0" * 64, "dtype": "bfloat16"}
SMALL: dict[str, Any] = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": 0, "head_dim": 24,
}  # fmt: skip


def make_model(kind: str = "llama", seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        "gemma": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=5.0)),
        "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    }[kind]()
    with torch.no_grad():
        for x in made.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return made.eval().requires_grad_(False)


def rows(count: int = 3 * BATCH) -> list[np.ndarray]:
    chance = np.random.default_rng(0)
    return [chance.integers(2, V, LENGTH) for _ in range(count)]


def job(run: LiveTeacher, form: str) -> Job:
    head = run({"input_ids": torch.zeros(1, 1, dtype=torch.int64)})
    assert isinstance(head, LMHead)
    layout = HiddenLayout(Policy(form, H), V - 3)
    size = int(1.5 * BATCH * LENGTH * layout.most_bytes_per_token)
    return Job(rows(), layout, {**FACTS, "padded_vocab_size": V}, BATCH, size, head)


def written(folder: Path, form: str, model: PreTrainedModel) -> LiveTeacher:
    run = LiveTeacher(model)
    build(folder, job(run, form), lambda ids: run({"input_ids": ids}))
    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rotated(x: np.ndarray) -> np.ndarray:
    """As fusedkd/cache/hidden.py describes it, (L, groups, 64)."""
    width = x.shape[1]
    raw = hashlib.shake_128(b"fusedkd").digest(-(-width // 8))
    signs = [1 - 2 * (raw[j // 8] >> (7 - j % 8) & 1) for j in range(width)]
    hadamard = np.ones((1, 1))
    for _ in range(6):
        hadamard = np.kron([[1, 1], [1, -1]], hadamard)
    padded = np.pad(x * signs, ((0, 0), (0, -width % GROUP)))
    return padded.reshape(len(x), -1, GROUP) @ hadamard / 8


def test_a_few_large_numbers_do_not_drown_the_others() -> None:
    """As they are in large models: rounded without a rotation, eight times as much is lost."""
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0))
    x[:, 3::GROUP] *= 100
    layout = HiddenLayout(Policy("int8", 256), V)
    ours = (layout.states(layout.encode_states(x), 50).float() - x)[:, 4:60].norm()
    step = x.unflatten(-1, (-1, GROUP)).abs().amax(-1, keepdim=True) / 127
    plain = (x.unflatten(-1, (-1, GROUP)) / step).round() * step
    assert ours < (plain.flatten(1) - x)[:, 4:60].norm() / 4


@pytest.mark.parametrize("width", [1, 63, 64, 200])
def test_round_trip(width: int) -> None:
    """bf16 to the bit; int8 to half a step of each number of a group, which a rotation leaves as it
    is in sum, and the rounding of what is read."""
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(0)) * 3
    x[2], x[3, 0] = 0, 900.0
    wide, narrow = (HiddenLayout(Policy(form, width), V) for form in ("bf16", "int8"))
    assert torch.equal(wide.states(wide.encode_states(x), 7), x.bfloat16())
    columns = narrow.encode_states(x)
    found = narrow.states(columns, 7).double()
    turned = rotated(x.double().numpy())
    steps = np.abs(turned).max(-1) / 127
    codes = np.frombuffer(columns["rotated"], np.int8).reshape(turned.shape)
    scales = np.frombuffer(columns["scales"], np.float16).reshape(steps.shape).astype(np.float64)
    np.testing.assert_allclose(scales, steps, rtol=1e-3, atol=1e-7)
    assert (np.abs(codes * scales[..., None] - turned) <= 0.51 * steps[..., None] + 1e-6).all()
    for number, start in enumerate(range(0, width, GROUP)):
        part = x[:, start : start + GROUP]
        error = (found[:, start : start + GROUP] - part).norm(dim=-1).numpy()
        assert (error <= 8 * 0.51 * steps[:, number] + part.norm(dim=-1).numpy() / 256 + 1e-6).all()
    for layout, kept in ((wide, wide.encode_states(x)), (narrow, columns)):
        assert sum(map(len, kept.values())) == 7 * layout.most_bytes_per_token
        with pytest.raises(ValueError, match="bytes"):
            layout.states(kept, 8)


def test_what_is_no_state() -> None:
    layout = HiddenLayout(Policy("bf16", 4), V)
    for value in (torch.nan, torch.inf):
        with pytest.raises(CacheError, match="NaN or infinite at token 1"):
            layout.encode_states(torch.tensor([[0.0] * 4, [0, 0, value, 0]]))
    raw = np.full(4, 0x7FC0, np.uint16).tobytes()
    with pytest.raises(ValueError, match="NaN"):
        layout.states({"states": raw}, 1)
    with pytest.raises(CacheError, match="5 numbers"):
        layout.encode_states(torch.zeros(2, 5))
    for wrong in ({"k": 0}, {"k": True}, {"k": 8, "top_p": 0.5}):
        with pytest.raises(CacheError, match="--hidden"):
            Policy("int8", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gemma", "cohere"])
def test_a_teacher_in_bf16_is_itself(tmp_path: Path, kind: str) -> None:
    """Bit for bit, where it was asked in the same batches; its softcap and scale with it."""
    run = written(tmp_path, "bf16", make_model(kind).bfloat16())
    teacher = CachedTeacher(TeacherCache(tmp_path), divergences.jsd(), 2.0, "bucket")
    every = torch.as_tensor(np.stack(rows()))
    for ids in every.split(BATCH):
        live = run({"input_ids": ids})
        found = teacher(teacher.answered({"input_ids": ids}))
        assert isinstance(live, LMHead) and isinstance(found, LMHead)
        assert torch.equal(found.hidden, live.hidden) and torch.equal(found.weight, live.weight)
        assert (found.softcap, found.logit_scale) == (live.softcap, live.logit_scale)
        student = torch.randn(*ids.shape, V, generator=torch.Generator().manual_seed(1))
        for name in divergences.names():
            keywords = {"divergence": name, "temperature": 2.0, "vocab_size": V - 3}
            assert torch.equal(*(kd_loss(student, t, **keywords) for t in (live, found)))


def test_padding_and_packed_rows(tmp_path: Path) -> None:
    written(tmp_path, "bf16", make_model().bfloat16())
    cache = TeacherCache(tmp_path)
    a, b = rows()[:2]
    teacher = CachedTeacher(cache, divergences.jsd(), 3.0, "bucket")
    ids, mask = torch.zeros(1, LENGTH + 5, dtype=torch.int64), torch.zeros(1, LENGTH + 5)
    ids[0, 5:], mask[0, 5:] = torch.as_tensor(a), 1
    found = teacher(teacher.answered({"input_ids": ids, "attention_mask": mask.long()}))
    assert isinstance(found, LMHead)
    assert torch.equal(found.hidden[0, 5:], cache.states(a)) and not found.hidden[0, :5].any()
    packed = torch.as_tensor(np.concatenate([a, b]))[None]
    positions = torch.arange(LENGTH).repeat(2)[None]
    found = teacher(teacher.answered({"input_ids": packed, "position_ids": positions}))
    assert isinstance(found, LMHead)
    assert torch.equal(found.hidden[0], torch.cat([cache.states(a), cache.states(b)]))
    assert torch.equal(cache.teacher(a).hidden, cache.states(a))  # type: ignore[union-attr]
    batch = cache.batch(ids, mask)
    assert isinstance(batch, LMHead) and torch.equal(batch.hidden[0, 5:], cache.states(a))
    with pytest.raises(CacheError, match=r"use states\(\)"):
        cache.get(a, 1.0)
    with pytest.raises(ValueError, match="teacher_tail='conditional'"):
        CachedTeacher(cache, divergences.jsd(), 1.0, "conditional")


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_interrupted_and_damaged_it_goes_on_to_the_same_bytes(tmp_path: Path, form: str) -> None:
    model = make_model()
    run = LiveTeacher(model)
    written(tmp_path / "whole", form, model)
    calls = []

    def tired(ids: torch.Tensor) -> Any:
        calls.append(ids)
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return run({"input_ids": ids})

    for _ in range(3):
        try:
            build(tmp_path / "other", job(run, form), tired)
        except KeyboardInterrupt:
            continue
    assert content(tmp_path / "other") == content(tmp_path / "whole")
    for name in ("head.safetensors", "shard-00001.arrow", "index.arrow"):
        (tmp_path / "other" / name).write_bytes(b"nothing")
    build(tmp_path / "other", job(run, form), lambda ids: run({"input_ids": ids}))
    assert content(tmp_path / "other") == content(tmp_path / "whole")
    with pytest.raises(CacheError, match="another head"):
        written(tmp_path / "other", form, make_model(seed=1))


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_every_damaged_byte_is_noticed(tmp_path: Path, form: str) -> None:
    written(tmp_path, form, make_model())
    assert verify(tmp_path)[1] == []
    files, chance = sorted(tmp_path.iterdir()), random.Random(0)
    sizes = [path.stat().st_size for path in files]
    for path in chance.choices(files, sizes, k=60) + chance.choices(files, k=40):
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        other = whole[place] ^ chance.randrange(1, 256)
        path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
        wrong = verify(tmp_path)[1]
        assert len(wrong) == 1 and path.name in wrong[0], (path, place, other)
        path.write_bytes(whole)


def test_a_head_of_somebody_else(tmp_path: Path) -> None:
    """With sums that fit: it is one, or it is refused."""
    import json

    written(tmp_path, "bf16", make_model())
    path, manifest = tmp_path / "head.safetensors", tmp_path / "manifest.json"
    good = safetensors.torch.load(path.read_bytes())
    plain = json.loads(manifest.read_bytes())

    def say(data: bytes, **changed: Any) -> None:
        told = {k: v for k, v in plain.items() if k not in ("sha256", "schema")}
        head = {**plain["head"], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        path.write_bytes(data)
        manifest.write_bytes(_render({**told, "head": head | changed}))

    weight = good["weight"]
    for named in (
        {"weight": weight[:, :-1].clone()}, {"weight": weight[:-1].clone()}, {"bias": weight[0]},
        {"weight": weight.int()}, {**good, "bias": weight[0].clone()},
        {**good, "more": weight.clone()},
    ):  # fmt: skip
        say(safetensors.torch.save(named))
        with pytest.raises(Damaged, match=r"head\.safetensors is damaged"):
            TeacherCache(tmp_path).head()
        assert "head.safetensors" in verify(tmp_path)[1][0]
    say(b"\xff" * 100)
    with pytest.raises(Damaged, match=r"head\.safetensors is damaged"):
        TeacherCache(tmp_path).head()
    whole = safetensors.torch.save(good)
    for changed in ({"softcap": -1.0}, {"logit_scale": "2"}, {"name": "../head.safetensors"}):
        say(whole, **changed)
        with pytest.raises(Damaged, match=r"manifest\.json is damaged"):
            TeacherCache(tmp_path)
    say(whole)
    assert torch.equal(TeacherCache(tmp_path).head().weight, weight)
