"""What watches a model in the steps that scores come from: a rule for its units, another for its adapters.

Not for when that is (``plan.schedule``), nor for the rules (``scoring``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import Space
from apt_trainer.models.batch import Tokens
from apt_trainer.scoring import Importance, Reduce
from apt_trainer.scoring.rank_score import RankScore


class Observers:
    """Both rules on one model. ``of_units``: units are watched too, not adapters alone."""

    def __init__(
        self, model: nn.Module, spaces: Sequence[Space], importance: Importance, ranks: RankScore, of_units: bool
    ) -> None:
        self._model, self._spaces, self._importance, self._ranks = model, spaces, importance, ranks
        self._of_units = of_units
        self.attached = False
        self._resting = False

    @property
    def watching(self) -> bool:
        """Whether the step at hand is observed."""
        return self.attached and not self._resting

    def attach(self, counts: Mapping[str, int]) -> None:
        """Hook into the model, which has ``counts`` units per space."""
        if self._of_units:
            self._importance.attach(self._model, self._spaces, counts)
        self._ranks.attach(self._model)
        self.attached = True

    def detach(self) -> None:
        """Take every hook out."""
        if self.attached:
            self._importance.detach()
            self._ranks.detach()
            self.attached = False

    def rest(self, resting: bool) -> None:
        """While ``resting``, steps are not observed and hooks cost nothing."""
        self._resting = resting
        self._importance.rest(resting)
        self._ranks.rest(resting)

    def set_tokens(self, mask: Tokens) -> None:
        """Tell which tokens of the next forward pass are real."""
        if self.watching and self._of_units:
            self._importance.set_tokens(mask)

    def update(self, reduce: Reduce, processes: int) -> None:
        """After the last backward pass of a step that is observed."""
        if self._of_units:
            self._importance.check_step()
            self._importance.update(reduce, processes)
        self._ranks.update(reduce, processes)

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        """Keep the scores of ``survivors``, after a cut."""
        if self._of_units:  # else scores have served their purpose
            names = {space.name for space in self._spaces}
            self._importance.follow({name: index for name, index in survivors.items() if name in names})

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {f"ranks/{name}": value for name, value in self._ranks.state_dict().items()}
        units = self._importance.state_dict() if self._of_units else {}
        return state | {f"importance/{name}": value for name, value in units.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore :meth:`state_dict`, after :meth:`attach`; other names are left alone."""
        if self._of_units:
            self._importance.load_state_dict(part_of(state, "importance/"))
        self._ranks.load_state_dict(part_of(state, "ranks/"))


def part_of(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
