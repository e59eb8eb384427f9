"""Base of the rules that watch activations while a model trains: real tokens, and rest between observations.

Not for what is watched: that is each rule's own.
"""

from __future__ import annotations

from apt_trainer.models.batch import Tokens
from apt_trainer.scoring.base import Importance
from apt_trainer.scoring.taps import TapContext


class Observing(Importance):
    """Hooks of a subclass ask ``self._context`` for the weights of tokens and whether they rest."""

    def __init__(self) -> None:
        self._context = TapContext()

    def set_tokens(self, mask: Tokens) -> None:
        self._context.set_tokens(mask)

    def rest(self, resting: bool) -> None:
        self._context.resting = resting
