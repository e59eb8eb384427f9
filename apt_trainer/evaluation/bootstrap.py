"""Confidence intervals of means by resampling examples with replacement (percentile bootstrap).

They say how much a score would move with another draw of as many examples from the same source; not how much it moves
with another training seed, and not whether two models differ on the same examples. Where all examples are alike (none
or all right) the interval has no width and says too little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from apt_trainer.errors import UserError

RESAMPLES = 2000
CONFIDENCE = 0.95
_CELLS = 1 << 22  # resampled values held at a time


class Interval(NamedTuple):
    """Ends of a confidence interval."""

    low: float
    high: float


def mean_interval(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Interval of the weighted mean of ``values`` [n]; the same arguments give the same interval.

    Args:
        values: One number per example.
        weights: How much each example counts, for example its number of tokens; default: all alike.
        resamples: Draws of n examples.
        confidence: Share of the draws whose mean lies inside.
        seed: Of the draws.

    Raises:
        UserError: no values.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise UserError("There are no examples to draw a confidence interval from.")
    shares = np.ones_like(numbers) if weights is None else np.asarray(weights, dtype=np.float64)
    generator = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    rows = max(1, _CELLS // numbers.size)
    for start in range(0, resamples, rows):
        drawn = generator.integers(numbers.size, size=(min(rows, resamples - start), numbers.size))
        means.append((numbers * shares)[drawn].sum(axis=1) / shares[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(float(low), float(high))
