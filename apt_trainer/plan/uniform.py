"""Plans of equal layers: every layer keeps as many heads and as many neurons as every other, or is gone as a whole.

Of all numbers of layers, heads and neurons per layer and hidden dimensions that the budget allows, those are taken
whose units have the largest sum of scores; which units these are differs from layer to layer. Pure function of scores
and costs. Not for what a stock config can say of such a plan (``store.stock``).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from apt_trainer.models import HIDDEN, Space, Stack
from apt_trainer.plan.cost import CostModel
from apt_trainer.plan.limits import LEAST_DEPTH, Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.selection import budget_too_small, falling, finite

_KINDS = ("heads", "neurons", HIDDEN)


@dataclass(frozen=True)
class Layer:
    """One layer of a stack: the spaces in it. ``stays``: it cannot go as a whole."""

    stack: Stack
    spaces: tuple[str, ...]
    stays: bool = False


@dataclass(frozen=True)
class UniformShape:
    """What plans of equal layers have to keep to. ``layers``: all of the dense model, in their order.

    ``allowed(heads, hidden)``: whether a model may have so many heads per layer beside so many hidden dimensions.
    """

    layers: tuple[Layer, ...]
    allowed: Callable[[int, int], bool]

    def select(
        self,
        scores: Mapping[str, torch.Tensor],
        spaces: Sequence[Space],
        current: PruningPlan,
        cost: CostModel,
        budget: float,
        limits: Limits,
        scores_are_densities: bool = False,
    ) -> PruningPlan:
        """Plan of equal layers whose cost is at most ``budget``; arguments and errors as ``selection.select``.

        ``current`` is a plan of equal layers too. Layers go by the sum of the scores of all their units, per cost.
        """
        values = _values(scores, spaces, current, cost, limits, scores_are_densities)
        choice = _Choice(self, spaces, current, cost, limits, values)
        counts = choice.best(budget)
        if counts is None:
            raise budget_too_small(budget, cost.total(choice.least()))
        if cost.total(counts) > budget:  # sums of the same numbers in another order
            counts = choice.best(budget * (1 - 1e-12)) or counts
        positions = {}
        for space in spaces:
            if counts[space.name] < current.counts[space.name]:
                _, order = falling(scores[space.name])
                positions[space.name] = order[: counts[space.name]].sort().values
        return current.narrowed(positions)

    def least(
        self, spaces: Sequence[Space], current: PruningPlan, cost: CostModel, limits: Limits
    ) -> Mapping[str, int]:
        """Units per space of the cheapest plan below ``current``."""
        flat = {name: torch.ones(number, dtype=torch.float64) for name, number in current.counts.items()}
        return _Choice(self, spaces, current, cost, limits, flat).least()


def _values(
    scores: Mapping[str, torch.Tensor],
    spaces: Sequence[Space],
    current: PruningPlan,
    cost: CostModel,
    limits: Limits,
    scores_are_densities: bool,
) -> dict[str, torch.Tensor]:
    """What each unit adds to a plan, never below 0: more units are never worth less. 0 where nothing may go."""
    found = {}
    for space in spaces:
        number = current.counts[space.name]
        if space.kind not in limits.kinds or not number:
            found[space.name] = torch.zeros(number, dtype=torch.float64)
            continue
        found[space.name] = finite(scores[space.name], space.name)
    for kind in _KINDS:
        names = [space.name for space in spaces if space.kind == kind]
        lowest = min((float(found[name].min()) for name in names if len(found[name])), default=0.0)
        for name in names:
            found[name] = found[name] - min(0.0, lowest)
            if scores_are_densities:
                found[name] = found[name] * cost.marginal(name, current.counts)
    return found


class _Choice:
    """The numbers that a plan below ``current`` may have, what they cost and what their units are worth."""

    def __init__(
        self,
        shape: UniformShape,
        spaces: Sequence[Space],
        current: PruningPlan,
        cost: CostModel,
        limits: Limits,
        values: Mapping[str, torch.Tensor],
    ) -> None:
        self.shape, self.spaces, self.current, self.cost, self.limits = shape, spaces, current, cost, limits
        self.values = values
        self.kinds = {space.name: space.kind for space in spaces}
        self.alive = [layer for layer in shape.layers if any(current.counts[name] for name in layer.spaces)]
        self.numbers = {kind: self._numbers(kind) for kind in _KINDS}

    def best(self, budget: float) -> dict[str, int] | None:
        """Units per space of the plan of most value within ``budget``; None: there is none. The first of equals, the
        more layers, heads and dimensions the earlier."""
        best, found = -math.inf, None
        heads, hidden = self._pairs
        for layers in self._kept_layers():
            worth = {kind: self._worth(kind, layers) for kind in _KINDS}
            place = self._most_neurons(layers, heads, hidden, budget)
            neurons = self.numbers["neurons"][place.clamp(min=0)]
            total = worth["heads"][heads] + worth["neurons"][neurons] + worth[HIDDEN][hidden]
            total = torch.where(place >= 0, total, -math.inf)
            chosen = self._first_allowed(heads, hidden, total, best)
            if chosen is not None:
                best = float(total[chosen])
                found = self._counts(layers, int(heads[chosen]), int(neurons[chosen]), int(hidden[chosen]))
        return found

    def least(self) -> dict[str, int]:
        """Units per space of the cheapest plan of all."""
        layers = min(self._kept_layers(), key=len)
        neurons = int(self.numbers["neurons"][0])
        heads, hidden = self._pairs
        fixed, slope = self._costs(layers, heads, hidden)
        chosen = self._first_allowed(heads, hidden, -(fixed + slope * neurons), -math.inf)
        assert chosen is not None, "the dense model is not allowed"
        return self._counts(layers, int(heads[chosen]), neurons, int(hidden[chosen]))

    # ------------------------------------------------------------------ inside

    @cached_property
    def _pairs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(heads per layer, hidden dimensions) of every pair, the largest first."""
        pairs = torch.cartesian_prod(self.numbers["heads"].flip(0), self.numbers[HIDDEN].flip(0))
        return pairs[:, 0], pairs[:, 1]

    def _first_allowed(
        self, heads: torch.Tensor, hidden: torch.Tensor, total: torch.Tensor, above: float
    ) -> int | None:
        """Place of the largest ``total`` that is more than ``above`` and whose pair is allowed; of equals the first.
        Asks for no more pairs than it has to: to ask takes a config."""
        for place in total.argsort(descending=True, stable=True).tolist():
            if not float(total[place]) > above:
                return None
            if self.shape.allowed(int(heads[place]), int(hidden[place])):
                return int(place)
        return None

    def _numbers(self, kind: str) -> torch.Tensor:
        """Ascending numbers of units of ``kind`` that each layer that stays may keep."""
        names = {name for layer in self.alive for name in layer.spaces} | {HIDDEN}
        members = [space for space in self.spaces if space.kind == kind and space.name in names]
        left = min(self.current.counts[space.name] for space in members)
        if kind not in self.limits.targets:
            return torch.tensor([left])
        multiple = self.limits.round_to[kind]
        least = max(self.limits.core(space, left) for space in members) or min(left, multiple)
        return torch.tensor(sorted({*range(least, left, multiple), left}))

    def _kept_layers(self) -> Iterator[list[Layer]]:
        """Every choice of layers: all that are left, then without those worth least per cost, per stack."""
        if not self.limits.sublayers:
            yield self.alive
            return
        per_stack: list[list[list[Layer]]] = []
        for stack in dict.fromkeys(layer.stack for layer in self.alive):
            members = [layer for layer in self.alive if layer.stack == stack]
            going = [layer for layer in reversed(members) if not layer.stays]  # of equals the last goes first
            going.sort(key=self._density)
            least = math.ceil(sum(layer.stack == stack for layer in self.shape.layers) / LEAST_DEPTH)
            most = max(0, min(len(going), len(members) - least))
            per_stack.append([[la for la in members if la not in going[:gone]] for gone in range(most + 1)])
        for chosen in itertools.product(*per_stack):
            yield [layer for layers in chosen for layer in layers]

    def _density(self, layer: Layer) -> float:
        counts = self.current.counts
        saved = self.cost.total(counts) - self.cost.total(counts | dict.fromkeys(layer.spaces, 0))
        worth = sum(float(self.values[name].sum()) for name in layer.spaces)
        return worth / saved if saved > 0 else math.inf

    def _worth(self, kind: str, layers: Sequence[Layer]) -> torch.Tensor:
        """Sum of the values of the best 0, 1, … units of ``kind`` in each of ``layers`` together."""
        names = [HIDDEN] if kind == HIDDEN else [n for layer in layers for n in layer.spaces if self.kinds[n] == kind]
        return torch.stack([self._prefix_sums[name] for name in names]).sum(0)

    @cached_property
    def _prefix_sums(self) -> dict[str, torch.Tensor]:
        zero = torch.zeros(1, dtype=torch.float64)
        return {name: torch.cat([zero, falling(values)[0].cumsum(0)]) for name, values in self.values.items()}

    def _most_neurons(
        self, layers: Sequence[Layer], heads: torch.Tensor, hidden: torch.Tensor, budget: float
    ) -> torch.Tensor:
        """Place in ``numbers["neurons"]`` of the most neurons per layer that ``budget`` leaves beside each pair of
        ``heads`` and ``hidden``; -1: not even the least."""
        fixed, slope = self._costs(layers, heads, hidden)
        numbers = self.numbers["neurons"].double()
        room = torch.where(fixed <= budget, math.inf, -math.inf)
        room = torch.where(slope > 0, (budget - fixed) / slope, room)
        place = torch.searchsorted(numbers, room, right=True) - 1
        for step in (1, -1):  # what was rounded in the division
            beside = (place + max(step, 0)).clamp(0, len(numbers) - 1)
            fits = fixed + slope * numbers[beside] <= budget
            place = torch.where(fits & (beside > place), beside, place) if step == 1 else place - (~fits).long()
        return place.clamp(min=-1)

    def _costs(
        self, layers: Sequence[Layer], heads: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(cost without neurons, cost of one more neuron per layer) of a model of ``layers``, pair by pair."""
        fixed = torch.zeros(len(heads), dtype=torch.float64)
        slope = torch.zeros(len(heads), dtype=torch.float64)
        for (of_heads, of_neurons, of_hidden), coefficient in self._polynomial(layers).items():
            term = coefficient * heads.double() ** of_heads * hidden.double() ** of_hidden
            if of_neurons:
                slope += term
            else:
                fixed += term
        return fixed, slope

    def _polynomial(self, layers: Sequence[Layer]) -> dict[tuple[int, int, int], float]:
        """Exponents of (heads per layer, neurons per layer, hidden dimensions) → coefficient, of a model of
        ``layers``."""
        there = {name for layer in layers for name in layer.spaces} | {HIDDEN}
        found: dict[tuple[int, int, int], float] = defaultdict(float)
        for guard, terms in self.cost.terms.items():
            if guard is not None and guard not in there:
                continue
            for term, coefficient in terms.items():
                if there.issuperset(term):
                    kinds: list[str] = [self.kinds[name] for name in term]
                    exponents = (kinds.count("heads"), kinds.count("neurons"), kinds.count(HIDDEN))
                    assert exponents[1] <= 1, "a cost that is not linear in the neurons"
                    found[exponents] += coefficient
        return found

    def _counts(self, layers: Sequence[Layer], heads: int, neurons: int, hidden: int) -> dict[str, int]:
        there = {name for layer in layers for name in layer.spaces} | {HIDDEN}
        number = {"heads": heads, "neurons": neurons, HIDDEN: hidden}
        return {space.name: number[space.kind] if space.name in there else 0 for space in self.spaces}
