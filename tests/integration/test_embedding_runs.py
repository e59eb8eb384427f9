"""Runs of ``task: embedding``: from a recipe to a folder of sentence-transformers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from texts import TOKENS, word_tokenizer, words
from tiny import WIDTH, randomise, tiny_config
from transformers import AutoModel, set_seed

from apt_trainer import APTConfig, UserError, load_pruned
from apt_trainer.models.pooling import mean_pooling
from apt_trainer.runs import dry_run
from apt_trainer.runs.run import evaluate, train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.packages import Package
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store.export.onnx_session import OnnxModel
from integration.factories import events_of

TEXTS = [words(3 + row, row) for row in range(4)]


def recipe(folder: Path, scored: bool = True, output: str = "out", **changes: Any) -> Recipe:
    if not (folder / "dense").exists():
        config = tiny_config("bert")
        config.vocab_size, config.pad_token_id = len(TOKENS), 0
        model = AutoModel.from_config(config)
        randomise(model, seed=1)
        model.save_pretrained(folder / "dense")
        word_tokenizer().save_pretrained(folder / "dense")
    rows = [{"one": words(4 + row % 3, row), "two": words(5, row + 50), "label": row % 6 / 1.0} for row in range(40)]
    file = folder / f"{scored}.jsonl"
    kept = rows if scored else [{name: row[name] for name in ("one", "two")} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    values = {"max_steps": 8, "target_sparsity": 0.3, "round_to": 1, "pruning_start": 1, "pruning_end": 4}
    values |= {"num_pruning_events": 2, "mask_window": 1, "observe_every": 1, "distillation_end": 7, "lora_r": 2}
    values |= {"per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "disable_tqdm": True, "seed": 7}
    values |= {"measure_latency": False, "learning_rate": 1e-3, "save_strategy": "no", "logging_steps": 1} | changes
    return Recipe(
        model=ModelSettings(str(folder / "dense")),
        data=DataSettings(task="embedding", train_file=str(file), validation_file=str(file), max_length=16),
        training=APTConfig(output_dir=str(folder / output), **values),
        path=None,
        given={},
    )


def test_a_run_writes_a_sentence_transformer(tmp_path: Path) -> None:
    """Which loads as a plain model, as a pruned one and in onnxruntime too, with equal embeddings."""
    ready = recipe(tmp_path, export=["onnx"])
    assert "Distillation (self) from step 1 to 7." in dry_run.plan(ready)
    metrics = train(ready)
    output = tmp_path / "out"
    assert metrics["metric_name"] == "spearman" and metrics["sparsity"] >= 0.3
    assert metrics["total_params"] < metrics["total_params_dense"]
    assert events_of(output, "teacher") and len(events_of(output, "prune")) == 2
    parts = ["", "1_Pooling", "2_Normalize"]
    assert [part["path"] for part in json.loads((output / "modules.json").read_text())] == parts

    library = SentenceTransformer(str(output), device="cpu")
    found, asked = (
        library.encode(TEXTS, convert_to_tensor=True),
        word_tokenizer()(TEXTS, padding=True, return_tensors="pt"),
    )
    assert library.get_max_seq_length() == 20 and found.shape == (4, WIDTH)
    for load in (AutoModel.from_pretrained, load_pruned):
        with torch.no_grad():
            ours = mean_pooling(load(output).eval()(**asked).last_hidden_state, asked)
        assert torch.allclose(ours, found, atol=1e-6)
    exported = OnnxModel(output / "export/onnx" / metrics["exports"]["onnx"]["file"])
    states = exported({name: value.numpy() for name, value in asked.items()})["last_hidden_state"]
    assert torch.allclose(mean_pooling(torch.from_numpy(states), asked), found, atol=1e-5)
    assert metrics["exports"]["onnx"]["task_metric"] == pytest.approx(metrics["task_metric"], abs=1e-3)

    again = evaluate(str(output), ready)
    assert again["validation_spearman"] == pytest.approx(metrics["task_metric"], abs=1e-6)
    assert again["validation_spearman_low"] <= again["validation_spearman"] <= again["validation_spearman_high"]


@pytest.mark.parametrize(
    "changes",
    [
        {"pruning_time": "before", "pruning_start": None, "distillation": "none", "distillation_end": None},
        {"prune_targets": ["hidden", "neurons"], "gradient_accumulation_steps": 2, "bf16": True},
    ],
)
def test_pairs_without_scores_find_each_other(changes: dict[str, Any], tmp_path: Path) -> None:
    changes = {"calibration_samples": 16, **changes}
    metrics = train(recipe(tmp_path, scored=False, **changes))
    assert metrics["metric_name"] == "mrr" and {"validation_mrr", "validation_recall_at_1"} <= metrics["scores"].keys()
    library = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert metrics["sparsity"] >= 0.3 and library.encode(TEXTS).shape[1] == library.get_embedding_dimension()


def test_a_run_goes_on_where_it_was_ended(tmp_path: Path) -> None:
    set_seed(3)
    straight = train(recipe(tmp_path, save_strategy="steps", save_steps=5))
    onward = recipe(tmp_path, output="onward", resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    resumed = train(onward)
    assert resumed["task_metric"] == straight["task_metric"]
    weights = [load_pruned(tmp_path / name).state_dict() for name in ("out", "onward")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_without_the_library_nothing_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = lambda name, *args: None if name.startswith("sentence_transformers") else find(name, *args)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    assert not Package("x", ("sentence_transformers",)).is_installed
    for start in (dry_run.plan, train):
        with pytest.raises(
            UserError, match=r"task: embedding needs the package .* pip install 'apt-trainer\[embedding\]'"
        ):
            start(recipe(tmp_path))
    assert not (tmp_path / "out").exists()
