"""The teacher cache, on tiny models of the real library and text from the standard library."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from fusedkd import divergences
from fusedkd.cache import (
    CacheError,
    Damaged,
    Job,
    Layout,
    Policy,
    TeacherCache,
    build,
    of_model,
    verify,
)
from fusedkd.cache.keys import sequence_key, tokenizer_hash
from fusedkd.cache.layout import Answers
from fusedkd.cache.packing import bits_for, pack, pack_runs, packed_size, unpack, unpack_runs
from fusedkd.cache.policy import linear_in_teacher
from fusedkd.cache.summary import summarize
from fusedkd.cache.writer import Share
from fusedkd.cli import main
from fusedkd.train import DistillationArguments, DistillationTrainer

V, BLOCK = 301, 32
KEYS = [bytes([n]) * 16 for n in range(8)]


# ---- packing -----------------------------------------------------------------------------------


@given(st.integers(0, 32), st.data())
@settings(max_examples=200, deadline=None)
def test_packing_round_trip(bits: int, data: Any) -> None:
    values = data.draw(st.lists(st.integers(0, (1 << bits) - 1), max_size=40))
    packed = pack(np.array(values, np.int64), bits)
    assert packed.size == packed_size(len(values), bits)
    assert unpack(packed, bits, len(values)).tolist() == values
    # bit i of value v is bit v * bits + i of the stream
    stream = sum(value << (bits * n) for n, value in enumerate(values))
    assert packed.tobytes() == stream.to_bytes(packed.size, "little")


def test_runs() -> None:
    lengths = np.array([3, 1, 2, 2, 4, 6, 1, 5])  # of four rows of 6
    packed = np.frombuffer(pack_runs(lengths, 24), np.uint8)
    assert packed.size == 3
    read, counts = unpack_runs(packed, 4, 6)
    assert read.tolist() == lengths.tolist() and counts.tolist() == [3, 2, 1, 2]
    for wrong in (packed[:2], np.zeros(3, np.uint8)):
        with pytest.raises(ValueError, match=r"expected 3|first draw"):
            unpack_runs(wrong, 4, 6)


def test_packing_refuses_what_does_not_fit() -> None:
    assert [bits_for(n) for n in (0, 1, 2, 255, 256, 151_935)] == [0, 1, 2, 8, 9, 18]
    for values, bits in (([8], 3), ([-1], 3), ([1], 0)):
        with pytest.raises(ValueError, match="expected 0 to"):
            pack(np.array(values), bits)
    with pytest.raises(ValueError, match="bits=33"):
        pack(np.array([1]), 33)
    with pytest.raises(ValueError, match="expected 3"):
        unpack(np.zeros(2, np.uint8), 3, 8)


# ---- from logits to bytes and back -------------------------------------------------------------


def random_logits(size: int = V, tokens: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(2, tokens, size, generator=generator)


def through(layout: Layout, logits: torch.Tensor, temperature: float) -> Any:
    """Each sequence of a batch, written and read."""
    answers = summarize(logits, layout, KEYS[: len(logits)])
    return [layout.decode(layout.encode(a), logits.shape[1], temperature) for a in answers]


@pytest.mark.parametrize(("size", "k"), [(V, 50), (256, 20), (4099, 50), (30, 40)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5, 7.0])
def test_head_and_tail_at_every_temperature(size: int, k: int, temperature: float) -> None:
    """Ids are exact, the tail to 16 bits, each entry to its step."""
    layout = Layout(Policy("top", k), size, (1.0, 2.0, 0.5, 7.0))
    logits = random_logits(size)
    for found, row in zip(through(layout, logits, temperature), logits.double(), strict=True):
        truth = (row / temperature).log_softmax(-1)
        top = truth.topk(layout.k)
        assert torch.equal(torch.from_numpy(found.ids), top.indices)
        tail = 1 - np.exp(found.log_probs.astype(np.float64)).sum(1)
        exact = -torch.expm1(top.values.logsumexp(1)).numpy()
        np.testing.assert_allclose(tail, exact, rtol=3.2e-4, atol=3e-7)
        # the step of layout.py's docstring, on both sides of the difference of two entries
        gaps = temperature * (top.values[:, :1] - top.values).numpy()
        reach = np.ceil(4 * gaps.max(1, keepdims=True)) / 4
        bound = (np.sqrt(gaps * reach) / 255 + reach / 255**2) / temperature
        ours = found.log_probs[:, :1] - found.log_probs
        assert (np.abs(ours - gaps / temperature) <= 1.001 * bound + 1e-5).all()
        entropy = -(row.softmax(-1) * row.log_softmax(-1)).sum(-1)
        np.testing.assert_allclose(found.entropy, entropy, atol=math.log(size) / 65534 + 1e-4)


def test_columns_beyond_the_vocabulary_and_impossible_entries_do_not_count() -> None:
    layout = Layout(Policy("top", 50), V, (1.0, 100.0))
    logits = random_logits(V + 11)
    logits[..., V:] = 50.0
    logits[0, :, 20:V] = -math.inf
    for temperature in (1.0, 100.0):
        found = through(layout, logits, temperature)
        truth = (logits[..., :V] / temperature).log_softmax(-1)
        assert ((found[0].ids >= 0).sum(1) == 20).all() and found[0].ids.max() < 20
        np.testing.assert_allclose(np.exp(found[0].log_probs).sum(1), 1, atol=1e-5)
        assert found[1].ids.max() < V
        best = truth[1].max(-1).values
        np.testing.assert_allclose(found[1].log_probs[:, 0], best, atol=0.05)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    layout = Layout(Policy("top", 50, 0.9), V)
    logits = random_logits()
    for found, row in zip(through(layout, logits, 1.0), logits.softmax(-1), strict=True):
        sums = row.sort(-1, descending=True).values.cumsum(-1)
        expected = ((sums < 0.9).sum(-1) + 1).clamp(max=50).numpy()
        assert ((found.ids >= 0).sum(1) == expected).all()
        assert np.isneginf(found.log_probs[found.ids < 0]).all()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_draws_are_unbiased_and_depend_on_the_sequence_alone(temperature: float) -> None:
    layout = Layout(Policy("sample", 200), 67, (temperature,))
    logits = random_logits(67, 400) / 4  # 80,000 draws see every id often
    logits[:] = logits[0, 0]  # 400 tokens with one distribution
    first, second = through(layout, logits, temperature)
    truth = (logits[0, 0] / temperature).softmax(-1).double().numpy()
    mean = np.zeros(67)
    np.add.at(mean, first.ids[first.ids >= 0], np.exp(first.log_probs[first.ids >= 0]))
    error = np.sqrt(truth * (1 - truth) / (400 * 200))
    assert (np.abs(mean / 400 - truth) < 5 * error + 1e-6).all()
    np.testing.assert_allclose(np.exp(first.log_probs).sum(1), 1, atol=1e-5)
    drawn = np.zeros((400, 67))
    token, place = (first.ids >= 0).nonzero()
    drawn[token, first.ids[token, place]] = 200 * np.exp(first.log_probs[token, place])
    assert (np.abs(drawn - 200 * truth) < 1 + 1e-3).all()  # each token's own counts are rounded
    assert not np.array_equal(first.log_probs, second.log_probs)
    alone = next(iter(summarize(logits[1:], layout, KEYS[1:2])))
    again = layout.decode(layout.encode(alone), 400, temperature)
    assert np.array_equal(again.ids, second.ids)
    assert np.array_equal(again.log_probs, second.log_probs)


def test_nothing_known_of_a_token() -> None:
    layout = Layout(Policy("top", 3), V)
    ids = np.array([[5, 4, -1], [-1, -1, -1]])
    values = np.array([[-0.5, -1.5, -np.inf], [-np.inf] * 3])
    odds, unknown = np.array([[np.inf], [-np.inf]]), np.full(2, np.nan)
    found = layout.decode(layout.encode(Answers(ids, values, odds, unknown)), 2, 1.0)
    assert found.ids.tolist() == [[5, 4], [-1, -1]] and np.isnan(found.entropy).all()
    np.testing.assert_allclose(np.exp(found.log_probs).sum(1), [1, 0], atol=1e-5)


def test_bytes_per_token() -> None:
    assert Layout(Policy("top", 50), 151_936, (1.0, 2.0)).most_bytes_per_token <= 170
    assert Layout(Policy("top", 128), 151_936, (1.0, 2.0)).most_bytes_per_token <= 400


def test_only_losses_linear_in_the_teacher_take_draws() -> None:
    linear = {name for name in divergences.names() if linear_in_teacher(divergences.make(name))}
    assert linear == {"forward_kl"}
    assert linear_in_teacher(divergences.mixed_kl(1.0))
    assert not linear_in_teacher(divergences.mixed_kl(0.999))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Policy("top", 0), "--top-k 0"),
        (lambda: Policy("sample", 5000), "--sample 5000"),
        (lambda: Policy("top", 5, 1.5), "--top-p 1.5"),
        (lambda: Policy("sample", 5, 0.5), "--top-p"),
        (lambda: Policy("other"), "'top' or 'sample'"),
        (lambda: Layout(Policy(), V, (0.0,)), "--temperatures 0"),
        (lambda: Layout(Policy(), V, (1.0, 1.0)), "only once"),
        (lambda: Layout(Policy("sample"), V, (1.0, 2.0)), "one temperature"),
        (lambda: Layout(Policy(), V, (1.0, 2.0)).slot(3.0), "made for 1,2"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(CacheError, match=message):
        make()


# ---- a cache of a real model -------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and an end of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate(["<end>", *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", bos_token="<end>")


def save_model(folder: Path, seed: int, size: int = 264, spread: float = 0.3) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher/, student/, and text/ from the standard library."""
    root = tmp_path_factory.mktemp("disk")
    save_model(root / "teacher", 1)
    save_model(root / "student", 2)
    (root / "text").mkdir()
    for name in ("bisect.py", "heapq.py", "keyword.py", "stat.py"):
        source = Path(sysconfig.get_paths()["stdlib"]) / name
        (root / "text" / name).write_text(source.read_text(encoding="utf-8")[:6000])
    return root


