"""Rows of token ids as batches for a decoder: cut into blocks, packed, padded or laid end to end.

Packing and collating are TRL's; it is imported when a task needs it, since that takes seconds. Not for what is in a
row: that is the task's module.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apt_trainer.settings.packages import TRL, require
from apt_trainer.tasks.text_windows import cut

_IN_MEMORY = {"keep_in_memory": True, "load_from_cache_file": False}


def cut_into_blocks(rows: Dataset, length: int, opening: Sequence[int] = ()) -> Dataset:
    """All ``input_ids`` one after the other, in blocks of ``length`` tokens that begin with ``opening``.

    The last block may be shorter; one that predicts nothing is left out.
    """
    tokens = np.concatenate([chunk.flatten().to_numpy() for chunk in rows.data.column("input_ids").chunks])
    return Dataset.from_dict({"input_ids": [block.ids for block in cut(tokens, length, opening)]})


def pack(rows: Dataset, length: int) -> Dataset:
    """Whole rows side by side, at most ``length`` tokens together, with ``position_ids`` that restart at each row."""
    from trl.data_utils import pack_dataset

    packed = pack_dataset(rows, length, "bfd", map_kwargs=_IN_MEMORY)
    return packed.map(_positions, batched=True, remove_columns=["seq_lengths"], **_IN_MEMORY)


def _positions(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {"position_ids": [[i for length in lengths for i in range(length)] for lengths in batch["seq_lengths"]]}


class DecoderCollator:
    """Pads rows on the right, with labels equal to the inputs where a row has none.

    Packed rows (those with ``position_ids``) become one row without padding and without attention mask: from positions
    that restart, models tell which tokens belong together, if nothing is cached. The first token of a sequence is no
    label there, since what stands before it is another sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None) -> None:
        require(TRL, "Training a decoder on texts")
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        self._pad = DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=pad_to_multiple_of)
        self._flatten = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "position_ids" not in rows[0]:
            return dict(self._pad(rows))
        batch = self._flatten([row | {"seq_lengths": _lengths(row["position_ids"])} for row in rows])
        return {name: batch[name] for name in ("input_ids", "labels", "position_ids")} | {"use_cache": False}


def _lengths(positions: list[int]) -> list[int]:
    starts = [i for i, position in enumerate(positions) if position == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


@torch.no_grad()
def keeps_sequences_apart(model: PreTrainedModel) -> bool:
    """Whether what stands before a restart of the positions changes nothing after it; tried out on ``model``.

    With eager attention, which runs on every device: what masks or splits the sequences is shared by all back ends.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    device, was_training, attention = model.device, model.training, model.config._attn_implementation
    model.set_attn_implementation("eager")
    ids = torch.tensor([[3, 4, 5, 3, 5], [4, 3, 6, 3, 5]], device=device)
    positions = torch.tensor([[0, 1, 2, 0, 1]], device=device)
    model.eval()
    first, second = (model(input_ids=row[None], position_ids=positions, use_cache=False).logits[:, 3:] for row in ids)
    model.train(was_training)
    model.set_attn_implementation(attention)
    return bool(torch.equal(first, second))
