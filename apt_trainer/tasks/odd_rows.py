"""Rows that a person should look at before a model learns from them: empty, broken, alone or contradicted.

Not for refusing rows: what cannot be trained on at all, the tasks refuse.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset

from apt_trainer.models.labels import as_text, shown
from apt_trainer.settings.packages import TRL, require
from apt_trainer.tasks import TASK_KINDS
from apt_trainer.tasks.empty_texts import TEXT_SETTINGS, lacks_text
from apt_trainer.tasks.labels import is_blank, label_text
from apt_trainer.tasks.nested import with_fields

_SHOWN = 5
_OF_CLASSES = ("classification", "multi_label_classification", "image_classification")


def odd_rows(rows: Dataset, settings: Mapping[str, Any]) -> tuple[dict[str, bool], list[str]]:
    """(settings that leave out rows without text or label, sentences that name rows)

    Args:
        rows: Of the training data.
        settings: Keys of :class:`~apt_trainer.settings.DataSettings`, with the task and the columns.

    Raises:
        UserError: a package is missing without which conversations cannot be read.
    """
    if settings["task"] == "instruction_tuning":
        require(TRL, "task: instruction_tuning")
    named = [settings[name] for name in TEXT_SETTINGS if settings.get(name)]
    of_labels = [name for name in (settings.get("label_column"), *(settings.get("label_columns") or ())) if name]
    rows = with_fields(rows, [*named, *of_labels])
    texts = [rows[name][:] for name in named if name in rows.column_names]
    labels = _labels(rows, settings)
    changes, told = {}, []
    blank = _where(any(map(lacks_text, of_row)) for of_row in zip(*texts, strict=True))
    if blank:
        changes["drop_empty_texts"] = True
        told.append(f"{_rows(blank)} without text: left out (drop_empty_texts).")
    broken = _where(any("\ufffd" in str(text) for text in of_row) for of_row in zip(*texts, strict=True))
    if broken:
        told.append(
            f"{_rows(broken)} with characters that were lost (\ufffd): the file was written in another encoding."
        )
    lacks = TASK_KINDS[settings["task"]].lacks
    unlabeled = [] if lacks is None else _where(lacks(value, False) for value in labels)
    if unlabeled:
        changes["drop_unlabeled"] = True
        told.append(f"{_rows(unlabeled)} without a label: left out (drop_unlabeled).")
    if settings["task"] in _OF_CLASSES and settings.get("label_column") in rows.features:
        told += _of_labels(rows, settings)
    if settings["task"] == "classification" and labels and len(texts) == 1:
        told += _contradictions(texts[0], labels)
    return changes, told


def _labels(rows: Dataset, settings: Mapping[str, Any]) -> list[Any]:
    """What is to be learnt of each row; empty where nothing of the kind is named."""
    columns, column = settings.get("label_columns"), settings.get("label_column")
    if columns:
        return [list(cells) for cells in zip(*(rows[name][:] for name in columns), strict=True)]
    return rows[column][:] if column in rows.column_names else []


def _of_labels(rows: Dataset, settings: Mapping[str, Any]) -> Iterator[str]:
    """Labels that occur once, and those that one writes in several ways."""
    column, separator = settings["label_column"], settings.get("label_separator")
    kind = rows.features[column]
    places: dict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(rows[column][:]):
        labels = value if isinstance(value, list) else str(value or "").split(separator) if separator else [value]
        for label in labels:
            if not is_blank(label):
                places[label_text(label, getattr(kind, "feature", kind))].append(row)
    alone = {name: of[0] for name, of in places.items() if len(of) == 1}
    if alone:
        names = ", ".join(f"{name!r} (row {row})" for name, row in list(alone.items())[:_SHOWN])
        more = "" if len(alone) <= _SHOWN else f" and {len(alone) - _SHOWN} others"
        yield (
            f"One row alone has the label {names}{more}: it is trained on or tested on, not both. Give more rows, or "
            "correct the label."
        )
    folded = Counter(name.casefold() for name in places)
    twins = sorted(name for name in places if folded[name.casefold()] > 1)
    if twins:
        yield f"Labels that differ in case only, and count as different ones: {shown(twins)}."


def _contradictions(texts: Sequence[Any], labels: Sequence[Any]) -> Iterator[str]:
    """Equal texts with different labels."""
    found: dict[str, set[str]] = defaultdict(set)
    places: dict[str, list[int]] = defaultdict(list)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not is_blank(text) and not is_blank(label):
            found[str(text).strip()].add(as_text(label))
            places[str(text).strip()].append(row)
    odd = sorted(row for text, of in found.items() if len(of) > 1 for row in places[text])
    if odd:
        yield f"{_rows(odd)} with a text that has another label elsewhere. Correct one of them."


def _where(flags: Iterable[bool]) -> list[int]:
    return [row for row, flag in enumerate(flags) if flag]


def _rows(numbers: Sequence[int]) -> str:
    first = ", ".join(map(str, numbers[:_SHOWN])) + (", …" if len(numbers) > _SHOWN else "")
    return f"{len(numbers):,} row{'s' if len(numbers) > 1 else ''} ({first}, counted from 0)"
