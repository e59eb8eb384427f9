"""Negative log-likelihoods of tokens, summed exactly, and the perplexity that a mean of them gives."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional

LARGEST = 700.0
"""Mean loss in nats of which the exp is a float; of more it is none."""
_ROWS = 256  # positions whose logits are widened to float32 at a time


def summed_loss(logits: Tensor, targets: Tensor) -> float:
    """Σ cross-entropy in nats of logits [n, vocabulary] and targets [n], each in float32, their sum in float64."""
    total = 0.0
    for part, wanted in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True):
        total += float(functional.cross_entropy(part.float(), wanted, reduction="none").double().sum())
    return total


def bounded_exp(mean: float) -> float:
    """exp of a loss; infinite where that is no float, and where the loss is not a number."""
    return math.exp(mean) if mean < LARGEST else math.inf
