"""Confidence intervals of means, and of what follows from sums, by resampling examples with replacement (percentile
bootstrap).

They say how much a score would move with another draw of as many examples from the same source; not how much it moves
with another training seed, and not whether two models differ on the same examples. Where all examples are alike (none
or all right) the interval has no width and says too little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from apt_trainer.errors import UserError

RESAMPLES = 2000
CONFIDENCE = 0.95
CELLS = 1 << 22
"""Resampled values held at a time."""


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
    rows = max(1, CELLS // numbers.size)
    for start in range(0, resamples, rows):
        drawn = generator.integers(numbers.size, size=(min(rows, resamples - start), numbers.size))
        means.append((numbers * shares)[drawn].sum(axis=1) / shares[drawn].sum(axis=1))
    return interval_of(np.concatenate(means), confidence)


def summed_intervals(
    rows: np.ndarray,
    scores: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of scores that follow from sums over examples.

    Args:
        rows: What each example adds to the sums [n, numbers].
        scores: From the sums of some draws [draws, numbers], each score's name to its values [draws].
        resamples: Draws of n examples.
        confidence: Share of the draws whose score lies inside.
        seed: Of the draws.

    Raises:
        UserError: no examples.
    """
    n = len(rows)
    if n == 0:
        raise UserError("There are no examples to draw a confidence interval from.")
    generator = np.random.default_rng(seed)
    parts: list[Mapping[str, np.ndarray]] = []
    size = max(1, CELLS // n)
    for start in range(0, resamples, size):
        draws = min(size, resamples - start)
        drawn = generator.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n)  # how often each example is drawn
        parts.append(scores(times.astype(np.float64) @ rows))
    return {name: interval_of(np.concatenate([part[name] for part in parts]), confidence) for name in parts[0]}


def interval_of(draws: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """Ends of the interval that has the share ``confidence`` of ``draws`` in its middle."""
    low, high = np.quantile(draws, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(float(low), float(high))
