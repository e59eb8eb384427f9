"""Labels of a classifier, as its config names and numbers them, and what its logits mean. Not for reading data."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from apt_trainer.errors import UserError

logger = logging.getLogger(__name__)

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
"""The values of ``problem_type`` in transformers."""

SEQUENCE_HEAD, TOKEN_HEAD = "ForSequenceClassification", "ForTokenClassification"
IMAGE_HEAD = "ForImageClassification"
LABEL_HEADS = (SEQUENCE_HEAD, TOKEN_HEAD, IMAGE_HEAD)
"""Endings of the classes whose logits are one number per label."""

HEADS = (*LABEL_HEADS, "ForQuestionAnswering")
"""Endings of the classes that do not predict words."""

TRUTH = ("False", "True")


def head_of(model: Any) -> str | None:
    """The one of ``HEADS`` that ``model`` has, also in a subclass of another name; None: another kind of head."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((head for head in HEADS if any(name.endswith(head) for name in names)), None)


def problem_type(config: Any, labels: torch.Tensor | None = None) -> str:
    """The ``problem_type`` of ``config``, or the one that transformers' loss infers from ``labels``."""
    found = getattr(config, "problem_type", None)
    if found is not None:
        return str(found)
    if config.num_labels == 1:
        return REGRESSION
    return MULTI_LABEL if labels is not None and labels.is_floating_point() else SINGLE_LABEL


def names_of(config: Any) -> tuple[str, ...]:
    """Names of the labels in the order of their ids: of ``id2label``, or of ``label2id`` where that alone has names.

    Raises:
        UserError: two labels have one name, or the two tables disagree, so that nothing can be matched by name.
    """
    names = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"id2label of the model gives the name {twice[0]!r} to several labels: {shown(names)}. "
            "Correct id2label and label2id in its config."
        )
    others = {int(number): str(name) for name, number in (config.label2id or {}).items()}
    reverse = tuple(others[number] for number in sorted(others))
    if set(others) == set(range(len(names))) and not are_numbers(reverse) and reverse != names:
        if not are_numbers(names):
            raise UserError(
                f"id2label of the model ({shown(names)}) and its label2id ({shown(reverse)}) disagree. Correct one of "
                "them in its config."
            )
        names = reverse
    return names


def has_head(config: Any, ending: str) -> bool:
    """Whether ``config`` was saved with a model whose class has this ``ending``."""
    names = [*(getattr(config, "architectures", None) or []), getattr(config, "apt_base_architecture", None) or ""]
    return any(name.endswith(ending) for name in names)


