"""Cosine importance of whole sublayers while a model trains (LLM-Drop, eq. 1–6): 1 − cos(X, Y) of the residual stream.

X and Y are those of ``scoring.stream``. A moving average over observed steps, in the model as it trains, dropout and
fading masks included. One pass is observed after each call of ``set_tokens``, or per step where there is none: not
those that compute layers again for the backward pass, nor evaluations. All units of a sublayer get the same
share of its score, so their sum is the score. Not for choosing among heads or neurons, which it cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from apt_trainer.models import Space, Sublayer, family_of
from apt_trainer.models.batch import Tokens
from apt_trainer.scoring.base import Reduce
from apt_trainer.scoring.observing import Observing
from apt_trainer.scoring.stream import ResidualStream, cosines
from apt_trainer.scoring.taps import average_in
from apt_trainer.settings import PruningSettings


class Cosine(Observing):
    """``decay``: of the moving average, per observed step."""

    def __init__(self, decay: float = 0.85) -> None:
        super().__init__()
        self.decay = decay
        self._counts: dict[str, int] = {}
        self._awaited: set[str] = set()
        self._told = False

    @classmethod
    def from_settings(cls, settings: PruningSettings, seed: int) -> Cosine:
        return cls(settings.salience_decay)

    def set_tokens(self, mask: Tokens) -> None:
        super().set_tokens(mask)
        self._awaited, self._told = set(self._counts), True

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self.detach()
        config: Any = model.config
        family = family_of(config)
        self._counts = {space.name: counts[space.name] for space in spaces if counts[space.name] > 0}
        device = next(model.parameters()).device
        self._await()
        self._sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in self._counts}
        for name in self._counts:  # [Σ (1 − cos), tokens]
            self._average.setdefault(name, torch.zeros(2, dtype=torch.float64, device=device))
        follows = family.keeps_norms(config)  # of a sublayer that is gone its norm is still on the way
        sublayers = [one for one in family.sublayers(model) if follows or one.space in self._counts]
        blocks = dict.fromkeys((sublayer.block, sublayer.stack) for sublayer in sublayers)
        self._taps.append(ResidualStream(model, family, blocks, sublayers, self._take, self._observes))

    @torch.no_grad()
    def update(self, reduce: Reduce, processes: int) -> None:
        flat = torch.stack(list(self._sums.values()))
        flat = reduce(flat) if processes > 1 else flat
        averages = [self._average[name] for name in self._sums]
        average_in(zip(averages, flat, strict=True), 1 - self.decay, flat)
        for sums in self._sums.values():
            sums.zero_()
        self._await()

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        scores = {}
        for name, count in self._counts.items():
            turned, tokens = self._average[name]
            scores[name] = (turned / tokens.clamp_min(1) / count).expand(count)
        return scores

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        for name, index in survivors.items():
            if len(index) == 0:
                self._average.pop(name, None)

    def _await(self) -> None:
        """A loop that tells no tokens has the first pass of each step observed."""
        self._awaited = set() if self._told else set(self._counts)

    def _observes(self) -> bool:
        return bool(self._awaited) and not self._context.resting

    def _take(self, sublayer: Sublayer, before: torch.Tensor, after: torch.Tensor) -> None:
        if sublayer.space not in self._awaited:
            return
        self._awaited.remove(sublayer.space)
        self._context.passes += 1
        turned = 1 - cosines(before, after).flatten()
        weights = self._context.weights(before, sublayer.stack)
        tokens = turned.new_tensor(turned.numel()) if weights is None else weights.sum()
        total = turned.sum() if weights is None else turned @ weights
        self._sums[sublayer.space] += torch.stack([total, tokens]).double()
