"""What a unit costs: parameters, seconds, bytes or nothing; and shares of it, by which impact is normalised.

Shares are of the sum over all sublayers of the dense model. Not for the units inside a sublayer (``pruning.cost``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn

from apt_trainer.measure import count_parameters, evaluating, example_inputs
from apt_trainer.measure.latency import now, take_turns
from apt_trainer.models import Space
from apt_trainer.sublayers.gates import switched_off
from apt_trainer.sublayers.units import Unit, Units


@dataclass(frozen=True)
class Shape:
    """Where seconds and cached bytes are counted: a forward pass at [batch_size, length].

    ``max_seconds``: time after which no further pass is timed.
    """

    batch_size: int = 1
    length: int = 128
    max_seconds: float = 20.0


def unit_costs(model: nn.Module, units: Units, cost: str, shape: Shape) -> dict[Unit, float]:
    """Cost of every unit, blocks included.

    Args:
        model: The dense model; for seconds with weights, else the meta device will do.
        units: Its units.
        cost: "params", "memory" (bytes of weights, and of keys and values where they are cached), "latency" (seconds
            of one forward pass) or "none" (1 each).
        shape: For memory and latency.
    """
    if cost == "none":
        return dict.fromkeys(units.members, 1.0)
    if cost == "latency":
        of_sublayer = _seconds(model, units, shape)
    elif cost == "memory":
        of_sublayer = {unit: _bytes(model, units, unit, shape) for unit in units.sublayers}
    else:
        of_sublayer = {unit: float(_parameters(model, units, unit)) for unit in units.sublayers}
    return {unit: sum(of_sublayer[part] for part in units.parts([unit])) for unit in units.members}


def shares(costs: Mapping[Unit, float], units: Units) -> dict[Unit, float]:
    """Each cost divided by the sum over all sublayers."""
    total = sum(costs[unit] for unit in units.sublayers)
    return {unit: cost / total for unit, cost in costs.items()}


def cache_bytes(model: nn.Module, units: Units, unit: Unit, shape: Shape) -> int:
    """Bytes of the keys and values that an attention leaves in the cache of ``shape``."""
    element = next(model.parameters()).element_size()
    space = next(s for s in units.spaces if s.name == units.members[unit][0].space)
    return shape.batch_size * shape.length * _cached_numbers(space) * element


def _cached_numbers(space: Space) -> int:
    """Entries of a key and a value for one token: rows of the projections that are not queries."""
    rows = sum(sum(part.parts) for part in space.slices if part.side == "out" and part.module not in space.norms)
    return space.size * (rows - space.channels)


def _parameters(model: nn.Module, units: Units, unit: Unit) -> int:
    (sublayer,) = units.members[unit]
    return sum(count_parameters(model.get_submodule(path)) for path in sublayer.modules)


def _bytes(model: nn.Module, units: Units, unit: Unit, shape: Shape) -> float:
    (sublayer,) = units.members[unit]
    modules = [model.get_submodule(path) for path in sublayer.modules]
    size = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    cached = unit.kind != "mlp" and model.can_generate()  # type: ignore[operator]
    return float(size + (cache_bytes(model, units, unit, shape) if cached else 0))


def _seconds(model: nn.Module, units: Units, shape: Shape) -> dict[Unit, float]:
    """Time that goes with all units of one kind, shared equally among them: single ones drown in noise."""
    kinds = {unit.kind: [u for u in units.sublayers if u.kind == unit.kind] for unit in units.sublayers}
    batch = example_inputs(model, shape.batch_size, shape.length)
    device = batch["input_ids"].device

    def forward(off: list[Unit]) -> tuple[float]:
        with switched_off(model, units, off):
            start = now(device)
            model(**batch)
            return (now(device) - start,)

    with evaluating(model):
        calls = {"dense": partial(forward, [])} | {kind: partial(forward, members) for kind, members in kinds.items()}
        timed = take_turns(calls, min_runs=10, max_seconds=shape.max_seconds)
    seconds = {name: latency.median_ms / 1000 for name, (latency,) in timed.items()}
    least = 1e-9  # a unit that costs nothing measurable still has a share above 0
    return {
        unit: max(least, (seconds["dense"] - seconds[kind]) / len(members))
        for kind, members in kinds.items()
        for unit in members
    }
