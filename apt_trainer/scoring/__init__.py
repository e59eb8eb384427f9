"""Scoring rules. To add one: a file with a subclass of :class:`Importance` and one line in ``IMPORTANCES``."""

from __future__ import annotations

from collections.abc import Callable

from apt_trainer.scoring.base import Importance, Reduce
from apt_trainer.scoring.cosine import Cosine
from apt_trainer.scoring.magnitude import Magnitude
from apt_trainer.scoring.nri import Nri
from apt_trainer.scoring.random import Random
from apt_trainer.scoring.salience import Salience
from apt_trainer.scoring.taylor import Taylor
from apt_trainer.settings import PruningSettings

IMPORTANCES: dict[str, Callable[[PruningSettings, int], Importance]] = {
    "salience": lambda s, seed: _salience(s),
    "magnitude": lambda s, seed: Magnitude(),
    "taylor": lambda s, seed: Taylor(s.salience_decay),
    "random": lambda s, seed: Random(seed),
    "cosine": lambda s, seed: Cosine(s.salience_decay),
    "nri": lambda s, seed: Nri(s.nri_cost),
}


def _salience(s: PruningSettings) -> Salience:
    return Salience(s.salience_decay, s.outlier_term, s.details.outlier_scaling, s.details.outlier_weight)


def make_importance(settings: PruningSettings, seed: int) -> Importance:
    """The scoring rule named by ``settings.importance``."""
    return IMPORTANCES[settings.importance](settings, seed)


__all__ = [
    "IMPORTANCES",
    "Cosine",
    "Importance",
    "Magnitude",
    "Nri",
    "Random",
    "Reduce",
    "Salience",
    "Taylor",
    "make_importance",
]
