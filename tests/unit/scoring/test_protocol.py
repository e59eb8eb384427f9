"""What the pruner asks of a scoring rule: rules of a user's own, scored from weights, in steps or at a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from test_calibration import batches_of
from tiny import tiny_batch, tiny_model
from torch import nn

from apt_trainer import AdaptivePruner, Importance, UserError
from apt_trainer.models import Space
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.scoring import IMPORTANCES
from apt_trainer.scoring.base import Batch, Reduce
from apt_trainer.settings import CHOICES, MethodSettings, PruningSettings
from apt_trainer.surgery import adapters as lora

SETTINGS: dict[str, Any] = {"target_sparsity": 0.3, "num_pruning_events": 2, "round_to": 4, "mask_window": 2}
STEPS = 20


class FirstUnits(Importance):
    """Earlier units are worth more."""

    scored = "weights"

    def attach(self, model: nn.Module, spaces: Sequence[Space], counts: Mapping[str, int]) -> None:
        self.counts = {space.name: counts[space.name] for space in spaces}

    def scores(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: torch.arange(number, 0, -1.0) for name, number in self.counts.items()}


class AtCuts(FirstUnits):
    """As that, once it was measured."""

    scored = "cut"

    def __init__(self) -> None:
        self.prepared: list[bool] = []
        self.measured: list[tuple[int, dict[str, int], dict[str, float]]] = []
        self.used: list[float] = []

    def prepare(self, model: nn.Module, settings: PruningSettings, timed_on: torch.device | None = None) -> None:
        self.prepared.append(bool(lora.ranks(model)))

    def seconds(self) -> list[float]:
        return [2.0, 4.0]

    def use_seconds(self, seconds: Sequence[float]) -> None:
        self.used = list(seconds)

    def measure(
        self,
        model: nn.Module,
        batches: Iterable[Batch | None],
        loss_of: Callable[[Batch], torch.Tensor],
        reduce: Reduce,
        counts: Mapping[str, int],
        saved: Mapping[str, float],
    ) -> None:
        rows = [batch for batch in batches if batch is not None]
        with torch.no_grad():
            assert all(float(loss_of(batch)) > 0 for batch in rows)
        self.measured.append((len(rows), dict(counts), dict(saved)))


def pruner_of(rule: Importance, **settings: Any) -> AdaptivePruner:
    return AdaptivePruner(tiny_model("bert"), MethodSettings(**{**SETTINGS, **settings}), importance=rule)


def trained(pruner: AdaptivePruner) -> list[bool]:
    """Whether masks were open, by step, in a loop without an optimizer."""
    opened, batch = [], tiny_batch(pruner.model)
    for step in range(STEPS):
        pruner.begin(step)
        opened.append(pruner.masks.is_open)
        pruner.model(**batch).loss.backward()
        pruner.observe()
        if pruner.measures_impact(step + 1):
            pruner.measure_impact(batches_of(pruner.model), lambda inputs: pruner.model(**inputs).loss)
        pruner.step(step + 1)
    return opened


def keeps_first(pruner: AdaptivePruner) -> bool:
    return all(units == tuple(range(len(units))) for units in pruner.plan.kept.values())


def test_a_rule_from_weights_fades_and_cuts() -> None:
    pruner = pruner_of(FirstUnits())
    pruner.start(make_schedule(pruner.settings, STEPS))
    assert not pruner.scores_at_cuts and any(trained(pruner))
    assert pruner.sparsity() >= 0.3 and keeps_first(pruner)


def test_a_rule_of_cuts_is_measured_at_each_and_nothing_fades() -> None:
    rule = AtCuts()
    pruner = pruner_of(rule)
    pruner.start(make_schedule(pruner.settings, STEPS))
    start = pruner.plan.counts
    assert pruner.scores_at_cuts and not any(trained(pruner))
    assert rule.prepared == [False] and len(rule.measured) == 2
    rows, counts, saved = rule.measured[0]
    assert rows == 3 and counts == start and saved.keys() <= counts.keys() and min(saved.values()) > 0
    assert pruner.sparsity() >= 0.3 and keeps_first(pruner)


def test_a_rule_of_cuts_scores_the_model_before_it_trains() -> None:
    rule = AtCuts()
    pruner = pruner_of(rule, pruning_time="before", distillation="none")
    pruner.start(make_schedule(pruner.settings, STEPS))
    pruner.calibrate(batches_of(pruner.model), lambda inputs: pruner.model(**inputs).loss)
    assert len(rule.measured) == 1 and pruner.step(0) is not None
    assert pruner.sparsity() >= 0.3 and keeps_first(pruner)


def test_processes_score_by_the_mean_of_their_seconds() -> None:
    """Of two processes, whose sum is three times what this one has timed; a resumed run keeps them."""
    rule, other = AtCuts(), AtCuts()
    pruner = pruner_of(rule)
    pruner.start(make_schedule(pruner.settings, STEPS), 0, lambda tensor: tensor * 3, 2)
    assert rule.used == [3.0, 6.0] and pruner.seconds == {"impact": [3.0, 6.0]}
    resumed = pruner_of(other)
    resumed.restore_shapes(pruner.state()[0])
    resumed.start(make_schedule(resumed.settings, STEPS), 4)
    assert other.used == [3.0, 6.0] and resumed.seconds == pruner.seconds


def test_nothing_is_prepared_or_measured_where_nothing_is_pruned() -> None:
    rule = AtCuts()
    pruner = pruner_of(rule, target_sparsity=None, distillation="none")
    pruner.start(make_schedule(pruner.settings, STEPS))
    assert rule.prepared == [] and not pruner.measures_impact(STEPS)
    with pytest.raises(UserError, match="measure_impact is for"):
        pruner.measure_impact([], lambda inputs: inputs["labels"])


@pytest.mark.parametrize("name", CHOICES["importance"])
def test_a_shipped_rule_says_what_it_does_before_a_cut(name: str) -> None:
    rule = IMPORTANCES[name](PruningSettings(), 0)
    rule.prepare(tiny_model("bert"), PruningSettings())
    expected = {"weights": "", "steps": "scored on 7 training rows"}
    passes = "scored on 7 training rows in 7 passes (whole, and without each sublayer)"
    assert rule.describe(7) == expected.get(rule.scored, passes)
