"""NRI of whole sublayers (``scoring.sublayers.impact``): harm of going without one, relative to its cost.

Losses are not this file's: each takes a pass over the data, which ``impact_pass`` makes before the first step or at
each event. Here they become scores. Selection divides the score of a sublayer by what the budget saves without it, but
NRI is a quotient already and must not be divided twice. So the score is NRI times that saving: whatever ``nri_cost``
and ``sparsity_metric`` are, the division gives NRI back, and where both count the same the score is the relative
impact itself, up to a constant. Two departures keep the sums sensible that selection compares: where removal helps
(NRI below 0) all NRI are raised until the least is 0, and a sublayer without which the model breaks down is worth more
than all others together. Not for heads and neurons, among which it cannot choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models import Space
from apt_trainer.scoring.base import Importance


class Nri(Importance):
    """``cost``: by whose share impact is divided ("params", "latency", "memory" or "none")."""

    def __init__(self, cost: str = "params") -> None:
        self.cost = cost
        self._counts: dict[str, int] = {}
        self._impacts: dict[str, float] | None = None
        self._saved: dict[str, float] = {}

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self._counts = {space.name: counts[space.name] for space in spaces if counts[space.name] > 0}

    def take(self, impacts: Mapping[str, float], saved: Mapping[str, float]) -> None:
        """What was measured.

        Args:
            impacts: Space → NRI of its sublayer; infinite where the model breaks down without it, or has to keep it.
            saved: Space → what its sublayer saves of the budget, in the unit of ``sparsity_metric``.
        """
        self._impacts, self._saved = dict(impacts), dict(saved)

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Space → [units left] float64, equal shares of the score of the sublayer."""
        if self._impacts is None:
            raise UserError(
                "NRI has not been measured since the last cut. In a loop of your own call AdaptivePruner.calibrate "
                "before the first step where pruning_time is before, else AdaptivePruner.measure_impact before each "
                "event."
            )
        densities = self._densities(self._impacts)
        return {
            name: torch.full((count,), densities[name] * self._saved[name] / count, dtype=torch.float64)
            for name, count in self._counts.items()
        }

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        """What was measured is of the model before the cut."""
        self._impacts = None

    def _densities(self, impacts: Mapping[str, float]) -> dict[str, float]:
        """Space → NRI from 0 on, finite: score per saving of the budget."""
        finite = {name: value for name, value in impacts.items() if math.isfinite(value)}
        lift = -min([0.0, *finite.values()])
        raised = {name: value + lift for name, value in finite.items()}
        together = sum(value * self._saved[name] for name, value in raised.items())
        least = min((saved for saved in self._saved.values() if saved > 0), default=1.0)
        staying = 1.0 + max([together / least, *raised.values()])
        return {name: raised.get(name, staying) for name in impacts}

    def check_kept(self, counts: Mapping[str, int]) -> None:
        broken = [name for name, value in (self._impacts or {}).items() if math.isinf(value) and counts[name] == 0]
        if broken:
            raise UserError(
                f"The loss of the model without {broken[0]} is not finite, but the budget cannot be met by others "
                "alone. Lower target_sparsity, or look at the model's dtype."
            )
