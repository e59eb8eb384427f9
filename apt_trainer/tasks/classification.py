"""Classification (one label or several) and regression of a text or of a pair of texts. Not for tags per token."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.models.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, are_numbers, hot, hot_width, of_hot, shown
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
from apt_trainer.tasks.labels import KnownLabels, Labels, class_weights, is_blank, label_text, number_labels
from apt_trainer.tasks.metrics import classification_scores, multi_label_scores, regression_scores
from apt_trainer.tasks.summed_scores import SummedScores, multi_label_sums

logger = logging.getLogger(__name__)


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """Check the columns of every part; the text column may be left open where only one fits."""
    return _columns(parts, data, is_label, "one label or number per row, all of one type")


def find_number_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """As :func:`find_columns`, with a number or a list of numbers per row."""
    return _columns(
        parts, data, lambda f: is_label(f) or _is_list_of_labels(f), "a number, or a list of them, per row"
    )


def find_list_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """As :func:`find_columns`, with a list of labels per row, or a text that ``label_separator`` parts."""
    if data.label_separator is None:
        kind = (
            "a list of labels per row, or of 0 and 1 for each label; of a column of text say how labels are parted, "
            "as label_separator: ','; columns of 0 and 1 go into label_columns"
        )
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
    labels, ids = numbered(splits, columns.label, known)
    counts = labels.counts(ids["train"])
    kwargs = {**labels.model_kwargs, "problem_type": SINGLE_LABEL}
    task = _build(splits, ids, columns, data, tokenizer, metric, kwargs)
    weights = class_weights(data, counts, len(ids["train"]), multi=False)
    return replace(task, label_counts=counts, class_weights=weights)


def numbered(splits: Splits, column: str, known: KnownLabels | None) -> tuple[Labels, dict[str, list[int]]]:
    """The labels in ``column``, one a row, and the id of that of each row of each part."""
    whole = splits.parts | {"train": splits.all_train}
    found = {part: (set(rows.unique(column)), rows.features[column]) for part, rows in whole.items()}
    labels = number_labels(found, column, known)
    return labels, {
        part: [labels.ids[label_text(value, rows.features[column])] for value in rows[column][:]]
        for part, rows in splits.parts.items()
    }


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
    rows = splits.parts | {"every": splits.all_train}
    lists, features = _label_lists(rows, column, data, known)
    found = {part: (set(chain.from_iterable(lists[part])), features[part]) for part in splits.parts}
    labels = number_labels(
        found | {"train": (set(chain.from_iterable(lists["every"])), features["every"])}, column, known
    )
    targets = {}
    for part in splits.parts:
        ids = [[labels.ids[label_text(value, features[part])] for value in row] for row in lists[part]]
        targets[part] = [hot(row, len(labels.names)) for row in ids]
    counts = labels.counts(i for row in targets["train"] for i, number in enumerate(row) if number)
    kwargs = {**labels.model_kwargs, "problem_type": MULTI_LABEL}
    task = _build(splits, targets, columns, data, tokenizer, metric, kwargs)
    weights = class_weights(data, counts, len(targets["train"]), multi=True)
    sums = {"validation": _multi_label_sums, "test": _multi_label_sums}
    return replace(task, label_counts=counts, class_weights=weights, sums=sums)


def _label_lists(
    parts: Mapping[str, Dataset], column: str, data: DataSettings, known: KnownLabels | None
) -> tuple[dict[str, list[list[Any]]], dict[str, Any]]:
    """Labels of each row of ``parts`` (text parted and without blanks at its ends), and the feature of each part."""
    lists: dict[str, list[list[Any]]] = {part: rows[column][:] for part, rows in parts.items()}
    features = {part: getattr(rows.features[column], "feature", None) for part, rows in parts.items()}
    if data.label_separator is not None:
        for part, texts in lists.items():
            parted = [text.split(data.label_separator) for text in texts]  # type: ignore[attr-defined]
            lists[part] = [[label.strip() for label in labels if label.strip()] for labels in parted]
    width = None
    if not any(isinstance(feature, ClassLabel) for feature in features.values()):
        width = hot_width(chain.from_iterable(lists.values()))
    if width is None and data.label_columns is None:
        for part, of_part in lists.items():
            _check_lists(of_part, column, part)
        return lists, features
    names = _names_of_hot(lists, column, data, known)
    return {part: [of_hot(row) for row in of_part] for part, of_part in lists.items()}, dict.fromkeys(
        features, ClassLabel(names=list(names))
    )


def _names_of_hot(
    lists: Mapping[str, list[list[Any]]], column: str, data: DataSettings, known: KnownLabels | None
) -> Sequence[str]:
    """Of what the 0 and 1 of each row are for: columns they come from, else the labels of the model, else numbers."""
    if data.label_columns is not None:
        wrong = [value for rows in lists.values() for row in rows for value in row if value not in (0, 1)]
        if wrong:
            raise UserError(
                f"label_columns={data.label_columns} hold {wrong[0]:g}, but say for each label whether a row has it. "
                "Give 0 and 1."
            )
        return data.label_columns
    width = len(lists["train"][0])
    if known is not None and len(known.names) == width:
        return known.names
    if known is not None and known.final:
        raise UserError(
            f"label_column={column!r} says 0 or 1 for {width} labels, and the model has {len(known.names)}: "
            f"{shown(known.names)}. Give one value for each of these, in their order."
        )
    return [f"LABEL_{i}" for i in range(width)]


def _check_lists(lists: list[list[Any]], column: str, part: str) -> None:
    """Raise :class:`UserError` for a list of labels with an empty one, or of 0 and 1 that do not tell each label."""
    for row, labels in enumerate(lists):
        where = f"label_column={column!r} of the {_part_name(part)} data, row {row} of those used (counted from 0)"
        if any(map(is_blank, labels)):
            raise UserError(f"{where}: {labels} holds an empty label. Leave it out.")
        fraction = next((v for v in labels if isinstance(v, float) and not v.is_integer()), None)
        if fraction is not None:
            raise UserError(f"{where}: {fraction} is no label. Give names, numbers of labels, or 0 and 1 for each.")
        texts = [label for label in labels if isinstance(label, str) and label not in ("0", "1")]
        if len(set(labels)) < len(labels) and not texts:
            raise UserError(
                f"{where}: {labels} names a label twice. If these are 0 and 1 for each label in turn, all rows of all "
                "data need as many, and no other values; else give the names or numbers of the labels that a row has."
            )


def _part_name(part: str) -> str:
    return PART_NAMES.get(part, PART_NAMES["train"])


def build_regression(
    splits: Splits,
    columns: Columns,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    metric: str,
    known: KnownLabels | None = None,
) -> TaskData:
    """One number per row, or several, as they stand: they are neither scaled nor shifted."""
    if data.class_weights is not None:
        raise UserError("class_weights has no meaning for task: regression. Remove it.")
    numbers = {part: numbers_of(rows, columns.label, part, "regression") for part, rows in splits.parts.items()}
    if "test" in numbers and set(numbers["test"].flat) == {-1.0} and -1.0 not in numbers["train"]:
        raise UserError(
            f"label_column={columns.label!r} of the test data holds only -1, which marks hidden labels. "
            "Use labelled data, or leave out the test data."
        )
    width = numbers["train"].shape[1]
    for part, of_part in numbers.items():
        if of_part.shape[1] != width:
            raise UserError(
                f"label_column={columns.label!r} holds {width} numbers per row in the training data and "
                f"{of_part.shape[1]} in the {PART_NAMES[part]} data. Give as many everywhere."
            )
    kwargs: dict[str, Any] = {"num_labels": width, "problem_type": REGRESSION}
    names: Sequence[str] = known.names if known is not None and len(known.names) == width else ()
    if data.label_columns is not None:
        labels = number_labels(
            {"train": (set(range(width)), ClassLabel(names=data.label_columns))}, columns.label, known
        )
        if len(labels.names) != width:
            raise UserError(
                f"label_columns={data.label_columns} are some of the numbers that the model predicts. Give a column "
                f"for each: {shown(labels.names)}."
            )
        names, kwargs = labels.names, kwargs | labels.model_kwargs
        order = np.argsort([labels.ids[name] for name in data.label_columns])
        numbers = {part: of_part[:, order] for part, of_part in numbers.items()}
    values = {part: of_part[:, 0] if width == 1 else of_part for part, of_part in numbers.items()}
    task = _build(splits, values, columns, data, tokenizer, metric, kwargs)
    names = () if are_numbers(names) else tuple(names)
    scores = partial(_regression_metrics, names=names)
    return replace(task, metrics={"validation": scores, "test": scores}, label_names=names)


def _build(
    splits: Splits,
    labels: Mapping[str, Sequence[Any] | np.ndarray],
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
    return {**encode_texts(batch, tokenizer, columns, max_length), "labels": labels[indices].tolist()}


def encode_texts(
    batch: Mapping[str, list[Any]], tokenizer: PreTrainedTokenizerBase, columns: Columns, max_length: int
) -> Mapping[str, Any]:
    """Inputs of the model for texts or pairs of texts."""
    pairs = None if columns.text_pair is None else batch[columns.text_pair]
    return tokenizer(batch[columns.text], pairs, truncation=True, max_length=max_length)


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


def is_label(feature: Any) -> bool:
    return isinstance(feature, ClassLabel | Value)


def _is_list_of_labels(feature: Any) -> bool:
    return is_label(getattr(feature, "feature", None))


def numbers_of(rows: Dataset, column: str, part: str, task: str) -> np.ndarray:
    """[rows, numbers] float64, of one number or a list of them per row; :class:`UserError` for one that is not
    finite."""
    advice = ", or use task: classification" if task == "regression" else ""
    numbers: list[list[float]] = []
    for row, value in enumerate(rows[column][:]):
        try:
            of_row = [float(one) for one in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError):
            of_row = [math.nan]
        where = f"label_column={column!r} of the {PART_NAMES[part]} data holds {value!r} (row {row} of those used)"
        if not all(map(math.isfinite, of_row)):
            raise UserError(f"{where}, but task: {task} needs finite numbers. Correct the data{advice}.")
        if numbers and len(of_row) != len(numbers[0]):
            raise UserError(f"{where}, but other rows {len(numbers[0])} numbers. Give as many in each row.")
        numbers.append(of_row)
    return np.array(numbers)


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of logits [rows, labels] and one label id per row."""
    return classification_scores(first_output(prediction.predictions), np.asarray(prediction.label_ids))


def _regression_metrics(prediction: EvalPrediction, names: Sequence[str] = ()) -> dict[str, float]:
    return regression_scores(first_output(prediction.predictions), np.asarray(prediction.label_ids), names)


def _multi_label_metrics(prediction: EvalPrediction) -> dict[str, float]:
    return multi_label_scores(first_output(prediction.predictions), np.asarray(prediction.label_ids))


def _multi_label_sums(prediction: EvalPrediction) -> SummedScores:
    return multi_label_sums(first_output(prediction.predictions), np.asarray(prediction.label_ids))


_METRICS = {SINGLE_LABEL: classification_metrics, MULTI_LABEL: _multi_label_metrics, REGRESSION: _regression_metrics}
