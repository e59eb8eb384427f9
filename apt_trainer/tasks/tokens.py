"""One tag per word, for example named entities or parts of speech. Not for one label per text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import DataCollatorForTokenClassification, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    IGNORED_LABEL,
    PART_NAMES,
    Columns,
    Splits,
    TaskData,
    check_column,
    encode,
    fingerprint,
    first_output,
    is_list_of_text,
    keep_logits,
    only_column,
    pad_multiple,
    parts_of,
    require_fast,
)
from apt_trainer.tasks.labels import KnownLabels, class_weights, is_blank, label_text, number_labels
from apt_trainer.tasks.metrics import entity_scores, looks_like_bio, tag_scores
from apt_trainer.tasks.summed_scores import SummedScores, tag_sums


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """Check the columns of every part: a list of words and a list of as many tags per row."""
    if data.text_pair_column is not None:
        raise UserError(
            f"text_pair_column={data.text_pair_column!r} has no meaning for task: token_classification. Remove it."
        )
    for part, rows in parts.items():
        check_column(rows, data.label_column, "label_column", part, _is_list_of_tags, "a list of tags per row")
    text = data.text_column or only_column(parts["train"], (data.label_column,), is_list_of_text, "lists of words")
    for part, rows in parts.items():
        check_column(rows, text, "text_column", part, is_list_of_text, "a list of words per row")
        _check_lengths(rows, text, data.label_column, part)
    return Columns(text, None, data.label_column)


def build(
    splits: Splits,
    columns: Columns,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    known: KnownLabels | None = None,
) -> TaskData:
    """The first piece of a word bears its tag, further pieces are ignored; words past max_length are not scored."""
    require_fast(tokenizer, "token_classification")
    column = columns.label
    whole = splits.parts | {"train": splits.all_train}
    found = {part: (set(_tags(rows, column)), rows.features[column].feature) for part, rows in whole.items()}
    labels = number_labels(found, column, known, "word")
    names = labels.names
    encoded = {
        part: encode(
            rows,
            _tokenise,
            tokenizer=tokenizer,
            columns=columns,
            feature=rows.features[column].feature,
            ids=dict(labels.ids),
            prefix=word_prefix(tokenizer),
            max_length=data.max_length,
        )
        for part, rows in splits.parts.items()
    }
    counts = labels.counts(i for row in encoded["train"]["labels"][:] for i in row if i != IGNORED_LABEL)
    scores, sums = partial(_metrics, names=names), partial(_sums, names=names)
    return TaskData(
        **parts_of(encoded),
        collator=DataCollatorForTokenClassification(tokenizer, pad_to_multiple_of=pad_multiple(data)),
        model_class="AutoModelForTokenClassification",
        model_kwargs=labels.model_kwargs,
        metric_name=metric,
        metrics={"validation": scores, "test": scores},
        label_names=names,
        fingerprint=fingerprint(splits.train, columns),
        preprocess_logits=keep_logits,
        sums={"validation": sums, "test": sums},
        label_counts=counts,
        class_weights=class_weights(data, counts, sum(counts.values()), multi=False),
    )


def _tokenise(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    feature: Any,
    ids: dict[str, int],
    prefix: str,
    max_length: int,
) -> dict[str, Any]:
    encoded, words = encode_words(batch[columns.text], tokenizer, prefix, max_length)
    labels = [
        [IGNORED_LABEL if word is None else ids[label_text(tags[word], feature)] for word in of_row]
        for tags, of_row in zip(batch[columns.label], words, strict=True)
    ]
    return {**encoded, "labels": labels}


def encode_words(
    rows: list[list[str]], tokenizer: PreTrainedTokenizerBase, prefix: str, max_length: int
) -> tuple[Mapping[str, Any], list[list[int | None]]]:
    """Inputs of the model for lists of words, and for each token of a row the number of the word that it begins."""
    words = [[prefix + word for word in row] for row in rows]
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    begun = []
    for row in range(len(rows)):
        owners = encoded.word_ids(row)
        begun.append([w if w != before else None for before, w in zip([None, *owners], owners, strict=False)])
    return encoded, begun


def word_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """A space for tokenizers that mark words by the space before them, which words in a list do not have."""
    pieces = tokenizer.tokenize("x x")
    return " " if pieces and pieces[0] != pieces[-1] else ""


def _tags(rows: Dataset, column: str) -> Iterator[Any]:
    for batch in rows.select_columns([column]).iter(batch_size=1000):
        for tags in batch[column]:
            yield from tags


def _is_list_of_tags(feature: Any) -> bool:
    return isinstance(getattr(feature, "feature", None), ClassLabel | Value)


def _check_lengths(rows: Dataset, text: str, label: str, part: str) -> None:
    row = 0
    for batch in rows.select_columns([text, label]).iter(batch_size=1000):
        for words, tags in zip(batch[text], batch[label], strict=True):
            if len(words) != len(tags) or None in words or any(map(is_blank, tags)):
                raise UserError(
                    f"Row {row} (counted from 0) of the {PART_NAMES[part]} data has {len(words)} words in {text!r} "
                    f"and {len(tags)} tags in {label!r}. Every word needs one tag, and neither may be empty."
                )
            row += 1


def _metrics(prediction: EvalPrediction, names: tuple[str, ...]) -> dict[str, float]:
    """Entity scores take the place of tag scores of the same name where the tags are B-, I- and O."""
    predicted, expected = _tags_of(prediction, names)
    scores = tag_scores(predicted, expected)
    return {**scores, **entity_scores(predicted, expected)} if looks_like_bio(names) else scores


def _sums(prediction: EvalPrediction, names: tuple[str, ...]) -> SummedScores:
    return tag_sums(*_tags_of(prediction, names), names)


def _tags_of(prediction: EvalPrediction, names: tuple[str, ...]) -> tuple[list[list[str]], list[list[str]]]:
    """Predicted and expected tags of the words of each row."""
    predicted_ids = np.argmax(first_output(prediction.predictions), axis=-1)
    labels = np.asarray(prediction.label_ids)
    predicted, expected = [], []
    for ids, row in zip(predicted_ids, labels, strict=True):
        kept = row != IGNORED_LABEL
        predicted.append([names[i] for i in ids[: len(row)][kept]])
        expected.append([names[i] for i in row[kept]])
    return predicted, expected
