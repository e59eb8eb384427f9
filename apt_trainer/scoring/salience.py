"""APT's outlier-aware salience: moving average of Σ|activation| · Σ|gradient|, plus the root of the kurtosis.

Formulas: APT, Eq. 4 and 5. Two differences, both on purpose. The outlier term is computed from the moving average of
inputs when scores are asked for (anew after ``OUTLIER_EVERY`` steps), not averaged over per-step values, since it
depends on the weights above all and would cost as much as a layer at each step. And it can be brought to the scale of
the salience (``outlier_scaling="mean"``), since Σ|a|·Σ|g| grows with batch, length and loss while a kurtosis does not.
A place without gradient (below the first trained weight) contributes 0. Experts, and neurons inside of them, have no
outlier term: no single projection reads them. Not for whole sublayers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import HIDDEN, Space
from apt_trainer.scoring.base import Reduce
from apt_trainer.scoring.kurtosis import contributions, root_kurtosis
from apt_trainer.scoring.observing import Observing
from apt_trainer.scoring.taps import Side, Tap, average_in
from apt_trainer.settings import PruningSettings
from apt_trainer.tensors.partitioned import whole_modules

OUTLIER_EVERY = 25
"""Optimizer steps for which an outlier term is used again."""


class Salience(Observing):
    """``decay``: of the moving average, per optimizer step. ``outlier_scaling``: "none" as in the paper, or "mean"."""

    def __init__(
        self,
        decay: float = 0.85,
        outlier_term: bool = True,
        outlier_scaling: str = "mean",
        outlier_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.decay, self.outlier_term = decay, outlier_term
        self.outlier_scaling, self.outlier_weight = outlier_scaling, outlier_weight
        self._inputs: dict[str, torch.Tensor] = {}
        self._outlier: dict[str, torch.Tensor] = {}
        self._outlier_age = 0

    @classmethod
    def from_settings(cls, settings: PruningSettings, seed: int) -> Salience:
        details = settings.details
        return cls(settings.salience_decay, settings.outlier_term, details.outlier_scaling, details.outlier_weight)

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self.detach()
        device = next(model.parameters()).device
        self._spaces = {space.name: space for space in spaces if counts[space.name] > 0}
        places = self._places(model, counts)
        widths = [counts[name] * self._spaces[name].channels for name, _, _ in places]
        self._flat = torch.zeros(3 * sum(widths), device=device)
        self._groups: list[tuple[str, torch.Tensor]] = []
        for (name, path, side), part in zip(places, self._flat.split([3 * width for width in widths]), strict=True):
            sums, stack = part.view(3, -1), self._spaces[name].stack_of(path)
            self._taps.append(Tap(model.get_submodule(path), side, "magnitudes", sums, self._context, stack))
            self._groups.append((name, sums))
        for name in self._spaces:
            self._average.setdefault(name, torch.zeros(counts[name], device=device))
        for name, sums in self._groups:
            if name != HIDDEN and self._spaces[name].gate_side == "input":
                self._inputs.setdefault(name, torch.zeros(sums.shape[1], device=device))

    @torch.no_grad()
    def update(self, reduce: Reduce, processes: int) -> None:
        flat = reduce(self._flat) if processes > 1 else self._flat
        offset = 0
        step = {name: torch.zeros_like(average) for name, average in self._average.items()}
        pairs = [(average, step[name]) for name, average in self._average.items()]
        for name, sums in self._groups:
            magnitude, gradient, signed = flat[offset : offset + sums.numel()].view_as(sums)
            offset += sums.numel()
            product = magnitude * gradient / processes
            step[name] += product.view(len(step[name]), -1).sum(1)
            if name in self._inputs:
                pairs.append((self._inputs[name], signed))
        average_in(pairs, 1 - self.decay, flat)
        self._flat.zero_()
        self._outlier_age += 1

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        salience = {name: self._average[name] for name in self._spaces}
        if not self.outlier_term:
            return dict(salience)
        if not self._outlier or self._outlier_age >= OUTLIER_EVERY:
            self._outlier, self._outlier_age = self._outlier_terms(model), 0
        outlier = self._outlier
        if self.outlier_scaling == "none":
            return {name: value + outlier[name] for name, value in salience.items()}
        scaled = {}
        for kind in {space.kind for space in self._spaces.values()}:
            names = [name for name, space in self._spaces.items() if space.kind == kind]
            mean = torch.cat([salience[name] for name in names]).mean()
            term = torch.cat([outlier[name] for name in names]).mean().clamp_min(1e-12)
            for name in names:
                scaled[name] = salience[name] + self.outlier_weight * mean * outlier[name] / term
        return scaled

    @torch.no_grad()
    def _outlier_terms(self, model: nn.Module) -> dict[str, torch.Tensor]:
        hidden = self._average.get(HIDDEN)
        terms = {name: torch.zeros_like(average) for name, average in self._average.items()}
        total = torch.zeros_like(hidden) if hidden is not None else None
        for name, mean_input in self._inputs.items():
            space = self._spaces[name]
            assert space.gate is not None
            gate = model.get_submodule(space.gate)
            with whole_modules(*gate.modules()):
                table = contributions(gate, mean_input)
            units = table.shape[1] // space.channels
            per_unit = table.view(table.shape[0], units, space.channels).transpose(0, 1).reshape(units, -1)
            terms[name] = root_kurtosis(per_unit)
            if total is not None:
                total += root_kurtosis(table)
        if total is not None:
            terms[HIDDEN] = total
        return terms

    def follow(self, survivors: Mapping[str, torch.Tensor]) -> None:
        self._outlier = {}
        for name, index in survivors.items():
            average = self._average[name]
            channels = self._spaces[name].channels
            if len(index) == 0:
                self._average.pop(name)
                self._inputs.pop(name, None)
                continue
            where = index.to(average.device)
            self._average[name] = average.index_select(0, where)
            if name in self._inputs:
                self._inputs[name] = self._inputs[name].view(-1, channels).index_select(0, where).reshape(-1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = {f"average.{name}": value for name, value in self._average.items()}
        state |= {f"inputs.{name}": value for name, value in self._inputs.items()}
        state |= {f"outlier.{name}": value for name, value in self._outlier.items()}
        return state | {"age": torch.tensor(self._outlier_age)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self._outlier_age = int(state["age"])
        for key, value in state.items():
            kind, _, name = key.partition(".")
            if kind == "outlier":
                self._outlier[name] = value.to(self._average[name].device)
            elif kind != "age":
                (self._average if kind == "average" else self._inputs)[name].copy_(value)

    def _places(self, model: nn.Module, counts: Mapping[str, int]) -> list[tuple[str, str, Side]]:
        """(space, module path, side) of every observation; modules of removed sublayers are gone."""
        present = {path for path, _ in model.named_modules()}
        places: list[tuple[str, str, Side]] = []
        for name, space in self._spaces.items():
            if space.gate is not None and space.gate in present:
                places.append((name, space.gate, space.gate_side))
            for path in space.places:
                if path in present and hasattr(model.get_submodule(path), "weight"):
                    places.append((name, path, "output"))
        return places
