"""Which models a run distils, and how they are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusedkd.models.loading import DTYPES, required
from fusedkd.models.quantised import SCHEMES
from fusedkd.models.saved import SavedModel
from fusedkd.models.served import ServedArguments


@dataclass
class ModelArguments(ServedArguments):
    """The student and its teacher."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of the teacher, or where it is served: "
            "http://a:8000,http://b:8000 (vLLM, SGLang). Several: --teacher NAME=SOURCE for each, "
            "SOURCE one of these or a cache, and --teacher_column."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={"help": "Folder that `fusedkd cache` wrote, instead of --teacher."},
    )
    student: str | None = field(
        default=None, metadata={"help": "Folder or hub name of the student to start from."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or hub name (default: the student's or teacher's)."}
    )
    teacher_tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "With --cross_tokenizer: folder or hub name of the teacher's tokenizer, of a "
            "teacher that is served or cached (default: the teacher's folder)."
        },
    )
    teacher_top_k: int = field(
        default=64,
        metadata={
            "help": "Entries of a token that a served teacher is asked for. With --cross_tokenizer "
            "alm none is, but how probable the token that is there was."
        },
    )
    student_init: str = field(
        default="weights",
        metadata={"help": "weights: as saved. random: only the student's config is used."},
    )
    student_dtype: str = field(
        default="float32",
        metadata={"help": f"Of the trained weights: {', '.join(DTYPES)}. --bf16 computes in bf16."},
    )
    teacher_dtype: str = field(
        default="auto", metadata={"help": f"{', '.join(DTYPES)} (auto: as saved)."}
    )

    student_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a student on the hub."}
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher on the hub."}
    )
    student_load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: frozen NF4 weights (bitsandbytes), --use_peft."}
    )
    student_load_in_8bit: bool = field(
        default=False, metadata={"help": "The same in 8 bits (LLM.int8())."}
    )
    teacher_load_in_4bit: bool = field(
        default=False, metadata={"help": "The teacher's weights in NF4 (bitsandbytes)."}
    )
    teacher_load_in_8bit: bool = field(
        default=False, metadata={"help": "The teacher's weights in 8 bits."}
    )
    teacher_device_map: str | None = field(
        default=None,
        metadata={
            "help": "Spread the teacher over devices, CPU memory and disk: auto, balanced, ..., or "
            "JSON (transformers' device_map; default: beside the student)."
        },
    )
    teacher_tp: bool = field(
        default=False,
        metadata={
            "help": "Split the teacher over torchrun's processes (transformers' tensor-parallel "
            "plan); each process' batch is run by all of them."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of both models: eager, sdpa, flash_attention_2, ..."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python that comes with a model."}
    )
    use_peft: bool = field(
        default=False,
        metadata={"help": "Train LoRA adapters (peft) and leave the student's weights alone."},
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "They are scaled by this over the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before an adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={
            "help": "Layers that get one, such as q_proj v_proj (all-linear: all but heads)."
        },
    )

    quantise: str | None = field(
        default=None,
        metadata={
            "help": "Quantisation-aware distillation (torchao): the student's linear layers round "
            "their weights as they are trained, and are saved quantised, too: "
            f"{', '.join(SCHEMES)} (4-bit weights, 8-bit activations). Without --teacher it is the "
            "student itself, not quantised."
        },
    )
    quantise_group: int = field(
        default=32, metadata={"help": "Weights of a row that share a scale."}
    )

    def side(self, role: str) -> SavedModel:
        """How the student or the teacher is read.

        Raises:
            UserError: it was not given, or there is no such folder.
        """
        bits = [n for n in (4, 8) if getattr(self, f"{role}_load_in_{n}bit")]
        return SavedModel(
            role,
            required(role, getattr(self, role)),
            getattr(self, f"{role}_dtype"),
            getattr(self, f"{role}_revision"),
            bits[0] if bits else None,
            self.teacher_device_map if role == "teacher" else None,
            self.attn_implementation,
            self.trust_remote_code,
            role == "teacher" and self.teacher_tp,
        )

    def lora(self) -> dict[str, Any]:
        """What ``peft.LoraConfig`` is told."""
        return {"r": self.lora_r, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {"student_init": ("weights", "random")}
        choices |= {"student_dtype": DTYPES, "teacher_dtype": DTYPES}
        for name, known in choices.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--{name} {value}: expected one of {', '.join(known)}.")
        for role in ("student", "teacher"):
            if getattr(self, f"{role}_load_in_4bit") and getattr(self, f"{role}_load_in_8bit"):
                raise ValueError(f"--{role}_load_in_4bit, --{role}_load_in_8bit: expected one.")
        if self.quantise is not None:
            self._check_quantise()
        if self.lora_r < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"--lora_r {self.lora_r}, --lora_dropout {self.lora_dropout}: expected a rank "
                "of at least 1 and a share from 0 to below 1."
            )

    def _check_quantise(self) -> None:
        if self.quantise not in SCHEMES:
            raise ValueError(f"--quantise {self.quantise}: expected one of {', '.join(SCHEMES)}.")
        if self.quantise_group < 1:
            raise ValueError(
                f"--quantise_group {self.quantise_group}: expected a whole number of at least 1."
            )
        if self.use_peft or self.student_load_in_4bit or self.student_load_in_8bit:
            raise ValueError(
                f"--quantise {self.quantise}: trains all weights: expected neither --use_peft nor "
                "--student_load_in_4bit or --student_load_in_8bit."
            )
        if self.teacher is None and self.teacher_cache is None:
            self.teacher, self.teacher_revision = self.student, self.student_revision
