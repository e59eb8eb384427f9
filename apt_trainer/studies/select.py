"""Which units to drop: a ranking by harm, a budget, and whether to rank anew after each drop.

A ranker orders candidates, least harmful first, given what is dropped already. Joint drops rank attentions and
feed-forwards in one list; consecutive ones choose the run of layers whose input and output are most alike.
Not for dropping (``drop``).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models import Stack
from apt_trainer.scoring.sublayers.cosine import Batch, Watch, cosine_scores, unwatched
from apt_trainer.scoring.sublayers.impact import Losses, impacts
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.studies.choices import KINDS, STRATEGIES

_EXACT = 1e-9  # a fraction that is met up to rounding is met


@dataclass(frozen=True)
class Ranked:
    """``score``: harm by which the unit was ranked, None where there is no number; ``details``: for the report."""

    unit: Unit
    score: float | None
    details: dict[str, Any] = field(default_factory=dict)


class Ranker(Protocol):
    def rank(self, candidates: Sequence[Unit], dropped: Sequence[Unit]) -> list[Ranked]:
        """``candidates``, least harmful first, for the model without ``dropped``."""


@dataclass
class CosineRanker:
    """Least change of the residual stream first; equals stay in the order of the layers."""

    model: nn.Module
    units: Units
    batches: Sequence[Batch]
    watch: Watch = unwatched

    def rank(self, candidates: Sequence[Unit], dropped: Sequence[Unit]) -> list[Ranked]:
        found = cosine_scores(self.model, self.units, self.batches, off=dropped, watch=self.watch).scores
        return [Ranked(unit, found[unit]) for unit in sorted(candidates, key=found.__getitem__)]


@dataclass
class ImpactRanker:
    """Least normalised relative impact first (``impact``)."""

    losses: Losses
    share: Mapping[Unit, float]
    baseline: str = "current"
    watch: Watch = unwatched

    def rank(self, candidates: Sequence[Unit], dropped: Sequence[Unit]) -> list[Ranked]:
        found = impacts(self.losses, candidates, dropped, self.share, self.baseline, self.watch)
        return [
            Ranked(one.unit, one.normalised, {"relative_impact": one.relative, "share": one.share, "loss": one.loss})
            for one in sorted(found, key=lambda one: one.order)
        ]


@dataclass
class ReverseRanker:
    """Last unit of the forward pass first: the baseline that costs nothing."""

    units: Units

    def rank(self, candidates: Sequence[Unit], dropped: Sequence[Unit]) -> list[Ranked]:
        place = {unit: i for i, unit in enumerate(self.units.every)}
        return [Ranked(unit, None) for unit in sorted(candidates, key=place.__getitem__, reverse=True)]


@dataclass
class RandomRanker:
    """Any order, the same for the same ``seed``."""

    seed: int = 0

    def rank(self, candidates: Sequence[Unit], dropped: Sequence[Unit]) -> list[Ranked]:
        order = list(candidates)
        random.Random(self.seed).shuffle(order)
        return [Ranked(unit, None) for unit in order]


@dataclass(frozen=True)
class Budget:
    """How much to drop: ``count`` units, or units until their ``share`` adds up to ``fraction``.

    ``units``: those of the model; needed for heads, of which some attentions keep one, and the last of which takes
    along what its attention has besides. ``even``: all attentions lose as many heads.
    """

    count: int | None = None
    fraction: float | None = None
    share: Mapping[Unit, float] = field(default_factory=dict)
    units: Units | None = None
    even: bool = False

    def __post_init__(self) -> None:
        if (self.count is None) == (self.fraction is None):
            raise UserError("Give how much to drop: count (units) or fraction (0 to 1), one of them.")
        if self.count is not None and self.count < 1:
            raise UserError(f"count={self.count} must be at least 1.")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise UserError(f"fraction={self.fraction} must lie between 0 and 1, both excluded.")

    def met(self, dropped: Sequence[Unit]) -> bool:
        if len(set(self._lost_heads(dropped).values())) > 1:
            return False
        if self.count is not None:
            return len(dropped) >= self.count
        assert self.fraction is not None
        return self._sum(dropped) >= self.fraction - _EXACT

    def _sum(self, dropped: Sequence[Unit]) -> float:
        return sum(self.share[unit] for unit in (dropped if self.units is None else self.units.parts(dropped)))

    def _lost_heads(self, dropped: Sequence[Unit]) -> dict[Unit, int]:
        """Attention → heads dropped of it, where these have to be as many in each."""
        if self.units is None or not self.even:
            return {}
        lost = dict.fromkeys(self.units.heads.values(), 0)
        for unit in dropped:
            if unit.head is not None:
                lost[self.units.heads[unit]] += 1
        return lost

    def left(self, candidates: Sequence[Unit], dropped: Sequence[Unit]) -> tuple[Unit, ...]:
        """Those of ``candidates`` that may still go after ``dropped``."""
        if self.units is not None:
            lost = self._lost_heads(dropped)
            free = self.units.free(candidates, dropped)
            if not lost:
                return free
            least = min(lost.values())
            return tuple(u for u in free if u.head is None or lost[self.units.heads[u]] == least)
        return tuple(unit for unit in candidates if unit not in dropped)

    def check(self, candidates: Sequence[Unit], kind: str) -> None:
        """Raise :class:`UserError` when all ``candidates`` together are too few."""
        candidates = candidates if self.units is None else self.units.together(candidates)
        if self.met(candidates):
            return
        if self.count is not None:
            raise UserError(f"count={self.count} is more than the {len(candidates)} units of kind {kind!r}.")
        most = self._sum(candidates)
        raise UserError(f"fraction={self.fraction} cannot be met: all units of kind {kind!r} make up {most:.3f}.")


@dataclass(frozen=True)
class Choice:
    """``units`` in the order they were chosen; ``steps``: the rankings behind it, one, or one per unit."""

    units: tuple[Unit, ...]
    steps: tuple[tuple[Ranked, ...], ...]


def candidates_of(units: Units, kind: str, protect: Sequence[int] = ()) -> tuple[Unit, ...]:
    """Units that a drop of ``kind`` may choose from; ``protect``: layers that stay, negative ones from the end."""
    if kind not in KINDS:
        raise unknown_choice("kind", kind, KINDS)
    for layer in protect:
        if not any(-units.layers(stack) <= layer < units.layers(stack) for stack in units.stacks):
            raise UserError(f"protect={layer} is no layer of the model, which has {units.layers(units.stacks[0])}.")
    staying = {(stack, layer % units.layers(stack)) for stack in units.stacks for layer in protect}
    found = units.free((unit for unit in units.of(kind) if (unit.stack, unit.layer) not in staying), ())
    if not found:
        raise UserError(f"The model has no unit of kind {kind!r} that may be dropped. Protect fewer layers.")
    return found


def choose(
    candidates: Sequence[Unit], kind: str, budget: Budget, ranker: Ranker, strategy: str = "one_shot"
) -> Choice:
    """Units to drop, by rank. ``iterative`` ranks anew after each; no unit is chosen twice."""
    if strategy not in STRATEGIES:
        raise unknown_choice("strategy", strategy, STRATEGIES)
    budget.check(candidates, kind)
    dropped: list[Unit] = []
    steps: list[tuple[Ranked, ...]] = []
    while not budget.met(dropped):
        left = budget.left(candidates, dropped)
        if strategy == "iterative" or not steps:
            steps.append(tuple(ranker.rank(left, dropped)))
        may_go = set(left)
        dropped.append(next(one.unit for one in steps[-1] if one.unit in may_go))
    return Choice(tuple(dropped), tuple(steps))


def consecutive_runs(
    candidates: Sequence[Unit], budget: Budget, similarity: Mapping[Stack, torch.Tensor]
) -> list[list[Ranked]]:
    """Runs of neighbouring layers of the smallest length that can meet ``budget``, most alike ends first.

    ``similarity`` per stack as ``scoring.sublayers.cosine.CosineScores`` has it: a run of n layers from i takes the
    stream from the input of layer i to that of layer i + n, so its entry is [i, i + n]. Every run is ranked by 1 −
    that cosine, which each of its units carries.
    """
    budget.check(candidates, "consecutive")
    for length in range(1, len(candidates) + 1):
        runs = [run for run in _runs(candidates, length, budget.units) if budget.met(run)]
        if runs:
            scored = [(1.0 - float(similarity[run[0].stack][run[0].layer, run[-1].layer + 1]), run) for run in runs]
            scored.sort(key=lambda pair: pair[0])
            return [[Ranked(unit, score) for unit in run] for score, run in scored]
    raise UserError("No run of neighbouring layers is long enough: protected layers part them. Drop fewer.")


def _runs(candidates: Sequence[Unit], length: int, units: Units | None) -> list[list[Unit]]:
    """Runs of ``length``; layers between which all others are gone are neighbours."""
    place = {unit: unit.layer for unit in candidates}
    if units is not None:
        place = {unit: number for number, unit in enumerate(units.of("block"))}
    found = []
    for unit in candidates:
        run = [other for other in candidates if other.stack == unit.stack and 0 <= place[other] - place[unit] < length]
        if len(run) == length:
            found.append(run)
    return found


def choose_consecutive(candidates: Sequence[Unit], budget: Budget, similarity: Mapping[Stack, torch.Tensor]) -> Choice:
    """The run of layers whose input and output are most alike, the first of equals."""
    runs = consecutive_runs(candidates, budget, similarity)
    return Choice(tuple(ranked.unit for ranked in runs[0]), tuple(tuple(run) for run in runs))
