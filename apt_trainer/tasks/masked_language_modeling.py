"""Prediction of masked tokens on plain text for encoders: blocks as for decoders (``language_modeling``), some of
whose tokens are hidden, changed or left, and to be predicted (BERT, arXiv 1810.04805).

Which tokens follows from the text alone: of a training batch from all of its rows, so that those of a row change with
the rows beside it, from epoch to epoch, and not where a run is resumed (in batches of one row they never change); of a
row to evaluate on from that row, so that scores compare.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import IGNORED_LABEL, Splits, TaskData, encode, fingerprint, pad_multiple, parts_of
from apt_trainer.tasks.language_modeling import TextColumn, blocks_of
from apt_trainer.tasks.token_scores import aligned_sums, token_scores


def build(
    splits: Splits, columns: TextColumn, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Blocks of max_length tokens of every part; the last block of a part may be shorter."""
    if tokenizer.mask_token is None:
        raise UserError(
            f"task={data.task!r} hides tokens behind a mask token, and the tokenizer has none. Use an encoder that "
            "was made to predict masked tokens."
        )
    if not 0 < data.mask_probability < 1:
        raise UserError(f"mask_probability={data.mask_probability} must lie between 0 and 1, such as 0.15.")
    rows = blocks_of(splits, columns, data, tokenizer)
    single = MaskingCollator(tokenizer, data.mask_probability)
    for part in rows.keys() - {"train"}:
        rows[part] = encode(rows[part], _masked, collator=single)
    return TaskData(
        **parts_of(rows),
        collator=MaskingCollator(tokenizer, data.mask_probability, pad_multiple(data)),
        model_class="AutoModelForMaskedLM",
        metric_name=metric,
        metrics={"validation": token_scores, "test": token_scores},
        fingerprint=fingerprint(splits.train, columns),
        preprocess_logits=aligned_sums,
        greater_is_better=metric != "perplexity",
    )


def _masked(batch: dict[str, list[list[int]]], collator: MaskingCollator) -> dict[str, list[list[int]]]:
    found = [collator([{"input_ids": ids}]) for ids in batch["input_ids"]]
    return {name: [row[name][0].tolist() for row in found] for name in ("input_ids", "labels")}


class MaskingCollator:
    """Pads rows; of rows without ``labels``, hides tokens of each. Special tokens are never predicted."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, probability: float, pad_to_multiple_of: int | None = None
    ) -> None:
        self._hide = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=probability, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [{"input_ids": row["input_ids"]} for row in rows]
        self._hide.generator = torch.Generator().manual_seed(_seed(texts))
        batch = dict(self._hide(texts))
        if "labels" in rows[0]:
            tokenizer, multiple = self._hide.tokenizer, self._hide.pad_to_multiple_of
            batch = dict(tokenizer.pad(texts, return_tensors="pt", pad_to_multiple_of=multiple))
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORED_LABEL)
            for row, labels in zip(rows, batch["labels"], strict=True):
                labels[: len(row["labels"])] = torch.tensor(row["labels"])
        return batch


def _seed(texts: list[dict[str, list[int]]]) -> int:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(np.asarray(text["input_ids"]).tobytes())
    return int.from_bytes(digest.digest()[:7], "big")
