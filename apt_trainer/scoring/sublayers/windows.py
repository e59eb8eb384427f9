"""Calibration data: text cut into windows of equal length, or labelled rows, as batches of one model.

What a window asks of the model follows from its head: the next token, masked tokens (15 %, drawn once with the seed),
or, of an encoder–decoder model, the second half of the window from the first. Other heads need rows with labels to
have a loss, and do with text for scores that need none. Not for training data (``tasks``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apt_trainer.errors import UserError
from apt_trainer.models.batch import IGNORED
from apt_trainer.models.labels import (
    MULTI_LABEL,
    REGRESSION,
    SEQUENCE_HEAD,
    as_text,
    head_of,
    hot,
    hot_width,
    match_labels,
    names_of,
    of_hot,
    problem_type,
    shown,
)
from apt_trainer.scoring.sublayers.units import Units
from apt_trainer.tasks.text_windows import Frame, cut, frame_of, plain_ids

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Calibration:
    """``batches``: inputs with labels where there are any; ``rows``: windows or rows; ``length``: tokens per window,
    None for rows of their own length; ``sha256``: of what was tokenised."""

    batches: tuple[dict[str, torch.Tensor], ...]
    rows: int
    length: int | None
    sha256: str
    has_labels: bool


def from_text(
    text: str, tokenizer: Any, model: Any, units: Units, samples: int, length: int, batch_size: int = 1, seed: int = 0
) -> Calibration:
    """At most ``samples`` windows of ``length`` tokens, spread evenly over ``text``.

    ``model`` may be on the meta device: only its head and config are read. Raises :class:`UserError` for a text
    shorter than one window and for windows that the model cannot take.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if length < 4 or (longest is not None and length > longest):
        limit = f" and at most the {longest} positions of the model" if longest is not None else ""
        raise UserError(f"length={length} must be at least 4{limit}.")
    ids = plain_ids(tokenizer, text)
    opening, closing = _frame(tokenizer, model, units)
    whole = length - len(closing)
    windows = [one.ids for one in cut(ids, whole, opening) if len(one.ids) == whole]
    if not windows:
        raise UserError(
            f"The text has {len(ids):,} tokens, fewer than one window of {length:,}. Give more text or "
            "a smaller length."
        )
    chosen = torch.linspace(0, len(windows) - 1, min(samples, len(windows))).round().long()
    end = np.asarray(closing, dtype=np.int64)
    rows = torch.stack([torch.from_numpy(np.concatenate([windows[i], end])) for i in chosen.tolist()])
    encoded = _asked(rows, tokenizer, model, units, seed)
    batches = tuple(
        {name: value[start : start + batch_size] for name, value in encoded.items()}
        for start in range(0, len(rows), batch_size)
    )
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return Calibration(batches, len(rows), length, digest, "labels" in encoded)


def from_rows(
    lines: Sequence[str], tokenizer: Any, model: Any, samples: int, length: int, batch_size: int = 8
) -> Calibration:
    """At most ``samples`` JSON lines with ``text`` and ``label``: a name or a number of a label of the model; where a
    row may have several, a list of them, or of 0 and 1 for each; or what a regression predicts."""
    if head_of(model) != SEQUENCE_HEAD:
        raise UserError(
            "Rows with a text and a label are for classification and regression of texts, and the model is a "
            f"{type(model).__name__}. Give a text."
        )
    texts: list[str] = []
    labels: list[Any] = []
    for number, line in enumerate((line for line in lines if line.strip()), start=1):
        if len(texts) == samples:
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise UserError(f'Row {number} is not {{"text": "…", "label": …}} with a text.')
        texts.append(row["text"])
        labels.append(row["label"])
    if not texts:
        raise UserError("The file holds no rows.")
    targets = _targets(labels, model.config)
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        part = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        batches.append(part | {"labels": targets[start : start + batch_size]})
    digest = hashlib.sha256(json.dumps([texts, targets.tolist()]).encode()).hexdigest()
    return Calibration(tuple(batches), len(texts), None, digest, True)


