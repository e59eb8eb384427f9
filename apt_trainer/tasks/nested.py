"""Fields of records as columns: ``translation.de`` of rows like ``{"translation": {"de": …, "en": …}}``.

Only those that are named become columns; a column whose own name has a dot comes first. Not for lists of records.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, Translation, concatenate_datasets


def with_fields(rows: Dataset, names: Iterable[str]) -> Dataset:
    """``rows`` with a further column for each of ``names`` that is a field of a record; other names change nothing."""
    for name in names:
        if name not in rows.column_names and name in names_with_fields(rows):
            record = rows.select_columns([name.partition(".")[0]])
            fields = record.flatten(max_depth=1 + name.count("."))
            rows = concatenate_datasets([rows, fields.select_columns([name])], axis=1)
    return rows


def names_with_fields(rows: Dataset) -> list[str]:
    """Names of the columns, those of records followed by their fields."""
    return list(dict.fromkeys(name for column, kind in rows.features.items() for name in _names(column, kind)))


def _names(name: str, feature: Any) -> Iterator[str]:
    yield name
    fields = feature.flatten() if isinstance(feature, Translation) else feature
    if isinstance(fields, dict):
        for field, kind in fields.items():
            yield from _names(f"{name}.{field}", kind)
