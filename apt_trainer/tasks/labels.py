"""Labels of the data: which rows have one, what they are called, their ids and how often they occur.

The ids follow the names of a model that has these labels already; else those of the data set, else the sorted labels.
Not for numbers (``classification``) nor for how a config names labels (``models.labels``).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset, List, Value

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models.labels import TRUTH, are_numbers, as_text, has_head, match_labels, names_of, shown
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import IGNORED_LABEL, PART_NAMES, require_column

logger = logging.getLogger(__name__)

BALANCED = "balanced"
_HIDDEN = "-1"
_ROWS_SHOWN = 5
_SAID_OF_MISSING = ("nan", "none", "null", "na", "n/a", "<na>")
"""What other programs write into a cell without a value; also names that a label may have."""


@dataclass(frozen=True)
class KnownLabels:
    """``names`` of the labels of a model, in the order of their ids. ``final``: it is not going to be trained, so that
    labels of the data have to be among them."""

    names: tuple[str, ...]
    final: bool

    @classmethod
    def of(cls, config: Any, head: str, final: bool) -> KnownLabels | None:
        """Those that count for data: of a model with this ``head``; for training only where they have names."""
        if config is None or not has_head(config, head):
            return None
        names = names_of(config)
        return None if are_numbers(names) and not final else cls(names, final)


@dataclass(frozen=True)
class Labels:
    """``names`` in the order of their ids, and the id of each label text of the data."""

    names: tuple[str, ...]
    ids: Mapping[str, int]

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Configuration of a model with one output per label."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: i for i, name in enumerate(self.names)},
        }

    def counts(self, ids: Iterable[int]) -> dict[str, int]:
        """How often each label occurs among ``ids``; warns of those that do not."""
        found = Counter(ids)
        counts = {name: found[i] for i, name in enumerate(self.names)}
        absent = [name for name, number in counts.items() if number == 0]
        if absent:
            logger.warning("The training rows hold no example of label %s, so it cannot be learned.", shown(absent))
        return counts


def label_text(value: Any, feature: Any) -> str:
    """As :func:`~apt_trainer.models.labels.as_text`; the name where ``feature`` is a ``ClassLabel``."""
    if isinstance(feature, ClassLabel) and isinstance(value, int) and value >= 0:
        return as_text(feature.int2str(value))
    return as_text(value)


def is_blank(value: Any) -> bool:
    """Whether a cell holds no label: null, not a number, or white space alone."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or (not str(value).strip())


def lacks_label(value: Any, drops: bool) -> bool:
    """Whether a cell holds no label or number, or a list of numbers lacks one of them."""
    return is_blank(value) if not isinstance(value, list) else not value or any(map(is_blank, value))


def lacks_labels(value: Any, drops: bool) -> bool:
    """Whether a cell does not tell which labels a row has, if any: an empty list or text tells that there are none."""
    if not isinstance(value, list):
        return value is None or (isinstance(value, float) and math.isnan(value))
    return any(map(is_blank, value)) and not any(isinstance(label, str) and label.strip() for label in value)


def lacks_tags(value: Any, drops: bool) -> bool:
    """Whether a word has no tag. A row without any goes where such rows are dropped; it may have no word either."""
    return value is None or any(map(is_blank, value)) or (drops and not value)


def only_labelled(
    rows: Dataset, column: str, part: str, drop: bool, lacks: Callable[[Any, bool], bool] = lacks_label
) -> Dataset:
    """The rows of which no cell of ``column`` ``lacks`` a label; raises :class:`UserError` with the numbers of the
    others unless ``drop``."""
    if column not in rows.column_names:
        return rows
    cells = rows[column][:]
    blank = [row for row, value in enumerate(cells) if lacks(value, drop)]
    if not blank:
        return rows
    empty = "is empty, or lacks a part," if any(isinstance(value, list) for value in cells) else "is empty"
    where = f"label_column={column!r} of the {PART_NAMES[part]} data {empty} in {len(blank)} of {len(rows)} rows"
    if len(blank) == len(rows):
        raise UserError(f"{where}. Give labels.")
    if drop:
        logger.warning("%s, which are left out.", where)
        return rows.select(sorted(set(range(len(rows))) - set(blank)), keep_in_memory=True)
    first = ", ".join(map(str, blank[:_ROWS_SHOWN])) + (", …" if len(blank) > _ROWS_SHOWN else "")
    raise UserError(
        f"{where}: row {first} (counted from 0). Fill them, or set drop_unlabeled: true to leave them out."
    )


