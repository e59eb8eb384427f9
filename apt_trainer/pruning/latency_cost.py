"""A latency budget from measurement: times whole cut copies of the model and fits seconds per head and per neuron.

Not for reporting the speed of a result (``measure.latency``, ``apt-trainer benchmark``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from apt_trainer.measure import compare_latency
from apt_trainer.models import ModelFamily, Space
from apt_trainer.plan.cost import CostModel, fitted_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.surgery.cutting import apply_plan

_SHARES = {"heads": {"half_heads": 2, "no_heads": 0}, "neurons": {"half_neurons": 2, "no_neurons": 0}}


def latency_cost(
    model: nn.Module, family: ModelFamily, spaces: Sequence[Space], batch_size: int, length: int
) -> CostModel:
    """Cost in seconds of one forward pass at [batch_size, length] on the model's device.

    Five models are timed, interleaved: dense, half of all heads, no attention, half of all neurons, no feed-forward.
    The slope per unit comes from the halves, the fixed part of a sublayer from its absence.
    """
    dense = PruningPlan.dense(spaces)
    variants: dict[str, nn.Module] = {"dense": model}
    for kind, names in _SHARES.items():
        for name, divisor in names.items():
            kept = dict(dense.kept)
            for space in spaces:
                if space.kind == kind:
                    kept[space.name] = kept[space.name][: _left(space, divisor)]
            variant = copy.deepcopy(model)
            apply_plan(variant, family, spaces, dense, PruningPlan(kept))
            variants[name] = variant
    timed = compare_latency(variants, [batch_size], length)
    seconds = {name: of_batch[batch_size].median_ms / 1000 for name, of_batch in timed.items()}
    per_unit, fixed = {}, {}
    for kind in _SHARES:
        members = [space for space in spaces if space.kind == kind]
        halved = sum(space.size - _left(space, 2) for space in members)
        slope = max(0.0, seconds["dense"] - seconds[f"half_{kind}"]) / max(halved, 1)
        absent = max(0.0, seconds["dense"] - seconds[f"no_{kind}"])
        units = sum(space.size - _left(space, 0) for space in members)
        rest = max(0.0, absent - slope * units) / max(1, sum(space.minimum == 0 for space in members))
        for space in members:
            per_unit[space.name], fixed[space.name] = slope, 0.0 if space.minimum else rest
    return fitted_cost(spaces, per_unit, fixed)


def _left(space: Space, divisor: int) -> int:
    """Units of a space that a timed variant keeps: a part of them, or none but those that must stay."""
    return max(space.minimum, space.size // divisor if divisor else 0)
