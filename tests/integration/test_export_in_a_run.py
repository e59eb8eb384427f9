"""Runs that end with exports: written, measured and shown; or refused before anything loads."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import TOKENS, tiny_llama, word_tokenizer, words
from tiny import ALL_TASKS, tiny_config

from apt_trainer import APTConfig, UserError
from apt_trainer.cli.train import result_text
from apt_trainer.errors import RunError
from apt_trainer.runs import dry_run, exports
from apt_trainer.runs.run import evaluate, train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.export.onnx_session import OnnxModel
from apt_trainer.store.pretrained import load_inputs, load_model, load_saved

LENGTH = 8
HEADS = {
    "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
}


def recipe(folder: Path, family: str, task: str, **changes: Any) -> Recipe:
    """A tiny model that is cut once, before its 4 steps."""
    if family == "llama":
        tiny_llama().save_pretrained(folder / "dense")
    else:
        config = tiny_config(family)
        config.vocab_size, config.pad_token_id = len(TOKENS), 0
        ALL_TASKS[HEADS[task]].from_config(config).save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    texts = folder / "rows.jsonl"
    texts.write_text("".join(json.dumps(row(task, i)) + "\n" for i in range(40)))
    values = {"max_steps": 4, "pruning_time": "before", "distillation": "none", "target_sparsity": 0.3, "round_to": 1}
    values |= {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    values |= {"calibration_samples": 8, "num_pruning_events": 1, "measure_latency": False} | changes
    return Recipe(
        model=ModelSettings(str(folder / "dense")),
        data=DataSettings(task=task, train_file=str(texts), validation_file=str(texts), max_length=16, doc_stride=4),
        training=APTConfig(output_dir=str(folder / "out"), **values),
        path=None,
        given={},
    )


def row(task: str, number: int) -> dict[str, Any]:
    if task == "question_answering":
        context = words(6, number + 99)
        answer = context.split()[2]
        found = {"text": [answer], "answer_start": [context.index(answer)]}
        return {"id": str(number), "question": words(3, number), "context": context, "answers": found}
    if task == "token_classification":
        return {"text": words(3 + number % 4, number).split(), "label": list("ABABOO")[: 3 + number % 4]}
    if task == "classification":
        return {"text": words(6, number), "label": "ab"[number % 2]}
    return {"text": words(6, number)}


def refused(recipe: Recipe, message: str) -> None:
    """By the dry run and by the run itself, before anything is written."""
    for start in (dry_run.plan, train):
        with pytest.raises(UserError, match=message):
            start(recipe)
    assert not Path(str(recipe.training.output_dir)).exists()


def test_a_run_ends_with_a_classifier_for_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two formats; the metric is that of what was written, on the rows that the model was measured on."""
    monkeypatch.setattr("apt_trainer.runs.run._inference_memory", lambda recipe: {})  # processes of their own
    for place in ("evaluate.compare", "store.export.speed"):
        monkeypatch.setattr(f"apt_trainer.{place}.MAX_SECONDS", 0.0)
    speed = {"measure_latency": True, "latency_batch_sizes": [1, 2], "latency_length": LENGTH}
    ready = recipe(tmp_path, "bert", "classification", export=["onnx", "onnx_int8"], **speed)
    assert "exports      onnx, onnx_int8" in dry_run.plan(ready)
    metrics = train(ready)
    output = tmp_path / "out"
    assert json.loads((output / "metrics.json").read_text())["exports"] == metrics["exports"]
    plain, small = metrics["exports"]["onnx"], metrics["exports"]["onnx_int8"]
    assert plain["equal"] and plain["task_metric"] == metrics["task_metric"]
    assert (output / "export/onnx_int8" / small["file"]).stat().st_size == small["bytes"]
    assert json.loads((output / "export/onnx_int8/export.json").read_text()) == small

    run, right = OnnxModel(output / "export/onnx_int8" / small["file"]), 0
    again = load_saved(ModelSettings(str(output)))
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        told = json.loads(line)
        asked = word_tokenizer()(told["text"], return_tensors="np")
        right += again.config.id2label[int(run(asked)["logits"].argmax())] == told["label"]
    assert small["task_metric"] == pytest.approx(right / 40)

    assert small["speed"]["threads"] == torch.get_num_threads()
    times = small["speed"]["milliseconds"]
    assert set(times) == {"dense", "pruned", "export"} and set(times["dense"]) == {"1", "2"}
    assert times["dense"] == plain["speed"]["milliseconds"]["dense"], "all take turns"
    ratio = times["dense"]["2"]["forward"]["median_ms"] / times["export"]["2"]["forward"]["median_ms"]
    assert small["speed"]["speedup"]["export"]["2"]["forward"] == pytest.approx(ratio)
    shown = result_text(metrics, str(output))
    line = next(line for line in shown.splitlines() if line.startswith("| onnx_int8"))
    assert f"{small['task_metric']:.4f}" in line and f"{ratio:.2f} ×" in line


@pytest.mark.parametrize("task", ["question_answering", "token_classification"])
def test_the_metric_of_an_export_is_that_of_evaluate(task: str, tmp_path: Path) -> None:
    """Of the same model, whose outputs are given as an export gives them."""
    ready = recipe(tmp_path, "bert", task)
    _, _, data = load_inputs(ready.model, ready)
    model = load_model(ready.model, data).eval()
    model.save_pretrained(tmp_path / "tuned")
    word_tokenizer().save_pretrained(tmp_path / "tuned")

    @torch.no_grad()
    def run(batch: Mapping[str, Any]) -> dict[str, Any]:
        found = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return {name: value.numpy() for name, value in found.items()}

    scores = evaluate(str(tmp_path / "tuned"), ready)
    assert exports.task_metric(run, data, 3) == pytest.approx(scores[f"validation_{data.metric_name}"], abs=1e-6)
    assert scores[f"validation_{data.metric_name}"] > 0


def test_a_run_whose_export_fails_keeps_model_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **named: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(exports, "export", fails)
    ready = recipe(tmp_path, "bert", "classification", export=["onnx_int8"])
    with pytest.raises(RunError, match=r"saved in .*out.*no room.*apt-trainer export .*--format onnx --quantize int8"):
        train(ready)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["exports"] == {}
    assert evaluate(str(tmp_path / "out"), ready)["validation_accuracy"] == metrics["task_metric"]


def test_what_cannot_be_exported_is_refused_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = recipe(tmp_path, "bert", "classification")
    for names, message in (
        (["tflite"], "export='tflite' is not known. Choose one of: onnx, openvino, gguf"),
        (["onnx_int4"], "int8"),
        (["gguf_q8_0"], "cannot be written as GGUF.*--format onnx"),
    ):
        encoder.training.export = names
        refused(encoder, message)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else found(name, *rest)
    )
    encoder.training.export = ["onnx"]
    refused(encoder, r"export: onnx needs the package onnxruntime.*pip install 'apt-trainer\[export\]'")
    with pytest.raises(UserError, match="twice"):
        recipe(tmp_path, "bert", "classification", export=["onnx", "onnx"])


def test_a_tokenizer_without_a_form_in_gguf_is_told_before_training(tmp_path: Path) -> None:
    refused(recipe(tmp_path, "llama", "language_modeling", export=["gguf"]), "The tokenizer is WordLevel")
