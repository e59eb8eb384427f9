"""What stands beside a finished model: where it comes from, what was kept, what it scores, how to load it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from texts import tiny_llama, word_tokenizer
from tiny import parts, random_plan, tiny_model
from transformers import AutoModelForSequenceClassification

from apt_trainer.runs.run import train
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.store.model_card import model_card, picture
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.surgery.cutting import apply_plan


@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_the_picture_tells_each_layer(name: str) -> None:
    task = {"bert": "ForSequenceClassification", "t5": "ForConditionalGeneration"}.get(name, "ForCausalLM")
    model = tiny_model(name, task)
    family, spaces, dense = parts(model)
    plan = random_plan(spaces, dense, 5, vanish=("layers.1.heads", "decoder.0.cross_heads"))
    drawn = picture(model, plan)
    lines = {line.split()[0]: line for line in drawn.splitlines() if line.strip() and "of" in line}
    for space in spaces[:-1]:
        assert f"{plan.counts[space.name]} of {space.size}" in " ".join(lines[space.label].split()), space.name
    assert f"hidden dimensions: {plan.counts['hidden']} of {spaces[-1].size}" in drawn
    if name == "llama":
        assert "·" * 16 in lines["1"] and "█" in lines["0"]
    apply_plan(model, family, spaces, dense, plan)
    as_pruned(model, family, plan)
    card = model_card(model, plan=plan)
    assert drawn in card.content and "load_pruned" in card.content and "trust_remote_code=True" in card.content
    assert ("gguf" in card.content) == (name == "llama") and ("apt-trainer export" in card.content) == (name != "t5")


def test_the_licence_is_that_of_the_base(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert model_card(model).data.license == "mit"
    assert model_card(model, license="apache-2.0").data.license == "apache-2.0"
    for text in ("notes", "---\n- x\n---\n", "---\n{\n---\n"):
        (tmp_path / "base" / "README.md").write_text(text)
        assert model_card(model).data.license is None
    assert str(tmp_path) not in model_card(model).content


def test_a_run_ends_with_a_card_of_what_it_measured(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    word_tokenizer().save_pretrained(tmp_path / "dense")
    rows = [{"text": f"w{i % 7} w{i % 5}", "label": i % 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model_name_or_path": tmp_path / "dense", "train_file": tmp_path / "rows.jsonl", "use_cpu": "true"}
    words |= {"output_dir": tmp_path / "out", "max_length": 8, "report_to": "none", "measure_latency": "false"}
    words |= {"round_to": 4, "min_hidden": 8, "lora_r": 2, "max_steps": 3, "num_pruning_events": 1}
    words |= {"pruning_start": 0, "pruning_end": 2, "mask_window": 1, "distillation": "none"}
    metrics = train(load_recipe(None, [word for key, value in words.items() for word in (f"--{key}", str(value))]))
    card = ModelCard.load(tmp_path / "out" / "README.md").content
    low, high = metrics["task_metric_low"], metrics["task_metric_high"]
    assert low <= metrics["task_metric"] <= high
    assert f"{metrics['task_metric']:.4f} ({low:.4f} to {high:.4f})" in card
    assert "rows.jsonl" in card and "lora_r: 2" in card and str(tmp_path) not in card
