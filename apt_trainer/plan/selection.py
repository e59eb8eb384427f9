"""Which units stay: joint ranking of all kinds by score per cost, longest prefix within the budget (APT, Sec. 4.2).

Units of one space are grouped into chunks of ``round_to`` by falling score, so that a plan is a multiple of it by
construction. Pure function of scores and costs; not for measuring either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from apt_trainer.errors import UserError
from apt_trainer.models import Space
from apt_trainer.plan.cost import CostModel
from apt_trainer.plan.limits import Limits
from apt_trainer.plan.pruning_plan import PruningPlan


@dataclass(frozen=True)
class _Chunk:
    density: float
    order: int
    space: str
    units: int
    salience: float


def select(
    scores: Mapping[str, torch.Tensor],
    spaces: Sequence[Space],
    current: PruningPlan,
    cost: CostModel,
    budget: float,
    limits: Limits,
    scores_are_densities: bool = False,
) -> PruningPlan:
    """Plan of the most salient units whose cost is at most ``budget``.

    ``scores``: space → [units left] float, higher = keep. The ranking is by score / marginal cost at the current
    counts; chunks after the longest prefix that still fit are added in order. Raises :class:`UserError` when even
    the minimums exceed the budget.
    """
    counts = {space.name: limits.floor(space, current.counts[space.name]) for space in spaces}
    least = cost.total(counts)
    if least > budget:
        raise UserError(
            f"The budget allows a cost of {_amount(budget)}, but the least that prune_targets, min_heads, "
            f"min_neurons, min_hidden and round_to leave is {_amount(least)}. "
            "Lower target_sparsity, widen prune_targets or lower a minimum."
        )
    chunks = _chunks(scores, spaces, current, cost, limits, counts, scores_are_densities)
    for chunk in _within(chunks, counts, cost, budget):
        counts[chunk.space] += chunk.units
    positions = {}
    for space in spaces:
        if counts[space.name] < current.counts[space.name]:
            order = torch.sort(scores[space.name].double().cpu(), descending=True, stable=True).indices
            positions[space.name] = order[: counts[space.name]].sort().values
    return current.narrowed(positions)


def _chunks(
    scores: Mapping[str, torch.Tensor],
    spaces: Sequence[Space],
    current: PruningPlan,
    cost: CostModel,
    limits: Limits,
    floor: Mapping[str, int],
    scores_are_densities: bool,
) -> list[_Chunk]:
    """Everything above the floor, in groups, most salient per cost first; ties keep the order of the model."""
    chunks: list[_Chunk] = []
    for space in spaces:
        left = current.counts[space.name]
        if left == floor[space.name]:
            continue
        if not bool(torch.isfinite(scores[space.name]).all()):
            raise UserError(f"Scores of {space.name} are not finite. Lower the learning rate, or look at the data.")
        values = scores[space.name].double().cpu().sort(descending=True, stable=True).values
        core = 0 if floor[space.name] else limits.core(space, left)
        unit_cost = 1.0 if scores_are_densities else cost.marginal(space.name, current.counts)
        rest = values[floor[space.name] or core :]
        of_space = []
        for group in rest.split(limits.round_to[space.kind]) if len(rest) else ():
            density = float(group.mean()) / unit_cost if unit_cost > 0 else math.inf  # what costs nothing stays
            of_space.append((density, group))
        if core:
            group = values[:core]
            density = _core_density(group, space, current, cost, of_space, scores_are_densities)
            of_space.insert(0, (density, group))
        for density, group in of_space:
            chunks.append(_Chunk(density, len(chunks), space.name, len(group), float(group.sum())))
    return sorted(chunks, key=lambda chunk: (-chunk.density, chunk.order))


def _core_density(
    core: torch.Tensor,
    space: Space,
    current: PruningPlan,
    cost: CostModel,
    others: Sequence[tuple[float, torch.Tensor]],
    scores_are_densities: bool,
) -> float:
    """Score per cost of what goes last of a sublayer, fixed parts included; never below what has to go before it."""
    counts = current.counts
    saved = cost.total(counts | {space.name: len(core)}) - cost.total(counts | {space.name: 0})
    per_cost = float(core.sum()) / saved if saved > 0 else math.inf  # what costs nothing stays
    own = float(core.mean()) if scores_are_densities else per_cost
    return max([own, *(density for density, _ in others)])


def _within(chunks: Sequence[_Chunk], floor: Mapping[str, int], cost: CostModel, budget: float) -> Sequence[_Chunk]:
    """Longest prefix within the budget, then later chunks that still fit.

    A dear chunk at the border (eight hidden dimensions cross every layer) would leave much of the budget unused;
    the choice that keeps it in the place of cheaper ones is made too, and the one that keeps more salience wins.
    """
    without, border = _fill(chunks, floor, cost, budget)
    if border is None:
        return without
    counts = dict(floor)
    for chunk in border:
        counts[chunk.space] += chunk.units
    if cost.total(counts) > budget:
        return without
    forced = set(border)
    rest, _ = _fill([chunk for chunk in chunks if chunk not in forced], counts, cost, budget)
    instead = [*border, *rest]
    return max(without, instead, key=lambda chosen: sum(chunk.salience for chunk in chosen))


def _fill(
    chunks: Sequence[_Chunk], floor: Mapping[str, int], cost: CostModel, budget: float
) -> tuple[list[_Chunk], list[_Chunk] | None]:
    """(chosen chunks, the first chunk that was left out with all before it in its space)."""

    def counts_of(number: int) -> dict[str, int]:
        counts = dict(floor)
        for chunk in chunks[:number]:
            counts[chunk.space] += chunk.units
        return counts

    low, high = 0, len(chunks)
    while low < high:
        middle = (low + high + 1) // 2
        if cost.total(counts_of(middle)) <= budget:
            low = middle
        else:
            high = middle - 1
    if low == len(chunks):
        return list(chunks), None
    chosen, counts = list(chunks[:low]), counts_of(low)
    full: set[str] = set()
    for chunk in chunks[low:]:
        if chunk.space in full:
            continue
        counts[chunk.space] += chunk.units
        if cost.total(counts) <= budget:
            chosen.append(chunk)
        else:
            counts[chunk.space] -= chunk.units
            full.add(chunk.space)  # later chunks of a space are not smaller, but for its last one
    left_out = chunks[low]
    return chosen, [chunk for chunk in chunks[: low + 1] if chunk.space == left_out.space]


def _amount(cost: float) -> str:
    """Parameters, FLOPs and bytes without decimals; seconds with three digits."""
    return f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
