"""Where two models say something else of a test row, by hand, for one label, several labels and numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from texts import word_tokenizer, words
from transformers import EvalPrediction

from apt_trainer.evaluate.differences import keep_predictions
from apt_trainer.settings import DataSettings
from apt_trainer.tasks import TaskData, load_task


def load(folder: Path, task: str, labels: list[Any]) -> TaskData:
    rows = [{"text": words(4, i), "label": label} for i, label in enumerate(labels)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = str(folder / "rows.jsonl")
    files = {"train_file": file, "validation_file": file, "test_file": file}
    return load_task(DataSettings(task=task, text_column="text", max_length=8, **files), word_tokenizer(), 1)


def found(folder: Path, data: TaskData, dense: Any, pruned: Any, labels: Any) -> dict[str, Any]:
    """``differences.json`` of two runs with these outputs."""
    for place, outputs in ((folder / "dense", dense), (folder, pruned)):
        place.mkdir(exist_ok=True)
        prediction = EvalPrediction(predictions=np.array(outputs), label_ids=np.array(labels))
        keep_predictions(place, folder / "dense", data, word_tokenizer(), [prediction])
    return json.loads((folder / "differences.json").read_text())


def test_one_label(tmp_path: Path) -> None:
    data = load(tmp_path, "classification", ["a", "b", "c", "b"])
    a, b, c = np.eye(3)
    seen = found(tmp_path, data, [a, b, b, a], [a, a, a, b], [0, 1, 2, 1])
    assert (seen["rows"], seen["of"], seen["differ"], seen["numbers"]) == (4, 4, 3, False)
    assert seen["right"] == {"dense": 1, "pruned": 1, "neither": 1}
    told = [(e["row"], e["label"], e["dense"], e["pruned"], e["right"]) for e in seen["examples"]]
    assert told == [(1, "b", "b", "a", "dense"), (2, "c", "b", "a", "neither"), (3, "b", "a", "b", "pruned")]
    assert [e["text"] for e in seen["examples"]] == [words(4, i) for i in (1, 2, 3)]


def test_predictions_that_come_in_another_order(tmp_path: Path) -> None:
    data = load(tmp_path, "classification", ["a", "b", "a"])
    prediction = EvalPrediction(predictions=np.array([[0, 1], [1, 0], [1, 0]]), label_ids=np.array([1, 0, 0]))
    keep_predictions(tmp_path, tmp_path / "dense", data, word_tokenizer(), [prediction], lambda: [1, 2, 0])
    kept = json.loads((tmp_path / "predictions.json").read_text())
    assert kept["prediction"] == kept["label"] == ["a", "b", "a"] and kept["example"]["text"] == words(4, 0)


def test_several_labels_and_none(tmp_path: Path) -> None:
    data = load(tmp_path, "multi_label_classification", [["a"], ["a", "b"], []])
    dense, pruned = [[2, -1], [3, 1], [-1, -1]], [[2, -1], [3, -1], [-1, 1]]
    seen = found(tmp_path, data, dense, pruned, [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert [(e["row"], e["dense"], e["pruned"]) for e in seen["examples"]] == [(1, "a, b", "a"), (2, "none", "b")]
    assert seen["right"] == {"dense": 2, "pruned": 0, "neither": 0}


def test_numbers_differ_most_first(tmp_path: Path) -> None:
    data = load(tmp_path, "regression", [0.5, 1.5, 2.5])
    seen = found(tmp_path, data, [[0.5], [1.0], [2.0]], [[0.5], [1.25], [4.0]], [0.5, 1.5, 2.5])
    assert seen["numbers"] and [(e["row"], e["right"]) for e in seen["examples"]] == [(2, "dense"), (1, "pruned")]


def test_nothing_is_told_of_a_model_that_was_tested_on_other_rows(tmp_path: Path) -> None:
    data = load(tmp_path, "classification", ["a", "b"])
    found(tmp_path, data, [[1, 0], [1, 0]], [[0, 1], [0, 1]], [0, 1])
    prediction = EvalPrediction(predictions=np.eye(2), label_ids=np.array([1, 1]))
    keep_predictions(tmp_path, tmp_path / "dense", data, word_tokenizer(), [prediction])
    assert not (tmp_path / "differences.json").exists() and (tmp_path / "predictions.json").exists()
    keep_predictions(tmp_path, tmp_path / "dense", data, word_tokenizer(), [])  # nothing was predicted
    assert not (tmp_path / "predictions.json").exists()


def test_other_tasks_keep_nothing(tmp_path: Path) -> None:
    data = load(tmp_path, "language_modeling", ["a", "b"])
    prediction = EvalPrediction(predictions=np.eye(2), label_ids=np.array([1, 1]))
    keep_predictions(tmp_path, tmp_path / "dense", data, word_tokenizer(), [prediction])
    assert not (tmp_path / "predictions.json").exists()
