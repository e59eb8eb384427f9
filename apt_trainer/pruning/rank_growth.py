"""The adapters of one model: where they are put, and which of them grow to which ranks at an event.

Not for the arithmetic of ranks (``plan.ranks``), nor for changing layers (``surgery.adapters``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from apt_trainer.models import ModelFamily, Space, Sublayer
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.plan.ranks import AdapterSize, allocate
from apt_trainer.scoring.rank_score import RankScore
from apt_trainer.settings import MethodSettings
from apt_trainer.surgery import adapters as lora
from apt_trainer.surgery.slicing import EditLog


class RankGrowth:
    """Puts adapters into ``model`` where ``settings`` ask for them, and grows them.

    ``score``: what adapters are worth. ``parameters_at_start``: theirs, in the model as it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        family: ModelFamily,
        spaces: Sequence[Space],
        sublayers: Sequence[Sublayer],
        settings: MethodSettings,
    ) -> None:
        self._model, self._spaces, self._sublayers, self._settings = model, spaces, sublayers, settings
        self.score = RankScore(settings.salience_decay, absolute=settings.details.rank_score == "absolute")
        if settings.uses_adapters:
            targets = settings.lora_target_modules or family.default_targets(model)
            layers = family.layer_paths(model)
            lora.insert_adapters(model, targets, settings.lora_r, settings.lora_alpha, settings.lora_dropout, layers)
        self.parameters_at_start = lora.adapter_parameters(model)

    def choose(self, plan: PruningPlan, share: float) -> dict[str, int]:
        """Path → rank of the adapters that grow at an event which leaves ``plan``; ``share`` of the growth is reached
        there."""
        s, ranks, widths = self._settings, lora.ranks(self._model), self.widths(plan)
        sizes = [AdapterSize(path, ranks[path], widths[path]) for path in ranks if path in widths]
        budget = self.parameters_at_start * (1 + share * (s.tuning_growth - 1))
        return allocate(sizes, self.score.scores(), budget, s.max_rank, s.rank_growth, s.details.rank_rule)

    def grow(self, ranks: Mapping[str, int], seed: int, log: EditLog) -> None:
        """Raise adapters to ``ranks``, with fresh rows drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        for path, layer in lora.adapters(self._model):
            if path in ranks:
                lora.grow_rank(path, layer, ranks[path], generator, log)

    def widths(self, plan: PruningPlan) -> dict[str, int]:
        """in + out features of every adapted linear once ``plan`` is applied; those that vanish are left out."""
        sides: dict[tuple[str, str], int] = {}
        for space in self._spaces:
            for part in space.slices:
                sides[part.module, part.side] = plan.counts[space.name] * sum(part.parts)
        gone = tuple(path for sub in self._sublayers if plan.counts[sub.space] == 0 for path in sub.modules)
        widths = {}
        for path, layer in lora.adapters(self._model):
            if not any(path == module or path.startswith(module + ".") for module in gone):
                inputs = sides.get((path, "in"), layer.in_features)
                widths[path] = inputs + sides.get((path, "out"), layer.out_features)
        return widths
