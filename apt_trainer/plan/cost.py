"""What a set of units costs: an exact polynomial in the number of units left per space.

Each tensor's size is a product over its dimensions, each either fixed or a space times a width, so parameters, FLOPs,
bytes and fitted seconds are all sums of products of unit counts. Not for measuring a finished model (``measure``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import DynamicCache

from apt_trainer.models import HIDDEN, ModelFamily, Space, Sublayer
from apt_trainer.models.base import base_layer, exists, unit_dim
from apt_trainer.models.family import Positions

Term = tuple[str, ...]
"""Names of the spaces whose counts are multiplied; the empty term is a constant."""

Weigh = Callable[[str, nn.Parameter], float]
"""Cost of one entry of a parameter, given its name."""


@dataclass(frozen=True)
class CostModel:
    """Cost(counts) = Σ coefficient · Π counts, where the terms of a sublayer vanish with its last unit."""

    terms: Mapping[str | None, Mapping[Term, float]]

    def total(self, counts: Mapping[str, int]) -> float:
        """Cost with ``counts`` units left per space, in the model's unit (parameters, FLOPs, seconds or bytes)."""
        cost = 0.0
        for guard, terms in self.terms.items():
            if guard is not None and counts[guard] == 0:
                continue
            for term, coefficient in terms.items():
                product = coefficient
                for name in term:
                    product *= counts[name]
                cost += product
        return cost

    def marginal(self, space: str, counts: Mapping[str, int]) -> float:
        """Cost of one unit of ``space`` at ``counts``: the partial derivative, without fixed parts of sublayers."""
        cost = 0.0
        for guard, terms in self.terms.items():
            if guard is not None and counts[guard] == 0:
                continue
            for term, coefficient in terms.items():
                for position, name in enumerate(term):
                    if name == space:
                        product = coefficient
                        for other in term[:position] + term[position + 1 :]:
                            product *= counts[other]
                        cost += product
        return cost

    def coefficients(self) -> list[float]:
        """All of them, in an order that the spaces of the model fix."""
        return [coefficient for terms in self.terms.values() for coefficient in terms.values()]

    def with_coefficients(self, coefficients: Sequence[float]) -> CostModel:
        """The same terms with others than :meth:`coefficients`, in the same order."""
        left = iter(coefficients)
        assert len(coefficients) == len(self.coefficients()), "seconds of another model"
        return CostModel({guard: {term: next(left) for term in terms} for guard, terms in self.terms.items()})


def parameter_cost(
    model: nn.Module,
    family: ModelFamily,
    spaces: Sequence[Space],
    weigh: Weigh | None = None,
    blocks_only: bool = True,
) -> CostModel:
    """Parameters of the transformer blocks (or of the whole model), adapters excluded; tied weights count once.

    ``weigh`` turns the size of a parameter into another cost, for example FLOPs or bytes per entry.
    """
    dims = _dimensions(model, spaces)
    guards = _guards(family.sublayers(model))
    blocks = tuple(path + "." for path in family.block_modules(model))
    terms: dict[str | None, dict[Term, float]] = defaultdict(lambda: defaultdict(float))
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if ".lora_" in name or (blocks_only and not plain.startswith(blocks)):
            continue
        coefficient = 1.0 if weigh is None else weigh(plain, parameter)
        if coefficient == 0:
            continue
        term: list[str] = []
        for dim, size in enumerate(parameter.shape):
            space, width = dims.get((plain, dim), (None, size))
            coefficient *= width
            term += [space] if space is not None else []
        guard = next((space for path, space in guards if plain.startswith(path + ".")), None)
        terms[guard][tuple(term)] += coefficient
    return CostModel({guard: dict(of_guard) for guard, of_guard in terms.items()})


def flops_cost(
    model: nn.Module, family: ModelFamily, spaces: Sequence[Space], batch_size: int, length: int
) -> CostModel:
    """Forward FLOPs of the blocks at [batch_size, length]: 2 per weight and token, plus attention scores.

    The inputs of an encoder and of a decoder are taken to be of one length; an image has a length of its own.
    """
    config = getattr(model, "config", None)
    length = family.tokens(config) or length
    tokens = batch_size * length
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    positions, repeats = family.positions(config) or Positions(0, 0), family.repeats(config)
    own, shared = (tuple(f".{name}.weight" for name in names) for names in (positions.own, positions.shared))

    def weigh(name: str, parameter: nn.Parameter) -> float:
        if parameter.dim() not in (2, 3) or id(parameter) in tables:
            return 0.0
        rows = positions.number if name.endswith(own) else tokens
        rows += positions.number if name.endswith(shared) else 0
        return 2.0 * repeats * rows

    cost = parameter_cost(model, family, spaces, weigh=weigh)
    used = {space.name: space.minimum for space in spaces if space.kind == "experts"}
    terms = {guard: _of_used(of_guard, used) for guard, of_guard in cost.terms.items()}
    for space in spaces:
        if space.kind == "heads":
            compared = 2 * length + positions.products * positions.number
            scores = 2.0 * repeats * tokens * compared * space.channels
            terms[space.name][(space.name,)] = terms[space.name].get((space.name,), 0.0) + scores
    return CostModel(terms)