def one_column(parts: Mapping[str, Dataset], data: DataSettings) -> tuple[dict[str, Dataset], DataSettings]:
    """``parts`` and ``data`` with a column of lists of numbers, named after all ``label_columns``, instead of them."""
    columns = data.label_columns
    if columns is None:
        return dict(parts), data
    if not columns or len(set(columns)) < len(columns):
        raise UserError(f"label_columns={columns} must name at least one column, and each of them once.")
    if data.label_column != DataSettings.label_column or data.label_separator is not None:
        other = "label_column" if data.label_separator is None else "label_separator"
        raise UserError(f"Both label_columns and {other} were given. Give one of them.")
    name = ", ".join(columns)
    joined = {}
    for part, rows in parts.items():
        for column in columns:
            require_column(rows, column, "label_columns", part)
        cells = zip(*([_number(value, column, part) for value in rows[column][:]] for column in columns), strict=True)
        others = rows.remove_columns(columns)
        joined[part] = others.add_column(name, [list(row) for row in cells], feature=List(Value("float64")))  # type: ignore[arg-type]
    return joined, replace(data, label_column=name)


def _number(value: Any, column: str, part: str) -> float | None:
    """None where there is none; text where a file has empty cells beside numbers."""
    if is_blank(value):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        number = {name: float(i) for i, name in enumerate(TRUTH)}.get(str(value).strip().capitalize())
    if number is None:
        raise UserError(f"label_columns: {column!r} of the {PART_NAMES[part]} data holds {value!r}. Give numbers.")
    return number


def number_labels(
    parts: Mapping[str, tuple[set[Any], Any]], column: str, known: KnownLabels | None, kind: str = "row"
) -> Labels:
    """Names and ids for the labels of all parts.

    Args:
        parts: Of "train" (before anything was held out) and of the others, the labels and the feature of the column.
        column: Its name.
        known: Labels of the model, if it has any.
        kind: What has a label.

    Raises:
        UserError: a label that a model which is not trained does not have, or that the training data do not have;
            labels that are hidden; fewer than two.
    """
    texts = {part: {label_text(value, feature) for value in values} for part, (values, feature) in parts.items()}
    for part, found in texts.items():
        if str(IGNORED_LABEL) in found:
            raise UserError(
                f"label_column={column!r} of the {PART_NAMES[part]} data holds {IGNORED_LABEL}, which marks what has "
                f"no label. Leave out each {kind} with it."
            )
    everything, values, feature = set().union(*texts.values()), *parts["train"]
    if known is not None:
        hidden = _HIDDEN in everything - texts["train"] - set(known.names)
        labels = everything - {_HIDDEN} if hidden else everything
        names = tuple(map(as_text, feature.names)) if isinstance(feature, ClassLabel) else _sorted(labels)
        ids = match_labels(sorted(labels), known.names, names, subset_by_number=known.final)
        if ids is None and known.final:
            raise _not_of_the_model(labels, known, column)
        if ids is None:
            logger.warning(
                "The model has the labels %s, the data have others (%s): its outputs are numbered anew by the data.",
                shown(known.names),
                shown(names),
            )
        else:
            own = known.names
            if are_numbers(known.names) and not all(name.isdecimal() or name in known.names for name in labels):
                logger.warning(
                    "The model has no names for its labels. Those of the data are taken in their order: %s.",
                    ", ".join(f"{i} is {name}" for name, i in ids.items()),
                )
                own = tuple(sorted(ids, key=ids.__getitem__))
            _check_known(texts, ids, own, column, "model")
            return Labels(own, ids)
    names = _own_names(values, feature, column)
    ids = {name: i for i, name in enumerate(names)}
    _check_known(texts, ids, names, column, "training data")
    _warn_of_case(names, column)
    _warn_of_missing(names, column)
    return Labels(names, ids)


