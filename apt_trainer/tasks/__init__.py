"""From :class:`~apt_trainer.settings.DataSettings` to the data, collator, labels and metrics of one training run.

Not for models or training. A task is one row of ``TASK_KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.settings import DataSettings, check_choices
from apt_trainer.tasks import classification, question_answering, tokens
from apt_trainer.tasks.base import Columns, TaskData
from apt_trainer.tasks.loading import read_parts, split_parts

__all__ = ["TASK_KINDS", "TaskData", "TaskKind", "load_task"]


@dataclass(frozen=True)
class TaskKind:
    """What tells one task from another; the first of ``metrics`` is the default."""

    metrics: tuple[str, ...]
    find_columns: Callable[[dict[str, Dataset], DataSettings], Columns]
    build: Callable[..., TaskData]
    stratified: bool = False


TASK_KINDS = {
    "classification": TaskKind(
        ("accuracy", "f1", "matthews"), classification.find_columns, classification.build_classification, True
    ),
    "regression": TaskKind(("pearson", "spearman"), classification.find_columns, classification.build_regression),
    "token_classification": TaskKind(("f1", "accuracy"), tokens.find_columns, tokens.build),
    "question_answering": TaskKind(("f1", "exact_match"), question_answering.find_columns, question_answering.build),
}


def load_task(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    split_seed: int | None = None,
    max_positions: int | None = None,
) -> TaskData:
    """Read, split and tokenise the data of one run; the same arguments give the same rows in the same order.

    ``seed`` picks the rows that max_train_samples keeps; ``split_seed`` (default: ``seed``) picks the rows held out of
    the training data; ``max_positions`` is the longest input of the model in tokens. Raises :class:`UserError`.
    """
    check_choices(data)
    kind = TASK_KINDS[data.task]
    metric = data.metric or kind.metrics[0]
    if metric not in kind.metrics:
        raise unknown_choice("metric", metric, kind.metrics)
    _check_numbers(data)
    _check_lengths(data, tokenizer, max_positions)
    parts = read_parts(data)
    columns = kind.find_columns(parts, data)
    splits = split_parts(
        parts, data, seed, seed if split_seed is None else split_seed, columns.label if kind.stratified else None
    )
    return kind.build(splits, columns, data, tokenizer, metric)


def _check_numbers(data: DataSettings) -> None:
    for name in ("max_train_samples", "max_validation_samples", "max_test_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1; leave it out to use all rows.")
    for name in ("validation_fraction", "test_fraction"):
        value = getattr(data, name)
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} must lie between 0 and 1 (0.1 holds out 10 % of the training data).")
    if data.doc_stride < 0:
        raise UserError(f"doc_stride={data.doc_stride} must not be negative.")


def _check_lengths(data: DataSettings, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> None:
    if max_positions is not None and data.max_length > max_positions:
        raise UserError(
            f"max_length={data.max_length} is more than the {max_positions} tokens that the model can take. "
            f"Set max_length to {max_positions} or less."
        )
    special = tokenizer.num_special_tokens_to_add(pair=data.text_pair_column is not None)
    if data.max_length <= special:
        raise UserError(f"max_length={data.max_length} must exceed the {special} special tokens of every input.")
    if tokenizer.pad_token is None:
        raise UserError(
            "The tokenizer has no padding token, so texts of different length cannot share a batch. "
            "Set tokenizer.pad_token, for example to tokenizer.eos_token."
        )
