"""Next-token prediction on plain text for decoders: the text is tokenised, joined and cut into blocks of max_length.

Not for prompts with answers: that is ``instruction_tuning``. Every row is one document and ends with the end-of-text
token; a txt file is one running text. Blocks do not overlap, so the first token of a block is not predicted: the start
token where the tokenizer puts one before a text, as each of its documents has too. Within a block documents see each
other. Perplexity is over all predicted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks.base import (
    PART_NAMES,
    Splits,
    TaskData,
    check_column,
    encode,
    end_with_eos,
    fingerprint,
    is_text,
    only_column,
    pad_multiple,
    parts_of,
    without_blank,
)
from apt_trainer.tasks.loading import PLAIN_TEXT
from apt_trainer.tasks.packing import DecoderCollator, cut_into_blocks
from apt_trainer.tasks.text_windows import frame_of, framed_once
from apt_trainer.tasks.token_scores import causal_sums, token_scores


@dataclass(frozen=True)
class TextColumn:
    """The one column in use."""

    text: str

    @property
    def names(self) -> list[str]:
        return [self.text]


def find_columns(parts: dict[str, Dataset], data: DataSettings) -> TextColumn:
    """Check the text column of every part; it may be left open where only one fits."""
    text = data.text_column or only_column(parts["train"], (), is_text, "text")
    for part, rows in parts.items():
        check_column(rows, text, "text_column", part, is_text, "text")
    return TextColumn(text)


def build(
    splits: Splits, columns: TextColumn, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Blocks of max_length tokens of every part; the last block of a part may be shorter."""
    collator = DecoderCollator(tokenizer, pad_multiple(data))
    return TaskData(
        **parts_of(blocks_of(splits, columns, data, tokenizer)),
        collator=collator,
        model_class="AutoModelForCausalLM",
        metric_name=metric,
        metrics={"validation": token_scores, "test": token_scores},
        fingerprint=fingerprint(splits.train, columns),
        preprocess_logits=causal_sums,
        greater_is_better=metric != "perplexity",
    )


def blocks_of(
    splits: Splits, columns: TextColumn, data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Dataset]:
    """``input_ids`` of every part, in blocks of max_length tokens."""
    return {part: _blocks(rows, part, columns, data, tokenizer) for part, rows in splits.parts.items()}


def _blocks(
    rows: Dataset, part: str, columns: TextColumn, data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    running = _is_running(part, data)
    if not running:
        rows = without_blank(rows, columns.text, "text_column", part)
    encoded = encode(rows, _tokenise, tokenizer=tokenizer, column=columns.text, running=running)
    blocks = cut_into_blocks(encoded, data.max_length, frame_of(tokenizer).opening)
    if len(blocks) == 0:
        raise UserError(
            f"The {PART_NAMES[part]} data has fewer than two tokens, so nothing is predicted. Give more text."
        )
    return blocks


def _is_running(part: str, data: DataSettings) -> bool:
    """Whether the part is one running text; what was held out of the training data is as those are."""
    return (getattr(data, f"{part}_file") or data.train_file or "").lower().endswith(PLAIN_TEXT)


def _tokenise(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, column: str, running: bool
) -> dict[str, Any]:
    """Special tokens of the tokenizer stand round a document, and not round a piece of a running text."""
    if running:
        return {"input_ids": tokenizer(batch[column], add_special_tokens=False, verbose=False).input_ids}
    documents, frame = tokenizer(batch[column], verbose=False).input_ids, frame_of(tokenizer)
    return {"input_ids": [end_with_eos(framed_once(ids, frame), tokenizer) for ids in documents]}
