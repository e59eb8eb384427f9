"""NRI of whole sublayers (``scoring.sublayers.impact``): harm of going without one, relative to its cost.

Measured right before each cut by forward passes over rows of training data: one with all sublayers and one without
each of them, no gradient, no dropout. The loss is the one that the model is trained on, summed over what it is a mean
of (predicted tokens, else rows) and over processes, so that all see the same numbers whatever their number.

Selection divides the score of a sublayer by what the budget saves without it, but NRI is a quotient already and must
not be divided twice. So the score is NRI times that saving: whatever ``nri_cost`` and ``sparsity_metric`` are, the
division gives NRI back, and where both count the same the score is the relative impact itself, up to a constant. Two
departures keep the sums sensible that selection compares: where removal helps (NRI below 0) all NRI are raised until
the least is 0, and a sublayer without which the model breaks down is worth more than all others together. Not for
heads and neurons, among which it cannot choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.measure import evaluating, placed
from apt_trainer.measure.likelihood import bounded_exp
from apt_trainer.models import Space
from apt_trainer.models.shares import count
from apt_trainer.scoring.base import Batch, Importance, Reduce
from apt_trainer.scoring.calibration import NOT_FINITE
from apt_trainer.scoring.sublayers.costs import Shape, shares, unit_costs
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.impact import Impact, relative_impact
from apt_trainer.scoring.sublayers.units import Unit, find_units
from apt_trainer.settings import PruningSettings


class Nri(Importance):
    """``cost``: by whose share impact is divided ("params", "latency", "memory" or "none").

    Memory and seconds are those of a forward pass at ``reference_batch_size`` × ``reference_length``. ``units``: of
    the model; ``candidates``: the sublayers that may go; ``costs``: that of each, adapters being no part of it.
    """

    scored = "cut"

    def __init__(self, cost: str = "params") -> None:
        self.cost = cost
        self._counts: dict[str, int] = {}
        self._impacts: dict[str, float] | None = None
        self._saved: dict[str, float] = {}

    @classmethod
    def from_settings(cls, settings: PruningSettings, seed: int) -> Nri:
        return cls(settings.nri_cost)

    def prepare(self, model: nn.Module, settings: PruningSettings, timed_on: torch.device | None = None) -> None:
        """Count or time what sublayers cost; on the meta device, where nothing will be scored, nothing is timed."""
        self.units = find_units(model)
        self.candidates = [unit for unit in self.units.sublayers if unit not in self.units.protected]
        timeless = self.cost == "latency" and next(model.parameters()).is_meta
        shape = Shape(settings.reference_batch_size, settings.reference_length)
        with placed(model, timed_on if self.cost == "latency" else None):
            self.costs = unit_costs(model, self.units, "none" if timeless else self.cost, shape)

    def seconds(self) -> list[float]:
        return list(self.costs.values()) if self.cost == "latency" else []

    def use_seconds(self, seconds: Sequence[float]) -> None:
        self.costs = dict(zip(self.costs, seconds, strict=True))

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self._counts = {space.name: counts[space.name] for space in spaces if counts[space.name] > 0}

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch | None],
        loss_of: Callable[[Batch], torch.Tensor],
        reduce: Reduce,
        counts: Mapping[str, int],
        saved: Mapping[str, float],
    ) -> None:
        """Measure the sublayers that are left. A process without rows computes another batch once more, as all take
        part in a pass where an engine has split the model.

        Raises:
            UserError: in all processes, when the loss of the whole model is not finite. Nothing is measured where no
                sublayer is left that could go.
        """
        device = next(model.parameters()).device
        left = [unit for unit in self.units.sublayers if counts[self.units.space(unit).name] > 0]
        candidates = [unit for unit in left if unit in self.candidates]
        found = {self.units.space(unit).name: math.inf for unit in left}
        if not candidates:
            self.take(found, saved)
            return
        with torch.random.fork_rng(devices=[]), evaluating(model, inference=False):  # the run does not depend on it
            shown = list(self._weighed(model, list(batches)))

            def total(off: Sequence[Unit]) -> torch.Tensor:
                """[Σ loss, what it was summed over] of this process."""
                sums = torch.zeros(2, dtype=torch.float64, device=device)
                with switched_off(model, self.units, off):
                    for batch, weight in shown:
                        loss = loss_of(batch).double()
                        sums += torch.stack([torch.where(weight > 0, loss * weight, 0.0), weight])
                return sums

            full = _mean(reduce(total(())))
            if not math.isfinite(full):
                raise UserError(NOT_FINITE)
            without = reduce(torch.stack([total([unit]) for unit in candidates]))
        share = shares(self.costs, self.units)
        for unit, sums in zip(candidates, without, strict=True):
            loss = _mean(sums)
            impact = Impact(unit, bounded_exp(loss), relative_impact(loss, full), share[unit])
            found[self.units.space(unit).name] = impact.normalised
        self.take(found, saved)

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
            name: torch.full((number,), densities[name] * self._saved[name] / number, dtype=torch.float64)
            for name, number in self._counts.items()
        }

    def check_kept(self, counts: Mapping[str, int]) -> None:
        broken = [name for name, value in (self._impacts or {}).items() if math.isinf(value) and counts[name] == 0]
        if broken:
            raise UserError(
                f"The loss of the model without {broken[0]} is not finite, but the budget cannot be met by others "
                "alone. Lower target_sparsity, or look at the model's dtype."
            )

    def describe(self, rows: int) -> str:
        passes = 1 + len(self.candidates)
        return f"{super().describe(rows)} in {passes} passes (whole, and without each sublayer)"

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

    def _weighed(self, model: nn.Module, batches: Sequence[Batch | None]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch, and what its loss is a mean of: predicted tokens, rows, or the weights of labels; 0 for the
        batch that stands in for one that is not there."""
        spare = next((batch for batch in batches if batch is not None), None)
        for batch in batches:
            if batch is not None:
                yield batch, count(batch, self.units.family, model, self.class_weights)[0].double()
            elif spare is not None:
                yield spare, torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)


def _mean(sums: torch.Tensor) -> float:
    """Mean loss of [Σ loss, what it was summed over]; not a number where there was nothing to predict."""
    total, number = sums.tolist()
    return total / number if number else math.nan
