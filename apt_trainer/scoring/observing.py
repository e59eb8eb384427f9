"""Base of the rules that watch activations while a model trains: real tokens, and rest between observations.

Not for what is watched: that is each rule's own.
"""

from __future__ import annotations

import torch

from apt_trainer.models.batch import Tokens
from apt_trainer.scoring.base import Importance
from apt_trainer.scoring.taps import TapContext


class Observing(Importance):
    """Hooks of a subclass ask ``self._context`` for the weights of tokens and whether they rest.

    ``_average``: space → moving average of what its scores are made of.
    """

    def __init__(self) -> None:
        self._context = TapContext()
        self._average: dict[str, torch.Tensor] = {}

    def set_tokens(self, mask: Tokens) -> None:
        self._context.set_tokens(mask)

    def has_observed(self) -> bool:
        """Whether anything was observed since this was last asked."""
        passes, self._context.passes = self._context.passes, 0
        return passes > 0

    def is_blank(self) -> bool:
        """Whether all scores are still zero, as where nothing finite was observed; waits for the device."""
        return not any(bool(average.any()) for average in self._average.values())

    def rest(self, resting: bool) -> None:
        self._context.resting = resting
