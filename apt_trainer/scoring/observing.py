"""Base of the rules that watch activations while a model trains: real tokens, and rest between observations.

Not for what is watched: that is each rule's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from apt_trainer.errors import UserError
from apt_trainer.models.batch import Tokens
from apt_trainer.scoring.base import Importance
from apt_trainer.scoring.taps import TapContext


class Removable(Protocol):
    """Hooks that can be taken out."""

    def remove(self) -> None: ...


class Observing(Importance):
    """Hooks of a subclass ask ``self._context`` for the weights of tokens and whether they rest.

    ``_average``: space → moving average of what its scores are made of. ``_taps``: what is hooked into the model.
    """

    def __init__(self) -> None:
        self._context = TapContext()
        self._average: dict[str, torch.Tensor] = {}
        self._taps: list[Removable] = []

    def set_tokens(self, mask: Tokens) -> None:
        self._context.set_tokens(mask)

    def check_step(self) -> None:
        """Raise :class:`UserError` where no pass was observed since this was last asked."""
        passes, self._context.passes = self._context.passes, 0
        if passes == 0:
            raise UserError(
                "A step is to be observed, but no forward pass of the model's layers was seen in training mode with "
                "gradients: it would be pruned without scores. Call the model itself in compute_loss (not a copy, not "
                "under no_grad, not after model.eval()), or take importance: magnitude."
            )

    def check_observed(self) -> None:
        """Raise :class:`UserError` where all averages are still zero; waits for the device."""
        if not any(bool(average.any()) for average in self._average.values()):
            raise UserError(
                "Nothing finite was observed that units could be scored by: all gradients were zero or not finite. "
                "With fp16, train a few steps before pruning_start, until the loss scale has settled, or use bf16."
            )

    def detach(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps.clear()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, value in state.items():
            self._average[name].copy_(value)

    def rest(self, resting: bool) -> None:
        self._context.resting = resting
