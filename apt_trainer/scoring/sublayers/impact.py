"""NRI (apt_trainer definition): how much worse a model gets without a unit, relative to what the unit costs.

With D dropped already and P the perplexity (exp of the mean loss for other heads) on fixed batches:
RI(u | D) = (P(D ∪ {u}) − P(base)) / P(base), base = D ("current") or nothing ("dense"), and NRI = RI / share of u in
the cost of all sublayers. Where removal helps (RI ≤ 0) the unit comes before all others and RI is multiplied by the
share instead: dividing would favour small units. Numbers are not those of the paper that the idea is from
("Rethinking the Impact of Heterogeneous Sublayers in Transformers"), whose exact scaling is not public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from apt_trainer.measure.likelihood import bounded_exp
from apt_trainer.scoring.sublayers.cosine import Batch, Watch, unwatched
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.loss import exp_loss
from apt_trainer.scoring.sublayers.units import Unit, Units

Key = tuple[str, ...]
"""Sorted names of the sublayers and heads that are off."""


@dataclass(frozen=True)
class Impact:
    """``loss``: P without the unit; ``relative``: RI; ``normalised``: NRI; ``share``: of its cost."""

    unit: Unit
    loss: float
    relative: float
    share: float

    @property
    def normalised(self) -> float:
        return self.relative * self.share if self.relative <= 0 else self.relative / self.share

    @property
    def order(self) -> tuple[bool, float]:
        """Sorts the least harmful first."""
        return (self.relative > 0, self.normalised)


def relative_impact(without: float, base: float) -> float:
    """RI of a unit by the mean losses in nats without it and of the base; infinite where one of them is not finite."""
    difference = without - base
    return math.expm1(difference) if math.isfinite(base) and math.isfinite(bounded_exp(difference)) else math.inf


class Losses:
    """P of a model without any units, each set measured once.

    ``known``: what has been measured before; ``record`` is told of every new value, so that a run can go on later.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Units,
        batches: Sequence[Batch],
        known: Mapping[Key, float] | None = None,
        record: Callable[[Key, float], None] = lambda key, value: None,
    ) -> None:
        self._model, self._units, self._batches, self._record = model, units, batches, record
        self._known = dict(known or {})

    def key(self, off: Iterable[Unit]) -> Key:
        return tuple(sorted(unit.name for unit in self._units.parts(off)))

    def without(self, off: Iterable[Unit]) -> float:
        """P without the units ``off``."""
        off = tuple(off)
        key = self.key(off)
        if key not in self._known:
            with switched_off(self._model, self._units, off):
                self._known[key] = exp_loss(self._model, self._units, self._batches)
            self._record(key, self._known[key])
        return self._known[key]

    def measure(self, sets: Sequence[tuple[Unit, ...]], watch: Watch) -> None:
        """Measure what is not known yet of ``sets``, showing progress over that alone."""
        for off in watch([off for off in sets if self.key(off) not in self._known], "impact"):
            self.without(off)


def impacts(
    losses: Losses,
    candidates: Sequence[Unit],
    dropped: Sequence[Unit],
    share: Mapping[Unit, float],
    baseline: str = "current",
    watch: Watch = unwatched,
) -> list[Impact]:
    """Impact of each of ``candidates`` on the model without ``dropped``, in their order."""
    losses.measure([(), tuple(dropped), *((*dropped, unit) for unit in candidates)], watch)
    base = losses.without(() if baseline == "dense" else dropped)
    found = []
    for unit in candidates:
        loss = losses.without((*dropped, unit))
        relative = relative_impact(math.log(loss), math.log(base))
        found.append(Impact(unit, loss, relative, share[unit]))
    return found
