"""What a scoring rule is: it scores units, higher = keep. Knows spaces and tensors, not model names or budgets.

A new rule is one file that subclasses :class:`Importance` and one line in ``importance/__init__.py``; an object can
also be passed to the trainer directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import Space
from apt_trainer.models.batch import Tokens

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sum of a tensor over processes, the identity in one process."""


class Importance(ABC):
    """Scores every unit of every space.

    ``densities``: scores are already per cost (used by random choice). ``needs_data``: scores come from batches, which
    a model that is pruned before it trains has to be shown first. ``decay``: share of the old value that an average
    over updates keeps; set to 1 − 1/n at update n it becomes a plain mean. Rules without an average ignore it.
    ``of_mean_loss``: an update is as large for few labels as for many, since gradients are those of a mean loss, so
    that a mean over updates has to weigh them by their labels; False: it grows with the rows.
    """

    densities: bool = False
    needs_data: bool = True
    decay: float = 0.0
    of_mean_loss: bool = False

    @abstractmethod
    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        """Start observing ``model``; called again after each cut, when ``counts`` units are left per space."""

    def set_tokens(self, mask: Tokens) -> None:
        """Tell which tokens of the next batch are real: [batch, length], 1 = real, one such per stack in a model with
        an encoder and a decoder; None = all."""

    def rest(self, resting: bool) -> None:
        """While ``resting``, steps are not to be observed: hooks should cost nothing, :meth:`update` is not called."""

    def update(self, reduce: Reduce, processes: int) -> None:
        """Take in one optimizer step, after its last backward pass."""

    @abstractmethod
    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Space → [units left] float."""

    def check_kept(self, counts: Mapping[str, int]) -> None:
        """Raise :class:`UserError` where ``counts`` units per space leave out what the model cannot do without."""

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        """Keep only ``survivors`` [kept] of each named space, after a cut."""

    def detach(self) -> None:
        """Stop observing: take out every hook."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict`, after :meth:`attach`."""
