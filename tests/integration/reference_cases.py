"""Runs with a fixed seed and saved models whose numbers version 0.1.0 wrote down; see ``test_reference``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import logits, parts, random_plan, tiny_batch, tiny_model
from transformers import PreTrainedModel

from apt_trainer import Plan, paint
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan
from integration.factories import CHANGES, SHORT, Rows, make_trainer

BEFORE = {"pruning_time": "before", "pruning_start": None, "pruning_end": 8, "num_pruning_events": 2, "max_steps": 12}
BEFORE |= {"distillation": "none", "distillation_end": None, "calibration_samples": 24}
RUNS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "bert_early": ("bert", "ForSequenceClassification", "classification", CHANGES),
    "llama_before": ("llama", "ForCausalLM", "text", BEFORE),
    "t5_hidden": ("t5", "ForConditionalGeneration", "target", SHORT | {"prune_targets": ["neurons", "hidden"]}),
}
"""Name → family, kind of head, kind of rows, settings."""


def run(name: str, folder: Path, **changes: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The finished model of one of ``RUNS``; its plan, losses and predictions."""
    family, task, rows, settings = RUNS[name]
    trainer = make_trainer(folder, tiny_model(family, task), Rows(task=rows), **{**settings, **changes})
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    plan = {space: list(units) for space, units in trainer.pruner.plan.kept.items()}
    return trainer.model, {"plan": plan, "losses": losses, "logits": answers(trainer.model)}


def models() -> dict[str, PreTrainedModel]:
    """Kinds of saved models that no run here makes."""
    kept = tiny_model("bert", "ForSequenceClassification", apt_post_norm_policy="keep_norm")
    table, spaces, dense = parts(kept)
    plan = random_plan(spaces, dense, 4, vanish=("layers.0.heads", "layers.2.neurons"))
    apply_plan(kept, table, spaces, dense, plan)
    as_pruned(kept, table, plan)
    gone = tiny_model("gpt2", "ForCausalLM")
    table, spaces, dense = parts(gone)
    plan = random_plan(spaces, dense, 4, vanish=("layers.0.heads", "layers.1.neurons"))
    apply_plan(gone, table, spaces, dense, plan)
    as_pruned(gone, table, plan)
    painted = tiny_model("llama", "ForCausalLM")
    paint(painted, Plan(3, (0, 2, 1, 1)))
    return {"bert_keep_norm": kept, "gpt2_gone": gone, "llama_painted": painted}


def answers(model: PreTrainedModel) -> list[float]:
    """All predictions for one batch."""
    return logits(model.eval(), tiny_batch(model)).flatten().tolist()  # type: ignore[no-any-return]