def _of_used(terms: Mapping[Term, float], used: Mapping[str, int]) -> dict[Term, float]:
    """``terms`` in which fused weights of experts, which have three dimensions, count as many times as a token uses
    one, however many there are. ``used``: space → how many experts that is."""
    counted: dict[Term, float] = defaultdict(float)
    for term, coefficient in terms.items():
        space = next((name for name in term if name in used), None)
        if space is not None and len(term) == 3:
            counted[tuple(name for name in term if name != space)] += coefficient * used[space]
        else:
            counted[term] += coefficient
    return dict(counted)


def memory_cost(
    model: nn.Module, family: ModelFamily, spaces: Sequence[Space], batch_size: int, length: int
) -> CostModel:
    """Bytes that a model takes while it runs: every weight and, where it generates, the keys and values that its
    attentions keep of [batch_size, length] tokens. Activations, which come and go, are not counted.

    The inputs of an encoder and of a decoder are taken to be of one length.
    """
    element = next(model.parameters()).element_size()
    cost = parameter_cost(model, family, spaces, weigh=lambda name, p: float(p.element_size()), blocks_only=False)
    terms = {guard: dict(of_guard) for guard, of_guard in cost.terms.items()}
    by_name = {space.name: space for space in spaces}
    for sublayer in family.sublayers(model):
        cached = element * batch_size * cached_numbers(model, sublayer, by_name[sublayer.space], length)
        if cached:
            of_guard = terms.setdefault(sublayer.space, {})  # none of a sublayer that is gone
            of_guard[(sublayer.space,)] = of_guard.get((sublayer.space,), 0.0) + cached
    return CostModel(terms)


def cached_numbers(model: Any, sublayer: Sublayer, space: Space, length: int) -> int:
    """Entries of the keys and values that one head keeps of a sequence of ``length`` tokens.

    0 for what is no attention, for the attentions of an encoder and in a model that does not generate. A sliding
    attention keeps no more than its window, as transformers' cache does.
    """
    if sublayer.kind != "attention" or sublayer.stack != "decoder" or not model.can_generate():
        return 0
    of_layers = () if sublayer.crosses else DynamicCache(config=model.config).layers
    window = getattr(of_layers[sublayer.layer], "sliding_window", None) if sublayer.layer < len(of_layers) else None
    tokens = length if window is None else min(length, window - 1)
    # keys and values are the rows of the projections that are not queries
    rows = sum(sum(part.parts) for part in space.slices if part.side == "out" and part.module not in space.norms)
    return tokens * (rows - space.channels)


def fitted_cost(
    spaces: Sequence[Space], seconds_per_unit: Mapping[str, float], fixed_seconds: Mapping[str, float]
) -> CostModel:
    """Latency as measured per sublayer: (fixed + per unit · units), scaled by the share of hidden dimensions left."""
    hidden = next(space.size for space in spaces if space.name == HIDDEN)
    return CostModel(
        {
            name: {(name, HIDDEN): seconds_per_unit[name] / hidden, (HIDDEN,): fixed_seconds[name] / hidden}
            for name in seconds_per_unit
        }
    )


def _dimensions(model: nn.Module, spaces: Sequence[Space]) -> dict[tuple[str, int], tuple[str, float]]:
    """(parameter name, dim) → (space, entries per unit), of the modules that are left."""
    dims: dict[tuple[str, int], tuple[str, float]] = {}
    for space in spaces:
        for part in space.slices:
            if not exists(model, part.module):
                continue
            module = base_layer(model.get_submodule(part.module))
            width = float(sum(part.parts))
            if part.weight is not None:
                name, dim = part.weight
                dims[f"{part.module}.{name}", dim] = (space.name, width)
                continue
            for name, parameter in module.named_parameters(recurse=False):
                side = unit_dim(module, parameter, part.side)
                if side is not None:
                    dims[f"{part.module}.{name}", side] = (space.name, width)
    return dims


def _guards(sublayers: Sequence[Sublayer]) -> list[tuple[str, str]]:
    return [(path, sublayer.space) for sublayer in sublayers for path in sublayer.modules]
