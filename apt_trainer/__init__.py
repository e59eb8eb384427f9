"""Fine-tune any Hugging Face transformer and get a smaller, faster model back: adaptive pruning while tuning (APT).

Names load on first use, so that ``import apt_trainer`` is quick. Before or after it, transformers' Auto classes learn
to load pruned models as soon as they are imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from apt_trainer.config import APTConfig
    from apt_trainer.errors import UserError
    from apt_trainer.importance import IMPORTANCES, Importance
    from apt_trainer.models import FAMILIES, ModelFamily
    from apt_trainer.painted_model import paint
    from apt_trainer.painting.plan import Plan
    from apt_trainer.pruned_model import load_pruned
    from apt_trainer.pruner import AdaptivePruner
    from apt_trainer.pruning.plan import PruningPlan
    from apt_trainer.trainer import APTTrainer

__version__ = "0.1.0"

_HOME = {
    "APTConfig": "config",
    "APTTrainer": "trainer",
    "AdaptivePruner": "pruner",
    "FAMILIES": "models",
    "IMPORTANCES": "importance",
    "Importance": "importance",
    "ModelFamily": "models",
    "Plan": "painting.plan",
    "PruningPlan": "pruning.plan",
    "UserError": "errors",
    "load_pruned": "pruned_model",
    "paint": "painted_model",
}

__all__ = [
    "FAMILIES",
    "IMPORTANCES",
    "APTConfig",
    "APTTrainer",
    "AdaptivePruner",
    "Importance",
    "ModelFamily",
    "Plan",
    "PruningPlan",
    "UserError",
    "load_pruned",
    "paint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(module: Any) -> None:
    import_module(f"{__name__}.pruned_model").register()
