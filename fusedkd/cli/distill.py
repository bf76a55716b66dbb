"""``fusedkd distill``: models and text from disk, a trainer, a summary."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import set_seed

from fusedkd.cli.mistakes import check_flags, check_output, what_is_asked
from fusedkd.cli.run_file import RunFile
from fusedkd.cli.teachers import Source, described
from fusedkd.data.arguments import DataArguments
from fusedkd.errors import NotFinite, UserError, as_user_error
from fusedkd.files import write_json
from fusedkd.models.arguments import ModelArguments
from fusedkd.models.loading import load_both_tokenizers, load_tokenizer
from fusedkd.models.quantised import QUANTISED, export
from fusedkd.models.saved import SavedModel
from fusedkd.train.arguments import DistillationArguments
from fusedkd.train.checkpoints import checkpoint_of
from fusedkd.train.fits import check_fits, check_prompts
from fusedkd.train.report.arguments import ReportArguments
from fusedkd.train.report.card import Card, make_card, write_card
from fusedkd.train.report.harness import lm_eval_scores
from fusedkd.train.report.samples import Samples
from fusedkd.train.students import make_student
from fusedkd.train.tasks import Task, saved_task, task_named
from fusedkd.train.term_set import own_parameters
from fusedkd.train.trainer import DistillationTrainer


def distill(
    models: ModelArguments,
    data: DataArguments,
    args: DistillationArguments,
    report: ReportArguments | None = None,
    run: RunFile | None = None,
) -> int:
    """Train, save the student, its tokenizer and a report to ``args.output_dir``, show a summary.

    Raises:
        UserError: a missing or wrong argument, model or file.
    """
    report = ReportArguments() if report is None else report
    folder = Path(args.output_dir or ".")
    trainer, checkpoint = _prepare(models, data, args)
    samples = _report_on(trainer, report, checkpoint)
    if run is not None and trainer.is_world_process_zero():
        _keep_flags(run, folder, resumed=checkpoint is not None)
    with what_is_asked(trainer):
        metrics = _trained(trainer, checkpoint)
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        trainer.save_model()
        trainer.save_state()
        texts = samples.finish()
    if trainer.is_world_process_zero():
        student = trainer.accelerator.unwrap_model(trainer.model)
        if report.eval_tasks:
            scores = lm_eval_scores(student, trainer.processing_class, report.eval_tasks)
            metrics["eval_tasks"] = scores
        if models.quantise is not None:
            scheme, group = models.quantise, models.quantise_group
            export(student, folder, scheme, group, trainer.processing_class)
        card = make_card(trainer, metrics, texts)
        _summary(trainer, card)
        _write(trainer, card, models, data, report)
    return 0


def _trained(trainer: DistillationTrainer, checkpoint: str | None) -> dict[str, Any]:
    """A run that is stopped leaves its log, for ``fusedkd doctor --run``."""
    try:
        return dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    except NotFinite as error:
        step = trainer.state.global_step
        history: list[Any] = trainer.state.log_history
        history.append({"stopped": str(error), "step": step})
        trainer.save_state()
        raise


def _report_on(
    trainer: DistillationTrainer, report: ReportArguments, checkpoint: str | None
) -> Samples:
    """Have the trainer evaluate before the first step, and the models write."""
    full = report.report == "full"
    if full and trainer.eval_dataset is not None and checkpoint is None:
        trainer.args.eval_on_start = True
    samples = Samples(trainer, report.report_samples if full else 0, report.report_new_tokens)
    trainer.add_callback(samples)
    return samples


def _keep_flags(run: RunFile, folder: Path, resumed: bool) -> None:
    for change in run.changes(folder) if resumed else ():
        print(f"changed since this run began: {change}", file=sys.stderr)
    run.write(folder)


def _write(
    trainer: DistillationTrainer,
    card: Card,
    models: ModelArguments,
    data: DataArguments,
    report: ReportArguments,
) -> None:
    args = trainer.args
    folder = Path(args.output_dir or ".")
    if report.report == "none":
        write_json(folder / "distillation.json", card)
        return
    terms = "".join(f" + {term}" for term in args.terms)
    rounded = f"{models.quantise}, {models.quantise_group} weights a scale, in {QUANTISED}/"
    about = {
        "student": str(models.student),
        "teacher": str(models.teacher or models.teacher_cache),
        "quantised": rounded if models.quantise else "",
        "data": ", ".join(data.data),
        "loss": f"{_kd(args)} at T = {args.temperature:g} + {_hard(args)}{terms}",
        "again": "`fusedkd distill --config run.yaml --output_dir again`",
    }
    write_card(folder, card, trainer.state.log_history, about)


def _prepare(
    models: ModelArguments, flags: DataArguments, args: DistillationArguments
) -> tuple[DistillationTrainer, str | None]:
    """Everything that can be wrong, in the order in which it is cheap to find out; and the
    checkpoint to go on from."""
    source = Source(models, flags.teacher_column)
    teacher = models.side("teacher") if source.runs else None
    student = models.side("student")
    if not flags.data:
        raise UserError("--data is missing: expected files, folders or names of data sets.")
    if flags.data_streaming and args.max_steps < 1:
        raise UserError("--data_streaming: a stream's length is not known: expected --max_steps.")
    dealt: Any = args.accelerator_config
    if flags.data_streaming and dealt.dispatch_batches is None:
        # each process makes its own batches, as of other data: one row cannot be dealt out
        dealt.dispatch_batches = False
    check_flags(args)
    named = {"teacher": models.teacher, "student": models.student}
    check_output(Path(args.output_dir or "."), **named)
    checkpoint = _checkpoint(args)
    task = _task(teacher, student) if args.task is None else task_named(args.task)
    sides = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    theirs = None
    if args.cross_tokenizer is None:
        tokenizer = load_tokenizer(models.tokenizer, **sides)
    elif source.named:
        raise UserError(f"--cross_tokenizer {args.cross_tokenizer}: expected one teacher.")
    else:
        given = models.tokenizer, models.teacher_tokenizer
        tokenizer, theirs = load_both_tokenizers(*given, student, teacher)
    if teacher is None and task.no_cache:
        raise UserError(task.no_cache)
    elsewhere = None if source.runs else source.open(args, theirs or tokenizer, task)
    flags.conversations = theirs is not None
    data = task.data(flags, tokenizer, None if teacher is None else teacher.config())
    check_prompts(data.train, data.test, flags, args.on_policy_share)
    with as_user_error(f"--seed {args.seed}"):
        set_seed(args.seed)  # before random weights are drawn
    student_model = make_student(models, task, args, data.student)
    teacher_side: Any = (
        elsewhere if teacher is None else teacher.load(task.loader(teacher.config()))
    )
    if data.test is None:
        args.eval_strategy = "no"  # type: ignore[assignment]
    with as_user_error():
        trainer = DistillationTrainer(
            student_model,
            teacher_side,
            args,
            train_dataset=data.train,
            eval_dataset=data.test,
            processing_class=tokenizer,
            teacher_processing_class=theirs,
            data_collator=data.collator,
        )
    if trainer.terms.attention and flags.packing == "flatten":
        raise UserError("--packing flatten: terms of attention compare rows: expected none.")
    # after the trainer's checks: a vocabulary that does not fit explains ids that do not
    reads = source.runs and theirs is None  # the same ids
    readers = {"student": student_model} | ({"teacher": teacher_side} if reads else {})
    for name in ("train_dataset", "eval_dataset"):
        with as_user_error("--data" if name == "train_dataset" else "--eval_data"):
            rows = check_fits(getattr(trainer, name), readers, flags, task.over_tokens)
            setattr(trainer, name, rows)
    return trainer, checkpoint


def _task(teacher: SavedModel | None, student: SavedModel) -> Task:
    """What the student learns to do. Any student can become a classifier, whose head is small."""
    theirs = None if teacher is None else saved_task(teacher)
    any_head = theirs is not None and not theirs.over_tokens
    ours = theirs if any_head else saved_task(student)
    task = theirs or ours
    if task is None:
        known = teacher or student
        raise UserError(
            f"--{known.role} {known.name}: its config names no architecture of transformers, such "
            "as LlamaForCausalLM."
        )
    if ours not in (None, task):
        raise UserError(
            f"--student {student.name} is a {ours.name} model, the teacher a {task.name} one: "
            "expected one task."
        )
    return task


def _checkpoint(args: DistillationArguments) -> str | None:
    return checkpoint_of(
        Path(args.output_dir or "."),
        args.resume_from_checkpoint,
        optimizer=not getattr(args, "save_only_model", False),
    )


ROWS = {
    "train_runtime": ("training, seconds", ",.0f"),
    "train_loss": ("training loss, mean", ".4f"),
    "eval_loss": ("held-out cross-entropy, nats per token", ".4f"),
    "eval_perplexity": ("held-out perplexity", ",.2f"),
    "eval_teacher_loss": ("the teacher's own", ".4f"),
    "gap_closed": ("gap to the teacher, closed", ".0%"),
    "eval_kd": ("held-out divergence from the teacher", ".4f"),
    "eval_top1_agreement": ("held-out agreement with the teacher", ".2%"),
    "eval_student_accuracy": ("held-out accuracy, student", ".2%"),
    "eval_teacher_accuracy": ("held-out accuracy, teacher", ".2%"),
}


def _hard(args: DistillationArguments) -> str:
    z_loss = f" + {args.z_loss_weight:g} x lse^2" if args.z_loss_weight else ""
    return f"{args.ce_weight:g} x CE{z_loss}"


def _kd(args: DistillationArguments) -> str:
    rule = f"{args.row_rule} x " if args.row_rule else ""
    kd = f"{args.kd_weight:g} x {rule}{args.divergence}"
    shared = f"{kd} over the shared vocabulary"
    alm = f"{args.alm_weight:g} x ALM"
    across = {"alm": alm, "shared_kl": shared, "both": f"{alm} + {shared}"}
    return kd if args.cross_tokenizer is None else across[args.cross_tokenizer]


def _summary(trainer: DistillationTrainer, card: Card) -> None:
    args = trainer.args
    table = Table(show_header=False, title="Distilled")
    parameters = own_parameters(trainer.model)
    table.add_row("student", f"{parameters:,} parameters in {args.output_dir}")
    table.add_row("teacher", described(trainer.teacher))
    table.add_row("loss", f"{_kd(args)} + {_hard(args)}")
    for text in args.terms:
        table.add_row("", f"+ {text}")
    table.add_row("steps", f"{trainer.state.global_step:,}")
    for name, (label, form) in ROWS.items():
        if card.get(name) is not None:
            label = label.replace("cross-entropy, nats per token", trainer.measure)
            moves = name in card["before"] and "teacher_" not in name
            before = f"{card['before'][name]:{form}} -> " if moves else ""
            table.add_row(label, before + format(card[name], form))
    for name in trainer.terms.terms:
        if f"eval_{name}" in card:
            table.add_row(f"held-out {name}", f"{card[f'eval_{name}']:.4f}")
    for task, scores in card.get("eval_tasks", {}).items():
        table.add_row(f"lm-eval, {task}", scores)
    console = Console(markup=False, emoji=False)  # names may have brackets
    console.print(table)
    console.print(card["verdict"])
