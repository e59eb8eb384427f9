"""Rows as people have them (texts and labels, messages, templates) for a Trainer in Python, as recipes take them.

The same :func:`~apt_trainer.tasks.load_task` that reads the data of a recipe. Not for reading files.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.settings.config import APTConfig
from apt_trainer.settings.packages import check_packages
from apt_trainer.tasks import TaskData, architecture_of, keeps_sequences_apart, load_task
from apt_trainer.tasks.base import FirstRows
from apt_trainer.tasks.trainer_options import data_options, set_task_arguments


def prepared(data: DataSettings, model: PreTrainedModel, args: APTConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Trainer with ``data`` applied to the data sets among them, and what the task adds.

    Args:
        data: What the rows hold. Files that it names are read; ``train_dataset`` and ``eval_dataset`` stand before
            them. Where there is nothing to evaluate on, ``validation_fraction`` of the training rows is held out.
        model: With the head of the task. Its labels get the names that the data give them, if they have none.
        args: Those of the run, which are copied.
        given: ``train_dataset``, ``eval_dataset``, ``processing_class`` and whatever else was given.

    Raises:
        UserError: no tokenizer was given, the rows do not fit the task, or the model does not.
    """
    tokenizer = given.get("processing_class")
    if tokenizer is None:
        raise UserError("data says how texts become tokens, which takes a tokenizer. Give processing_class too.")
    if data.task == "embedding":
        raise UserError(
            "task: embedding takes several texts a row, which this Trainer does not. Use "
            "APTSentenceTransformerTrainer, or a recipe."
        )
    check_packages(vars(data))
    names = {"train": "train_dataset", "validation": "eval_dataset"}
    rows = {part: given[name] for part, name in names.items() if given.get(name) is not None}
    for part, of_part in rows.items():
        if not isinstance(of_part, Dataset):
            raise UserError(
                f"{names[part]} is {type(of_part).__name__}. With data it has to be a datasets.Dataset, for example "
                "Dataset.from_list(rows)."
            )
    positions = getattr(model.config, "max_position_embeddings", None)
    task = load_task(
        data,
        tokenizer,
        args.seed if args.data_seed is None else args.data_seed,
        max_positions=positions,
        architecture=architecture_of(model.config),
        config=model.config,
        rows=rows,
    )
    _fit(model, task)
    args = copy.copy(args)
    set_task_arguments(args, task, _watch_given(args))
    found = {"args": args, "train_dataset": task.train, "eval_dataset": task.validation}
    options = data_options(task, "validation")
    if isinstance(
        options["compute_metrics"], FirstRows
    ):  # may be asked about other rows too, each of which counts once
        options["compute_metrics"] = options["compute_metrics"].function
    return {**options, **{name: value for name, value in given.items() if value is not None}, **found}


def _watch_given(args: APTConfig) -> set[str]:
    """What was said about the best model, when ``args`` were made or afterwards; "loss" may have been filled in."""
    later = () if args.metric_for_best_model in (None, "loss") else ("metric_for_best_model",)
    return {*args.watch_given, *later}


def _fit(model: PreTrainedModel, task: TaskData) -> None:
    """Give ``model`` the names of the labels; raises :class:`UserError` where it is not made for the task."""
    head = task.model_class.removeprefix("AutoModel")
    wanted = task.model_kwargs.get("num_labels")
    if wanted is not None and model.config.num_labels != wanted:
        raise UserError(
            f"The model has {model.config.num_labels} outputs, and the data need {wanted}. Load it with the head of "
            f"the task: {task.model_class}.from_pretrained(name, num_labels={wanted})."
        )
    named = type(model).__name__
    if head in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering") and head not in named:
        raise UserError(f"The model is a {named}, and the task needs one of {task.model_class}.")
    if task.packed and not keeps_sequences_apart(model):
        raise UserError(f"packing: true, but in {named} packed sequences would see each other. Set packing=False.")
    for name, value in task.model_kwargs.items():
        setattr(model.config, name, value)
