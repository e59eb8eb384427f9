"""Baseline rule: the root of the sum of squared weights of a unit, adapters included. Needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import Space
from apt_trainer.models.base import base_layer
from apt_trainer.scoring.base import Importance
from apt_trainer.surgery.adapters import with_adapters
from apt_trainer.tensors.partitioned import whole_modules


class Magnitude(Importance):
    """Score of a unit = ‖all weights that belong to it‖₂."""

    scored = "weights"

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self._spaces, self._counts = [space for space in spaces if counts[space.name] > 0], dict(counts)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        present = {path for path, _ in model.named_modules()}
        scores = {}
        for space in self._spaces:
            size = self._counts[space.name]
            total = torch.zeros(size, device=next(model.parameters()).device)
            for part in space.slices:
                if part.module not in present or _weight(model.get_submodule(part.module)) is None:
                    continue
                module = model.get_submodule(part.module)
                with whole_modules(*module.modules()):
                    squares = _squares(module, part.side)
                total += _sum_parts(squares, part.parts, size)
            scores[space.name] = total.sqrt()
        return scores


def _sum_parts(values: torch.Tensor, parts: tuple[int, ...], size: int) -> torch.Tensor:
    """Sum rows per unit for parts of different widths: [size·Σparts] → [size]."""
    groups = values.split([size * width for width in parts])
    return torch.stack([group.view(size, -1).sum(1) for group in groups]).sum(0)


def _weight(module: nn.Module) -> torch.Tensor | None:
    """Weight without its adapter; None for a no-op and for a norm without one."""
    return getattr(base_layer(module), "weight", None)


def _squares(module: nn.Module, side: str) -> torch.Tensor:
    """Squared weights summed over the other side: [rows of ``side``]."""
    plain, weight = base_layer(module), _weight(module)
    assert weight is not None
    weight = weight.detach()
    if weight.dim() == 1:
        return weight.float().square()
    weight = with_adapters(module, weight)
    transposed = isinstance(plain, nn.Embedding) or type(plain).__name__ == "Conv1D"
    outputs = 1 if transposed else 0
    return weight.float().square().sum(1 - outputs if side == "out" else outputs)
