"""Extractive question answering in the SQuAD format: the answer is a span of the context, or there is none.

Not for generated answers. A long context is cut into overlapping pieces, *features*; the answer to a question is the
best span over all of its features. Source of the format and of the null score: SQuAD 2.0 (arXiv 1806.03822).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    PART_NAMES,
    Columns,
    Splits,
    TaskData,
    check_column,
    check_filled,
    encode,
    fingerprint,
    is_text,
    pad_multiple,
    parts_of,
    require_column,
    require_fast,
    right_padding,
)
from apt_trainer.tasks.metrics import squad_scores
from apt_trainer.tasks.summed_scores import answer_sums

logger = logging.getLogger(__name__)

MAX_ANSWER_TOKENS = 30
# Columns beside the model's inputs: question number, characters of each token (-1 outside the context), null position.
SPAN_COLUMNS = ["question", "span_start", "span_end", "null_position"]
_Answers = Callable[[EvalPrediction], tuple[list[str], list[list[str]]]]


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> Columns:
    """Check the columns of every part; by default question, context and answers."""
    text, context = data.text_column or "question", data.text_pair_column or "context"
    label = data.label_column
    if label == DataSettings.label_column and label not in parts["train"].column_names:
        label = "answers"
    for part, rows in parts.items():
        check_column(rows, text, "text_column", part, is_text, "the question as text")
        check_column(rows, context, "text_pair_column", part, is_text, "the context as text")
        require_column(rows, label, "label_column", part)
        check_filled(rows, label, "label_column", part)
        _check_answers(rows, context, label, part)
    return Columns(text, context, label)


def build(
    splits: Splits, columns: Columns, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Questions may stay unanswered where the training data has questions without an answer (SQuAD 2.0)."""
    require_fast(tokenizer, "question_answering")
    answerable = [bool(answers["text"]) for answers in splits.all_train[columns.label][:]]
    if not any(answerable):
        raise UserError(f"label_column={columns.label!r}: no question of the training data has an answer.")
    if splits.test is not None and not any(answers["text"] for answers in splits.test[columns.label][:]):
        raise UserError(
            f"label_column={columns.label!r}: no question of the test data has an answer, so they seem to be hidden. "
            "Use labelled data, or leave out the test data."
        )
    encoded = {part: features_of(rows, columns, data, tokenizer) for part, rows in splits.parts.items()}
    answers = {
        part: partial(
            _answers,
            features=encoded[part].select_columns(SPAN_COLUMNS),
            rows=rows.select_columns(columns.names),
            columns=columns,
            null_allowed=not all(answerable),
        )
        for part, rows in splits.parts.items()
        if part != "train"
    }
    answers.setdefault("test", answers["validation"])
    inputs = {part: features.remove_columns(SPAN_COLUMNS) for part, features in encoded.items()}
    padder = right_padding(tokenizer)  # positions of answers are counted from the left
    return TaskData(
        **parts_of(inputs),
        collator=DataCollatorWithPadding(padder, pad_to_multiple_of=pad_multiple(data)),
        model_class="AutoModelForQuestionAnswering",
        metric_name=metric,
        metrics={part: partial(_scores, answers=of_part, scores=squad_scores) for part, of_part in answers.items()},
        fingerprint=fingerprint(splits.train, columns),
        keeps_order=True,
        sums={part: partial(_scores, answers=of_part, scores=answer_sums) for part, of_part in answers.items()},
    )


def best_answers(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    features: Iterable[Mapping[str, Any]],
    contexts: Sequence[str],
    *,
    null_allowed: bool,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> list[str]:
    """The best span of each context, by the sum of its start and end logit over all spans of the context.

    Logits are [features, tokens]; every feature has the SPAN_COLUMNS. With ``null_allowed`` the answer is "" where
    the least null score over the features of a question exceeds its best span.
    """
    best = np.full(len(contexts), -np.inf)
    null = np.full(len(contexts), np.inf)
    answers = [""] * len(contexts)
    for start, end, feature in zip(start_logits, end_logits, features, strict=True):
        question, position = int(feature["question"]), int(feature["null_position"])
        null[question] = min(null[question], float(start[position]) + float(end[position]))
        score, first, last = _best_span(start, end, np.asarray(feature["span_start"]) >= 0, max_answer_tokens)
        if score > best[question]:
            best[question] = score
            answers[question] = contexts[question][feature["span_start"][first] : feature["span_end"][last]]
    return ["" if null_allowed and null[i] > best[i] else answer for i, answer in enumerate(answers)]


def _best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray, longest: int) -> tuple[float, int, int]:
    """Score, first and last token of the best span of allowed tokens; a score of -inf where none is allowed."""
    length = len(allowed)  # the logits may be padded beyond it
    start = np.where(allowed, start[:length].astype(np.float64), -np.inf)
    end = np.where(allowed, end[:length].astype(np.float64), -np.inf)
    best = (-np.inf, 0, 0)
    for extra in range(min(longest, length)):
        scores = start[: length - extra] + end[extra:]
        first = int(np.argmax(scores))
        if scores[first] > best[0]:
            best = (float(scores[first]), first, first + extra)
    return best


def _scores(prediction: EvalPrediction, answers: _Answers, scores: Callable[..., Any]) -> Any:
    return scores(*answers(prediction))


