"""Fine-tune any Hugging Face transformer and get a smaller, faster model back: adaptive pruning while tuning (APT).

Names load on first use, so that ``import apt_trainer`` is quick. Before or after it, transformers' Auto classes learn
to load pruned models as soon as they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from apt_trainer.libraries.versions import check_versions, refusal

if TYPE_CHECKING:
    from apt_trainer.errors import UserError
    from apt_trainer.models import FAMILIES, ModelFamily
    from apt_trainer.plan.pruning_plan import PruningPlan
    from apt_trainer.pruning.pruner import AdaptivePruner
    from apt_trainer.scoring import IMPORTANCES, Importance
    from apt_trainer.settings import DataSettings
    from apt_trainer.settings.config import APTConfig
    from apt_trainer.settings.execution_plan import Plan
    from apt_trainer.store.painted_model import paint
    from apt_trainer.store.saved_model import load_pruned
    from apt_trainer.training.any_trainer import (
        APTCrossEncoderTrainer,
        APTDPOTrainer,
        APTRewardTrainer,
        APTSentenceTransformerTrainer,
        APTSFTTrainer,
        with_pruning,
    )
    from apt_trainer.training.inside import load_pruned_into
    from apt_trainer.training.session import PruningSession
    from apt_trainer.training.trainer import APTTrainer

__version__ = "0.1.0"

_HOME = {
    "APTConfig": "settings.config",
    "APTCrossEncoderTrainer": "training.any_trainer",
    "APTDPOTrainer": "training.any_trainer",
    "APTRewardTrainer": "training.any_trainer",
    "APTSFTTrainer": "training.any_trainer",
    "APTSentenceTransformerTrainer": "training.any_trainer",
    "APTTrainer": "training.trainer",
    "AdaptivePruner": "pruning.pruner",
    "DataSettings": "settings",
    "FAMILIES": "models",
    "IMPORTANCES": "scoring",
    "Importance": "scoring",
    "ModelFamily": "models",
    "Plan": "settings.execution_plan",
    "PruningPlan": "plan.pruning_plan",
    "PruningSession": "training.session",
    "UserError": "errors",
    "load_pruned": "store.saved_model",
    "load_pruned_into": "training.inside",
    "paint": "store.painted_model",
    "with_pruning": "training.any_trainer",
}

__all__ = [
    "FAMILIES",
    "IMPORTANCES",
    "APTConfig",
    "APTCrossEncoderTrainer",
    "APTDPOTrainer",
    "APTRewardTrainer",
    "APTSFTTrainer",
    "APTSentenceTransformerTrainer",
    "APTTrainer",
    "AdaptivePruner",
    "DataSettings",
    "Importance",
    "ModelFamily",
    "Plan",
    "PruningPlan",
    "PruningSession",
    "UserError",
    "load_pruned",
    "load_pruned_into",
    "paint",
    "with_pruning",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "UserError":
        check_versions()
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(module: Any) -> None:
    if refusal() is None:  # else whoever uses a name of this package is told
        import_module(f"{__name__}.store.saved_model").register(module.CONFIG_MAPPING)
