"""Which adapters grow, and to which rank, so that tuning parameters meet a budget (APT, Sec. 4.3).

Pure functions of importance and sizes. Not for changing layers (``surgery.adapters``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterSize:
    """``width`` = in_features + out_features of the linear, so an adapter holds rank · width parameters."""

    path: str
    rank: int
    width: int

    @property
    def parameters(self) -> int:
        return self.rank * self.width


def mean_growth(old: Mapping[str, int], new: Mapping[str, int]) -> float:
    """Factor by which the mean rank rises when adapters go from ranks ``old`` to ``new`` (those that grow)."""
    total = sum(old.values())
    return 1.0 + sum(rank - old[path] for path, rank in new.items()) / total if total else 1.0


def allocate(
    sizes: Sequence[AdapterSize],
    importance: Mapping[str, float],
    budget: float,
    max_rank: int,
    growth: str = "salience",
    rule: str = "fill_budget",
) -> dict[str, int]:
    """New rank per adapter that grows; ranks never shrink and never exceed ``max_rank``.

    ``budget``: adapter parameters allowed in total. ``growth``: "salience" lets the more important half grow,
    "uniform" all, "none" nothing. ``rule`` for the top half: "fill_budget" gives it the whole increase (official
    code), "paper" multiplies its ranks by budget / current.
    """
    current = sum(size.parameters for size in sizes)
    if growth == "none" or not sizes or budget <= current:
        return {}
    growing = [size for size in sizes if size.rank < max_rank]
    if growth == "salience":
        growing = sorted(growing, key=lambda size: -importance[size.path])[: max(1, len(sizes) // 2)]
    if not growing:
        return {}
    if growth == "uniform" or rule == "paper":
        rate = budget / current
    else:
        rate = 1 + (budget - current) / sum(size.parameters for size in growing)
    new = {size.path: min(int(size.rank * rate + 1e-9), max_rank) for size in growing}
    return {size.path: new[size.path] for size in growing if new[size.path] > size.rank}
