"""The dense model beside a run: full fine-tuning of it with the same data and steps, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from apt_trainer.errors import UserError
from apt_trainer.libraries.quiet import write_line
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.events import METRICS_FILE, RECIPE_FILE, write_json
from apt_trainer.tasks.shared_rows import hand_over

_DENSE: dict[str, Any] = {
    "target_sparsity": None,
    "distillation": "none",
    "teacher_name_or_path": None,
    "early_stopping_patience": None,
    "tune": "full",
    "tune_after_pruning": None,
    "tune_after_distillation": None,
    "tune_embeddings": True,
    "full_learning_rate": None,
    "measure_latency": False,
    "lm_eval_tasks": [],
    "export": [],
    "vocabulary": None,
    "base_quantization": None,
    "keep_adapters": False,
    "reference_metric": None,
    "dense_baseline": False,
    "report_to": "none",
    "push_to_hub": False,
    "resume_from_checkpoint": "auto",
}


def dense_settings(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What the dense model beside the run of ``recipe`` is fine-tuned with, in ``folder``."""
    return recipe.given | _DENSE | {"output_dir": str(folder), "learning_rate": recipe.training.dense_learning_rate}


def train_dense(recipe: Recipe, output: Path, rows: Mapping[str, Dataset]) -> dict[str, Any]:
    """Metrics of full fine-tuning with the same data and steps, run (or found finished) in ``output``/dense.
    ``rows``: those of the same data that are tokenized."""
    folder = output / "dense"
    if not (folder / METRICS_FILE).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / RECIPE_FILE
            write_json(file, dense_settings(recipe, folder))
            command = [sys.executable, "-m", "apt_trainer", "train", "--config", str(file)]
            write_line(f"First the dense model, all of whose weights train on the same data, in {folder}")
            environment = os.environ | hand_over(rows, Path(scratch))
            if subprocess.run(command, check=False, stdout=subprocess.DEVNULL, env=environment).returncode != 0:
                raise UserError(
                    "Fine-tuning the dense model failed, see above. Set dense_baseline: false to do without."
                )
            write_line("Now the model that is pruned")
    metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text())
    return metrics
