"""First-order rule: expected change of the loss when a unit is switched off (Michel et al. 2019, arXiv 1905.10650).

Score = moving average of Σ over sequences of |Σ over tokens and channels of activation · gradient|. Hidden dimensions
are observed where they are written; of neurons inside of experts each token counts by itself. Keeps the observed
activations until the backward pass, unlike the salience.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import Space
from apt_trainer.models.modeling_apt import NoOp
from apt_trainer.scoring.base import Reduce
from apt_trainer.scoring.observing import Observing
from apt_trainer.scoring.taps import Side, Tap, average_in
from apt_trainer.settings import PruningSettings


class Taylor(Observing):
    """``decay``: of the moving average, per optimizer step."""

    of_mean_loss = True

    def __init__(self, decay: float = 0.85) -> None:
        super().__init__()
        self.decay = decay

    @classmethod
    def from_settings(cls, settings: PruningSettings, seed: int) -> Taylor:
        return cls(settings.salience_decay)

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self.detach()
        device = next(model.parameters()).device
        present = {path for path, _ in model.named_modules()}
        left = [space for space in spaces if counts[space.name] > 0]
        self._flat = torch.zeros(sum(counts[space.name] for space in left), device=device)
        parts = self._flat.split([counts[space.name] for space in left])
        self._sums = {space.name: part.view(1, -1) for space, part in zip(left, parts, strict=True)}
        for space in left:
            sums = self._sums[space.name]
            sides: list[tuple[str, Side]] = [(space.gate, space.gate_side)] if space.gate is not None else []
            sides += [(path, "output") for path in space.places]
            for path, side in sides:
                if path in present and not isinstance(model.get_submodule(path), NoOp):
                    module, stack = model.get_submodule(path), space.stack_of(path)
                    self._taps.append(Tap(module, side, "per_sequence", sums, self._context, stack))
            self._average.setdefault(space.name, torch.zeros(counts[space.name], device=device))

    @torch.no_grad()
    def update(self, reduce: Reduce, processes: int) -> None:
        flat = reduce(self._flat) / processes if processes > 1 else self._flat
        values = flat.split([sums.shape[1] for sums in self._sums.values()])
        averages = [self._average[name] for name in self._sums]
        average_in(zip(averages, values, strict=True), 1 - self.decay, flat)
        self._flat.zero_()

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return dict(self._average)

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        for name, index in survivors.items():
            average = self._average.pop(name)
            if len(index) > 0:
                self._average[name] = average.index_select(0, index.to(average.device))
