"""What a unit costs: parameters, seconds, bytes or nothing; and shares of it, by which impact is normalised.

Shares are of the sum over all sublayers of the model, or of all its layers. A head costs what its attention is
smaller without it; the norm and the like go with the attention. Not for neurons (``plan.cost``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from apt_trainer.measure import compare_latency, count_parameters, evaluating, example_inputs
from apt_trainer.measure.latency import MAX_SECONDS, MIN_RUNS, now, take_turns
from apt_trainer.plan.cost import CostModel, cached_numbers, memory_cost, parameter_cost
from apt_trainer.scoring.sublayers.drop import plan_without
from apt_trainer.scoring.sublayers.gates import switched_off
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.surgery.cutting import apply_plan

_LEAST = 1e-9  # seconds: a unit that costs nothing measurable still has a share above 0


@dataclass(frozen=True)
class Shape:
    """Where seconds and cached bytes are counted: a forward pass at [batch_size, length].

    ``max_seconds``: time after which no further pass is timed.
    """

    batch_size: int = 1
    length: int = 128
    max_seconds: float = MAX_SECONDS


def unit_costs(model: nn.Module, units: Units, cost: str, shape: Shape, heads: bool = False) -> dict[Unit, float]:
    """Cost of every unit, blocks included, and single heads where asked for.

    Args:
        model: As it is; for seconds with weights, else the meta device will do.
        units: Its units.
        cost: "params", "memory" (bytes, as :func:`~apt_trainer.plan.cost.memory_cost` counts them), "latency"
            (seconds of one forward pass) or "none" (1 each).
        shape: For memory and latency.
        heads: Single heads too; their seconds are timed on a copy of the model.
    """
    if cost == "none":
        return dict.fromkeys(units.every if heads else units.members, 1.0)
    if cost == "latency":
        of_sublayer = _seconds(model, units, shape)
    elif cost == "memory":
        memory = _memory(model, units, shape)
        of_sublayer = {unit: _without(memory, units, unit) for unit in units.sublayers}
    else:
        of_sublayer = {unit: float(_parameters(model, units, unit)) for unit in units.sublayers}
    found = {unit: sum(of_sublayer[part] for part in units.parts([unit])) for unit in units.members}
    return found | _of_heads(model, units, cost, shape, found) if heads else found


def _of_heads(
    model: nn.Module, units: Units, cost: str, shape: Shape, costs: Mapping[Unit, float]
) -> dict[Unit, float]:
    """Cost of every head; an only head is its attention."""
    if cost == "latency":
        found = dict.fromkeys(units.heads, _seconds_per_head(model, units, shape))
    elif cost == "memory":
        found = _per_head(_memory(model, units, shape), units)
    else:
        found = _per_head(parameter_cost(model, units.family, units.spaces), units)
    return {
        head: costs[attention] if len(units.left(head)) == 1 else found[head]
        for head, attention in units.heads.items()
    }


def shares(costs: Mapping[Unit, float], units: Units) -> dict[Unit, float]:
    """Each cost divided by the sum over all sublayers."""
    total = sum(costs[unit] for unit in units.sublayers)
    return {unit: cost / total for unit, cost in costs.items()}


def block_shares(model: nn.Module, units: Units) -> dict[Unit, float]:
    """Parameters of every unit, heads included, divided by those of all layers, of which a norm may stay."""
    costs = unit_costs(model, units, "params", Shape(), heads=True)
    total = sum(count_parameters(model.get_submodule(path)) for path in units.blocks.values())
    return {unit: cost / total for unit, cost in costs.items()}


def cache_bytes(model: nn.Module, units: Units, unit: Unit, shape: Shape) -> int:
    """Bytes of the keys and values that an attention or a head leaves in the cache of ``shape``; 0 for others."""
    (sublayer,) = units.members[units.heads[unit] if unit.head is not None else unit]
    space = units.space(unit)
    heads = len(units.left(unit)) if unit.head is None else 1
    element = next(model.parameters()).element_size()
    return shape.batch_size * heads * cached_numbers(model, sublayer, space, shape.length) * element


def _parameters(model: nn.Module, units: Units, unit: Unit) -> int:
    (sublayer,) = units.members[unit]
    return sum(count_parameters(model.get_submodule(path)) for path in sublayer.modules)


def _memory(model: nn.Module, units: Units, shape: Shape) -> CostModel:
    return memory_cost(model, units.family, units.spaces, shape.batch_size, shape.length)


def _without(cost: CostModel, units: Units, unit: Unit) -> float:
    """What ``cost`` of the model falls by when all heads or neurons of a sublayer go."""
    counts = units.plan.counts
    return cost.total(counts) - cost.total({**counts, units.space(unit).name: 0})


def _per_head(cost: CostModel, units: Units) -> dict[Unit, float]:
    counts = units.plan.counts
    of_space = {name: cost.marginal(name, counts) for name in {units.space(head).name for head in units.heads}}
    return {head: of_space[units.space(head).name] for head in units.heads}


def _seconds_per_head(model: nn.Module, units: Units, shape: Shape) -> float:
    """Time saved by a copy without every other head, per head: a head that is only masked saves none."""
    gone = [head for head in units.heads if units.left(head).index(head.head or 0) % 2]
    small = copy.deepcopy(model)
    apply_plan(small, units.family, units.spaces, units.plan, plan_without(units, gone))
    timed = compare_latency(
        {"dense": model, "small": small}, [shape.batch_size], shape.length, max_seconds=shape.max_seconds
    )
    dense, less = (timed[name][shape.batch_size].median_ms / 1000 for name in ("dense", "small"))
    return max(_LEAST, (dense - less) / max(1, len(gone)))


def _seconds(model: nn.Module, units: Units, shape: Shape) -> dict[Unit, float]:
    """Time that goes with all units of one kind, shared equally among them: single ones drown in noise."""
    kinds = {unit.kind: [u for u in units.sublayers if u.kind == unit.kind] for unit in units.sublayers}
    batch = example_inputs(model, shape.batch_size, shape.length)
    device = next(iter(batch.values())).device

    def forward(off: list[Unit]) -> tuple[float]:
        with switched_off(model, units, off):
            start = now(device)
            model(**batch)
            return (now(device) - start,)

    with evaluating(model):
        calls = {"dense": partial(forward, [])} | {kind: partial(forward, members) for kind, members in kinds.items()}
        timed = take_turns(calls, min_runs=MIN_RUNS, max_seconds=shape.max_seconds)
    seconds = {name: latency.median_ms / 1000 for name, (latency,) in timed.items()}
    return {
        unit: max(_LEAST, (seconds["dense"] - seconds[kind]) / len(members))
        for kind, members in kinds.items()
        for unit in members
    }
