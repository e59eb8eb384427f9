"""Classification (one label or several) and regression of a text or of a pair of texts. Not for tags per token."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.models.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, hot
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    PART_NAMES,
    Columns,
    Splits,
    TaskData,
    check_column,
    encode,
    fingerprint,
    first_output,
    is_text,
    keep_logits,
    only_column,
    pad_multiple,
    parts_of,
    right_padding,
)
from apt_trainer.tasks.labels import KnownLabels, class_weights, is_blank, label_text, number_labels
from apt_trainer.tasks.metrics import classification_scores, multi_label_scores, regression_scores
from apt_trainer.tasks.summed_scores import SummedScores, multi_label_sums

logger = logging.getLogger(__name__)


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """Check the columns of every part; the text column may be left open where only one fits."""
    return _columns(parts, data, _is_label, "one label or number per row, all of one type")


def find_list_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """As :func:`find_columns`, with a list of labels per row, or a text that ``label_separator`` parts."""
    if data.label_separator is None:
        kind = "a list of labels per row; of a column of text say how labels are parted, as label_separator: ','"
        return _columns(parts, data, _is_list_of_labels, kind)
    if not data.label_separator:
        raise UserError("label_separator is empty. Give the text between labels, such as ',' or '|'.")
    return _columns(parts, data, is_text, "text, as label_separator is set")


def _columns(parts: dict[str, Dataset], data: DataSettings, fits: Callable[[Any], bool], kind: str) -> Columns:
    for part, rows in parts.items():
        check_column(rows, data.label_column, "label_column", part, fits, kind)
    text = data.text_column or only_column(parts["train"], (data.label_column, data.text_pair_column), is_text, "text")
    for part, rows in parts.items():
        for column, setting in ((text, "text_column"), (data.text_pair_column, "text_pair_column")):
            if column is not None:
                check_column(rows, column, setting, part, is_text, "text")
    return Columns(text, data.text_pair_column, data.label_column)


def build_classification(
    splits: Splits,
    columns: Columns,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    known: KnownLabels | None = None,
) -> TaskData:
    """One label per row; ids as in ``labels``."""
    column = columns.label
    whole = splits.parts | {"train": splits.all_train}
    found = {part: (set(rows.unique(column)), rows.features[column]) for part, rows in whole.items()}
    labels = number_labels(found, column, known)
    ids = {
        part: [labels.ids[label_text(value, rows.features[column])] for value in rows[column][:]]
        for part, rows in splits.parts.items()
    }
    counts = labels.counts(ids["train"])
    kwargs = {**labels.model_kwargs, "problem_type": SINGLE_LABEL}
    task = _build(splits, ids, columns, data, tokenizer, metric, kwargs)
    weights = class_weights(data, counts, len(ids["train"]), multi=False)
    return replace(task, label_counts=counts, class_weights=weights)


def build_multi_label(
    splits: Splits,
    columns: Columns,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    known: KnownLabels | None = None,
) -> TaskData:
    """Any number of labels per row, none included; ``labels`` are 0 or 1 for each, in the order of ids."""
    column = columns.label
    whole = {part: _label_lists(rows, column, data, part) for part, rows in splits.parts.items()}
    every = _label_lists(splits.all_train, column, data, "train")
    features = {part: getattr(rows.features[column], "feature", None) for part, rows in splits.parts.items()}
    found = {part: (set(chain.from_iterable(lists)), features[part]) for part, lists in whole.items()}
    labels = number_labels(found | {"train": (set(chain.from_iterable(every)), features["train"])}, column, known)
    targets = {}
    for part, lists in whole.items():
        ids = [[labels.ids[label_text(value, features[part])] for value in row] for row in lists]
        targets[part] = [hot(row, len(labels.names)) for row in ids]
    counts = labels.counts(i for row in targets["train"] for i, number in enumerate(row) if number)
    kwargs = {**labels.model_kwargs, "problem_type": MULTI_LABEL}
    task = _build(splits, targets, columns, data, tokenizer, metric, kwargs)
    weights = class_weights(data, counts, len(targets["train"]), multi=True)
    sums = {"validation": _multi_label_sums, "test": _multi_label_sums}
    return replace(task, label_counts=counts, class_weights=weights, sums=sums)


def _label_lists(rows: Dataset, column: str, data: DataSettings, part: str) -> list[list[Any]]:
    """The labels of each row, text parted and without blanks at its ends."""
    lists: list[list[Any]] = rows[column][:]
    if data.label_separator is not None:
        parted = [text.split(data.label_separator) for text in rows[column][:]]
        return [[label.strip() for label in labels if label.strip()] for labels in parted]
    for row, labels in enumerate(lists):
        where = f"label_column={column!r} of the {PART_NAMES[part]} data, row {row} of those used (counted from 0)"
        if any(map(is_blank, labels)):
            raise UserError(f"{where}: {labels} holds an empty label. Leave it out.")
        if len(set(labels)) < len(labels) and not isinstance(labels[0], str):
            raise UserError(
                f"{where}: {labels} names a label twice. If these are 0 and 1 for each label in turn, give the names "
                "or numbers of those that are 1."
            )
    return lists


def build_regression(
    splits: Splits, columns: Columns, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """One number per row, as it stands: it is neither scaled nor shifted."""
    if data.class_weights is not None:
        raise UserError("class_weights has no meaning for task: regression. Remove it.")
    numbers = {part: _numbers(rows, columns.label, part) for part, rows in splits.parts.items()}
    if "test" in numbers and set(numbers["test"]) == {-1.0} and -1.0 not in numbers["train"]:
        raise UserError(
            f"label_column={columns.label!r} of the test data holds only -1, which marks hidden labels. "
            "Use labelled data, or leave out the test data."
        )
    kwargs = {"num_labels": 1, "problem_type": REGRESSION}
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
        _warn_of_blank(splits.parts[part][columns.text][:], columns, part)
    scores = _METRICS[model_kwargs["problem_type"]]
    return TaskData(
        **parts_of(encoded),
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


def _warn_of_blank(texts: Sequence[str], columns: Columns, part: str) -> None:
    blank = sum(not text.strip() for text in texts)
    if blank:
        logger.warning(
            "%d of %d rows of the %s data have no text in %r.", blank, len(texts), PART_NAMES[part], columns.text
        )


def _is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel | Value)


def _is_list_of_labels(feature: Any) -> bool:
    return _is_label(getattr(feature, "feature", None))


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


def _multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return multi_label_scores(first_output(prediction.predictions), np.asarray(prediction.label_ids))


def _multi_label_sums(prediction: EvalPrediction) -> SummedScores:
    return multi_label_sums(first_output(prediction.predictions), np.asarray(prediction.label_ids))


_METRICS = {SINGLE_LABEL: _classification_metrics, MULTI_LABEL: _multi_label_metrics, REGRESSION: _regression_metrics}
