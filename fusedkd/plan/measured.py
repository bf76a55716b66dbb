"""What ``fusedkd plan`` says a step takes, against the memory that it takes on this CPU: three
pairs of small models, each measurement in a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from rich.console import Console
from rich.table import Table

from fusedkd import LMHead, kd_loss
from fusedkd.benchmarks.child import in_child
from fusedkd.benchmarks.peak import peak, reset_peak
from fusedkd.benchmarks.race.case import Case
from fusedkd.benchmarks.race.formulas import plain_loss
from fusedkd.cut import CHUNK_BYTES
from fusedkd.kernels import cpu
from fusedkd.models.heads import PlainHead, tap
from fusedkd.models.saved import SavedModel
from fusedkd.plan.bodies import Body
from fusedkd.plan.losses import EAGER, HEADS, WAYS, Setting
from fusedkd.plan.step import Step

TIMEOUT = 240  # seconds
MMAP_THRESHOLD = -3  # of mallopt

_QWEN: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 151936}
_GEMMA: dict[str, Any] = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 32000,
    "sliding_window": 128,
}
# The student's config, the teacher's, batch, length
PAIRS: dict[str, tuple[Any, Any, int, int]] = {
    "llama": (  # tied head
        tf.LlamaConfig(
            vocab_size=32000, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, tie_word_embeddings=True,
        ),
        tf.LlamaConfig(
            vocab_size=32000, hidden_size=192, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=4,
        ),
        4, 256,
    ),
    "qwen": (  # grouped queries, a large vocabulary
        tf.Qwen2Config(hidden_size=128, intermediate_size=256, num_hidden_layers=2, **_QWEN),
        tf.Qwen2Config(hidden_size=256, intermediate_size=512, num_hidden_layers=2, **_QWEN),
        2, 256,
    ),
    "gemma": (  # soft-capped logits
        tf.Gemma2Config(
            hidden_size=128, intermediate_size=256, num_hidden_layers=2, **_GEMMA,
        ),
        tf.Gemma2Config(
            hidden_size=192, intermediate_size=384, num_hidden_layers=2, **_GEMMA,
        ),
        2, 512,
    ),
}  # fmt: skip


def compare(pair: str, way: str, checkpointing: bool = False) -> tuple[int, int]:
    """(planned, measured) bytes of a step in fp32 above both models' weights and AdamW's state."""
    student, teacher, batch, length = PAIRS[pair]
    with tempfile.TemporaryDirectory() as folder:
        folders = [str(Path(folder) / role) for role in ("student", "teacher")]
        for config, path in zip((student, teacher), folders, strict=True):
            config.save_pretrained(path)
        setting = Setting(real="cpu", chunk_bytes=CHUNK_BYTES["cpu"])
        ours, theirs = (
            Body(SavedModel(role, path, "float32"), length)
            for role, path in zip(("student", "teacher"), folders, strict=True)
        )
        found = Step(ours, theirs, setting).peak(
            next(w for w in WAYS if w.name == way), batch, checkpointing
        )
        planned = found.total - found.weights - found.state - theirs.weights
        measured = in_child(
            measure, folders, batch, length, way == EAGER, checkpointing, timeout=TIMEOUT
        )
    return planned, measured


def measure(folders: list[str], batch: int, length: int, eager: bool, checkpointing: bool) -> int:
    """As :func:`compare`, in the process that is measured."""
    # without the blocks that the extension keeps for its next call until the system wants them
    cpu.empty = torch.empty  # type: ignore[assignment]
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 65536)  # what is freed is the system's at once
    torch.manual_seed(0)
    make: Any = tf.AutoModelForCausalLM.from_config
    configs = map(tf.AutoConfig.from_pretrained, folders)
    student, teacher = (make(config, dtype=torch.float32) for config in configs)
    student.train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step(batch: int) -> None:
        ids = torch.randint(0, student.config.vocab_size, (batch, length))
        (_eager if eager else _heads)(student, teacher, ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(1)
    before = reset_peak()
    step(batch)
    return peak() - before


def _heads(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    sides = []
    for model in (teacher, student):
        hidden: list[torch.Tensor] = []
        linear = model.get_output_embeddings()
        with torch.set_grad_enabled(model is student), tap(PlainHead(linear), hidden.append):
            model(input_ids=ids, use_cache=False)
        softcap = getattr(model.config, "final_logit_softcapping", None)
        sides.append(LMHead(hidden[0], linear.weight, softcap=softcap))
    return kd_loss(sides[1], sides[0], ids, temperature=2.0)


def _eager(student: Any, teacher: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        theirs = teacher(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    ours = student(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    case = Case(n=ids.numel(), vocab=ours.shape[-1], ce_weight=0)
    return plain_loss(ours, theirs, ids.flatten(), case, torch.float32)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--dry", action="store_true", help="say only what is measured")
    args = parser.parse_args()
    table = Table(title="A step's memory above weights and optimizer state, MiB")
    for name in ("pair", "loss", "checkpointing", "planned", "measured", "planned / measured"):
        table.add_column(name, justify="right")
    for pair in args.pairs:
        for way in (HEADS, EAGER):
            for checkpointing in (False, True):
                if args.dry:
                    table.add_row(pair, way, str(checkpointing))
                    continue
                planned, measured = compare(pair, way, checkpointing)
                sizes = (f"{size / 2**20:,.1f}" for size in (planned, measured))
                said = "yes" if checkpointing else "no"
                table.add_row(pair, way, said, *sizes, f"{planned / measured:.3f}")
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
