"""Calibration data: text cut into windows of equal length, or labelled rows, as batches of one model.

What a window asks of the model follows from its head: the next token, masked tokens (15 %, drawn once with the seed),
or, of an encoder–decoder model, the second half of the window from the first. Other heads need rows with labels to
have a loss, and do with text for scores that need none. Not for training data (``tasks``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apt_trainer.errors import UserError
from apt_trainer.models.batch import IGNORED
from apt_trainer.scoring.sublayers.units import Units

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
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    opening, closing = _frame(tokenizer, model, units)
    body = length - len(opening) - len(closing)
    if len(ids) < body:
        raise UserError(
            f"The text has {len(ids):,} tokens, fewer than one window of {length:,}. Give more text or "
            "a smaller length."
        )
    windows = ids[: len(ids) // body * body].view(-1, body)
    chosen = torch.linspace(0, len(windows) - 1, min(samples, len(windows))).round().long()
    edges = [torch.tensor([edge], dtype=torch.long).expand(len(chosen), -1) for edge in (opening, closing)]
    rows = torch.cat([edges[0], windows[chosen], edges[1]], dim=1)
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
    """At most ``samples`` JSON lines with ``text`` and ``label`` (a number, or a name that the config knows)."""
    texts: list[str] = []
    labels: list[float] = []
    names = {str(name): number for name, number in (model.config.label2id or {}).items()}
    for number, line in enumerate((line for line in lines if line.strip()), start=1):
        if len(texts) == samples:
            break
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise UserError(f'Row {number} is not {{"text": "…", "label": …}} with a text.')
        label = names.get(row["label"], row["label"]) if isinstance(row["label"], str) else row["label"]
        if not isinstance(label, int | float) or isinstance(label, bool):
            raise UserError(f"Row {number} has the label {label!r}. Known: {', '.join(names)}, or a number.")
        if isinstance(label, int) and not 0 <= label < model.config.num_labels:
            raise UserError(f"Row {number} has the label {label}; the model has {model.config.num_labels} labels.")
        texts.append(row["text"])
        labels.append(label)
    if not texts:
        raise UserError("The file holds no rows.")
    batches = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        part = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        batches.append(part | {"labels": torch.tensor(labels[start : start + batch_size])})
    digest = hashlib.sha256(json.dumps([texts, labels]).encode()).hexdigest()
    return Calibration(tuple(batches), len(texts), None, digest, True)


def _frame(tokenizer: Any, model: Any, units: Units) -> tuple[list[int], list[int]]:
    """Special tokens round a window: those of an encoder; a decoder is calibrated on running text without."""
    if model.config.is_encoder_decoder or units.stacks != ("encoder",):
        return [], []
    edges = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    return tuple([] if edge is None else [edge] for edge in edges)  # type: ignore[return-value]


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
