"""What a scoring rule is: it scores units, higher = keep. Knows spaces and tensors, not model names or budgets.

A new rule is one file that subclasses :class:`Importance`, as class NAME in ``scoring/name.py``, and one line in
``RULES`` of ``settings.choices``; an object can also be passed to the trainer directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from apt_trainer.models import Space
from apt_trainer.models.batch import Tokens
from apt_trainer.models.class_weights import ClassWeights
from apt_trainer.settings import PruningSettings

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sum of a tensor over processes, the identity in one process."""

Batch = dict[str, Any]
"""Inputs of the model, by name."""


class Importance(ABC):
    """Scores every unit of every space.

    ``scored``: what scores come from. "weights": the weights alone. "steps": what :meth:`update` takes in while the
    model trains, or, where it is cut before it trains, on rows that it is shown first. "cut": what :meth:`measure`
    takes in right before each cut; masks do not fade then. ``densities``: scores are already per cost (used by random
    choice). ``decay``: share of the old value that an average over updates keeps; set to 1 − 1/n at update n it
    becomes a plain mean. Rules without an average ignore it. ``class_weights``: of the labels in the loss, if any; set
    by who trains. ``of_mean_loss``: an update is as large for few labels as for many, since gradients are those of a
    mean loss, so that a mean over updates has to weigh them by their labels; False: it grows with the rows.
    """

    scored: Literal["weights", "steps", "cut"] = "steps"
    densities: bool = False
    decay: float = 0.0
    class_weights: ClassWeights | None = None
    of_mean_loss: bool = False

    @classmethod
    def from_settings(cls, settings: PruningSettings, seed: int) -> Importance:
        """The rule as ``settings`` ask for it; ``seed``: for what it draws."""
        return cls()

    def prepare(self, model: nn.Module, settings: PruningSettings, timed_on: torch.device | None = None) -> None:
        """Look at the plain ``model`` once, before it gets adapters. What scores need timed runs on ``timed_on``,
        default: where the model is."""

    def seconds(self) -> list[float]:
        """What :meth:`prepare` has timed, if anything; each process measures others."""
        return []

    def use_seconds(self, seconds: Sequence[float]) -> None:
        """Score by ``seconds``, on which all processes have agreed, instead of :meth:`seconds`."""

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

    def check_step(self) -> None:
        """Before :meth:`update` in training: raise :class:`UserError` where the step could not be observed."""

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch | None],
        loss_of: Callable[[Batch], torch.Tensor],
        reduce: Reduce,
        counts: Mapping[str, int],
        saved: Mapping[str, float],
    ) -> None:
        """Take in ``model`` as it is right before a cut; only of rules that are scored at the "cut".

        Args:
            model: Without hooks, in whatever mode.
            batches: This process' share; None: no rows are left for it, while others have some.
            loss_of: Mean loss of the model on a batch.
            reduce: Sum over processes.
            counts: Units left per space.
            saved: Space → what the budget saves when all its units go.
        """

    @abstractmethod
    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Space → [units left] float."""

    def check_observed(self) -> None:
        """Before a cut: raise :class:`UserError` where nothing was observed that units could be scored by."""

    def check_kept(self, counts: Mapping[str, int]) -> None:
        """Raise :class:`UserError` where ``counts`` units per space leave out what the model cannot do without."""

    def describe(self, rows: int) -> str:
        """What is done to the model before a cut, for people: "scored on 256 training rows"; "" for nothing."""
        return "" if self.scored == "weights" else f"scored on {rows} training rows"

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        """Keep only ``survivors`` [kept] of each named space, after a cut."""

    def detach(self) -> None:
        """Stop observing: take out every hook."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict`, after :meth:`attach`."""
