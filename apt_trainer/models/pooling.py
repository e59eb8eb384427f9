"""From the hidden states of a text to one vector: the embedding that a model without a head gives.

Not for the losses of embeddings, nor for batches of several texts a row (``tasks.embedding``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional as F


def mean_pooling(hidden: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
    """Normalised mean [B, d] of hidden states [B, S, d] over real tokens, in float32.

    Args:
        hidden: Of the last layer.
        inputs: Of the forward pass; ``attention_mask`` [B, S] is 1 at real tokens, without one all are.

    Source: Reimers and Gurevych, Sentence-BERT (EMNLP 2019), Sec. 3.
    """
    hidden = hidden.float()
    mask = inputs.get("attention_mask")
    if mask is None:
        return F.normalize(hidden.mean(1), dim=-1)
    real = mask.to(hidden.device).unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * real).sum(1) / real.sum(1).clamp(min=1), dim=-1)
