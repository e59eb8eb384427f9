"""Units leave a model: their weights, norms and cached keys go, no-ops of the right signature stay.

Not for choosing units (``select``), nor for writing the model (``store.saving``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.plan.limits import SAFE_DEPTH
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.scoring.sublayers.loss import refuse_broken
from apt_trainer.scoring.sublayers.units import Unit, Units
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan

COLLAPSE = 10.0
"""How many times the perplexity of the dense model means that a model has broken down."""


def plan_without(units: Units, dropped: Sequence[Unit]) -> PruningPlan:
    """The plan that keeps everything but the units ``dropped``; raises :class:`UserError` for units that must stay."""
    units.check(dropped)
    gone = units.lost(dropped)
    lost = {name: set(of_space) for name, of_space in gone.items()}
    return PruningPlan(
        {
            name: tuple(unit for unit in kept if unit not in lost.get(name, ()))
            for name, kept in units.plan.kept.items()
        }
    )


def drop(model: PreTrainedModel, units: Units, dropped: Sequence[Unit]) -> PruningPlan:
    """Take the units ``dropped`` out of ``model``, in place and for good.

    The model then saves and loads as a pruned one (``store.saved_model``). Returns its plan.
    """
    plan = plan_without(units, dropped)
    apply_plan(model, units.family, units.spaces, units.plan, plan)
    as_pruned(model, units.family, plan)
    return plan


def depth_share(units: Units, dropped: Sequence[Unit]) -> float:
    """Sublayers that go as a whole over all sublayers."""
    return sum(part.head is None for part in units.parts(dropped)) / len(units.sublayers)


def depth_share_of_dense(units: Units, dropped: Sequence[Unit]) -> float:
    """Sublayers of the dense original that are gone without ``dropped`` over all that it has."""
    gone = len(units.gone) + sum(part.head is None for part in units.parts(dropped))
    return gone / (len(units.gone) + len(units.sublayers))


def head_share(units: Units, dropped: Sequence[Unit]) -> float:
    """Dropped heads over all heads, those of whole attentions included."""
    attentions = [unit for unit in units.sublayers if unit.kind != "mlp"]
    gone = units.lost(dropped)
    lost = sum(len(gone.get(units.space(unit).name, ())) for unit in attentions)
    return lost / sum(len(units.left(unit)) for unit in attentions)


def depth_warning(units: Units, dropped: Sequence[Unit]) -> str | None:
    """A sentence where more than ``SAFE_DEPTH`` of the dense original's sublayers are gone then."""
    share = depth_share_of_dense(units, dropped)
    if share <= SAFE_DEPTH:
        return None
    return (
        f"{share:.0%} of all sublayers are dropped. Above {SAFE_DEPTH:.0%}, tuning the model afterwards may make it "
        "worse rather than mend it."
    )


def collapse_warning(before: float, after: float, name: str) -> str | None:
    """A sentence for a loss ``after`` above :data:`COLLAPSE` times that ``before``; ``name``: what they measure.

    Raises :class:`UserError` for one that is not finite: such a model is of no use.
    """
    refuse_broken(before, name)
    if not math.isfinite(after):
        raise UserError(f"Without these units the {name} is not finite. Drop fewer, or others; nothing was written.")
    if after <= COLLAPSE * before:
        return None
    return f"The {name} grew from {before:.4g} to {after:.4g}, more than {COLLAPSE:g} times. Drop fewer units."
