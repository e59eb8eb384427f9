"""What a run measures when it has ended: tasks of lm_eval, generation, and when it came near full fine-tuning."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from texts import local_task, tiny_llama, word_tokenizer, words
from transformers import EvalPrediction, TrainerControl, TrainerState

from apt_trainer import APTConfig
from apt_trainer.errors import UserError
from apt_trainer.evaluate import peak
from apt_trainer.evaluate.bootstrap import mean_interval
from apt_trainer.evaluate.harness import run_tasks
from apt_trainer.evaluate.peak import PeakRequest
from apt_trainer.evaluate.task_intervals import _f1, _matthews, score_intervals
from apt_trainer.report.tables import comparison_table
from apt_trainer.runs.run import evaluate, train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.pretrained import load_saved
from apt_trainer.tasks.generation_scores import ROUGE
from apt_trainer.tasks.metrics import classification_scores, regression_scores
from apt_trainer.training.time_to_accuracy import TimeToAccuracy

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


def test_a_run_ends_with_tasks_speed_and_memory_of_what_it_saved(
    tmp_path: Path, quick_manager: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_trainer.evaluate.compare.measure_peak", peak.run)  # in this process: quicker
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
    memory = metrics["inference_memory"]
    assert memory["pruned"]["weight_bytes"] < memory["dense"]["weight_bytes"] <= memory["dense"]["peak_bytes"]
    assert memory["pruned"]["weight_bytes"] == sum(
        t.numel() * t.element_size() for t in (*again.parameters(), *again.buffers())
    )
    assert "peak memory in use" in comparison_table(metrics)


def test_memory_is_taken_at_the_largest_batch_and_its_failure_does_not_lose_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests: list[PeakRequest] = []

    def fail(request: PeakRequest) -> None:
        requests.append(request)
        raise UserError("Measuring memory failed: out of memory.")

    monkeypatch.setattr("apt_trainer.evaluate.compare.measure_peak", fail)
    monkeypatch.setattr("apt_trainer.runs.run.measure_speed", lambda *_: {})
    changes = {"latency_batch_sizes": [2, 3, 1], "resume_from_checkpoint": "auto"}
    metrics = train(_recipe(tmp_path, **(SPEED | changes)))
    assert metrics["resumed"] is False
    assert "inference_memory" not in metrics and (tmp_path / "out/metrics.json").is_file()
    assert "Measuring memory failed: out of memory." in caplog.text
    assert [(r.dense_shape, r.batch_size, r.length, r.new_tokens, r.device) for r in requests] == [
        (True, 3, 8, 4, "cpu")
    ]
    assert requests[0].settings["model_name_or_path"] == str(tmp_path / "out")


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
        monkeypatch.setattr(
            "apt_trainer.training.time_to_accuracy.time", SimpleNamespace(perf_counter=lambda: self.now)
        )


def _evaluate(watch: TimeToAccuracy, clock: _Clock, step: int, value: float, trains: float, evaluates: float) -> None:
    clock.now += trains + evaluates
    state = TrainerState(global_step=step)
    metrics = {"eval_accuracy": value, "eval_runtime": evaluates}
    watch.on_evaluate(None, state, TrainerControl(), metrics=metrics)


def test_the_first_evaluation_of_the_final_shape_counts_without_the_time_of_evaluating(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, cut = _Clock(monkeypatch), [False]
    watch = TimeToAccuracy("eval_accuracy", is_pruned=lambda: cut[0])
    watch.on_train_begin(None, TrainerState(), TrainerControl())
    _evaluate(watch, clock, 10, 0.85, 5.0, 2.0)
    cut[0] = True
    _evaluate(watch, clock, 20, 0.79, 5.0, 2.0)
    assert watch.record(0.8) == {"mark": 0.8, "seconds": None, "step": None}
    _evaluate(watch, clock, 30, 0.8, 4.0, 2.0)
    _evaluate(watch, clock, 40, 0.9, 4.0, 2.0)
    assert watch.record(0.8) == {"mark": 0.8, "seconds": pytest.approx(14.0), "step": 30}


def test_a_resumed_run_counts_what_was_trained_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    first = TimeToAccuracy("eval_loss")
    first.on_train_begin(None, TrainerState(), TrainerControl())
    clock.now += 6.0
    saved = TrainerState(global_step=10, stateful_callbacks={"TimeToAccuracy": json.loads(json.dumps(first.state()))})
    clock.now += 1000.0
    again = TimeToAccuracy("eval_loss")
    again.on_train_begin(None, saved, TrainerControl())
    clock.now += 4.0
    again.on_evaluate(None, TrainerState(global_step=20), TrainerControl(), metrics={"eval_loss": 0.4})
    assert again.record(0.5, greater_is_better=False) == {"mark": 0.5, "seconds": pytest.approx(10.0), "step": 20}


def test_a_run_with_a_reference_records_when_it_came_near(tmp_path: Path) -> None:
    changes = {"eval_strategy": "steps", "eval_steps": 2, "reference_metric": 1e6}
    metrics = train(_recipe(tmp_path, **changes))
    found, evaluations = metrics["time_to_accuracy"], metrics["evaluations"]
    assert found["mark"] == pytest.approx(1e6 / 0.97) and found["step"] == 2
    assert 0 < found["seconds"] == evaluations[0].seconds < evaluations[-1].seconds
    assert [each.step for each in evaluations] == list(range(2, metrics["train_steps"] + 1, 2))


def test_a_dense_baseline_under_a_launcher_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _recipe(tmp_path, dense_baseline=True)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="would join those of the launcher"):
        train(recipe)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- intervals of scores


def test_perplexity_of_a_recipe_has_an_interval(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    scores = evaluate(str(tmp_path / "dense"), recipe)
    for name in ("perplexity", "token_accuracy"):
        low, value, high = (scores[f"validation_{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high
    assert scores["validation_perplexity_low"] < scores["validation_perplexity_high"]


def _by_redrawing(scores: Any, name: str, *values: np.ndarray) -> np.ndarray:
    generator, rows = np.random.default_rng(1), len(values[0])
    drawn = [generator.integers(rows, size=rows) for _ in range(200)]
    return np.quantile([scores(*(of[chosen] for of in values))[name] for chosen in drawn], (0.025, 0.975))


def test_intervals_of_a_classification_are_those_of_redrawn_rows() -> None:
    generator, classes = np.random.default_rng(0), 4
    labels = np.minimum(generator.geometric(0.5, size=60) - 1, classes - 1)
    logits = generator.normal(size=(60, classes)) + 1.5 * np.eye(classes)[labels]
    found = score_intervals("classification", "f1", EvalPrediction(logits, labels), classification_scores)
    assert found["accuracy"] == mean_interval(logits.argmax(-1) == labels)
    for name in ("f1", "matthews"):
        expected = _by_redrawing(classification_scores, name, logits, labels)
        assert found[name] == pytest.approx(tuple(expected), abs=0.05)


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (2, 1), (5, 2)])
def test_scores_from_a_confusion_matrix_are_those_from_rows(classes: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, logits = generator.integers(max(1, classes - 1), size=30), generator.normal(size=(30, classes))
    confusion = np.zeros((1, classes, classes))
    np.add.at(confusion, (0, labels, logits.argmax(-1)), 1)
    expected = classification_scores(logits, labels)
    of_labels, seen = _f1(confusion)
    macro = of_labels.sum() / seen[0]
    f1 = of_labels[0, 1] if classes == 2 else macro
    found = (f1, macro, _matthews(confusion)[0])
    assert found == pytest.approx((expected["f1"], expected["f1_macro"], expected["matthews"]))


def test_intervals_of_a_regression_are_those_of_redrawn_rows() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(6, size=80).astype(float)
    predicted = labels + generator.normal(size=80)
    found = score_intervals("regression", "pearson", EvalPrediction(predicted[:, None], labels), regression_scores)
    for name in ("pearson", "spearman"):
        expected = _by_redrawing(regression_scores, name, predicted, labels)
        assert found[name] == pytest.approx(tuple(expected), abs=0.03)
    assert found["mse"] == mean_interval((predicted - labels) ** 2)
    constant = score_intervals("regression", "pearson", EvalPrediction(np.ones(9), labels[:9]), regression_scores)
    assert constant["pearson"] == constant["spearman"] == (0, 0)


def test_intervals_of_rouge_and_of_tokens_are_those_of_rows() -> None:
    rows = np.arange(12.0)

    def scores(prediction: EvalPrediction) -> dict[str, float]:
        return dict.fromkeys(ROUGE, float(np.mean(prediction.predictions)) / 12)

    found = score_intervals("summarization", "rougeL", EvalPrediction(rows, rows), scores)
    assert found == dict.fromkeys(ROUGE, mean_interval(rows / 12))
    sums = np.array([[2.0, 1, 0], [0, 0, 0], [6, 4, 3], [9, 5, 1]])
    found = score_intervals("summarization", "perplexity", EvalPrediction(sums, rows), scores)
    assert found["perplexity"] == pytest.approx(np.exp(mean_interval([2, 1.5, 1.8], [1, 4, 5])))
    assert found["token_accuracy"] == mean_interval([0, 0.75, 0.2], [1, 4, 5])
