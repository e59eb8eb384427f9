"""What the budget of a run counts, whether it can be met, and what a whole sublayer takes of it.

Not for costs themselves (``plan.cost``), nor for choosing what goes (``plan.selection``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models import ModelFamily, Space
from apt_trainer.plan.cost import CostModel, flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.limits import Limits
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.selection import select
from apt_trainer.pruning.latency_cost import latency_cost
from apt_trainer.settings import PruningSettings

COSTS: dict[str, Callable[[nn.Module, ModelFamily, list[Space], int, int], CostModel]] = {
    "params": lambda model, family, spaces, batch, length: parameter_cost(model, family, spaces),
    "flops": flops_cost,
    "memory": memory_cost,
    "latency": latency_cost,
}


def cost_of(model: nn.Module, family: ModelFamily, spaces: list[Space], settings: PruningSettings) -> CostModel:
    """Cost of the dense ``model`` in what ``sparsity_metric`` counts; measured, if that is latency."""
    make = COSTS[settings.sparsity_metric]
    return make(model, family, spaces, settings.reference_batch_size, settings.reference_length)


def check_budget(
    spaces: Sequence[Space], dense: PruningPlan, cost: CostModel, limits: Limits, sparsity: float | None
) -> None:
    """Raise :class:`UserError` where ``sparsity`` (None: nothing is pruned) is more than ``limits`` let go, or where
    what could go costs nothing."""
    if sparsity is None:
        return
    if cost.total(dense.counts) <= 0:
        raise UserError(
            "Neither heads nor neurons take time that can be measured at reference_batch_size × reference_length. "
            "Raise these, or choose another sparsity_metric."
        )
    zeros = {space.name: torch.zeros(space.size) for space in spaces}
    select(zeros, spaces, dense, cost, (1 - sparsity) * cost.total(dense.counts), limits)


def saved_without(spaces: Sequence[Space], counts: Mapping[str, int], cost: CostModel) -> dict[str, float]:
    """Space → what the budget saves when all its units go, of a model with ``counts`` units per space."""
    whole = cost.total(counts)
    return {space.name: whole - cost.total({**counts, space.name: 0}) for space in spaces}
