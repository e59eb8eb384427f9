"""From :class:`~apt_trainer.settings.DataSettings` to the data, collator, labels and metrics of one training run.

Not for models or training. A task is one row of ``TASK_KINDS``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedTokenizerBase

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models.labels import IMAGE_HEAD, SEQUENCE_HEAD, TOKEN_HEAD
from apt_trainer.settings import DataSettings, check_choices
from apt_trainer.tasks import (
    classification,
    embedding,
    images,
    instruction_tuning,
    language_modeling,
    masked_language_modeling,
    question_answering,
    sequence_to_sequence,
    tokens,
)
from apt_trainer.tasks.architecture import DECODER, ENCODER, ENCODER_DECODER, IMAGE, architecture_of
from apt_trainer.tasks.base import FirstRows, TaskData
from apt_trainer.tasks.empty_texts import only_with_text
from apt_trainer.tasks.generation_scores import ROUGE
from apt_trainer.tasks.labels import KnownLabels, lacks_label, lacks_labels, lacks_tags, one_column, only_labelled
from apt_trainer.tasks.loading import read_parts, split_parts
from apt_trainer.tasks.nested import with_fields
from apt_trainer.tasks.packing import keeps_sequences_apart
from apt_trainer.tasks.prompts import Template

__all__ = ["IMAGE", "TASK_KINDS", "TaskData", "TaskKind", "architecture_of", "keeps_sequences_apart", "load_task"]

logger = logging.getLogger(__name__)

_ANY = (ENCODER, DECODER, ENCODER_DECODER)


@dataclass(frozen=True)
class TaskKind:
    """What tells one task from another.

    The first of ``metrics`` is the default. ``architectures``: the kinds of model that can learn it. ``settings``: the
    keys of DataSettings that no task without them in its list may set. ``head``: the ending of the classes of models
    whose labels are those of the data. ``lacks``: which rows ``drop_unlabeled`` leaves out. ``further``: scores beside
    ``metrics`` that an evaluation tells.
    """

    metrics: tuple[str, ...]
    find_columns: Callable[[dict[str, Dataset], DataSettings], Any]
    build: Callable[..., TaskData]
    stratified: bool = False
    architectures: tuple[str, ...] = _ANY
    settings: tuple[str, ...] = ()
    head: str | None = None
    lacks: Callable[[Any, bool], bool] | None = None
    further: tuple[str, ...] = ()


_OF_LABELS = ("class_weights", "drop_unlabeled", "label_separator", "label_columns")
_OF_TEXT = ("text_column", "text_pair_column", "max_length", "doc_stride")
_OF_ONE_TASK = ("negative_column", "image_column", "mask_probability")
_OF_PROMPTS = (
    "prompt_column",
    "input_column",
    "completion_column",
    "messages_column",
    "template",
    "template_without_input",
    "use_chat_template",
    "completion_only_loss",
    "packing",
)
_OF_TARGETS = ("target_column", "source_prefix", "max_target_length")
_PER_TOKEN = ("perplexity", "token_accuracy")

TASK_KINDS = {
    "classification": TaskKind(
        ("accuracy", "f1", "f1_macro", "matthews"),
        classification.find_columns,
        classification.build_classification,
        stratified=True,
        settings=("class_weights", "drop_unlabeled"),
        head=SEQUENCE_HEAD,
        lacks=lacks_label,
    ),
    "multi_label_classification": TaskKind(
        ("f1_micro", "f1_macro", "subset_accuracy"),
        classification.find_list_columns,
        classification.build_multi_label,
        settings=_OF_LABELS,
        head=SEQUENCE_HEAD,
        lacks=lacks_labels,
    ),
    "regression": TaskKind(
        ("pearson", "spearman"),
        classification.find_number_columns,
        classification.build_regression,
        settings=("drop_unlabeled", "label_columns"),
        head=SEQUENCE_HEAD,
        lacks=lacks_label,
        further=("mse",),
    ),
    "embedding": TaskKind(
        (*embedding.SCORED, *embedding.UNSCORED),
        embedding.find_columns,
        embedding.build,
        architectures=(ENCODER,),
        settings=("negative_column",),
    ),
    "image_classification": TaskKind(
        ("accuracy", "f1", "f1_macro", "matthews"),
        images.find_columns,
        images.build,
        stratified=True,
        architectures=(IMAGE,),
        settings=("class_weights", "drop_unlabeled", "image_column"),
        head=IMAGE_HEAD,
        lacks=lacks_label,
    ),
    "token_classification": TaskKind(
        ("f1", "accuracy"),
        tokens.find_columns,
        tokens.build,
        settings=("class_weights", "drop_unlabeled"),
        head=TOKEN_HEAD,
        lacks=lacks_tags,
        further=("f1_macro", "f1_micro", "precision", "recall"),
    ),
    "question_answering": TaskKind(("f1", "exact_match"), question_answering.find_columns, question_answering.build),
    "language_modeling": TaskKind(
        _PER_TOKEN, language_modeling.find_columns, language_modeling.build, architectures=(DECODER,)
    ),
    "masked_language_modeling": TaskKind(
        _PER_TOKEN,
        language_modeling.find_columns,
        masked_language_modeling.build,
        architectures=(ENCODER,),
        settings=("mask_probability",),
    ),
    "instruction_tuning": TaskKind(
        _PER_TOKEN,
        instruction_tuning.find_columns,
        instruction_tuning.build,
        architectures=(DECODER,),
        settings=_OF_PROMPTS,
    ),
    "summarization": TaskKind(
        ("rougeL", *(name for name in ROUGE if name != "rougeL"), "perplexity"),
        sequence_to_sequence.find_columns,
        sequence_to_sequence.build_summarization,
        architectures=(ENCODER_DECODER,),
        settings=_OF_TARGETS,
        further=("token_accuracy",),
    ),
    "translation": TaskKind(
        ("bleu", "chrf", "perplexity"),
        sequence_to_sequence.find_columns,
        sequence_to_sequence.build_translation,
        architectures=(ENCODER_DECODER,),
        settings=_OF_TARGETS,
        further=("token_accuracy",),
    ),
}


def load_task(
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor,
    seed: int,
    *,
    split_seed: int | None = None,
    max_positions: int | None = None,
    architecture: str | None = None,
    config: Any = None,
    trained: bool = True,
    rows: Mapping[str, Dataset] | None = None,
) -> TaskData:
    """Read, split and encode the data of one run; the same arguments give the same rows in the same order.

    ``tokenizer`` is the image processor of a model of images. ``seed`` picks the rows that max_train_samples keeps;
    ``split_seed`` (default: ``seed``) picks the rows held out of the training data; ``max_positions`` is the longest
    input of the model in tokens; ``architecture`` is that of :func:`architecture_of` (not given: any that fits the
    task). ``config``: of the model, whose label ids are used where it has the labels of the data; if it is not going
    to be ``trained``, it has to have them. ``rows``: of parts ("train", "validation", "test") that are not to be read.
    A tokenizer without padding token gets its end-of-text token for a decoder. Raises :class:`UserError`.
    """
    check_choices(data)
    kind = TASK_KINDS[data.task]
    metric = data.metric or kind.metrics[0]
    if metric not in kind.metrics:
        raise unknown_choice("metric", metric, kind.metrics)
    architecture = architecture or kind.architectures[0]
    _check_architecture(data.task, kind, architecture)
    _check_settings(data, kind)
    _check_numbers(data)
    if architecture != IMAGE:
        _give_padding(tokenizer, architecture)
        _check_lengths(data, kind, tokenizer, max_positions)
    named = _named_columns(data)
    parts = {part: with_fields(rows, named) for part, rows in read_parts(data, rows or {}).items()}
    parts = only_with_text(parts, data) if data.drop_empty_texts else parts
    parts, data = one_column(parts, data)
    if kind.lacks is not None:
        column, drop, lacks = data.label_column, data.drop_unlabeled, kind.lacks
        parts = {part: only_labelled(rows, column, part, drop, lacks) for part, rows in parts.items()}
    columns = kind.find_columns(parts, data)
    splits = split_parts(
        parts, data, seed, seed if split_seed is None else split_seed, columns.label if kind.stratified else None
    )
    labelled = {} if kind.head is None else {"known": KnownLabels.of(config, kind.head, final=not trained)}
    task = kind.build(splits, columns, data, tokenizer, metric, **labelled)
    return _finished(task, kind, tokenizer, architecture)


def _named_columns(data: DataSettings) -> list[str]:
    """Columns that the settings name, alone or within a template."""
    named = [getattr(data, field.name) for field in dataclasses.fields(data) if field.name.endswith("_column")]
    named += data.label_columns or ()
    for setting in ("template", "template_without_input"):
        template = getattr(data, setting)
        named += () if template is None else Template.parse(template, setting).columns
    return [name for name in named if name is not None]


def _finished(task: TaskData, kind: TaskKind, tokenizer: PreTrainedTokenizerBase, architecture: str) -> TaskData:
    changes: dict[str, Any] = {"metrics": _for_parts(task, task.metrics), "sums": _for_parts(task, task.sums)}
    changes["score_names"] = (*kind.metrics, *kind.further)
    if architecture == DECODER and task.model_class == "AutoModelForSequenceClassification":
        # the model reads the last token that is no padding
        changes["model_kwargs"] = task.model_kwargs | {"pad_token_id": tokenizer.pad_token_id}
    return dataclasses.replace(task, **changes)


def _for_parts(task: TaskData, functions: Mapping[str, Callable[[EvalPrediction], Any]]) -> dict[str, Any]:
    """One of ``functions`` for each part, which sees the rows of its part only."""
    if not functions:
        return {}
    validation = FirstRows(functions["validation"], len(task.validation))
    test = validation if task.test is task.validation else FirstRows(functions["test"], len(task.test))
    return {"validation": validation, "test": test}


def _check_architecture(task: str, kind: TaskKind, architecture: str) -> None:
    if architecture in kind.architectures:
        return
    fitting = ", ".join(name for name, other in TASK_KINDS.items() if architecture in other.architectures)
    advice = f"Use another model, or a task that fits this one: {fitting}"
    if architecture == DECODER:
        advice = "Use task: instruction_tuning with prompts and completions, or another model"
    raise UserError(
        f"task={task!r} needs a model that is a {' or '.join(kind.architectures)}, but this one is of the kind "
        f"{architecture}. {advice}."
    )


def _check_settings(data: DataSettings, kind: TaskKind) -> None:
    defaults = DataSettings()
    of_text = _OF_TEXT if kind.architectures == (IMAGE,) else ()
    for name in (*of_text, *_OF_PROMPTS, *_OF_TARGETS, *_OF_LABELS, *_OF_ONE_TASK):
        if name not in kind.settings and getattr(data, name) != getattr(defaults, name):
            raise UserError(f"{name}={getattr(data, name)!r} has no meaning for task: {data.task}. Remove it.")


def _check_numbers(data: DataSettings) -> None:
    for name in ("max_train_samples", "max_validation_samples", "max_test_samples"):
        value = getattr(data, name)
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1; leave it out to use all rows.")
    for name in ("validation_fraction", "test_fraction"):
        value = getattr(data, name)
        if not 0 <= value < 1:
            raise UserError(f"{name}={value} must lie between 0 and 1 (0.1 holds out 10 % of the training data).")
    for name in ("max_length", "max_target_length"):
        if getattr(data, name) < 1:
            raise UserError(f"{name}={getattr(data, name)} must be at least 1 token.")
    if data.doc_stride < 0:
        raise UserError(f"doc_stride={data.doc_stride} must not be negative.")


def _give_padding(tokenizer: PreTrainedTokenizerBase, architecture: str) -> None:
    if tokenizer.pad_token is not None:
        return
    if architecture != DECODER or tokenizer.eos_token is None:
        raise UserError(
            "The tokenizer has no padding token, so texts of different length cannot share a batch. "
            "Set tokenizer.pad_token, for example to tokenizer.eos_token."
        )
    tokenizer.pad_token = tokenizer.eos_token
    logger.info("The tokenizer has no padding token; its end-of-text token %r is used.", tokenizer.eos_token)


def _check_lengths(
    data: DataSettings, kind: TaskKind, tokenizer: PreTrainedTokenizerBase, max_positions: int | None
) -> None:
    for name in ("max_length", *(name for name in ("max_target_length",) if name in kind.settings)):
        value = getattr(data, name)
        if max_positions is not None and value > max_positions:
            raise UserError(
                f"{name}={value} is more than the {max_positions} tokens that the model can take. "
                f"Set {name} to {max_positions} or less."
            )
    special = tokenizer.num_special_tokens_to_add(pair=data.text_pair_column is not None)
    if data.max_length <= special:
        raise UserError(f"max_length={data.max_length} must exceed the {special} special tokens of every input.")
    if kind.metrics == _PER_TOKEN and data.max_length < 2:
        raise UserError(f"max_length={data.max_length} must be at least 2: the first token is not predicted.")
