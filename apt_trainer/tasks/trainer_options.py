"""What a task asks of a ``transformers.Trainer`` and of its arguments. Not for what is in the data."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models.class_weights import check_smoothing
from apt_trainer.settings.config import APTConfig
from apt_trainer.tasks.base import TaskData

_OF_EVERY_EVALUATION = ("runtime", "samples_per_second", "steps_per_second", "epoch", "task_loss", "distillation_loss")


def set_task_arguments(args: APTConfig, data: TaskData, given: Container[str]) -> None:
    """Set what the task decides of the training arguments; of the rest, what the recipe leaves open.

    Raises :class:`UserError` for a sampling that the metrics of the task cannot follow, for two losses at once, and
    for names that its batches or evaluations do not have.
    """
    if data.keeps_order and args.train_sampling_strategy == "group_by_length":
        raise UserError(
            "train_sampling_strategy: group_by_length also reorders evaluation data, whose order the metrics of this "
            "task need. Set train_sampling_strategy: random."
        )
    check_smoothing(args.label_smoothing_factor, data.model_kwargs.get("problem_type"), data.class_weights is not None)
    _check_names(args, data)
    args.predict_with_generate = data.generation_length is not None
    if args.predict_with_generate and args.generation_max_length is None:
        args.generation_max_length = data.generation_length
    if args.early_stopping_patience is not None and "metric_for_best_model" not in given:
        args.metric_for_best_model, args.greater_is_better = data.metric_name, data.greater_is_better
    is_watched = args.metric_for_best_model in (data.metric_name, f"eval_{data.metric_name}")
    if is_watched and "greater_is_better" not in given:
        args.greater_is_better = data.greater_is_better


def _check_names(args: APTConfig, data: TaskData) -> None:
    """Without this they are missed at the first evaluation, or its metrics are."""
    columns = data.train.column_names
    absent = [name for name in args.label_names or () if name not in columns]
    if absent:
        raise UserError(
            f"label_names={args.label_names}, but a batch of this task holds {', '.join(columns)}. Remove it: "
            "label_names is for the arguments of a model; the column of the data is label_column."
        )
    watched = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = ("loss", *data.score_names)
    if not any(watched == name or watched.startswith(f"{name}_") for name in (*known, *_OF_EVERY_EVALUATION)):
        raise unknown_choice("metric_for_best_model", watched, known)


def data_options(data: TaskData, part: str) -> dict[str, Any]:
    """What a Trainer is told of the data when it evaluates on ``part``, "validation" or "test".

    ``class_weights`` and ``embedding_loss``, for the Trainers of this package, are there where the task has some.
    """
    given: dict[str, Any] = {} if data.class_weights is None else {"class_weights": data.class_weights}
    if data.embedding_loss is not None:
        given["embedding_loss"] = data.embedding_loss
    return given | {
        "data_collator": data.collator,
        "compute_metrics": data.metrics[part],
        "preprocess_logits_for_metrics": data.preprocess_logits,
    }
