"""Scoring rules. To add one: a file with a subclass of :class:`Importance` and one line in ``RULES`` of
``settings.choices``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from apt_trainer.scoring.base import Importance, Reduce
from apt_trainer.settings import PruningSettings
from apt_trainer.settings.choices import RULES


def _made_by(name: str) -> Callable[[PruningSettings, int], Importance]:
    rule: type[Importance] = getattr(import_module(f"{__name__}.{name}"), name.capitalize())
    return rule.from_settings


IMPORTANCES = {name: _made_by(name) for name in RULES}
"""Name of each rule → what makes it from settings and a seed: the class of that name in the file of that name."""


def make_importance(settings: PruningSettings, seed: int) -> Importance:
    """The scoring rule named by ``settings.importance``."""
    return IMPORTANCES[settings.importance](settings, seed)


__all__ = ["IMPORTANCES", "Importance", "Reduce", "make_importance"]