def _targets(labels: Sequence[Any], config: Any) -> torch.Tensor:
    """What the loss of the model takes: ids [rows], 0 or 1 [rows, labels], or numbers [rows] or [rows, numbers]."""
    several = isinstance(labels[0], list)
    problem = problem_type(config, torch.empty(0) if several else None)
    if problem == REGRESSION:
        return torch.tensor([_numbers(label, number, config) for number, label in enumerate(labels, start=1)])
    lists = [label if isinstance(label, list) else [label] for label in labels]
    names = names_of(config)
    if problem == MULTI_LABEL and hot_width(lists) == len(names):
        return torch.tensor([hot(of_hot(of_row), len(names)) for of_row in lists])
    found = sorted({as_text(label) for of_row in lists for label in of_row})
    ids = match_labels(found, names, found)
    for number, of_row in enumerate(lists, start=1):
        if len(set(map(as_text, of_row))) < len(of_row):
            raise UserError(
                f"Row {number} has the labels {of_row}, one twice. Give each once, or {len(names)} times 0 or 1."
            )
        for label in of_row:
            if ids is None and match_labels([as_text(label)], names, ()) is None:
                raise UserError(
                    f"Row {number} has the label {label!r}; the model has {len(names)} labels: {shown(names)}."
                )
        if problem != MULTI_LABEL and len(of_row) != 1:
            raise UserError(f"Row {number} has the labels {of_row}; the model takes one per row.")
    if ids is None:
        raise UserError(f"The rows name labels in several ways: {shown(found)}. Labels of the model: {shown(names)}.")
    numbered = [[ids[as_text(label)] for label in of_row] for of_row in lists]
    if problem == MULTI_LABEL:
        return torch.tensor([hot(of_row, len(names)) for of_row in numbered])
    return torch.tensor(numbered)[:, 0]


def _numbers(label: Any, number: int, config: Any) -> Any:
    """``label`` of the row ``number``, checked to be what a regression predicts."""
    values = label if isinstance(label, list) else [label]
    if len(values) != config.num_labels or not all(
        isinstance(value, int | float) and math.isfinite(value) for value in values
    ):
        raise UserError(
            f"Row {number} has the label {label!r}; the model predicts {config.num_labels} finite numbers per row."
        )
    return [float(value) for value in values] if isinstance(label, list) else float(label)


def _frame(tokenizer: Any, model: Any, units: Units) -> Frame:
    """Special tokens round a window: none where a half of it is asked for from the other, no end in running text."""
    frame = frame_of(tokenizer)
    if model.config.is_encoder_decoder:
        return Frame((), ())
    return Frame(frame.opening, ()) if units.family.head(model).next_token else frame


def _asked(rows: torch.Tensor, tokenizer: Any, model: Any, units: Units, seed: int) -> dict[str, torch.Tensor]:
    """Inputs and labels of windows [n, length]."""
    ones = torch.ones_like(rows)
    head = units.family.head(model)
    if head.next_token:
        return {"input_ids": rows, "attention_mask": ones, "labels": rows}
    if model.config.is_encoder_decoder and head.reads == ("lm_head",):
        half = rows.shape[1] // 2
        return {"input_ids": rows[:, :half], "attention_mask": ones[:, :half], "labels": rows[:, half:]}
    if not head.masked_token:
        return {"input_ids": rows, "attention_mask": ones}
    if tokenizer.mask_token_id is None:
        raise UserError("The model predicts masked tokens, but its tokenizer has no mask token.")
    drawn = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
    drawn[:, rows.shape[1] // 2] = True  # no window without a prediction
    inputs = torch.where(drawn, tokenizer.mask_token_id, rows)
    return {"input_ids": inputs, "attention_mask": ones, "labels": torch.where(drawn, rows, IGNORED)}
