"""Which tokens of a batch are real: what observers weigh, and where predictions and hidden states are compared.

Reads the inputs of a model, not its weights. Not for making batches (``tasks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from apt_trainer.models.base import Stack
from apt_trainer.models.family import ModelFamily

Tokens: TypeAlias = torch.Tensor | Mapping[Stack, torch.Tensor | None] | None
"""[batch, length], 1 = real, for every stack of a model or per stack; None = all."""

IGNORED = -100
"""Label of a position that no loss counts."""


def real_tokens(inputs: Mapping[str, Any], family: ModelFamily) -> Tokens:
    """Real tokens of a batch. In a model with two stacks the decoder's are what it is to say: ``labels`` without
    the ignored ones, where there is one per token; else its mask; else (its inputs are the encoder's) the encoder's.
    """
    mask = inputs.get("attention_mask")
    if len(family.stacks) == 1:
        return mask
    if has_label_per_token(inputs):
        return {"encoder": mask, "decoder": inputs["labels"] != IGNORED}
    return {"encoder": mask, "decoder": inputs.get("decoder_attention_mask", mask)}


def has_label_per_token(inputs: Mapping[str, Any]) -> bool:
    """Whether ``labels`` are [batch, length], of classes; not one or, of a regression, several per row."""
    labels = inputs.get("labels")
    return labels is not None and labels.dim() == 2 and not torch.is_floating_point(labels)


def of_stack(tokens: Tokens, stack: Stack) -> torch.Tensor | None:
    """The mask of one stack."""
    return tokens.get(stack) if isinstance(tokens, Mapping) else tokens


def predicted_tokens(inputs: Mapping[str, Any], family: ModelFamily, model: nn.Module) -> torch.Tensor | None:
    """[batch, length of the logits], 1 where a prediction counts; None = everywhere.

    A causal language model predicts at position t the label of t + 1, so its last position counts never.
    """
    tokens = of_stack(real_tokens(inputs, family), family.stacks[-1].stack)
    labels = inputs.get("labels")
    if not family.head(model).next_token or labels is None:
        return tokens
    counted = torch.zeros_like(labels, dtype=torch.bool)
    counted[:, :-1] = labels[:, 1:] != IGNORED
    return counted
