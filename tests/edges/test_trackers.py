"""What experiment trackers get: names that none of them drops, and one run of theirs for one training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from integration.factories import SHORT, Rows, events_of, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_before_the_first_step import classifier, recipe_file  # noqa: F401
from transformers.integrations.integration_utils import rewrite_logs

from apt_trainer import cli
from apt_trainer.report.plots import plot_run

EVALUATED: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}


def collisions(names: set[str]) -> list[tuple[str, str]]:
    """Pairs of which one is a folder on the path of the other, as MLflow's file store would keep them."""
    return [(a, b) for a in names for b in names if b.startswith(a + "/")]


def test_no_name_is_on_the_path_of_another(classifier: Path, tmp_path: Path) -> None:  # noqa: F811
    assert cli.main(["train", "--config", recipe_file(classifier, tmp_path, **EVALUATED)]) == 0
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    names = {name for entry in state["log_history"] for name in entry}
    assert {"loss", "task_loss", "distillation_loss", "sparsity", "eval_accuracy", "validation_accuracy"} <= names
    assert collisions(names) == [] and not any("/" in name for name in names)
    assert collisions(set(rewrite_logs(dict.fromkeys(names, 0.0)))) == []
    older = {"task_loss": "loss/task", "distillation_loss": "loss/distillation"}
    logs = [{older.get(name, name): value for name, value in entry.items()} for entry in state["log_history"]]
    for file, history in (("now.png", state["log_history"]), ("older.png", logs)):
        plot_run(events_of(tmp_path / "out"), history, tmp_path / file, "a run")
    assert (tmp_path / "now.png").read_bytes() == (tmp_path / "older.png").read_bytes()


def test_tensorboard_keeps_one_file_with_the_scores_after_training(classifier: Path, tmp_path: Path) -> None:  # noqa: F811
    file = recipe_file(classifier, tmp_path, report_to="tensorboard", **EVALUATED)
    assert cli.main(["train", "--config", file]) == 0
    (written,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    found = EventAccumulator(str(written))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/task_loss", "train/sparsity", "eval/accuracy", "train/validation_accuracy"} <= tags
    assert found.Scalars("train/sparsity")[-1].value >= 0.6


def runs_of(mlflow: Any, where: Path) -> list[Any]:
    client = mlflow.MlflowClient(f"sqlite:///{where}/mlflow.db")
    return [
        run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])
    ]


@pytest.mark.parametrize("by", ["command line", "trainer"])
def test_mlflow_gets_one_run_with_all_of_it(
    classifier: Path,  # noqa: F811
    tmp_path: Path,
    by: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the store in which names are paths
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    caplog.set_level(logging.WARNING)
    if by == "command line":
        file = recipe_file(classifier, tmp_path, report_to="mlflow", **EVALUATED)
        assert cli.main(["train", "--config", file]) == 0
        last = "validation_accuracy"
    else:
        changes = {**SHORT, **EVALUATED, "report_to": "mlflow"}
        trainer = make_trainer(tmp_path / "out", options={"eval_dataset": Rows(16)}, **changes)
        trainer.train()
        trainer.evaluate(metric_key_prefix="test")
        last = "test_loss"
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {"loss", "task_loss", "distillation_loss", "sparsity", "eval_loss", last} <= set(run.data.metrics)
    assert run.info.status == "FINISHED" and mlflow.active_run() is None
