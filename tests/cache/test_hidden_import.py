"""Hidden states that vLLM wrote, as a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from words import llama, rows, tokenizer

from fusedkd.cache import TeacherCache, verify
from fusedkd.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """model/ and other/, and the states of the first: of its layers, before and after the norm."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained("model")
    tokenizer().save_pretrained("model")
    llama().save_pretrained("other")
    kept: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
    for n, row in enumerate(rows(9)):
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            outputs = model(ids[None], output_hidden_states=True)
        states = [*outputs.hidden_states[:-1], kept.pop(), outputs.hidden_states[-1]]
        for name, chosen in {
            "layers": states[:-1],
            "normed": states[-1:],
            "early": states[:3],
        }.items():
            Path(name).mkdir(exist_ok=True)
            found = torch.stack([x[0] for x in chosen], 1).contiguous()
            save_file({"token_ids": ids, "hidden_states": found}, f"{name}/{n}.safetensors")
    return model


def words(source: str, *more: str) -> list[str]:
    flags = ["--head", "model", "--tokenizer", "model", "--output", f"of-{source}", *more]
    return ["cache", "import", "--from", "vllm-hidden", source, *flags]


@pytest.mark.parametrize("source", ["layers", "normed"])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_the_layer_and_the_norm_are_found(source: str, kind: str, disk: Any) -> None:
    assert main(words(source, "--hidden", kind)) == 0
    assert not verify(f"of-{source}")[1]
    cache = TeacherCache(f"of-{source}")
    assert str(cache.layout.policy) == f"hidden states, 24 in {kind}"
    head = cache.head()
    for row in rows(9):
        with torch.no_grad():
            expected = disk(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        place = cache.find(row["input_ids"])
        assert place is not None
        columns = cache._columns(place)
        states = cache.layout.states(columns, 20).float()  # type: ignore[attr-defined]
        logs = (states @ head.weight.T).log_softmax(-1)
        kl = (expected.exp() * (expected - logs)).sum(-1)
        assert kl.max() < (1e-3 if kind == "bf16" else 5e-3)


def test_states_that_do_not_fit(disk: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"token_ids": torch.tensor([1])}, "bad.safetensors")
    Path("bad").mkdir()
    Path("bad.safetensors").rename("bad/0.safetensors")
    Path("empty").mkdir()
    for line, message in (
        (words("early"), "no layer of the states gives"),
        (words("normed", "--head", "other"), "no layer of the states gives"),
        (words("bad"), "has no hidden states as vLLM writes them"),
        (words("empty"), "no .safetensors files there"),
        (words("normed", "--vocab-size", "20"), "expected 0 to 19, the vocabulary"),
        (words("normed", "--head", "nowhere/at/all"), "--head nowhere/at/all"),
    ):
        assert main(line) == 2
        assert message in capsys.readouterr().err
        assert not Path(line[-1] if "of-" in line[-1] else f"of-{line[4]}").exists()
