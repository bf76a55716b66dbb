"""Language models: decoders, masked models, encoder-decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, EncoderDecoderModel

from fusedkd.data.arguments import DataArguments
from fusedkd.data.labelled import load_pairs
from fusedkd.data.loading import load_rows, say
from fusedkd.data.masking import FrequencyMasking, count_tokens
from fusedkd.errors import UserError, as_user_error
from fusedkd.models.columns import base_model
from fusedkd.models.heads import next_labels
from fusedkd.train.tasks.base import Task, TaskData, check_pads

_WRITERS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "VISION_2_SEQ",
)


class Causal(Task):
    """A decoder, which may see images or hear speech, too."""

    name = "causal"
    title = "causal language modelling"
    auto = "AutoModelForCausalLM"
    also = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    adapter = "CAUSAL_LM"
    lists = _WRITERS
    collator = (
        "DataCollatorForLanguageModeling(tokenizer, mlm=False), or DataCollatorForSeq2Seq for an "
        "encoder-decoder"
    )
    causal = writes = True
    no_cache = None

    def fits(self, config: Any) -> bool:
        """Not an encoder-decoder."""
        return not getattr(config, "is_encoder_decoder", False)

    def labels(self, inputs: dict[str, Any]) -> Tensor:
        """As in general, shifted unless the batch has ``shift_labels``."""
        shifted = "shift_labels" in inputs
        labels = super().labels(inputs)
        return labels if shifted else next_labels(labels)

    def data(self, flags: DataArguments, tokenizer: Any, teacher: Any) -> TaskData:
        """Text, conversations, prompts and answers."""
        rows = load_rows(flags, tokenizer)
        say(rows.summary)
        return TaskData(rows.train, rows.test, rows.collator, {})


class Masked(Task):
    """An encoder whose labels are where its input is masked."""

    name = "masked"
    title = "masked language modelling"
    auto = "AutoModelForMaskedLM"
    lists = ("MASKED_LM",)
    collator = "DataCollatorForLanguageModeling(tokenizer)"
    no_cache = (
        "a masked language model cannot have a teacher cache: masks are drawn anew in every "
        "epoch, so the teacher never sees the same sequence twice. Use --teacher."
    )

    def classes(self) -> frozenset[str]:
        """XLNet sees the tokens that it predicts unless it is told not to: nothing is shifted."""
        return super().classes() | {"XLNetLMHeadModel"}

    def fits(self, config: Any) -> bool:
        """Not BART, whose class is listed here, too."""
        return not getattr(config, "is_encoder_decoder", False)

    def data(self, flags: DataArguments, tokenizer: Any, teacher: Any) -> TaskData:
        """Blocks of text, masked anew whenever a batch is made."""
        if flags.packing == "flatten" or flags.data_streaming:
            raise UserError(
                "--packing flatten, --data_streaming: expected neither for a masked model."
            )
        train, test, *_, summary = load_rows(flags, tokenizer)
        say(summary)
        with as_user_error():
            ids = train.select_columns("input_ids").with_format("numpy")
            counts = count_tokens(ids, len(tokenizer))
            collator = FrequencyMasking(
                tokenizer, counts, flags.mlm_probability, flags.mlm_smoothing
            )
        without = None if test is None else test.remove_columns("labels")
        return TaskData(train.remove_columns("labels"), without, collator, {})


class Seq2Seq(Task):
    """An encoder-decoder; the decoder's inputs are made of the labels, as each model does it."""

    name = "seq2seq"
    title = "sequence to sequence"
    auto = "AutoModelForSeq2SeqLM"
    also = ("AutoModelForSpeechSeq2Seq", "AutoModelForImageTextToText")
    adapter = "SEQ_2_SEQ_LM"
    lists = _WRITERS
    collator = "DataCollatorForSeq2Seq(tokenizer)"
    per_token = False

    def fits(self, config: Any) -> bool:
        """An encoder-decoder."""
        return bool(getattr(config, "is_encoder_decoder", False))

    def inputs(
        self, model: Any, other: Any, inputs: Mapping[str, Any], labels: Tensor
    ) -> dict[str, Any]:
        """With the decoder's, where the batch has none."""
        found = super().inputs(model, other, inputs, labels)
        if not inputs.keys() & {"decoder_input_ids", "decoder_inputs_embeds"}:
            found["decoder_input_ids"] = ids = _decoder_inputs(model, labels)
            if isinstance(base_model(model), EncoderDecoderModel):
                found.setdefault(
                    "decoder_attention_mask", (ids != model.config.pad_token_id).long()
                )
        return found

    def data(self, flags: DataArguments, tokenizer: Any, teacher: Any) -> TaskData:
        """Pairs of texts."""
        check_pads(tokenizer)
        return TaskData(*load_pairs(flags, tokenizer), DataCollatorForSeq2Seq(tokenizer), {})


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """What the model's own forward makes of labels (B, L) for its decoder."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=labels)
    if hasattr(model, "_shift_right"):
        return model._shift_right(labels)
    config = model.config
    start, pad = config.decoder_start_token_id, config.pad_token_id
    if start is None or pad is None:
        raise ValueError(
            f"decoder_start_token_id={start}, pad_token_id={pad}: expected both in the config of "
            f"{type(model).__name__}, or 'decoder_input_ids' in the batch: "
            "DataCollatorForSeq2Seq(tokenizer, model) may make them."
        )
    shifted = F.pad(labels, (1, 0), value=start)[..., :-1]
    return shifted.masked_fill(shifted == -100, pad)
