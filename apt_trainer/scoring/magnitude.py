"""Baseline rule: the root of the sum of squared weights of a unit, adapters included. Needs no data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import Slice, Space
from apt_trainer.models.base import base_layer, unit_dim
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
                module = model.get_submodule(part.module) if part.module in present else None
                if module is None or not list(module.parameters()):
                    continue
                with whole_modules(*module.modules()):
                    squares = _squares(module, part)
                if squares is not None:
                    total += _sum_parts(squares, part.parts, size)
            scores[space.name] = total.sqrt()
        return scores


def _sum_parts(values: torch.Tensor, parts: tuple[int, ...], size: int) -> torch.Tensor:
    """Sum rows per unit for parts of different widths: [size·Σparts] → [size]."""
    groups = values.split([size * width for width in parts])
    return torch.stack([group.view(size, -1).sum(1) for group in groups]).sum(0)


def _squares(module: nn.Module, part: Slice) -> torch.Tensor | None:
    """Squared weights summed over all sides but that of ``part``: [rows of it]; None where it has only a bias."""
    plain, (name, dim) = base_layer(module), part.weight or ("weight", None)
    weight = plain._parameters.get(name)
    if weight is None:
        return None
    dim = unit_dim(plain, weight, part.side) if dim is None else dim
    assert dim is not None, f"{part.module} has no side {part.side}"
    squares = with_adapters(module, weight.detach()).float().square()
    return squares.sum([other for other in range(weight.dim()) if other != dim]) if weight.dim() > 1 else squares
