"""Supervised fine-tuning of a decoder on prompts with completions, or on conversations.

The loss is on completions only unless told otherwise; a completion ends with the end-of-text token, a conversation as
its chat template says. Not for plain text: that is ``language_modeling``. Perplexity and token accuracy are those of
the trained tokens, of the whole data set at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apt_trainer.errors import UserError
from apt_trainer.settings import DataSettings
from apt_trainer.tasks import prompts
from apt_trainer.tasks.base import (
    IGNORED_LABEL,
    PART_NAMES,
    Splits,
    TaskData,
    encode,
    end_with_eos,
    fingerprint,
    pad_multiple,
    parts_of,
    without_blank,
)
from apt_trainer.tasks.chat import (
    ChatTemplate,
    chat_template,
    check_conversation,
    clean_messages,
    own_template,
    unanswered,
)
from apt_trainer.tasks.packing import DecoderCollator, pack
from apt_trainer.tasks.prompts import PromptColumns
from apt_trainer.tasks.text_windows import frame_of, framed_once, without_closing
from apt_trainer.tasks.token_scores import causal_sums, token_scores

logger = logging.getLogger(__name__)

find_columns = prompts.find_columns
Encoded = tuple[list[int], list[int]]


def build(
    splits: Splits, columns: PromptColumns, data: DataSettings, tokenizer: PreTrainedTokenizerBase, metric: str
) -> TaskData:
    """Rows cut to max_length; those without a trained token left are dropped. Only training rows are packed."""
    collator = DecoderCollator(tokenizer, pad_multiple(data))
    chat = chat_template(tokenizer) if columns.messages is not None or data.use_chat_template else None
    encoded = {part: _encode(rows, part, columns, data, tokenizer, chat) for part, rows in splits.parts.items()}
    if data.packing:
        encoded["train"] = pack(encoded["train"], data.max_length)
    return TaskData(
        **parts_of(encoded),
        collator=collator,
        model_class="AutoModelForCausalLM",
        metric_name=metric,
        metrics={"validation": token_scores, "test": token_scores},
        fingerprint=fingerprint(splits.train, columns),
        preprocess_logits=causal_sums,
        greater_is_better=metric != "perplexity",
        packed=data.packing,
    )


def _encode(
    rows: Dataset,
    part: str,
    columns: PromptColumns,
    data: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatTemplate | None,
) -> Dataset:
    if columns.messages is not None:
        for row, messages in enumerate(rows[columns.messages]):
            check_conversation(clean_messages(messages), prompts.describe(part, row))
    for column, setting in ((columns.prompt, "prompt_column"), (columns.completion, "completion_column")):
        if column:
            rows = without_blank(rows, column, setting, part)
    encoded = encode(
        rows,
        _inputs,
        encode_row=_row_encoder(columns, tokenizer, chat),
        names=columns.names,
        max_length=data.max_length,
        completion_only=data.completion_only_loss,
    )
    return _drop_untrained(encoded, part, data.max_length)


def _row_encoder(
    columns: PromptColumns, tokenizer: PreTrainedTokenizerBase, chat: ChatTemplate | None
) -> Callable[[dict[str, Any]], Encoded]:
    """From a row to (token ids, 1 for each token of a completion)."""
    if columns.messages is not None:
        assert chat is not None
        return lambda row: chat.encode(clean_messages(row[str(columns.messages)]))
    if chat is not None:
        return lambda row: chat.encode(_as_messages(*columns.texts(row)))
    return lambda row: _prompt_and_completion(*columns.texts(row), tokenizer)


def prompt_encoder(
    columns: PromptColumns, data: DataSettings, tokenizer: PreTrainedTokenizerBase
) -> Callable[[dict[str, Any]], list[int]]:
    """From a row, whose completion is not looked at, to the token ids that a model goes on from."""
    if columns.messages is None and not data.use_chat_template:
        bare = without_closing(tokenizer)
        frame = frame_of(bare)
        # a space at the end is part of the first token that is generated
        return lambda row: framed_once(bare(_prompt(columns, row).rstrip(" "), verbose=False).input_ids, frame)
    chat = own_template(tokenizer)
    if columns.messages is None:
        return lambda row: chat.open_turn(_as_messages(_prompt(columns, row), "")[:1])
    return lambda row: chat.open_turn(unanswered(clean_messages(row[str(columns.messages)])))


def _prompt(columns: PromptColumns, row: dict[str, Any]) -> str:
    return columns.texts({name: row.get(name) for name in columns.names} | {columns.completion: ""})[0]


def _as_messages(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": completion.strip()}]


def _prompt_and_completion(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Tokens of the whole text; the completion starts where they differ from those of the prompt alone.

    A space at the end of the prompt thus becomes part of the first token of the completion, as when it is generated.
    """
    from trl.data_utils import common_prefix_length

    frame = frame_of(tokenizer)
    before, whole = (
        framed_once(tokenizer(text, verbose=False).input_ids, frame) for text in (prompt, prompt + completion)
    )
    ids = end_with_eos(whole, tokenizer)
    start = common_prefix_length(before, ids)
    return ids, [0] * start + [1] * (len(ids) - start)


def _inputs(
    batch: dict[str, list[Any]],
    encode_row: Callable[[dict[str, Any]], Encoded],
    names: list[str],
    max_length: int,
    completion_only: bool,
) -> dict[str, list[Any]]:
    inputs: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for cells in zip(*(batch[name] for name in names), strict=True):
        ids, trained = encode_row(dict(zip(names, cells, strict=True)))
        labels = [i if t or not completion_only else IGNORED_LABEL for i, t in zip(ids, trained, strict=True)]
        inputs["input_ids"].append(ids[:max_length])
        inputs["labels"].append(labels[:max_length])
    return inputs


def _drop_untrained(encoded: Dataset, part: str, max_length: int) -> Dataset:
    """Without the rows that have no label left to predict; the first token of a row is predicted from nothing."""
    kept = [row for row, labels in enumerate(encoded["labels"]) if any(i != IGNORED_LABEL for i in labels[1:])]
    dropped = len(encoded) - len(kept)
    if dropped == 0:
        return encoded
    reason = f"no token of the completion left within max_length={max_length}"
    if not kept:
        raise UserError(
            f"All {dropped} rows of the {PART_NAMES[part]} data have {reason}: their prompts alone are longer. "
            "Raise max_length, or shorten the prompts."
        )
    logger.warning(
        "%d of %d rows of the %s data have %s and are dropped. Raise max_length to keep them.",
        dropped,
        len(encoded),
        PART_NAMES[part],
        reason,
    )
    return encoded.select(kept)