def _answers(
    prediction: EvalPrediction, features: Dataset, rows: Dataset, columns: Columns, null_allowed: bool
) -> tuple[list[str], list[list[str]]]:
    """The predicted answer to each question, and the gold ones."""
    outputs: Any = prediction.predictions
    start, end = outputs[0], outputs[1]
    if len(start) != len(features):
        raise UserError(
            f"Answers are scored on the data that they are known of, of {len(features)} rows, and {len(start)} were "
            "predicted. Evaluate on eval_dataset."
        )
    answers = best_answers(
        np.asarray(start),
        np.asarray(end),
        features.with_format("numpy"),
        rows[columns.text_pair][:],
        null_allowed=null_allowed,
    )
    return answers, [gold["text"] for gold in rows[columns.label][:]]


# ------------------------------------------------------------------------------------------------ features


def features_of(rows: Dataset, columns: Columns, data: DataSettings, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Features of questions, with SPAN_COLUMNS; rows without a column of answers have none in the text."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    longest_question = data.max_length - special - data.doc_stride - 1  # a piece must be longer than the overlap
    if longest_question < 1:
        raise UserError(
            f"max_length={data.max_length} leaves no room for a question beside doc_stride={data.doc_stride} and "
            f"{special} special tokens. Raise max_length or lower doc_stride."
        )
    return encode(
        rows,
        _features,
        with_indices=True,
        tokenizer=tokenizer,
        columns=columns,
        max_length=data.max_length,
        stride=data.doc_stride,
        longest_question=longest_question,
    )


def _features(
    batch: dict[str, list[Any]],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    columns: Columns,
    max_length: int,
    stride: int,
    longest_question: int,
) -> dict[str, Any]:
    """Inputs, positions of the first gold answer (the null position where the feature lacks it) and SPAN_COLUMNS."""
    assert columns.text_pair is not None
    encoded = tokenizer(
        _cut(batch[columns.text], tokenizer, longest_question),
        batch[columns.text_pair],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    added: dict[str, list[Any]] = {name: [] for name in ["start_positions", "end_positions", *SPAN_COLUMNS]}
    for feature, owner in enumerate(owners):
        in_context = np.array([sequence == 1 for sequence in encoded.sequence_ids(feature)])
        characters = np.where(in_context[:, None], np.array(offsets[feature]), -1)
        ids = encoded["input_ids"][feature]
        null = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        answers = batch[columns.label][owner] if columns.label in batch else {"text": []}
        positions = (null, null)
        if answers["text"]:
            first_character = answers["answer_start"][0]
            positions = _find(characters, first_character, first_character + len(answers["text"][0]), null)
        values = (*positions, indices[owner], characters[:, 0].tolist(), characters[:, 1].tolist(), null)
        for name, value in zip(added, values, strict=True):
            added[name].append(value)
    return {**encoded, **added}


def _cut(questions: list[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """Questions without what is past their first ``longest`` tokens, so that every piece has room for context."""
    encoded = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=longest, return_offsets_mapping=True
    )
    ends = [offsets[-1][1] if offsets else 0 for offsets in encoded["offset_mapping"]]
    return [question[:end] for question, end in zip(questions, ends, strict=True)]


def _find(characters: np.ndarray, first: int, after: int, null: int) -> tuple[int, int]:
    """First and last token of the answer in characters [first, after), or the null position twice.

    ``characters`` [tokens, 2] has where each token of the context starts and ends, -1 elsewhere.
    """
    inside = np.flatnonzero(characters[:, 0] >= 0)
    if len(inside) == 0 or characters[inside[0], 0] > first or characters[inside[-1], 1] < after:
        return null, null
    start = int(np.searchsorted(characters[inside, 0], first, side="right")) - 1
    end = int(np.searchsorted(characters[inside, 1], after, side="left"))
    return int(inside[start]), int(inside[end])


# ------------------------------------------------------------------------------------------------ answers


def _check_answers(rows: Dataset, context: str, label: str, part: str) -> None:
    """Raise :class:`UserError` where the format is not that of SQuAD or no answer is where it is said to be."""
    total, misplaced = 0, 0
    for row, (text, answers) in enumerate(_pairs(rows, context, label)):
        if not _well_formed(answers):
            raise UserError(
                f"label_column={label!r} of the {PART_NAMES[part]} data holds {answers!r:.80} in row {row} (counted "
                'from 0). Each row must be {"text": [...], "answer_start": [...]}, with empty lists for no answer.'
            )
        for answer, start in zip(answers["text"], answers["answer_start"], strict=True):
            total += 1
            misplaced += text[start : start + len(answer)] != answer
    if total and misplaced == total:
        raise UserError(
            f"label_column={label!r} of the {PART_NAMES[part]} data: none of {total} answers is found at its "
            f"answer_start in {context!r}. answer_start counts characters from 0."
        )
    if misplaced:
        logger.warning("%d of %d answers of the %s data are not at their answer_start.", misplaced, total, part)


def _pairs(rows: Dataset, context: str, label: str) -> Iterator[tuple[str, Any]]:
    for batch in rows.select_columns([context, label]).iter(batch_size=1000):
        yield from zip(batch[context], batch[label], strict=True)


def _well_formed(answers: Any) -> bool:
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        return False
    text, start = answers["text"], answers["answer_start"]
    return isinstance(text, list) and isinstance(start, list) and len(text) == len(start)