def _own_names(values: Iterable[Any], feature: Any, column: str) -> tuple[str, ...]:
    """In the order of their ids: those of the ``ClassLabel``, else the labels sorted (numbers by size)."""
    if isinstance(feature, ClassLabel):
        return tuple(map(as_text, feature.names))
    values = set(values)
    fraction = next((v for v in values if isinstance(v, float) and not v.is_integer()), None)
    if fraction is not None:
        raise UserError(
            f"label_column={column!r} holds {fraction}, which is no class. Use task: regression for numbers."
        )
    names = {label_text(value, feature) for value in values}
    if len(names) < 2:
        raise UserError(
            f"label_column={column!r}: all training data has the label {', '.join(names)!r}. "
            "At least two labels are needed."
        )
    return _sorted(names)


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    """Whole numbers by size, all else by letters."""
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def _check_known(
    texts: Mapping[str, set[str]], ids: Mapping[str, int], names: tuple[str, ...], column: str, owner: str
) -> None:
    """Raise :class:`UserError` for a label without an id, or for hidden ones (-1)."""
    for part, found in texts.items():
        unknown = sorted(found - set(ids))
        if _HIDDEN in unknown:
            raise UserError(
                f"label_column={column!r} of the {PART_NAMES[part]} data holds -1, which marks hidden or missing "
                "labels, so nothing can be measured on it. Use labelled data, or leave out these rows (or this split)."
            )
        if unknown:
            raise UserError(
                f"label_column={column!r} of the {PART_NAMES[part]} data has the label {unknown[0]!r}, "
                f"which the {owner} does not have. Labels of the {owner}: {shown(names)}."
            )


def _not_of_the_model(labels: set[str], known: KnownLabels, column: str) -> UserError:
    folded = {name.casefold() for name in known.names}
    foreign = sorted(label for label in labels if label.casefold() not in folded) or sorted(labels)
    return UserError(
        f"label_column={column!r} has labels that the model does not have: {shown(foreign)}. "
        f"Labels of the model: {shown(known.names)}. Rename those of the data, or id2label and label2id in the "
        "config of the model."
    )


def _warn_of_case(names: tuple[str, ...], column: str) -> None:
    folded = Counter(name.casefold() for name in names)
    twins = [name for name in names if folded[name.casefold()] > 1]
    if twins:
        logger.warning("label_column=%r holds labels that differ in case only: %s.", column, ", ".join(twins))


def _warn_of_missing(names: tuple[str, ...], column: str) -> None:
    found = [name for name in names if name.casefold() in _SAID_OF_MISSING]
    if found:
        logger.warning(
            "label_column=%r holds the text %s, which is a label here. If these rows have none, leave the cell empty, "
            "and set drop_unlabeled: true.",
            column,
            ", ".join(found),
        )


def class_weights(data: DataSettings, counts: Mapping[str, int], rows: int, multi: bool) -> tuple[float, ...] | None:
    """Weight of each label in the loss, as ``data`` asks for; None: all alike.

    Args:
        data: Its ``class_weights`` is "balanced" or one number per label.
        counts: How often each label occurs in the training data, in the order of ids.
        rows: Of the training data (or words).
        multi: Whether a row may have several labels; weights are then those of its presence against its absence.

    Balanced are rows / (labels · count), as in scikit-learn; for several labels a row absences / presences. A label
    that does not occur weighs 1.

    Raises:
        UserError: another text, another number of weights, or weights that cannot be.
    """
    given = data.class_weights
    if given is None:
        return None
    if given == BALANCED:
        present = sum(1 for count in counts.values() if count)
        weights = [(rows - n) / n if multi else rows / (present * n) for n in (max(n, 1) for n in counts.values())]
        return tuple(w if n else 1.0 for w, n in zip(weights, counts.values(), strict=True))
    if isinstance(given, str):
        raise unknown_choice("class_weights", given, [BALANCED, "[1.0, 2.0, …]"])
    if len(given) != len(counts):
        raise UserError(
            f"class_weights={given} gives {len(given)} weights for {len(counts)} labels. Give one for each, in this "
            f"order: {shown(tuple(counts))}."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
        raise UserError(f"class_weights={given} must be finite and not negative, and at least one above 0.")
    return tuple(map(float, given))
