"""Which rows have no text to learn from, and the data without them. Not for labels that are empty (``labels``)."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import PART_NAMES
from apt_trainer.tasks.chat import check_conversation, clean_messages

logger = logging.getLogger(__name__)

TEXT_SETTINGS = (
    "text_column",
    "text_pair_column",
    "negative_column",
    "target_column",
    "prompt_column",
    "completion_column",
    "messages_column",
)
"""Keys of :class:`DataSettings` that name a column in which no row should be without text."""


def is_empty(value: Any) -> bool:
    """Whether a cell is null, white space, or a list without words or messages."""
    return not value if isinstance(value, list) else value is None or not str(value).strip()


def lacks_text(value: Any) -> bool:
    """Whether a cell is empty or a conversation without an answer of the assistant."""
    if is_empty(value) or not isinstance(value, list) or not isinstance(value[0], dict):
        return is_empty(value)
    try:
        check_conversation(clean_messages(value), "")
    except UserError:
        return True
    return False


def only_with_text(parts: dict[str, Dataset], data: DataSettings) -> dict[str, Dataset]:
    """``parts`` without the rows that lack a text in one of the columns that ``data`` names."""
    named = [name for name in (getattr(data, setting) for setting in TEXT_SETTINGS) if name is not None]
    if not named:
        raise UserError("drop_empty_texts: true looks at the columns that are named. Set text_column.")
    return {part: _with_text(rows, named, part) for part, rows in parts.items()}


def _with_text(rows: Dataset, named: list[str], part: str) -> Dataset:
    cells = [rows[name][:] for name in named if name in rows.column_names]  # others are told of later
    kept = [row for row, texts in enumerate(zip(*cells, strict=True)) if not any(map(lacks_text, texts))]
    if not cells or len(kept) == len(rows):
        return rows
    told = f"{len(rows) - len(kept)} of {len(rows)} rows of the {PART_NAMES[part]} data have no text"
    if not kept:
        raise UserError(f"{told} in {' and '.join(map(repr, named))}. Give text.")
    logger.warning("%s and are left out.", told)
    return rows.select(kept, keep_in_memory=True)
