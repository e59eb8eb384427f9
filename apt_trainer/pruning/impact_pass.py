"""NRI of every sublayer that a model has, before it trains or at an event: forward passes over rows of training data.

One pass with all sublayers and one without each of them, no gradient, no dropout. The definition is that of
``scoring.sublayers.impact``, the loss the one that the model is going to be trained on. Losses are summed over what
they are means of (predicted tokens, else rows) and over processes, so that all see the same numbers whatever their
number. See ``plan.selection`` for choosing, ``scoring.calibration`` for scores from gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.measure import placed
from apt_trainer.models.class_weights import ClassWeights
from apt_trainer.models.shares import count
from apt_trainer.scoring import Reduce
from apt_trainer.scoring.calibration import NOT_FINITE, Batch
from apt_trainer.scoring.sublayers.costs import Shape, shares, unit_costs
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.impact import Impact
from apt_trainer.scoring.sublayers.loss import bounded_exp
from apt_trainer.scoring.sublayers.units import Unit, find_units
from apt_trainer.settings import PruningSettings


class ImpactPass:
    """Made from the plain dense ``model``: adapters that it gets later are no part of what its sublayers cost.

    ``candidates``: the sublayers that may go. ``cost``: "params", "memory", "latency" or "none"; ``costs``: that of
    each sublayer. Memory and seconds are those of a forward pass at ``reference_batch_size`` × ``reference_length``;
    seconds are measured here, unless the model is on the meta device, where there is nothing to time and nothing will
    be scored. Other processes measure others: see ``agreed_seconds``. ``timed_on``: where; default: where the
    model is. ``weights``: of the labels in the loss, if any.
    """

    weights: ClassWeights | None = None

    def __init__(self, model: Any, cost: str, settings: PruningSettings, timed_on: torch.device | None = None) -> None:
        self.model, self.cost, self.units = model, cost, find_units(model)
        self.candidates = [unit for unit in self.units.sublayers if unit not in self.units.protected]
        timeless = cost == "latency" and next(model.parameters()).is_meta
        shape = Shape(settings.reference_batch_size, settings.reference_length)
        with placed(model, timed_on if cost == "latency" else None):
            self.costs: Mapping[Unit, float] = unit_costs(model, self.units, "none" if timeless else cost, shape)

    def measure(
        self,
        batches: Iterable[Batch | None],
        loss_of: Callable[[Batch], torch.Tensor],
        reduce: Reduce,
        counts: Mapping[str, int] | None = None,
    ) -> dict[str, float]:
        """Space → NRI of its sublayer; infinite where the loss without it is not finite, or where it has to stay.

        Args:
            batches: This process' share; None: no rows are left for it, and it computes another batch once more, as
                all processes take part in a pass where an engine has split the model.
            loss_of: Mean loss of the model on a batch.
            reduce: Sum over processes.
            counts: Units left per space; sublayers without any are left out. Default: all are there.

        Raises:
            UserError: in all processes, when the loss of the whole model is not finite. Nothing is measured where no
                sublayer is left that could go.
        """
        device = next(self.model.parameters()).device
        left = [unit for unit in self.units.sublayers if counts is None or counts[self._space(unit)] > 0]
        candidates = [unit for unit in left if unit in self.candidates]
        if not candidates:
            return dict.fromkeys(map(self._space, left), math.inf)
        with torch.random.fork_rng(devices=[]), frozen(self.model):  # what follows does not depend on the batches
            shown = list(self._weighed(list(batches)))

            def total(off: Sequence[Unit]) -> torch.Tensor:
                """[Σ loss, what it was summed over] of this process."""
                sums = torch.zeros(2, dtype=torch.float64, device=device)
                with switched_off(self.model, self.units, off):
                    for batch, weight in shown:
                        loss = loss_of(batch).double()
                        sums += torch.stack([torch.where(weight > 0, loss * weight, 0.0), weight])
                return sums

            full = _mean(reduce(total(())))
            if not math.isfinite(full):
                raise UserError(NOT_FINITE)
            without = reduce(torch.stack([total([unit]) for unit in candidates]))
        share = shares(self.costs, self.units)
        found = dict.fromkeys(map(self._space, left), math.inf)
        for unit, sums in zip(candidates, without, strict=True):
            loss = _mean(sums)
            relative = math.expm1(loss - full) if math.isfinite(bounded_exp(loss - full)) else math.inf
            found[self._space(unit)] = Impact(unit, bounded_exp(loss), relative, share[unit]).normalised
        return found

    def _space(self, unit: Unit) -> str:
        return self.units.members[unit][0].space

    def _weighed(self, batches: Sequence[Batch | None]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch, and what its loss is a mean of: predicted tokens, rows, or the weights of labels; 0 for the
        batch that stands in for one that is not there."""
        spare = next((batch for batch in batches if batch is not None), None)
        for batch in batches:
            if batch is not None:
                yield batch, count(batch, self.units.family, self.model, self.weights)[0].double()
            elif spare is not None:
                yield spare, torch.zeros((), dtype=torch.float64, device=next(self.model.parameters()).device)


def _mean(sums: torch.Tensor) -> float:
    """Mean loss of [Σ loss, what it was summed over]; not a number where there was nothing to predict."""
    total, number = sums.tolist()
    return total / number if number else math.nan


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within it, neither dropout nor gradients; the modules then train as they did before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
