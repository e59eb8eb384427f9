"""Classification and regression of a text or of a pair of texts. Not for tags per token."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    PART_NAMES,
    Columns,
    Splits,
    TaskData,
    check_column,
    check_labels,
    encode,
    fingerprint,
    first_output,
    is_text,
    keep_logits,
    label_kwargs,
    label_names,
    label_text,
    only_column,
    pad_multiple,
    right_padding,
)
from apt_trainer.tasks.metrics import classification_scores, regression_scores


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """Check the columns of every part; the text column may be left open where only one fits."""
    for part, rows in parts.items():
        kind = "one label or number per row, all of one type"
        check_column(rows, data.label_column, "label_column", part, _is_label, kind)
    text = data.text_column or only_column(parts["train"], (data.label_column, data.text_pair_column), is_text, "text")
    for part, rows in parts.items():
        for column, setting in ((text, "text_column"), (data.text_pair_column, "text_pair_column")):
            if column is not None:
                check_column(rows, column, setting, part, is_text, "text")
    return Columns(text, data.text_pair_column, data.label_column)


def build_classification(
    splits: Splits, columns: Columns, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """One label per row; ids follow the names of the data set, else the sorted labels of all training data."""
    column = columns.label
    feature = splits.all_train.features[column]
    names = label_names(splits.all_train.unique(column), feature, column)
    ids = {name: i for i, name in enumerate(names)}
    label_ids = {}
    for part, rows in splits.parts.items():
        feature = rows.features[column]
        check_labels(rows.unique(column), feature, names, column, part)
        label_ids[part] = [ids[label_text(value, feature)] for value in rows[column][:]]
    kwargs = {**label_kwargs(names), "problem_type": "single_label_classification"}
    return _build(splits, label_ids, columns, data, tokenizer, metric, kwargs)


def build_regression(
    splits: Splits, columns: Columns, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """One number per row, as it stands: it is neither scaled nor shifted."""
    numbers = {part: _numbers(rows, columns.label, part) for part, rows in splits.parts.items()}
    if "test" in numbers and set(numbers["test"]) == {-1.0} and -1.0 not in numbers["train"]:
        raise UserError(
            f"label_column={columns.label!r} of the test data holds only -1, which marks hidden labels. "
            "Use labelled data, or leave out the test data."
        )
    kwargs = {"num_labels": 1, "problem_type": "regression"}
    return _build(splits, numbers, columns, data, tokenizer, metric, kwargs)


def _build(
    splits: Splits,
    labels: dict[str, list[Any]],
    columns: Columns,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    model_kwargs: dict[str, Any],
) -> TaskData:
    encoded = {
        part: encode(
            rows,
            _tokenise,
            with_indices=True,
            tokenizer=tokenizer,
            columns=columns,
            labels=np.asarray(labels[part]),
            max_length=data.max_length,
        )
        for part, rows in splits.parts.items()
    }
    for part, rows in encoded.items():
        _check_not_empty(rows["input_ids"], columns, part)
    scores = _regression_metrics if model_kwargs["problem_type"] == "regression" else _classification_metrics
    return TaskData(
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded.get("test", encoded["validation"]),
        test_name="test" if "test" in encoded else "validation",
        # decoders read the last token before the padding, at positions counted from the left
        collator=DataCollatorWithPadding(right_padding(tokenizer), pad_to_multiple_of=pad_multiple(data)),
        model_class="AutoModelForSequenceClassification",
        model_kwargs=model_kwargs,
        metric_name=metric,
        metrics={"validation": scores, "test": scores},
        label_names=tuple(model_kwargs.get("label2id", ())),
        fingerprint=fingerprint(splits.train, columns),
        preprocess_logits=keep_logits,
    )


def _tokenise(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    labels: np.ndarray,
    max_length: int,
) -> dict[str, Any]:
    pairs = None if columns.text_pair is None else batch[columns.text_pair]
    encoded = tokenizer(batch[columns.text], pairs, truncation=True, max_length=max_length)
    return {**encoded, "labels": labels[indices].tolist()}


def _check_not_empty(inputs: Iterable[list[int]], columns: Columns, part: str) -> None:
    """Tokenizers of decoders add no special token, so that an empty text is no input at all."""
    for row, ids in enumerate(inputs):
        if not ids:
            raise UserError(
                f"text_column={columns.text!r} of the {PART_NAMES[part]} data has no text in row {row} of those used "
                "(counted from 0). Fill this row or remove it."
            )


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel | Value)


def _numbers(rows: Dataset, column: str, part: str) -> list[float]:
    numbers = []
    for row, value in enumerate(rows[column][:]):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"label_column={column!r} of the {PART_NAMES[part]} data holds {value!r} (row {row} of those used), "
                "but task: regression needs finite numbers. Correct the data, or use task: classification."
            )
        numbers.append(number)
    return numbers


def _classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return classification_scores(first_output(prediction.predictions), np.asarray(prediction.label_ids))


def _regression_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return regression_scores(np.ravel(first_output(prediction.predictions)), np.ravel(prediction.label_ids))
