"""NRI at every event of a run: what is left is measured anew, in the model as it has been trained so far."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, tiny_batch, tiny_model

from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.plan.schedule import make_schedule
from apt_trainer.scoring.nri import Nri
from apt_trainer.scoring.sublayers.gates import switched_off
from integration.factories import (
    SHORT,
    Rows,
    SaveAt,
    counted_block_parameters,
    events_of,
    losses_of,
    make_trainer,
    weights_of,
)
from integration.test_pruned_before import MODELS, OTHERS

DURING: dict[str, Any] = {**SHORT, "prune_targets": ["sublayers"], "importance": "nri", "target_sparsity": 0.45}
DURING |= {"calibration_samples": 20, "sparsity_schedule": "linear"}
FAMILIES = MODELS | OTHERS


def during(folder: Path, name: str, options: Any = None, dropout: float = 0.0, **changes: Any) -> APTTrainer:
    task, data = FAMILIES[name]
    model = tiny_model(name, task, dropout=dropout)
    return make_trainer(folder, model, Rows(110, data), options, **{**DURING, **changes})


class Watched:
    """What each measurement of ``trainer`` gave, beside the definition computed on the same model."""

    def __init__(self, trainer: APTTrainer) -> None:
        self.trainer, self.found, self.expected = trainer, list[dict[str, float]](), list[dict[str, float]]()
        self.measure = trainer.pruner.measure_impact
        trainer.pruner.measure_impact = self._measure  # type: ignore[method-assign]

    def _measure(self, batches: Any, loss_of: Any) -> None:
        pruner, batches = self.trainer.pruner, list(batches)
        training = {module: module.training for module in pruner.model.modules()}
        self.measure(iter(batches), loss_of)
        assert {module: module.training for module in pruner.model.modules()} == training
        self.found.append(dict(pruner.importance._impacts))  # type: ignore[attr-defined]
        pruner.model.eval()
        self.expected.append(self._defined(batches, loss_of))
        pruner.model.train()

    @torch.no_grad()
    def _defined(self, batches: Any, loss_of: Any) -> dict[str, float]:
        """Perplexity without it over that of the whole − 1, relative to its share of the parameters of the dense
        sublayers: divided by it where it is harm, multiplied where it is gain."""
        pruner = self.trainer.pruner
        rule = pruner.importance
        assert isinstance(rule, Nri)
        labels = [(batch["labels"] != -100) for batch in batches]
        causal = type(pruner.model).__name__.endswith("ForCausalLM")
        weights = [float((mask[:, 1:] if causal else mask).sum()) for mask in labels]

        def loss() -> float:
            return sum(w * float(loss_of(b)) for w, b in zip(weights, batches, strict=True)) / sum(weights)

        full, found = loss(), {}
        total = sum(rule.costs[unit] for unit in rule.units.sublayers)
        for unit in rule.units.sublayers:
            space = rule.units.space(unit).name
            if pruner.plan.counts[space] == 0:
                continue
            found[space] = math.inf
            if unit in rule.candidates:
                with switched_off(pruner.model, rule.units, [unit]):
                    relative, share = math.expm1(loss() - full), rule.costs[unit] / total
                found[space] = relative / share if relative > 0 else relative * share
        return found


@pytest.mark.parametrize("name", FAMILIES)
def test_each_event_takes_what_matters_least_of_what_is_left(name: str, tmp_path: Path) -> None:
    trainer = during(tmp_path, name)
    watched = Watched(trainer)
    trainer.train()
    assert len(watched.found) == SHORT["num_pruning_events"]
    for found, expected in zip(watched.found, watched.expected, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    counts, records = trainer.pruner.plan.counts, events_of(tmp_path, "prune")
    gone = {name for name, count in counts.items() if count == 0}
    first = watched.found[0].keys() - watched.found[1].keys()
    assert first < gone and trainer.pruner.sparsity() >= 0.45
    for impacts, lost in ((watched.found[0], first), (watched.found[1], gone - first)):
        least = sorted(impacts, key=impacts.__getitem__)  # the very least stays where the next frees enough alone
        assert lost and lost <= set(least[: len(lost) + 1])
    assert records[-1]["block_params"] == counted_block_parameters(trainer)
    trainer.save_model(str(tmp_path / "model"))
    batch, again = tiny_batch(trainer.model), load_pruned(tmp_path / "model").eval()
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))


@pytest.mark.parametrize("name", MODELS)
def test_resumed_is_bit_equal(name: str, tmp_path: Path) -> None:
    """Before the first event, between the two, after both."""
    whole = during(tmp_path / "whole", name, {"callbacks": [SaveAt((3, 6, 10))]}, dropout=0.1)
    whole.train()
    for step in (3, 6, 10):
        resumed = during(tmp_path / str(step), name, dropout=0.1)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert losses_of(resumed) == losses_of(whole) and resumed.pruner.plan == whole.pruner.plan
        expected, got = weights_of(whole.model), weights_of(resumed.model)
        assert expected.keys() == got.keys() and all(torch.equal(w, got[n]) for n, w in expected.items())


def test_an_object_is_as_good_as_a_setting(tmp_path: Path) -> None:
    """Also where masks would fade by another rule."""
    named = during(tmp_path / "named", "llama")
    given = during(tmp_path / "given", "llama", {"importance": Nri("params")}, importance="magnitude")
    for trainer in (named, given):
        trainer.train()
    assert given.pruner.plan == named.pruner.plan != named.pruner.dense_plan
    assert losses_of(given) == losses_of(named)


def test_a_process_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt_trainer.settings.config.APTConfig.world_size", 3, raising=False)
    for options in ({"importance": Nri()}, {}):
        changes = {"importance": "magnitude"} if options else {}
        with pytest.raises(UserError, match=r"give no row to some of the 3 processes \(2 rows\)"):
            during(tmp_path, "llama", options, calibration_samples=2, **changes)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_target_that_takes_all_that_may_go_before_the_last_event(name: str, tmp_path: Path) -> None:
    """Whole sublayers overshoot the targets of events; then there is nothing left to measure."""
    trainer = during(tmp_path, name, num_pruning_events=4, target_sparsity=0.66, sparsity_schedule="cubic")
    trainer.train()
    assert trainer.pruner.sparsity() >= 0.66
    assert len(events_of(tmp_path, "prune")) == 4


def test_a_loop_that_forgets_to_measure_is_told(tmp_path: Path) -> None:
    pruner = during(tmp_path, "llama").pruner
    pruner.start(make_schedule(pruner.settings, 12))  # type: ignore[arg-type]
    event = pruner.schedule.events[0]  # type: ignore[union-attr]
    pruner.begin(event - 1)
    assert pruner.measures_impact(event) and not pruner.measures_impact(event - 1)
    with pytest.raises(UserError, match="NRI has not been measured since the last cut"):
        pruner.step(event)
    batch = tiny_batch(pruner.model)
    pruner.measure_impact([batch], lambda inputs: pruner.model(**inputs).loss)
    assert pruner.step(event) is not None
    with pytest.raises(UserError, match="NRI has not been measured since the last cut"):
        pruner.step(pruner.schedule.events[1])  # type: ignore[union-attr]


def test_other_rules_measure_no_impact(tmp_path: Path) -> None:
    pruner = during(tmp_path, "llama", importance="magnitude").pruner
    with pytest.raises(UserError, match="measure_impact is for importance: nri"):
        pruner.measure_impact([], lambda inputs: inputs["labels"])
