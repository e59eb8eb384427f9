"""Perplexity and accuracy per token, exact over rows and batches of any length, without keeping logits.

Each batch is reduced at once to three sums per row; what is divided at the end are sums over all rows. Not for losses:
a mean of batch means weighs short batches too much.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import EvalPrediction

from apt_trainer.tasks.base import IGNORED_LABEL, first_output


def causal_sums(predictions: Any, labels: torch.Tensor) -> torch.Tensor:
    """As :func:`aligned_sums` for decoders, where the logits at one position predict the token at the next."""
    return aligned_sums(first_output(predictions)[:, :-1], labels[:, 1:])


def aligned_sums(predictions: Any, labels: torch.Tensor) -> torch.Tensor:
    """[rows, 3] in float32: negative log-likelihood in nats, tokens, tokens predicted right.

    ``predictions``: logits [rows, tokens, vocabulary], or a tuple that starts with them; ``labels`` [rows, tokens],
    where IGNORED_LABEL counts for nothing.
    """
    logits = first_output(predictions)
    return torch.stack([_row_sums(row, row_labels) for row, row_labels in zip(logits, labels, strict=True)])


def _row_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of one row [tokens, vocabulary], so that what is copied in float32 is one row."""
    counted = labels != IGNORED_LABEL
    logits, labels = logits[counted], labels[counted]
    losses = functional.cross_entropy(logits.float(), labels, reduction="none")
    right = (logits.argmax(-1) == labels).sum()
    return torch.stack([losses.sum(), counted.sum().to(losses), right.to(losses)])


def token_scores(prediction: EvalPrediction) -> dict[str, float]:
    """``perplexity`` (exp of the mean negative log-likelihood per token) and ``token_accuracy``."""
    sums = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    if sums[1] == 0:
        return {"perplexity": float("nan"), "token_accuracy": float("nan")}
    return {"perplexity": float(np.exp(sums[0] / sums[1])), "token_accuracy": float(sums[2] / sums[1])}
