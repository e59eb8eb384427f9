"""Baseline rule: a random order, drawn once per unit of the dense model and kept over all events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import Space
from apt_trainer.scoring.base import Importance
from apt_trainer.settings import PruningSettings


class Random(Importance):
    """Scores are uniform in [0, 1) and taken as densities, so that dear and cheap units are equally likely to stay."""

    densities = True
    scored = "weights"

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._scores: dict[str, torch.Tensor] = {}

    @classmethod
    def from_settings(cls, settings: PruningSettings, seed: int) -> Random:
        return cls(seed)

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        for space in spaces:
            if counts[space.name] > 0 and space.name not in self._scores:
                self._scores[space.name] = torch.rand(counts[space.name], generator=self._generator)

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return dict(self._scores)

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        for name, index in survivors.items():
            self._scores[name] = self._scores[name].index_select(0, index)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._scores)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._scores = {name: value.clone() for name, value in state.items()}
