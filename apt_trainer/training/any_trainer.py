"""The method on any class of Trainers: :func:`with_pruning`, and ready-made classes for those that many use.

The ready-made classes come into being on first use, since their packages are extras.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from transformers import Seq2SeqTrainer, Trainer

from apt_trainer.errors import UserError
from apt_trainer.libraries import versions
from apt_trainer.settings.config import joined
from apt_trainer.settings.packages import SENTENCE_TRANSFORMERS, TRL, Package, require
from apt_trainer.training.trainer import APTTrainer, PruningMixin
from apt_trainer.training.trainer_class import arguments_class

READY_MADE: dict[str, tuple[Package, str]] = {
    "APTSFTTrainer": (TRL, "SFTTrainer"),
    "APTDPOTrainer": (TRL, "DPOTrainer"),
    "APTRewardTrainer": (TRL, "RewardTrainer"),
    "APTSentenceTransformerTrainer": (SENTENCE_TRANSFORMERS, "SentenceTransformerTrainer"),
    "APTCrossEncoderTrainer": (SENTENCE_TRANSFORMERS, "CrossEncoderTrainer"),
}
"""Name → package, and class in it."""


@cache
def with_pruning(trainer_class: type[Trainer]) -> type[Any]:
    """A subclass of ``trainer_class`` that prunes, grows adapters and distils while it trains.

    Its ``Config`` is the class of training arguments of ``trainer_class`` joined with the settings of the method. Its
    own arguments are those of ``trainer_class`` and of :class:`~apt_trainer.training.trainer.PruningMixin`.

    Raises:
        UserError: ``trainer_class`` is no Trainer, has the method already, or generates while it trains.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise UserError(
            f"with_pruning takes a class, transformers.Trainer or a subclass of it, not {trainer_class!r}."
        )
    name = trainer_class.__name__
    if issubclass(trainer_class, PruningMixin):
        raise UserError(f"{name} prunes already. Use it as it is.")
    if trainer_class is Seq2SeqTrainer:
        return APTTrainer
    if hasattr(trainer_class, "_generate_and_score_completions"):
        raise UserError(
            f"{name} generates with the model while it trains, which is not supported. Prune with another class "
            "first, for example SFTTrainer, and give it the finished model."
        )
    ready = {made: to for to, (_, made) in READY_MADE.items()}
    is_ready = any(trainer_class.__module__.startswith(f"{package.modules[0]}.") for package, _ in READY_MADE.values())
    named = ready.get(name) if is_ready else None
    namespace = {
        "Config": joined(arguments_class(trainer_class)),  # type: ignore[arg-type]
        "trainer_class": trainer_class,
        "__doc__": f"``{name}`` with the method: see :func:`~apt_trainer.with_pruning`.",
        "__module__": __name__ if named else trainer_class.__module__,
    }
    return type(named or f"Pruned{name}", (PruningMixin, trainer_class), namespace)


def __getattr__(name: str) -> Any:
    if name not in READY_MADE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package, trainer_class = READY_MADE[name]
    require(package, name)
    if package is SENTENCE_TRANSFORMERS:
        versions.check_versions(versions.SENTENCE_TRANSFORMERS)
    return with_pruning(getattr(import_module(package.modules[0]), trainer_class))