def as_text(value: Any) -> str:
    """One label without white space round it, the same for 1, 1.0 and "1"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def hot(ids: Iterable[int], number: int) -> list[float]:
    """1 at ``ids``, 0 elsewhere: the labels of one row that may have any of ``number``."""
    present = set(ids)
    return [float(i in present) for i in range(number)]


def hot_width(rows: Iterable[Sequence[Any]]) -> int | None:
    """How many labels there are where each of ``rows`` says 0 or 1 for every label in turn; None: they hold labels.

    The latter too for rows of different lengths, or of one value.
    """
    lengths = set()
    for row in rows:
        if not all(isinstance(value, bool) or as_text(value) in ("0", "1") for value in row):
            return None
        lengths.add(len(row))
    width = lengths.pop() if len(lengths) == 1 else 0
    return width if width > 1 else None


def of_hot(row: Iterable[Any]) -> list[int]:
    """The inverse of :func:`hot`, of values as :func:`hot_width` takes them."""
    return [i for i, value in enumerate(row) if value is True or as_text(value) == "1"]


def are_numbers(names: Sequence[str]) -> bool:
    """Whether ``names`` say nothing but the ids: LABEL_0, LABEL_1, … as transformers makes them, or 0, 1, …"""
    return all(name in (f"LABEL_{i}", str(i)) for i, name in enumerate(names))


def match_labels(
    labels: Iterable[str], names: Sequence[str], ordered: Sequence[str], subset_by_number: bool = True
) -> dict[str, int] | None:
    """The id of each of ``labels`` in a model with ``names``; None where they are not its labels.

    By name, with or without regard to case; else by number, where the labels are whole numbers (or true and false for
    two labels); else in their order, where only the data name them.

    Args:
        labels: Those that occur in the data.
        names: Of the model, in the order of ids.
        ordered: All labels that the data know, in their order there.
        subset_by_number: Whether labels that are numbers may be some of the ids; False: they have to be all of them.
    """
    labels = list(labels)
    named = _by_name(labels, names)
    if named is not None:
        return named
    if all(re.fullmatch("-?[0-9]+", name) for name in names) and not are_numbers(names):
        return None  # numbers are names here, and other ones than these
    numbers = _numbers(labels, len(names))
    if numbers is not None:
        return numbers if subset_by_number or len(set(numbers.values())) == len(names) else None
    if are_numbers(names) and len(ordered) == len(names):
        return {label: number for number, label in enumerate(ordered)}
    return None


def _by_name(labels: Sequence[str], names: Sequence[str]) -> dict[str, int] | None:
    """With regard to case, else without, where that tells the names apart."""
    ids = {name: number for number, name in enumerate(names)}
    if all(label in ids for label in labels):
        return {label: ids[label] for label in labels}
    folded = {name.casefold(): number for name, number in ids.items()}
    if len(folded) < len(names) or not all(label.casefold() in folded for label in labels):
        return None
    return {label: folded[label.casefold()] for label in labels}


def _numbers(labels: Sequence[str], count: int) -> dict[str, int] | None:
    """Labels that are ids below ``count``, or false and true where there are two."""
    known = {str(number): number for number in range(count)}
    if count == len(TRUTH):
        known |= {name: number for number, name in enumerate(TRUTH)}
    return {label: known[label] for label in labels} if all(label in known for label in labels) else None


def label_order(student: Any, teacher: Any) -> list[int] | None:
    """Where in the logits of a teacher each label of a student is; None: at the same place. Both are configs.

    Matched by name; by number where only one of the two has names.

    Raises:
        UserError: the two do not have the same labels, or not the same kind of problem.
    """
    problems = [getattr(config, "problem_type", None) for config in (student, teacher)]
    if None not in problems and problems[0] != problems[1]:
        raise UserError(
            f"The teacher was trained for {problems[1]} and the model is for {problems[0]}. Give a teacher of the "
            "same task."
        )
    if student.num_labels != teacher.num_labels:
        raise UserError(
            f"The teacher has {teacher.num_labels} labels and the model {student.num_labels}. Give a teacher that was "
            f"fine-tuned on the same labels{_of_both(student, teacher)}"
        )
    ours, theirs = names_of(student), names_of(teacher)
    if len(ours) == 1 or are_numbers(ours) or are_numbers(theirs):
        if are_numbers(ours) != are_numbers(theirs) and len(ours) > 1:
            logger.warning("Labels are matched by number, as only one side names them%s", _of_both(student, teacher))
        return None
    found = _by_name(ours, theirs)
    if found is None or len(set(found.values())) < len(ours):
        raise UserError(
            "The labels of the teacher have other names than those of the model, so it would teach the wrong ones. "
            f"Correct id2label and label2id in one of the configs{_of_both(student, teacher)}"
        )
    order = [found[name] for name in ours]
    return None if order == list(range(len(order))) else order


def _of_both(student: Any, teacher: Any) -> str:
    return f". The teacher: {shown(names_of(teacher))}; the model: {shown(names_of(student))}."


def shown(names: Sequence[str]) -> str:
    """``names`` for a message."""
    return ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")


PADDING_ROWS = 1024
"""Most rows that a vocabulary has more than its tokenizer has tokens; they are added for speed, and no input."""


def match_teacher(student: Any, teacher: Any, tokenizer: Any = None) -> list[int] | None:
    """Where in the logits of ``teacher`` each label of ``student`` is; None: at the same place, or no labels.

    ``tokenizer``: of both. With it, vocabularies may differ in the rows that only pad them.

    Raises:
        UserError: the two have other tasks, labels or vocabularies.
    """
    head = head_of(student)
    if head != head_of(teacher):
        raise UserError(
            f"The teacher is a {type(teacher).__name__} and the model a {type(student).__name__}. Give a teacher of "
            "the same task."
        )
    found = [getattr(model.config.get_text_config(), "vocab_size", None) for model in (student, teacher)]
    sizes = [size for size in found if size is not None]
    if len(set(sizes)) == 2 and not _only_padded(sizes, tokenizer):
        raise UserError(
            f"The teacher has {sizes[1]:,} tokens and the model {sizes[0]:,}, so that one text is not the same input. "
            "Give a teacher with the same tokenizer. Where only padding differs, give the tokenizer too "
            f"(processing_class), or save the teacher anew: teacher.resize_token_embeddings({sizes[0]}); "
            "teacher.save_pretrained(DIR)."
        )
    return label_order(student.config, teacher.config) if head in LABEL_HEADS else None


def _only_padded(sizes: Sequence[int], tokenizer: Any) -> bool:
    """Whether vocabularies of ``sizes`` differ by nothing but rows that no token of ``tokenizer`` has."""
    if not hasattr(tokenizer, "get_vocab"):
        return False
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    return tokens <= min(sizes) and max(sizes) - tokens <= PADDING_ROWS
