"""ZeRO-3 on two real processes with other models and settings than ``test_zero``, each as one process runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LANGUAGE_MODELS, tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification

from apt_trainer import APTTrainer
from integration.factories import SHORT, Rows, losses_of, make_trainer
from integration.test_processes import GLOBAL_BATCH, two_processes
from integration.test_pruned_before import BEFORE

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "t5": {},
    "before": {**BEFORE, "importance": "magnitude"},
    "teacher": {"distillation": "model", "teacher_name_or_path": "given"},
    "norms": {"tune": "adapters_and_norms", "activation_checkpointing": True, "importance": "taylor"},
    "full": {"tune": "full", "tune_embeddings": True, "rank_growth": "none", "distillation_transform": "identity"},
}
"""What differs from ``SHORT``; the first three name models."""


def trained(folder: Path, name: str, **changes: Any) -> APTTrainer:
    """Rows without padding, so that the batches of two processes weigh the same."""
    options: dict[str, Any] = {"heldout_dataset": Rows(16, padded=False)}
    model, data = tiny_model("bert"), Rows(96, padded=False)
    if name in LANGUAGE_MODELS:
        model, data = tiny_model(name, LANGUAGE_MODELS[name]), Rows(96, "text", padded=False)
        options = {"heldout_dataset": Rows(16, "text", padded=False)}
    if name == "teacher":
        teacher = AutoModelForSequenceClassification.from_config(tiny_config("bert", 2, num_labels=3))
        options = {"teacher": teacher}
    trainer = make_trainer(folder, model, data, options, **{**SHORT, "max_grad_norm": 1.0, **CASES[name], **changes})
    trainer.train()
    return trainer


WORKER = """
import json, os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
import torch
torch.set_num_threads(1)
from integration.factories import losses_of
from integration.test_zero import deepspeed_config
from integration.test_zero3 import CASES, GLOBAL_BATCH, trained

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
for name in CASES:
    zero = {{"deepspeed": deepspeed_config(3), "per_device_train_batch_size": GLOBAL_BATCH // 2}}
    trainer = trained(folder / name, name, **zero)
    trainer.save_model(str(folder / name / "model"))
    result = {{"plan": trainer.pruner.plan.to_json(), "losses": losses_of(trainer)}}
    (folder / f"{{name}}.{{rank}}.json").write_text(json.dumps(result))
torch.distributed.barrier()
os._exit(0)
"""


@pytest.mark.distributed
def test_other_models_and_settings_equal_one_process(tmp_path: Path) -> None:
    """One test, since starting two processes takes longer than a run in them."""
    two_processes(tmp_path, WORKER, *(f"{name}.{rank}.json" for name in CASES for rank in (0, 1)))
    for name in CASES:
        expected = trained(tmp_path / "single" / name, name, per_device_train_batch_size=GLOBAL_BATCH)
        losses = losses_of(expected)
        for rank in (0, 1):
            result = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            assert result["plan"] == expected.pruner.plan.to_json(), name
        assert len(losses) == 12
        result = json.loads((tmp_path / f"{name}.0.json").read_text())
        worst = max(abs(result["losses"][str(step)][0] / values[0] - 1) for step, values in losses.items())
        assert worst < 1e-5, name
        assert torch.isfinite(torch.tensor([values[0] for values in losses.values()])).all()
