"""Summarization and translation with encoder-decoders: a source text in, a target text out.

Measured on generated texts (ROUGE or BLEU), or, with ``metric: perplexity``, on the target tokens without generating,
which is far faster. References are the target texts as the tokenizer writes them back. Not for decoders: those learn
the same from prompts and completions (``instruction_tuning``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.settings.packages import BLEU, ROUGE, Package, require
from apt_trainer.tasks.base import (
    Splits,
    TaskData,
    check_column,
    encode,
    fingerprint,
    is_text,
    only_column,
    pad_multiple,
    parts_of,
    without_blank,
)
from apt_trainer.tasks.generation_scores import rouge_scores, translation_scores
from apt_trainer.tasks.nested import names_with_fields
from apt_trainer.tasks.summed_scores import translation_sums
from apt_trainer.tasks.token_scores import aligned_sums, token_scores

Scores = Callable[[Sequence[str], Sequence[str]], Any]


@dataclass(frozen=True)
class SourceAndTarget:
    """Names of the columns in use."""

    source: str
    target: str

    @property
    def names(self) -> list[str]:
        return [self.source, self.target]


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> SourceAndTarget:
    """Check the columns of every part; the source column may be left open where only one fits."""
    if data.target_column is None:
        raise UserError(
            f"target_column is not set, which task: {data.task} needs. "
            f"The columns of the training data are: {', '.join(names_with_fields(parts['train']))}."
        )
    source = data.text_column or only_column(parts["train"], (data.target_column,), is_text, "text")
    for part, rows in parts.items():
        for column, setting in ((source, "text_column"), (data.target_column, "target_column")):
            check_column(rows, column, setting, part, is_text, "text")
    return SourceAndTarget(source, data.target_column)


def build_summarization(
    splits: Splits, columns: SourceAndTarget, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Scored by ROUGE."""
    return _build(splits, columns, data, tokenizer, metric, rouge_scores, ROUGE)


def build_translation(
    splits: Splits, columns: SourceAndTarget, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Scored by BLEU and chrF."""
    task = _build(splits, columns, data, tokenizer, metric, translation_scores, BLEU)
    if task.generation_length is None:
        return task
    sums = partial(_compare, tokenizer=tokenizer, scores=translation_sums)
    return replace(task, sums={"validation": sums, "test": sums})


def _build(
    splits: Splits,
    columns: SourceAndTarget,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    scores: Scores,
    package: Package,
) -> TaskData:
    _check_lengths(data, tokenizer)
    encoded = {}
    for part, rows in splits.parts.items():
        for column, setting in ((columns.source, "text_column"), (columns.target, "target_column")):
            rows = without_blank(rows, column, setting, part)
        encoded[part] = encode(rows, _tokenise, tokenizer=tokenizer, columns=columns, data=data, cut=part == "train")
    task = TaskData(
        **parts_of(encoded),
        collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=pad_multiple(data)),
        model_class="AutoModelForSeq2SeqLM",
        metric_name=metric,
        metrics={"validation": token_scores, "test": token_scores},
        fingerprint=fingerprint(splits.train, columns),
        preprocess_logits=aligned_sums,
        greater_is_better=False,
    )
    if metric == "perplexity":
        return task
    require(package, f"metric: {metric}")
    compare = partial(_compare, tokenizer=tokenizer, scores=scores)
    return replace(
        task,
        metrics={"validation": compare, "test": compare},
        preprocess_logits=None,
        greater_is_better=True,
        generation_length=data.max_target_length + 1,
    )


def _check_lengths(data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    prefix = len(tokenizer(data.source_prefix).input_ids)
    if prefix >= data.max_length:
        raise UserError(
            f"source_prefix={data.source_prefix!r} takes {prefix} tokens with the special ones, which leaves no room "
            f"for a text within max_length={data.max_length}. Raise max_length."
        )
    special = tokenizer.num_special_tokens_to_add()
    if data.max_target_length <= special:
        raise UserError(
            f"max_target_length={data.max_target_length} must exceed the {special} special tokens of every target."
        )


def _tokenise(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: SourceAndTarget,
    data: DataSettings,
    cut: bool,
) -> dict[str, Any]:
    """``cut``: targets to max_target_length. References stay whole, unless they exceed what the model is made for."""
    sources = [data.source_prefix + text for text in batch[columns.source]]
    encoded = tokenizer(sources, truncation=True, max_length=data.max_length)
    longest = data.max_target_length if cut else max(data.max_target_length, min(tokenizer.model_max_length, 10**6))
    targets = tokenizer(text_target=batch[columns.target], truncation=True, max_length=longest)
    return {**encoded, "labels": targets.input_ids}


def _compare(prediction: EvalPrediction, tokenizer: PreTrainedTokenizerBase, scores: Scores) -> Any:
    predicted, expected = (_texts(ids, tokenizer) for ids in (prediction.predictions, prediction.label_ids))
    return scores(predicted, expected)


def _texts(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of token ids that are padded with negative numbers or the padding token."""
    ids = np.asarray(ids)
    padded = np.where(ids < 0, tokenizer.pad_token_id, ids)
    return [text.strip() for text in tokenizer.batch_decode(padded, skip_special_tokens=True)]
