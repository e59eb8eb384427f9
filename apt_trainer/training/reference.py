"""The reference model of preference training (DPO, KTO …): the dense model, whatever becomes of the one that trains.

With adapters TRL would take the trained model without them, which is not the dense one any more after a cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apt_trainer.errors import UserError
from apt_trainer.training.trainer_class import takes

_WAYS = (
    "Set precompute_ref_log_probs=True, which computes its log-probabilities before anything is cut, or give "
    "ref_model, the dense model loaded a second time."
)


def check_reference(model: Any, args: Any, trainer_class: type, given: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` where ``trainer_class`` needs a reference and would have none, or a wrong one.

    ``given``: the other arguments of the trainer.
    """
    if not takes(trainer_class, "ref_model"):
        return
    name, reference = trainer_class.__name__, given.get("ref_model")
    if getattr(args, "sync_ref_model", False):
        raise UserError(
            f"sync_ref_model copies the weights of the model to the reference of {name}, but their shapes part at a "
            f"cut. Remove it. {_WAYS}"
        )
    if reference is not None and reference is model:
        raise UserError(f"ref_model is the model itself, which is going to be cut. {_WAYS}")
    if reference is not None or getattr(args, "precompute_ref_log_probs", False):
        return
    if not getattr(getattr(model, "config", None), "_name_or_path", ""):  # else it is loaded from there once more
        raise UserError(f"{name} compares with a reference model, and none was given. {_WAYS}")
