"""How salient an adapter is, so that the more salient ones grow (APT, Eq. 6 and footnote 3).

Observed at the output of A: Σ over tokens of h·∂L/∂h equals Σ A·∂L/∂A per rank, so no parameter gradient is read and
the number is the same under every distributed engine.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from apt_trainer.scoring.base import Reduce
from apt_trainer.scoring.taps import Tap, TapContext, average_in
from apt_trainer.surgery.adapters import ADAPTER, adapters


class RankScore:
    """Moving average per rank of |Σ A·∂L/∂A|; an adapter's score is the mean over its ranks.

    ``absolute`` uses Σ|B·∂L/∂B| (the paper's formula), which needs parameter gradients and so works in one process or
    under DDP only: call :meth:`update` before gradients are cleared.
    """

    def __init__(self, decay: float = 0.85, absolute: bool = False) -> None:
        self.decay, self.absolute = decay, absolute
        self._taps: list[Tap] = []
        self._context = TapContext()
        self._sums: dict[str, torch.Tensor] = {}
        self._average: dict[str, torch.Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """(Re-)start observing; averages start at zero, as after every event in the paper."""
        self.detach()
        layers = list(adapters(model))
        device = next(model.parameters()).device
        widths = [layer.r[ADAPTER] for _, layer in layers]
        self._flat = torch.zeros(sum(widths), device=device)
        self._sums = {path: part for (path, _), part in zip(layers, self._flat.split(widths), strict=True)}
        self._average = {path: torch.zeros_like(part) for path, part in self._sums.items()}
        self._factors = {path: layer.lora_B[ADAPTER].weight for path, layer in layers}
        if self.absolute:
            return
        for path, layer in layers:
            sums = self._sums[path].view(1, -1)
            self._taps.append(Tap(layer.lora_A[ADAPTER], "output", "signed", sums, self._context))

    def rest(self, resting: bool) -> None:
        """While ``resting``, steps are not to be observed; the paper's formula needs no hooks."""
        self._context.resting = resting

    @torch.no_grad()
    def update(self, reduce: Reduce, processes: int) -> None:
        """Take in one optimizer step."""
        if not self._average:
            return
        if self.absolute:
            for path, factor in self._factors.items():
                if factor.grad is not None:
                    self._sums[path].copy_((factor * factor.grad).abs().sum(0))
        flat = reduce(self._flat) / processes if processes > 1 and not self.absolute else self._flat
        values = flat.split([len(part) for part in self._sums.values()])
        pairs = zip(self._average.values(), (value.abs() for value in values), strict=True)
        average_in(pairs, 1 - self.decay, flat)
        self._flat.zero_()

    def scores(self) -> dict[str, float]:
        """Adapter path → mean over its ranks."""
        if not self._average:
            return {}
        means = torch.stack([average.mean() for average in self._average.values()]).tolist()
        return dict(zip(self._average, means, strict=True))

    def detach(self) -> None:
        for tap in self._taps:
            tap.remove()
        self._taps.clear()
        self._sums, self._average, self._factors = {}, {}, {}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        for path, value in state.items():
            self._average[path].copy_(value)
