"""What the budget of a run counts, whether it can be met, and what a whole sublayer takes of it.

Not for costs themselves (``plan.cost``), nor for choosing what goes (``plan.selection``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.measure import placed
from apt_trainer.models import ModelFamily, Space, Sublayer
from apt_trainer.plan.cost import CostModel, flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.limits import LEAST_DEPTH, Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning.latency_cost import latency_cost
from apt_trainer.settings import PruningSettings

COSTS: dict[str, Callable[[nn.Module, ModelFamily, list[Space], int, int], CostModel]] = {
    "params": lambda model, family, spaces, batch, length: parameter_cost(model, family, spaces),
    "flops": flops_cost,
    "memory": memory_cost,
    "latency": latency_cost,
}


def cost_of(
    model: nn.Module,
    family: ModelFamily,
    spaces: list[Space],
    settings: PruningSettings,
    timed_on: torch.device | None = None,
) -> CostModel:
    """Cost of the dense ``model`` in what ``sparsity_metric`` counts; measured, if that is latency, on ``timed_on``
    (default: where the model is). Else the model may be on the meta device."""
    make = COSTS[settings.sparsity_metric]
    with placed(model, timed_on if settings.sparsity_metric == "latency" else None):
        return make(model, family, spaces, settings.reference_batch_size, settings.reference_length)


def check_budget(
    spaces: Sequence[Space],
    sublayers: Sequence[Sublayer],
    start: PruningPlan,
    cost: CostModel,
    limits: Limits,
    sparsity: float | None,
    least: Mapping[str, int] | None = None,
) -> None:
    """Raise :class:`UserError` where ``sparsity`` (None: nothing is pruned) is more than ``limits`` let go of what is
    there at ``start`` or would leave next to nothing of the blocks, or no more than the dense model has lost by then,
    or where what could go costs nothing. ``least``: units per space of the cheapest model there may be, by default
    :func:`least_model`."""
    if sparsity is None:
        return
    dense = PruningPlan.dense(spaces)
    whole = cost.total(dense.counts)
    if whole <= 0:
        raise UserError(
            "Neither heads nor neurons take time that can be measured at reference_batch_size × reference_length. "
            "Raise these, or choose another sparsity_metric."
        )
    lost = 1 - cost.total(start.counts) / whole
    if start != dense and sparsity <= lost:
        raise UserError(
            f"target_sparsity={sparsity:g} is a fraction of the dense original, of which the model has lost "
            f"{lost:.4f} already. Give more than that to prune further, or target_sparsity: null to fine-tune it as "
            "it is."
        )
    largest = 1 - cost.total(least or least_model(spaces, sublayers, start, cost, limits)) / whole
    if sparsity > largest:
        named = f"; the largest that does not is {math.floor(1e4 * largest) / 1e4:g}" if largest >= 1e-4 else ""
        raise UserError(
            f"target_sparsity={sparsity:g} takes more than prune_targets, min_heads, min_neurons, min_hidden and "
            f"round_to allow, or more than all but one attention and one feed-forward in {LEAST_DEPTH}{named}. "
            "Lower target_sparsity, widen prune_targets or lower a minimum."
        )


def least_model(
    spaces: Sequence[Space], sublayers: Sequence[Sublayer], start: PruningPlan, cost: CostModel, limits: Limits
) -> dict[str, int]:
    """Units per space of the cheapest model that, of what is there at ``start``, keeps what ``limits`` ask for and
    something of one attention and of one feed-forward in :data:`~apt_trainer.plan.limits.LEAST_DEPTH`."""
    left = start.counts
    counts = {space.name: limits.floor(space, left[space.name]) for space in spaces}
    few = {
        space.name: limits.core(space, left[space.name]) or min(left[space.name], limits.round_to[space.kind])
        for space in spaces
    }
    for kind in ("attention", "mlp"):
        names = [sublayer.space for sublayer in sublayers if sublayer.kind == kind]
        missing = math.ceil(len(names) / LEAST_DEPTH) - sum(counts[name] > 0 for name in names)
        gone = [name for name in names if counts[name] == 0 < left[name]]
        gone.sort(key=lambda name: cost.total({**counts, name: few[name]}))
        counts |= {name: few[name] for name in gone[: max(0, missing)]}
    return counts


def saved_without(spaces: Sequence[Space], counts: Mapping[str, int], cost: CostModel) -> dict[str, float]:
    """Space → what the budget saves when all its units go, of a model with ``counts`` units per space."""
    whole = cost.total(counts)
    return {space.name: whole - cost.total({**counts, space.name: 0}) for space in spaces}
