"""Where ``fusedkd distill`` has its teacher from, or its teachers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fusedkd.cache.keys import tokenizer_hash
from fusedkd.cache.manifest import NAME
from fusedkd.cache.reader import TeacherCache
from fusedkd.cli.named import NAMED
from fusedkd.errors import UserError, as_user_error
from fusedkd.models.arguments import ModelArguments
from fusedkd.models.tokenizers import check_same
from fusedkd.teachers import RoutedTeachers, ServedTeacher, Service
from fusedkd.teachers.service import is_url
from fusedkd.train.arguments import DistillationArguments
from fusedkd.train.tasks import Task


@dataclass
class Source:
    """What the flags say about the teacher.

    Args:
        models: the flags.
        column: of the data, that names a row's teacher.

    Raises:
        UserError: they contradict each other.
    """

    models: ModelArguments
    column: str | None

    def __post_init__(self) -> None:
        text = self.models.teacher or ""
        pairs = NAMED.findall(text)
        several = bool(pairs) and " ".join(f"{a}={b}" for a, b in pairs) == " ".join(text.split())
        self.named: dict[str, str] = dict(pairs) if several else {}
        if several and len(self.named) < len(pairs):
            raise UserError(f"--teacher {text}: expected each name once.")
        if bool(self.named) != (self.column is not None):
            raise UserError(
                f"--teacher {text or None} with --teacher_column {self.column}: expected --teacher "
                "NAME=SOURCE for each name in that column, or one teacher and no column."
            )
        if self.models.teacher_cache is not None and self.models.teacher is not None:
            raise UserError(
                "--teacher and --teacher_cache: expected one of them; a cache needs no model."
            )

    @property
    def runs(self) -> bool:
        """Whether it is one model that runs beside the student."""
        return not (self.named or self.models.teacher_cache or is_url(self.models.teacher))

    def open(self, args: DistillationArguments, tokenizer: Any, task: Task) -> Any:
        """Any other teacher.

        Args:
            tokenizer: the teacher's.

        Raises:
            UserError: there is none, or it has another tokenizer.
        """
        folder = Path(
            self.models.teacher_answers or Path(args.output_dir or ".", "teacher_answers")
        )
        if not self.named:
            source = self.models.teacher_cache or str(self.models.teacher)
            return self._open(source, "teacher_cache", folder, args, tokenizer)
        teachers = {}
        for name, source in self.named.items():
            if is_url(source) or Path(source, NAME).exists():
                side = self._open(source, f"teacher {name}=", folder / name, args, tokenizer)
            else:
                side = self._load(source, tokenizer, task)
            teachers[name] = side
        return RoutedTeachers(teachers, str(self.column))

    def _open(
        self, source: str, flag: str, folder: Path, args: DistillationArguments, tokenizer: Any
    ) -> TeacherCache | ServedTeacher:
        if is_url(source):
            heat = args.teacher_temperature
            entries = {
                "top_k": self.models.teacher_top_k,
                "temperature": args.temperature if heat is None else heat,
            }
            if args.cross_tokenizer is not None:
                entries = {"top_k": 0}
            service = Service.of(source, self.models, vocab_size=args.vocab_size, **entries)
            return ServedTeacher(service, tokenizer, folder)
        with as_user_error(f"--{flag} {source}"):
            cache = TeacherCache(Path(source).expanduser())
        cache.check_tokenizer(tokenizer_hash(tokenizer))
        return cache

    def _load(self, source: str, tokenizer: Any, task: Task) -> Any:
        saved = replace(self.models, teacher=source).side("teacher")
        try:
            own = saved.tokenizer()
        except Exception:  # a model without a tokenizer raises one of many things
            own = None
        if own is not None:
            names = {"student": str(self.models.student), "teacher": source}
            check_same(tokenizer, own, names)
        return saved.load(task.loader(saved.config()))


def described(teacher: Any) -> str:
    """For the summary."""
    if isinstance(teacher, RoutedTeachers):
        return "; ".join(f"{name}: {described(x)}" for name, x in teacher.teachers.items())
    if isinstance(teacher, ServedTeacher):
        return str(teacher)
    if isinstance(teacher, TeacherCache):
        return f"{teacher.manifest.teacher}, {teacher.layout.policy}, from {teacher.folder}"
    return f"{sum(p.numel() for p in teacher.parameters()):,} parameters"
