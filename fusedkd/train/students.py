"""The student of a run: saved, random, or an adapter to train."""

from __future__ import annotations

from typing import Any

from fusedkd.errors import UserError
from fusedkd.models.adapters import add_lora
from fusedkd.models.arguments import ModelArguments
from fusedkd.models.quantised import fake_quantise
from fusedkd.train.tasks import Task, saved_task


def make_student(flags: ModelArguments, task: Task, args: Any, config: dict[str, Any]) -> Any:
    """The model that is trained.

    Args:
        args: transformers' TrainingArguments.
        config: what the student's has to have for its task.

    Raises:
        UserError: it cannot be loaded, its head would be made up where that is the whole model's
            work, quantised weights would be trained, or an adapter quantised.
    """
    saved = flags.side("student")
    if saved.bits and not flags.use_peft and saved.adapter is None:
        raise UserError(
            f"--student_load_in_{saved.bits}bit: quantised weights cannot be trained: add "
            "--use_peft, or start from an adapter."
        )
    if flags.student_init == "random":
        if saved.bits or saved.adapter is not None:
            raise UserError(
                "--student_init random: expected neither quantised weights nor an adapter."
            )
        model = saved.make(task.loader(saved.config()), **config)
    else:
        # a classifier's head is learnt anew, unless the student was saved with one
        new = not task.over_tokens and saved_task(saved, known=False) is not task
        model = saved.load(task.loader(saved.config()), new_head=new, train=True, **config)
    if saved.bits:
        import peft

        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if flags.use_peft and saved.adapter is None:
        model = add_lora(model, task.adapter, flags.lora_target_modules, **flags.lora())
    if flags.quantise is not None:
        if saved.adapter is not None:
            raise UserError(
                f"--quantise {flags.quantise} with --student {saved.name}, an adapter: expected a "
                "model; peft's merge_and_unload() makes one of it."
            )
        fake_quantise(model, flags.quantise, flags.quantise_group)
    adapted = flags.use_peft or saved.adapter is not None
    if adapted and args.gradient_checkpointing:  # or no gradient reaches the first adapter
        model.enable_input_require_grads()
    return model
