"""What a run or a study starts from: a dense model, or one that was pruned before, in units of the dense original.

Plans, budgets and scores count units as the dense original does, so that those of one run after another compose. A
pruned model says in its config which units it has left (``saved_model``). Not for loading or saving models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.models import Space, family_of
from apt_trainer.models.base import exists, units_in
from apt_trainer.models.family import POST_NORM_POLICY
from apt_trainer.models.modeling_apt import get_size
from apt_trainer.plan.pruning_plan import PLAN_FILE, PruningPlan
from apt_trainer.store.events import read_json
from apt_trainer.store.saved_model import KEPT, dense_copy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartingPoint:
    """``dense``: the dense original, which is the model itself or, for a pruned one, its shape on the meta device.

    ``spaces``: of ``dense``. ``plan``: what the model has of them.
    """

    dense: PreTrainedModel
    spaces: list[Space]
    plan: PruningPlan

    @property
    def is_pruned(self) -> bool:
        return self.plan != PruningPlan.dense(self.spaces)


def starting_point(model: PreTrainedModel) -> StartingPoint:
    """Where to begin with ``model``, stock or pruned; it may be on the meta device.

    Raises :class:`UserError` for a model without a family, with an execution plan, or of other units than it says.
    """
    config: Any = model.config
    family = family_of(config)
    if getattr(config, "apt_plan", None) is not None:
        raise UserError(
            "The model runs its layers by an execution plan and cannot be pruned, or tuned by APTTrainer. Start from "
            "the model without one; transformers.Trainer trains it with the plan in place."
        )
    if getattr(config, "apt_structure", None) is None:
        spaces = family.spaces(model)
        return StartingPoint(model, spaces, PruningPlan.dense(spaces))
    dense = dense_copy(model, "meta")
    if hasattr(config, POST_NORM_POLICY):
        setattr(dense.config, POST_NORM_POLICY, getattr(config, POST_NORM_POLICY))
    spaces = family.spaces(dense)
    return StartingPoint(dense, spaces, _kept(model, spaces))


def _kept(model: PreTrainedModel, spaces: Sequence[Space]) -> PruningPlan:
    """Units of the dense original that ``model`` has, which must be as many as its weights are made for."""
    packed, file = getattr(model.config, KEPT, None), Path(model.config._name_or_path) / PLAN_FILE
    if packed is not None:
        plan = PruningPlan.unpacked(_of_stacks(packed, spaces), spaces)
    elif file.is_file():  # version 0.1.0 kept them there alone
        plan = PruningPlan.from_json(read_json(file))
        plan.check_within(PruningPlan.dense(spaces))
    else:
        _log.warning(
            f"The pruned model does not say which units of its dense original it has, nor is there a {PLAN_FILE} "
            "beside it, so that plans and records of what follows count those it has from 0."
        )
        plan = PruningPlan({space.name: _counted_from_0(model, space) for space in spaces})
    for space in spaces:
        units = plan.kept.get(space.name, ())
        if len(units) != _units_left(model, space) or (units and units[-1] >= space.size):
            raise UserError(
                f"The model has {_units_left(model, space)} units of {space.name} left, but its config names "
                f"{len(units)}. It was changed after it was pruned; start from the model as its run saved it."
            )
    return plan


def _of_stacks(packed: Any, spaces: Sequence[Space]) -> Any:
    """What of a plan is for stacks that the model has: with another head it may have no decoder."""
    if not isinstance(packed, Mapping):
        return packed
    stacks = {space.name.partition(".")[0] for space in spaces}
    return {name: bits for name, bits in packed.items() if str(name).partition(".")[0] in stacks}


def _counted_from_0(model: PreTrainedModel, space: Space) -> tuple[int, ...]:
    """As many units as are left, but for an attention that has to know which they are itself."""
    for attribute in space.attributes:
        if attribute.per_unit is None and exists(model, attribute.module):
            known = get_size(model.get_submodule(attribute.module), attribute.name)
            if known is not None:
                return tuple(known)
    return tuple(range(_units_left(model, space)))


def _units_left(model: PreTrainedModel, space: Space) -> int:
    return units_in(model, space.slices[0 if space.kind == "hidden" else -1])
