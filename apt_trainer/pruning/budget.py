"""What the budget of a run counts, whether it can be met, and plans within it.

Not for costs themselves (``plan.cost``), nor for how a plan is chosen (``plan.selection``, ``plan.uniform``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.measure import placed
from apt_trainer.models import HIDDEN, ModelFamily, Space, Sublayer
from apt_trainer.plan.cost import CostModel, flops_cost, memory_cost, parameter_cost
from apt_trainer.plan.limits import LEAST_DEPTH, Limits, limits_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.selection import select
from apt_trainer.pruning.latency_cost import latency_cost
from apt_trainer.pruning.uniform_shape import uniform_shape
from apt_trainer.settings import MethodSettings
from apt_trainer.store.saved_model import dense_copy
from apt_trainer.store.starting_point import StartingPoint

COSTS: dict[str, Callable[[nn.Module, ModelFamily, list[Space], int, int], CostModel]] = {
    "params": lambda model, family, spaces, batch, length: parameter_cost(model, family, spaces),
    "total_params": lambda model, family, spaces, batch, length: parameter_cost(
        model, family, spaces, blocks_only=False
    ),
    "flops": flops_cost,
    "memory": memory_cost,
    "latency": latency_cost,
}
GROUPED = 8
"""Numbers of half precision in the 16 bytes that a row of fused experts has to be a multiple of."""


class Budget:
    """What ``model``, which began at ``origin``, may lose by ``settings``, in what ``sparsity_metric`` counts.

    ``cost``: of the dense original; what is measured is timed on ``timed_on``, default: where the model is.
    ``blocks``: parameters in blocks. ``limits``: what may go at all. ``shape``: what plans of equal layers have to
    keep to; None: any plan will do.
    """

    def __init__(
        self,
        model: Any,
        family: ModelFamily,
        origin: StartingPoint,
        settings: MethodSettings,
        timed_on: torch.device | None = None,
    ) -> None:
        self._settings, self._origin = settings, origin
        self._dense = PruningPlan.dense(origin.spaces)
        self._sublayers = family.sublayers(model)
        self.is_timed = settings.sparsity_metric == "latency"
        dense = dense_copy(model) if self.is_timed and origin.is_pruned else origin.dense  # to time takes weights
        with placed(dense, timed_on if self.is_timed else None):
            make, size = COSTS[settings.sparsity_metric], (settings.reference_batch_size, settings.reference_length)
            self.cost = make(dense, family, origin.spaces, *size)
        self.blocks = parameter_cost(origin.dense, family, origin.spaces)
        self._parameters = parameter_cost(origin.dense, family, origin.spaces, blocks_only=False)
        self.limits = limits_of(settings)
        self._check_targets()
        uniform = settings.prunes and settings.shape == "uniform"
        self.shape = uniform_shape(model, family, settings.prune_targets) if uniform else None

    def _check_targets(self) -> None:
        """Raise :class:`UserError` where ``prune_targets`` names a kind of units that the model has none of."""
        kinds = {space.kind for space in self._origin.spaces}
        absent = sorted(self.limits.targets - kinds) if self._settings.prunes else []
        if absent:
            raise UserError(
                f"prune_targets names {', '.join(absent)}, and the model has none. Its kinds of units: "
                f"{', '.join(sorted(kinds))}; and sublayers."
            )
        cut = sorted(self.limits.targets & {"neurons", HIDDEN})
        if "experts" in kinds and self._settings.prunes and cut and self._settings.round_to % GROUPED:
            raise UserError(
                f"round_to={self._settings.round_to}, but experts run as grouped matrix products, which take widths "
                f"in multiples of {GROUPED}. Set round_to to one, or prune_targets without {' and '.join(cut)}."
            )

    @property
    def scored(self) -> list[Space]:
        """Spaces whose units need scores."""
        return [space for space in self._origin.spaces if space.kind in self.limits.kinds]

    def check(self) -> None:
        """Raise :class:`UserError` where the target is more than the limits let go of what there is or would leave
        next to nothing of the blocks, or no more than is gone already, or where what could go costs nothing."""
        sparsity, start = self._settings.target_sparsity, self._origin.plan
        if sparsity is None:
            return
        whole = self.cost.total(self._dense.counts)
        if whole <= 0:
            raise UserError(
                "Neither heads nor neurons take time that can be measured at reference_batch_size × "
                "reference_length. Raise these, or choose another sparsity_metric."
            )
        lost = self.removed(start)
        if start != self._dense and sparsity <= lost:
            raise UserError(
                f"target_sparsity={sparsity:g} is a fraction of the dense original, of which the model has lost "
                f"{lost:.4f} already. Give more than that to prune further, or target_sparsity: null to fine-tune it "
                "as it is."
            )
        largest = 1 - self.cost.total(self._least()) / whole
        if sparsity > largest:
            named = f"; the largest that does not is {math.floor(1e4 * largest) / 1e4:g}" if largest >= 1e-4 else ""
            raise UserError(
                f"target_sparsity={sparsity:g} takes more than prune_targets, min_heads, min_neurons, min_hidden and "
                f"round_to allow, or more than all but one attention and one feed-forward in {LEAST_DEPTH}{named}. "
                f"{self._told_of_blocks()}Lower target_sparsity, widen prune_targets or lower a minimum."
            )

    def removed_parameters(self, plan: PruningPlan) -> tuple[float, float]:
        """(share of the parameters in blocks, share of all parameters) of the dense original that is gone at
        ``plan``."""
        blocks, whole = (
            1 - cost.total(plan.counts) / cost.total(self._dense.counts) for cost in (self.blocks, self._parameters)
        )
        return blocks, whole

    def removed(self, plan: PruningPlan) -> float:
        """Share of the budget of the dense original that is gone at ``plan``."""
        return 1 - self.cost.total(plan.counts) / self.cost.total(self._dense.counts)

    def removed_of_start(self, plan: PruningPlan) -> float:
        """As :meth:`removed`, but of what the model had when it was given here."""
        return 1 - self.cost.total(plan.counts) / self.cost.total(self._origin.plan.counts)

    def choose(
        self,
        scores: Mapping[str, torch.Tensor],
        current: PruningPlan,
        sparsity: float,
        densities: bool = False,
        free: bool = False,
    ) -> PruningPlan:
        """The plan below ``current`` at which ``sparsity`` is gone, of the shape that the settings ask for, or
        ``free`` of any; ``densities``: scores are per cost already. See ``plan.selection``."""
        left = (1 - sparsity) * self.cost.total(self._dense.counts)
        chosen = select if free or self.shape is None else self.shape.select
        return chosen(scores, self._origin.spaces, current, self.cost, left, self.limits, densities)

    def saved_without(self, plan: PruningPlan) -> dict[str, float]:
        """Scored space → what the budget saves when all its units go, of a model at ``plan``."""
        whole = self.cost.total(plan.counts)
        return {space.name: whole - self.cost.total({**plan.counts, space.name: 0}) for space in self.scored}

    def seconds(self) -> list[float]:
        """What was timed, in an order that the dense model fixes; empty where nothing is."""
        return self.cost.coefficients() if self.is_timed else []

    def use_seconds(self, seconds: Sequence[float]) -> None:
        """Count ``seconds``, on which all processes have agreed, instead of :meth:`seconds`."""
        self.cost = self.cost.with_coefficients(seconds)

    def _told_of_blocks(self) -> str:
        """Where the budget counts more than blocks, how little of it they are."""
        if self._settings.sparsity_metric not in ("total_params", "memory"):
            return ""
        share = self.blocks.total(self._dense.counts) / self._parameters.total(self._dense.counts)
        return f"Blocks are {share:.1%} of all parameters; vocabulary: used cuts embeddings. "

    def _least(self) -> Mapping[str, int]:
        """Units per space of the cheapest model there may be."""
        spaces, start = self._origin.spaces, self._origin.plan
        if self.shape is not None:
            return self.shape.least(spaces, start, self.cost, self.limits)
        return least_model(spaces, self._sublayers, start, self.cost, self.limits)


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