def command(disk: Path, output: Path, *more: str, text: str = "text") -> list[str]:
    return [
        *("cache", "--teacher", str(disk / "teacher"), "--data", str(disk / text)),
        *("--block_size", str(BLOCK), "--eval_share", "0.25", "--shard-mb", "0.03"),
        *("--output", str(output), "--device", "cpu", *more),
    ]


def training(disk: Path, cache: Path, output: Path, *more: str) -> list[str]:
    return [
        *("distill", "--teacher_cache", str(cache), "--student", str(disk / "student")),
        *("--data", str(disk / "text"), "--block_size", str(BLOCK), "--eval_share", "0.25"),
        *("--output_dir", str(output), "--use_cpu", "true", "--report_to", "none"),
        *("--max_steps", "2", "--per_device_train_batch_size", "3", "--save_strategy", "no"),
        *("--disable_tqdm", "true", "--backend", "reference", *more),
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def cache(disk: Path) -> Path:
    folder = disk / "cache"
    assert main(command(disk, folder, "--top-k", "40", "--temperatures", "1,2")) == 0
    return folder


@pytest.fixture(scope="module")
def sampled(disk: Path) -> Path:
    folder = disk / "sampled"
    assert main(command(disk, folder, "--sample", "50")) == 0
    return folder


def test_verify_and_info(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = TeacherCache(cache).manifest
    assert found.number_of_shards > 3 and found.vocab_size == 257
    assert found.padded_vocab_size == 264 and found.teacher_hash
    assert main(["cache", "verify", str(cache)]) == 0
    assert "every byte as it was written" in capsys.readouterr().out
    assert main(["cache", "info", str(cache)]) == 0
    said = capsys.readouterr().out
    assert "top 40" in said and "not kept" in said
    assert main(["cache", "verify", str(cache / "none")]) == 2
    assert "no teacher cache" in capsys.readouterr().err


def test_what_is_not_kept_is_told(disk: Path, cache: Path, sampled: Path) -> None:
    read, data = TeacherCache(cache), blocks(disk)["input_ids"]
    for temperature, told in zip(read.manifest.temperatures, read.tail_masses(), strict=True):
        # held-out sequences are in the cache too, and not here
        heads = [np.exp(read.get(ids, temperature).log_probs).sum(1) for ids in data]
        assert told == pytest.approx(1 - np.concatenate(heads).mean(), rel=0.2) and 0 < told < 1
    assert TeacherCache(sampled).tail_masses() == ()


def test_what_is_read_is_what_the_teacher_said(disk: Path, cache: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher").eval()
    data, read = blocks(disk), TeacherCache(cache)
    for ids in data["input_ids"][::7]:
        with torch.no_grad():
            truth = teacher(torch.tensor([ids])).logits[0, :, :257].log_softmax(-1)
        found = read.get(ids, 1.0)
        assert (found.ids == truth.topk(40).indices.numpy()).mean() > 0.99  # but for ties
        np.testing.assert_allclose(np.exp(found.log_probs[:, 0]), truth.exp().amax(-1), rtol=0.02)


def blocks(disk: Path) -> Dataset:
    return parts(disk).train


def parts(disk: Path) -> Any:
    from fusedkd.data.arguments import DataArguments
    from fusedkd.data.loading import load_rows

    flags = DataArguments(data=[str(disk / "text")], eval_share=0.25, max_length=BLOCK)
    return load_rows(flags, tokenizer())


def test_batches_are_found_however_they_are_made(disk: Path, cache: Path) -> None:
    """Other order, padding on either side, and several sequences in one row."""
    from fusedkd.teachers import CachedTeacher

    rows = blocks(disk).select([5, 2]).with_format("torch")
    read = TeacherCache(cache)
    expected = [read.get(row["input_ids"].numpy(), 2.0) for row in rows]
    teacher = CachedTeacher(read, divergences.forward_kl(), 2.0, "bucket")
    ids = torch.full((2, 40), 7)
    mask, spans = torch.zeros_like(ids), (slice(8, 40), slice(0, 32))
    for row, span in enumerate(spans):
        ids[row, span], mask[row, span] = rows[row]["input_ids"], 1
    padded = {"input_ids": ids, "attention_mask": mask}
    flat = {"input_ids": torch.cat([row["input_ids"] for row in rows])[None]}
    flat["position_ids"] = torch.arange(32).repeat(2)[None]
    for batch, places in (
        (padded, [(0, spans[0]), (1, spans[1])]),
        (flat, [(0, slice(0, 32)), (0, slice(32, 64))]),
    ):
        sparse = teacher(teacher.collator(lambda features: features)(dict(batch)))
        for (row, span), target in zip(places, expected, strict=True):
            np.testing.assert_array_equal(sparse.indices[row, span], target.ids)
            np.testing.assert_array_equal(sparse.log_probs[row, span], target.log_probs)
    assert (teacher(teacher.collator(lambda f: f)(padded)).indices[1, 32:] == -1).all()
    with pytest.raises(ValueError, match=r"trainer\.data_collator"):
        teacher({"input_ids": ids})


def test_a_loop_of_ones_own(disk: Path, cache: Path, sampled: Path) -> None:
    """The teacher of a sequence and of a padded batch, as the trainer has it."""
    from fusedkd.teachers import CachedTeacher

    row = torch.tensor(blocks(disk)["input_ids"][5])
    ids, mask = torch.full((2, 40), 7), torch.zeros(2, 40, dtype=torch.int64)
    ids[0, 8:], mask[0, 8:], ids[1, :32], mask[1, :32] = row, 1, row, 1
    for folder, heat in ((cache, 2.0), (cache, 1.0), (sampled, 1.0)):
        read = TeacherCache(folder)
        side = CachedTeacher(read, divergences.forward_kl(), heat, "bucket")
        want = side(side.answered({"input_ids": ids, "attention_mask": mask}))
        got, alone = read.batch(ids, mask, heat), read.teacher(row.tolist(), heat)
        assert got.tail == want.tail == alone.tail
        assert torch.equal(got.indices, want.indices.long())
        assert torch.equal(got.log_probs, want.log_probs)
        assert torch.equal(alone.log_probs, got.log_probs[1, :32])
        assert (got.entropy is None) == (want.entropy is None) == (heat != 1)
        if want.entropy is not None:
            assert torch.equal(got.entropy, want.entropy)


def test_built_in_a_program_of_ones_own(disk: Path, cache: Path, tmp_path: Path) -> None:
    """The command's cache, of data sets, lists, and padded batches."""
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher").train()
    rows = [row["input_ids"] for part in parts(disk)[:2] for row in part]
    kept: dict[str, Any] = {"top_k": 40, "temperatures": (1, 2)}
    made = TeacherCache.build(
        tmp_path / "c", teacher, tokenizer(), rows, shard_bytes=int(0.03 * 2**20), **kept
    )
    assert not teacher.training and content(made.folder) == content(cache)
    short = blocks(disk).select(range(2))
    ids, mask = torch.full((2, 40), 7), torch.zeros(2, 40, dtype=torch.int64)
    ids[0, 8:], mask[0, 8:] = torch.tensor(short[0]["input_ids"]), 1
    ids[1, :BLOCK], mask[1, :BLOCK] = torch.tensor(short[1]["input_ids"]), 1
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": mask}
    few = torch.tensor(short["input_ids"])
    every = {"set": short, "tensor": few, "batch": batch, "dicts": [*short]}
    for name, form in every.items():
        made = TeacherCache.build(tmp_path / name, teacher, tokenizer(), form, hidden="int8")
        assert made.manifest.sequences == 2
        assert torch.equal(made.batch(ids, mask).hidden[0, 8:], made.teacher(few[0]).hidden)
        assert made.batch(ids, mask).weight is made.head().weight  # read once
    with pytest.raises(CacheError, match="--hidden keeps what"):
        TeacherCache.build(tmp_path / "no", teacher, tokenizer(), few, hidden="int8", top_k=3)
    with pytest.raises(CacheError, match=r"expected 2 to 264"):
        TeacherCache.build(tmp_path / "no", teacher, tokenizer(), few, vocab_size=265)


def test_built_by_a_group(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher")
    rows = blocks(disk)["input_ids"][:40]

    def built(rank: int) -> TeacherCache:
        monkeypatch.setattr(Share, "of_group", lambda: Share(rank, 2))
        return TeacherCache.build(tmp_path / "c", teacher, tokenizer(), rows, shard_bytes=9000)

    monkeypatch.setattr(torch.distributed, "barrier", lambda: built(1) if waiting.pop() else None)
    waiting = [False, True]
    assert built(0).manifest.number_of_shards > 1 and not waiting
    monkeypatch.setattr(of_model, "is_partitioned", lambda parameter: parameter.dim() == 1)
    with pytest.raises(CacheError, match="in parts on the group's processes"):
        built(0)


def test_show(
    disk: Path, cache: Path, sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher's own most probable tokens, of any kind of cache."""
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher").eval()
    ids = blocks(disk)["input_ids"][3]
    made = TeacherCache.build(tmp_path / "c", teacher, tokenizer(), [ids], hidden="bf16")
    with torch.no_grad():
        wanted = (teacher(torch.tensor([ids])).logits[0, :, :257] / 2).log_softmax(-1).topk(3)
    kept = TeacherCache(cache)
    row = kept.find(ids)
    assert row is not None and made.find(ids) == 0
    found, whole = kept.top(row, 3, 2.0), kept.get(ids, 2.0)
    assert np.array_equal(found.ids, whole.ids[:, :3])
    assert np.array_equal(found.log_probs, whole.log_probs[:, :3])
    found = made.top(0, 3, 2.0)
    assert (found.ids == wanted.indices.numpy()).mean() > 0.9  # bf16
    np.testing.assert_allclose(found.log_probs, wanted.values, atol=2e-2)
    drawn = TeacherCache(sampled).top(row, 3)
    assert (np.diff(drawn.log_probs, axis=1) <= 0).all()
    flags = ["cache", "show", str(cache), "--row", str(TeacherCache(cache).find(ids))]
    assert main([*flags, "--tokens", "2", "--top-k", "2", "--temperature", "2"]) == 0
    said = capsys.readouterr().out
    token, share = whole.ids[1, 0], np.exp(whole.log_probs[1, 0])
    assert f"{tokenizer().decode([int(token)])!r} {share:.1%}" in said
    assert f"{BLOCK - 2} more tokens: --first 2" in said and "the data tell" in said
    data = ["--data", str(disk / "text"), "--block_size", str(BLOCK), "--eval_share", "0.25"]
    assert main([*flags, "--first", str(BLOCK - 1), *data]) == 0
    said = capsys.readouterr().out
    assert f" {tokenizer().decode([ids[-1]])!r} │" in said and "tell" not in said
    for wrong, why in (
        (["--row", "9999"], "row 9999"),
        (["--first", "32"], "--first 32"),
        (["--temperature", "3"], "made for 1,2"),
        ([*data, "--block_size", "16"], "is not in it"),
        (["--tokenizer", str(tmp_path)], "tokenizer"),
    ):
        assert main([*flags, *wrong]) == 2
        assert why in capsys.readouterr().err


def test_batch_size_and_order_change_no_key(disk: Path, cache: Path, tmp_path: Path) -> None:
    assert main(command(disk, tmp_path / "other", "--batch-size", "3", "--top-k", "40")) == 0
    one, other = TeacherCache(cache), TeacherCache(tmp_path / "other")
    for ids in blocks(disk)["input_ids"][::5]:
        a, b = one.get(ids, 1.0), other.get(ids, 1.0)
        np.testing.assert_allclose(a.log_probs[:, 0], b.log_probs[:, 0], atol=2e-3)
    assert one.find(ids[:-1]) is None
    assert sequence_key(ids, "00" * 32) != sequence_key(ids, "01" * 32)


# ---- killed, damaged ---------------------------------------------------------------------------


def test_the_same_command_goes_on_and_repairs(disk: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(cache, folder)
    whole = content(cache)
    again = command(disk, folder, "--top-k", "40", "--temperatures", "1,2")
    (folder / "shard-00001.arrow").write_bytes(b"x" + whole["shard-00001.arrow"][1:])
    (folder / "index.arrow").unlink()
    (folder / "shard-00009.arrow.tmp").write_bytes(b"half")
    before = (folder / "shard-00000.arrow").stat().st_mtime_ns
    assert main(again) == 0
    assert content(folder) == whole
    assert (folder / "shard-00000.arrow").stat().st_mtime_ns == before


# One interpreter that has imported everything forks a child per process, and kills some: of the
# writers of one cache any one, which is then started again while the others write.
ZYGOTE = """
import json, os, random, signal, sys, time
from pathlib import Path
from fusedkd.cli import main
import fusedkd.cli.make_cache

chance, sync = random.Random(0), os.fsync

def slowly(handle):  # so that there is a moment to hit
    time.sleep(0.005)
    sync(handle)
    time.sleep(0.005)

def start(argv, rank=0, world=1):
    child = os.fork()
    if child == 0:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        os.fsync = slowly
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os._exit(main(argv))
    return child

def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def ended(child):
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def state(folder):
    return sorted(p.name for p in folder.glob("*")) if folder.exists() else []

def run(whole, parts, folder, kills, writers, last):
    whole, folder, killed, alive = start(whole), Path(folder), [], {}
    codes = [finish(whole)]
    for _ in range(kills):
        before = state(folder)
        for rank in {*range(writers)} - {*alive}:
            alive[rank] = start(parts, rank, writers)
        while state(folder) == before and not any(map(ended, alive.values())):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1 * writers))
        child = alive.pop(chance.randrange(writers))
        os.kill(child, signal.SIGKILL)
        killed.append(finish(child))
    codes += map(finish, alive.values())
    children = [start(parts, rank, last) for rank in range(last)]
    return killed, codes + list(map(finish, children))

print(json.dumps([run(**job) for job in json.loads(sys.argv[1])]))
"""


KEPT = {
    "draws": ("--sample", "20", "--shard-mb", "0.01"),  # many shards
    "top": ("--top-k", "20", "--shard-mb", "0.01"),
    "bf16": ("--hidden", "bf16", "--shard-mb", "0.005"),
    "int8": ("--hidden", "int8", "--shard-mb", "0.004"),
}


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([("draws", 3, 1, 1), ("int8", 2, 2, 1)], id="few-kills"),
        *(
            pytest.param([(kept, 20, writers, last)], marks=pytest.mark.slow)
            for writers, kinds in ((1, ["draws"]), (2, KEPT))
            for last, kept in enumerate(kinds, 1)
        ),
    ],
)
def test_killed_and_resumed_is_identical(
    disk: Path, tmp_path: Path, runs: list[tuple[str, int, int, int]]
) -> None:
    """By one process, or by two of which one is killed, and then by any number of them."""
    jobs = []
    for kept, kills, writers, last in runs:
        whole, parts = tmp_path / f"{kept}-whole", tmp_path / f"{kept}-parts"
        job = {"kills": kills, "writers": writers, "last": last, "folder": str(parts)}
        job |= {"whole": command(disk, whole, *KEPT[kept])}
        jobs.append(job | {"parts": command(disk, parts, *KEPT[kept])})
    done = subprocess.run(
        [sys.executable, "-c", ZYGOTE, json.dumps(jobs)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for (kept, kills, writers, last), (killed, codes) in zip(runs, found, strict=True):
        assert codes == [0] * (writers + last), done.stderr
        # of two, one may have ended before: the other one changed the folder
        assert killed.count(-signal.SIGKILL) >= kills / writers
        one, other = (content(tmp_path / f"{kept}-{name}") for name in ("whole", "parts"))
        assert one == other and len(one) > 10


def test_nothing_is_computed_twice(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    seen: list[int] = []

    def answer(ids: torch.Tensor) -> torch.Tensor:
        if len(seen) == 5:
            seen.append(-1)
            raise Killed
        seen.append(int(ids[0, 0]))
        return random_logits(V, 4, seed=int(ids[0, 0]))[:1]

    facts = {"teacher": "t", "teacher_hash": None, "tokenizer_hash": "00" * 32,
             "padded_vocab_size": V, "dtype": "float32"}  # fmt: skip
    sequences = [[n, 1, 2, 3] for n in range(8)]
    job = Job([*sequences, sequences[0]], Layout(Policy("top", 5), V), facts, 1, 130)
    with pytest.raises(Killed):
        build(tmp_path / "c", job, answer)
    build(tmp_path / "c", job, answer)
    assert seen == [0, 1, 2, 3, 4, -1, 4, 5, 6, 7]  # two a shard; the open one had 4
    with pytest.raises(CacheError, match="another policy"):
        build(tmp_path / "c", Job(sequences, Layout(Policy("top", 6), V), facts), answer)
    with pytest.raises(CacheError, match="the data"):
        build(tmp_path / "c", Job(sequences[1:], job.layout, facts, 1, 130), answer)
    with pytest.raises(CacheError, match="no sequence"):
        build(tmp_path / "d", Job([], job.layout, facts), answer)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.tex").touch()
    with pytest.raises(CacheError, match=r"thesis\.tex"):
        build(tmp_path / "e", job, answer)
    nan = Job(sequences, job.layout, facts)
    with pytest.raises(CacheError, match="NaN"):
        build(tmp_path / "f", nan, lambda ids: torch.full((len(ids), 4, V), math.nan))
    with pytest.raises(CacheError, match=r"of .* shards are there"):
        TeacherCache(tmp_path / "f")
    assert "shards are there" in verify(tmp_path / "f")[1][0]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    from fusedkd.cache.writer import held

    refused = pytest.raises(CacheError, match="another process")
    with held(tmp_path), refused, held(tmp_path):
        pass
    one, other = Share(0, 2), Share(1, 2)
    with held(tmp_path, one), held(tmp_path, other), refused, held(tmp_path):
        pass


def test_every_damaged_byte_is_noticed(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(cache, folder)
    chance = random.Random(0)
    files = sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in files]
    # by size, and a share for the small files
    chosen = chance.choices(files, sizes, k=150) + chance.choices(files, k=50)
    for path in chosen:
        whole = path.read_bytes()
        place = chance.randrange(len(whole))
        other = whole[place] ^ chance.randrange(1, 256)
        path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
        _, wrong = verify(folder)
        assert len(wrong) == 1 and path.name in wrong[0], (path, place, other)
        path.write_bytes(whole)
    assert not verify(folder)[1]


def test_damage_is_an_error_that_names_the_file(
    disk: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("manifest.json", "index.arrow", "shard-00002.arrow"):
        folder = tmp_path / name
        shutil.copytree(cache, folder)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        assert main(["cache", "verify", str(folder)]) == 1
        assert name in capsys.readouterr().out
        argv = training(
            disk, folder, tmp_path / "out", "--num_train_epochs", "1", "--max_steps", "-1"
        )
        assert main(argv) == 2
        assert name in capsys.readouterr().err
    (folder / name).unlink()
    assert any("missing" in line for line in verify(folder)[1])
    (folder / "shard-00001.arrow").write_bytes(b"short")
    with pytest.raises(Damaged, match="5 bytes"):
        for ids in blocks(disk)["input_ids"]:
            TeacherCache(folder).get(ids, 1.0)


def test_another_schema_is_refused(cache: Path, tmp_path: Path) -> None:
    from fusedkd.cache import manifest

    content = json.loads((cache / "manifest.json").read_text())
    del content["sha256"], content["schema"]
    (tmp_path / "manifest.json").write_bytes(manifest._render(content, 99))
    with pytest.raises(CacheError, match="schema 99"):
        TeacherCache(tmp_path)


# ---- training ----------------------------------------------------------------------------------


def test_training_from_a_cache(disk: Path, cache: Path, sampled: Path, tmp_path: Path) -> None:
    measures = ("--teacher_tail", "generalized", "--divergence", "reverse_kl")
    for folder, more in (
        (cache, ("--temperature", "2", *measures)),
        (sampled, ("--ce_weight", "0.1")),
    ):
        out = tmp_path / folder.name
        assert main(training(disk, folder, out, *more)) == 0
        metrics = json.loads((out / "distillation.json").read_text())
        assert 0 < metrics["eval_kd"] < 10 and metrics["eval_teacher_accuracy"] >= 0
        assert 0 < metrics["eval_student_mass"] < metrics["eval_teacher_mass"] < 1.001
        AutoModelForCausalLM.from_pretrained(out)


def make_trainer(disk: Path, teacher: Any, out: Path, **more: Any) -> DistillationTrainer:
    arguments = {
        "output_dir": str(out), "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "save_strategy": "no", "backend": "reference", "logging_steps": 1, "max_steps": 4,
    }  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(disk / "student")
    data = blocks(disk)
    collate = more.pop("data_collator", default_data_collator)
    given = {"processing_class": tokenizer(), "train_dataset": data, "eval_dataset": data}
    given |= more.pop("keywords", {})
    args = DistillationArguments(**{**arguments, **more})
    return DistillationTrainer(student, teacher, args, data_collator=collate, **given)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_are_close_to_the_live_teacher_s(
    disk: Path, tmp_path: Path, temperature: float
) -> None:
    """With every entry kept there is only the rounding of the codes."""
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher")
    full = command(disk, tmp_path / "full", "--top-k", "300", "--temperatures", "1,2")
    assert main(full) == 0
    found = []
    for side in (teacher, TeacherCache(tmp_path / "full")):
        tested = make_trainer(disk, side, tmp_path, temperature=temperature, vocab_size=257)
        tested.train()
        found.append([e["loss"] for e in tested.state.log_history if "loss" in e])
    np.testing.assert_allclose(found[0], found[1], rtol=2e-3)


@pytest.mark.parametrize(("form", "close"), [("bf16", 4e-3), ("int8", 2e-2)])
def test_hidden_states_teach_as_the_teacher_does(
    disk: Path, tmp_path: Path, form: str, close: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any divergence at any temperature, from the command line to the losses."""
    folder = tmp_path / "hidden"
    assert main(command(disk, folder, "--hidden", form)) == 0
    assert main(["cache", "verify", str(folder)]) == 0
    assert main(["cache", "info", str(folder)]) == 0
    assert f"hidden states, 16 in {form}" in capsys.readouterr().out
    for divergence in ("jsd", "reverse_kl"):
        found = []
        for side in (
            AutoModelForCausalLM.from_pretrained(disk / "teacher"),
            TeacherCache(folder),
        ):
            more = {"temperature": 2.0, "divergence": divergence, "max_steps": 8}
            tested = make_trainer(disk, side, tmp_path, **more)
            tested.train()
            found.append([e["loss"] for e in tested.state.log_history if "loss" in e])
        assert len(found[0]) == 8
        np.testing.assert_allclose(found[0], found[1], rtol=close)
    assert main(training(disk, folder, tmp_path / "out", "--temperature", "3")) == 0
    for flag in (("--top-k", "3"), ("--sample", "3"), ("--temperatures", "1,2")):
        assert main(command(disk, tmp_path / "none", "--hidden", form, *flag)) == 2
        assert "--hidden keeps what" in capsys.readouterr().err


def test_the_entropy_of_a_teacher_that_was_cut_is_its_own(
    disk: Path, cache: Path, tmp_path: Path
) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher")
    found = []
    for side in (teacher, TeacherCache(cache)):
        tested = make_trainer(disk, side, tmp_path, max_steps=1, vocab_size=257)
        tested.train()
        found += [e["teacher_entropy"] for e in tested.state.log_history if "loss" in e]
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_workers_read_the_cache_too(disk: Path, cache: Path, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 1):
        tested = make_trainer(
            disk, TeacherCache(cache), tmp_path, dataloader_num_workers=workers, max_steps=2
        )
        tested.train()
        losses.append(tested.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--teacher", "x"), "expected one of them"),
        (("--temperature", "3"), "made for 1,2"),
        (("--teacher_temperature", "1.5"), "made for 1,2"),
        (("--block_size", "16"), "of the training data are not in the cache"),
        (("--eval_share", "0.5"), "are not in the cache"),
        (("--vocab_size", "99"), "vocab_size=99"),
        (("--teacher_tail", "cut"), "teacher_tail='cut': expected one of bucket, renormalize"),
        (("--teacher_cache", "nowhere"), "no teacher cache"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    disk: Path, cache: Path, tmp_path: Path, capsys: Any, more: tuple[str, ...], message: str
) -> None:
    assert main(training(disk, cache, tmp_path, *more)) == 2
    assert message in capsys.readouterr().err


def test_draws_are_refused_where_they_would_bias(
    disk: Path, sampled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(training(disk, sampled, tmp_path, "--divergence", "jsd")) == 2
    assert "unbiased only" in capsys.readouterr().err
    assert main(training(disk, sampled, tmp_path, "--teacher_tail", "conditional")) == 2
    assert "teacher_tail='conditional'" in capsys.readouterr().err


def test_other_tokenizers_and_vocabularies_are_refused(
    disk: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tokenizer()
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path / "tokenizer")
    argv = training(disk, cache, tmp_path / "a", "--tokenizer", str(tmp_path / "tokenizer"))
    assert main(argv) == 2
    assert "ids mean other tokens" in capsys.readouterr().err
    save_model(tmp_path / "small", 3, size=200)
    argv = training(disk, cache, tmp_path / "b", "--student", str(tmp_path / "small"))
    assert main(argv) == 2
    assert "has 200 entries" in capsys.readouterr().err
    with pytest.raises(CacheError, match="evaluation"):
        part = TeacherCache(cache)
        part._keys = part._keys[:1]
        make_trainer(disk, part, tmp_path, keywords={"train_dataset": None})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--top-k", "5", "--sample", "5"], "expected one of them"),
        (["--top-k", "0"], "--top-k 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--vocab-size", "999"], "--vocab-size 999"),
        (["--teacher", "./nowhere"], "./nowhere"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--temperatures", "1,-2"], "--temperatures 1,-2"),
    ],
)
def test_mistakes_get_one_message(
    disk: Path, tmp_path: Path, capsys: Any, argv: list[str], message: str
) -> None:
    assert main([*command(disk, tmp_path / "x"), *argv]) == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["cache", "--help"], ["cache", "import", "--help"], ["cache", "show", "--help"]):
        with pytest.raises(SystemExit) as done:
            main(argv)
        assert done.value.code == 0
    assert "--teacher_cache cache/" in capsys.readouterr().out


# ---- importing ---------------------------------------------------------------------------------


def expected_top(disk: Path, ids: list[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    teacher = AutoModelForCausalLM.from_pretrained(disk / "teacher").eval()
    with torch.no_grad():
        top = teacher(torch.tensor([ids])).logits[0, :, :257].log_softmax(-1).topk(k)
    return top.indices.numpy(), top.values.numpy()


@pytest.mark.parametrize("form", ["vllm", "choices", "parquet", "of-token"])
def test_import(disk: Path, tmp_path: Path, form: str) -> None:
    data = blocks(disk)["input_ids"][:3]
    tops = [expected_top(disk, ids, 6) for ids in data]
    more: list[str] = []
    if form in ("vllm", "choices"):
        path = tmp_path / "answers.jsonl"
        lines = []
        for ids, (tokens, values) in zip(data, tops, strict=True):
            steps = [None] + [
                {str(t): {"logprob": float(v), "rank": 1} for t, v in zip(a, b, strict=True)}
                for a, b in zip(tokens[:-1], values[:-1], strict=True)
            ]
            row = {"prompt_token_ids": ids, "prompt_logprobs": steps}
            lines.append(json.dumps(row if form == "vllm" else {"choices": [row]}))
        path.write_text("\n".join(lines))
    else:
        path = tmp_path / "answers.parquet"
        token_lists = [t.tolist() for t, _ in tops]
        value_lists = [v.tolist() for _, v in tops]
        if form == "of-token":
            more = ["--of-token", "--ids-column", "i", "--logprobs-column", "l"]
            token_lists = [[None, *t[:-1]] for t in token_lists]
            value_lists = [[None, *v[:-1]] for v in value_lists]
        names = ("i", "l") if more else ("target_token_ids", "target_logprobs")
        columns = {"input_ids": data, names[0]: token_lists, names[1]: value_lists}
        Dataset.from_dict(columns).to_parquet(path)
    argv = ["cache", "import", str(path), "--tokenizer", str(disk / "teacher")]
    assert main([*argv, "--output", str(tmp_path / "c"), *more]) == 0
    read = TeacherCache(tmp_path / "c")
    assert read.manifest.teacher_hash is None and not verify(tmp_path / "c")[1]
    for ids, (tokens, values) in zip(data, tops, strict=True):
        found = read.get(ids, 1.0)
        known = slice(None) if form == "parquet" else slice(-1)
        np.testing.assert_array_equal(found.ids[known], tokens[known])
        np.testing.assert_allclose(found.log_probs[known], values[known], atol=0.02)
        assert form == "parquet" or (found.ids[-1] == -1).all()
    # tokens of which nothing is known are not counted as all tail
    heads = np.concatenate([np.exp(values[known]).sum(1) for _, values in tops])
    assert read.tail_masses() == (pytest.approx(1 - heads.mean(), abs=2e-3),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt_logprobs": [null]}', "prompt_token_ids"),
        ('{"prompt_token_ids": [1, 2], "prompt_logprobs": [null]}', "2 tokens but 1"),
        (
            '{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"999": -1}]}',
            "outside 0 to 256",
        ),
        ('{"prompt_token_ids": [1, 2], "prompt_logprobs": [null, {"9": 1.0}]}', "sum to 2.7183"),
        ("not json prompt_logprobs", "line 1"),
        ('{"text": "x", "input_ids": [1, 2]}', "--ids-column"),
    ],
)
def test_import_explains(disk: Path, tmp_path: Path, capsys: Any, row: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n")
    argv = ["cache", "import", str(tmp_path / "a.jsonl"), "--tokenizer", str(disk / "teacher")]
    assert main([*argv, "--output", str(tmp_path / "c")]) == 2
    assert message in capsys.readouterr().err


def test_tokenizer_hash_is_of_the_vocabulary() -> None:
    same, other = tokenizer(), tokenizer()
    other.add_tokens(["<more>"])
    assert tokenizer_hash(same) == tokenizer_hash(tokenizer()) != tokenizer_hash(other)
