"""Whole sublayers, hidden dimensions, heads and neurons within one budget while a model trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import logits, tiny_batch, tiny_model

from apt_trainer import APTTrainer, load_pruned
from apt_trainer.models import HIDDEN
from integration.factories import SHORT, Fixed, Rows, counted_block_parameters, events_of, make_trainer

TARGETS = {
    "sublayers and hidden": ["sublayers", "hidden"],
    "all four": ["sublayers", "heads", "neurons", "hidden"],
}
FAMILIES = {
    "bert": ("ForSequenceClassification", "classification", ("layers.1.heads", "layers.0.neurons")),
    "llama": ("ForCausalLM", "text", ("layers.1.heads", "layers.0.neurons")),
    "gemma2": ("ForCausalLM", "text", ("layers.0.heads", "layers.2.neurons")),
    "gpt2": ("ForCausalLM", "text", ("layers.0.heads", "layers.2.neurons")),
    "t5": ("ForConditionalGeneration", "target", ("encoder.1.heads", "decoder.0.neurons")),
}


def trained(folder: Path, name: str, targets: str, importance: Any = None, **changes: Any) -> APTTrainer:
    task, data, _ = FAMILIES[name]
    options = {"importance": importance} if importance is not None else {}
    settings = {**SHORT, "prune_targets": TARGETS[targets], "target_sparsity": 0.5, **changes}
    trainer = make_trainer(folder, tiny_model(name, task), Rows(110, data), options, **settings)
    trainer.train()
    return trainer


def check_result(trainer: APTTrainer, folder: Path, targets: str) -> None:
    """The budget is met in real parameters, only what may go has gone, and what is saved computes the same."""
    counts, dense = trainer.pruner.plan.counts, trainer.pruner.dense_plan.counts
    assert trainer.pruner.sparsity() >= 0.5
    parameters = counted_block_parameters(trainer)
    assert parameters <= 0.5 * trainer.pruner.block_cost.total(dense)
    assert parameters == events_of(folder, "prune")[-1]["block_params"]
    assert 8 <= counts[HIDDEN] <= dense[HIDDEN] and counts[HIDDEN] % 4 == 0
    if targets == "sublayers and hidden":
        assert all(count in (0, dense[name]) for name, count in counts.items() if name != HIDDEN)
    trainer.save_model(str(folder / "saved"))
    batch = tiny_batch(trainer.model)
    assert torch.equal(logits(load_pruned(folder / "saved").eval(), batch), logits(trainer.model.eval(), batch))


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_masked_is_what_is_cut(name: str, targets: str, tmp_path: Path) -> None:
    """Scores stay as they are, so that masks have faded to what an event then cuts: no loss changes by it."""
    worthless = dict.fromkeys(FAMILIES[name][2], 0.0)
    hidden = [1e3] * 12 + [1e-3] * 4
    trainer = trained(tmp_path, name, targets, Fixed(worthless | {HIDDEN: hidden}), mask_step=1.0)
    check_result(trainer, tmp_path, targets)
    counts = trainer.pruner.plan.counts
    assert any(counts[space] == 0 for space in worthless) and counts[HIDDEN] < 16
    records = events_of(tmp_path, "prune")
    assert len(records) == 2
    for record in records:
        assert record["loss_after"] == pytest.approx(record["loss_before"], rel=1e-5)


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("time", ["early", "before"])
def test_salience_weighs_them_against_each_other(name: str, targets: str, time: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"pruning_time": time}
    if time == "before":
        changes |= {"pruning_start": None, "distillation": "none", "distillation_end": None}
    trainer = trained(tmp_path, name, targets, **changes)
    check_result(trainer, tmp_path, targets)
    assert trainer.pruner.plan != trainer.pruner.dense_plan
