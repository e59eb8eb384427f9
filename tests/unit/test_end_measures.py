"""What a run measures when it has ended: tasks of lm_eval, generation, and when it came near full fine-tuning."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from texts import local_task, tiny_llama, word_tokenizer, words
from transformers import TrainerControl, TrainerState

from apt_trainer import APTConfig
from apt_trainer.errors import UserError
from apt_trainer.evaluation.harness import run_tasks
from apt_trainer.loading import load_saved
from apt_trainer.recipe import Recipe
from apt_trainer.report.tables import comparison_table
from apt_trainer.run import train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.time_to_accuracy import TimeToAccuracy

SPEED = {"measure_latency": True, "latency_batch_sizes": [1], "latency_length": 8, "latency_new_tokens": 4}


def _recipe(folder: Path, **changes: Any) -> Recipe:
    tiny_llama().save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": words(4, i), "completion": words(5, 50 + i)}) + "\n" for i in range(40))
    )
    values = {"max_steps": 6, "pruning_time": "before", "distillation": "none", "target_sparsity": 0.3, "round_to": 1}
    values |= {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    values |= {"calibration_samples": 8, "measure_latency": False, "num_pruning_events": 1} | changes
    return Recipe(
        model=ModelSettings(str(folder / "dense")),
        data=DataSettings(task="instruction_tuning", train_file=str(rows), validation_file=str(rows), max_length=24),
        training=APTConfig(output_dir=str(folder / "out"), **values),
        path=None,
        given={},
    )


@pytest.fixture
def quick_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the tasks that come with lm_eval takes long."""
    monkeypatch.setattr(sys.modules["lm_eval.tasks"], "TaskManager", partial(TaskManager, include_defaults=False))


def test_a_run_ends_with_tasks_and_generation_of_what_it_saved(tmp_path: Path, quick_manager: None) -> None:
    rows = [{"UID": "x", "sentence_good": words(5, i), "sentence_bad": words(6, 90 + i)} for i in range(20)]
    task = local_task(tmp_path, "blimp", rows)
    metrics = train(_recipe(tmp_path, lm_eval_tasks=[task], **SPEED))
    again = load_saved(ModelSettings(str(tmp_path / "out")))
    assert run_tasks(again.eval(), word_tokenizer(), [task]) == metrics["lm_eval"]
    assert metrics["lm_eval"]["my_blimp"]["examples"] == 20
    times = metrics["generation"]
    assert set(times) == {"dense", "pruned"} and set(times["pruned"]) == {"1"}
    assert times["pruned"]["1"]["cache_bytes"] <= times["dense"]["1"]["cache_bytes"]
    assert "latency_ms" not in metrics and "prefill, batch 1 × 8" in comparison_table(metrics)
    assert json.loads((tmp_path / "out/metrics.json").read_text())["lm_eval"] == metrics["lm_eval"]


def test_an_unknown_task_stops_before_anything_is_written(tmp_path: Path, quick_manager: None) -> None:
    with pytest.raises(UserError, match="nothing_of_the_kind"):
        train(_recipe(tmp_path, lm_eval_tasks=["nothing_of_the_kind"]))
    assert not (tmp_path / "out").exists()


def test_tasks_need_a_language_model(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, lm_eval_tasks=["piqa_local"])
    rows = tmp_path / "classes.jsonl"
    rows.write_text("".join(json.dumps({"text": words(4, i), "label": i % 2}) + "\n" for i in range(20)))
    data = DataSettings(task="classification", train_file=str(rows), validation_file=str(rows), max_length=24)
    with pytest.raises(UserError, match="classification is no language model"):
        train(replace(recipe, data=data))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_metric": 0.9}, "eval_strategy is no"),
        ({"reference_share": 0}, "reference_share=0"),
        ({"latency_new_tokens": 0}, "latency_new_tokens=0"),
        ({"latency_batch_sizes": []}, r"latency_batch_sizes=\[\]"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _recipe(tmp_path, **changes)


# ---------------------------------------------------------------------------------------- time to accuracy


class _Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("apt_trainer.time_to_accuracy.time", SimpleNamespace(perf_counter=lambda: self.now))


def _evaluate(watch: TimeToAccuracy, clock: _Clock, step: int, value: float, trains: float, evaluates: float) -> None:
    clock.now += trains + evaluates
    state = TrainerState(global_step=step)
    metrics = {"eval_accuracy": value, "eval_runtime": evaluates}
    watch.on_evaluate(None, state, TrainerControl(), metrics=metrics)


def test_the_first_evaluation_of_the_final_shape_counts_without_the_time_of_evaluating(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, cut = _Clock(monkeypatch), [False]
    watch = TimeToAccuracy("eval_accuracy", 0.8, is_pruned=lambda: cut[0])
    watch.on_train_begin(None, TrainerState(), TrainerControl())
    _evaluate(watch, clock, 10, 0.85, 5.0, 2.0)
    cut[0] = True
    _evaluate(watch, clock, 20, 0.79, 5.0, 2.0)
    assert watch.record() == {"mark": 0.8, "seconds": None, "step": None}
    _evaluate(watch, clock, 30, 0.8, 4.0, 2.0)
    _evaluate(watch, clock, 40, 0.9, 4.0, 2.0)
    assert watch.record() == {"mark": 0.8, "seconds": pytest.approx(14.0), "step": 30}


def test_a_resumed_run_counts_what_was_trained_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    first = TimeToAccuracy("eval_loss", 0.5, greater_is_better=False)
    first.on_train_begin(None, TrainerState(), TrainerControl())
    clock.now += 6.0
    saved = TrainerState(global_step=10, stateful_callbacks={"TimeToAccuracy": json.loads(json.dumps(first.state()))})
    clock.now += 1000.0
    again = TimeToAccuracy("eval_loss", 0.5, greater_is_better=False)
    again.on_train_begin(None, saved, TrainerControl())
    clock.now += 4.0
    again.on_evaluate(None, TrainerState(global_step=20), TrainerControl(), metrics={"eval_loss": 0.4})
    assert again.record() == {"mark": 0.5, "seconds": pytest.approx(10.0), "step": 20}


def test_a_run_with_a_reference_records_when_it_came_near(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "reference_metric": 1e6}
    found = train(_recipe(tmp_path, **changes))["time_to_accuracy"]
    assert found["mark"] == pytest.approx(1e6 / 0.97) and found["step"] == 2
    assert found["seconds"] > 0
