"""Continued pretraining of encoders: which tokens are hidden and what is scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from texts import TOKENS, tiny_llama, word_tokenizer, words
from tiny import randomise
from transformers import BertConfig, BertForMaskedLM

from apt_trainer import UserError, load_pruned
from apt_trainer.runs import dry_run, run
from apt_trainer.settings.recipe import load_recipe

MASK, NUMBER = "w0", TOKENS.index("w0")
"""A word that stands for the hidden ones."""


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def saved_encoder(place: Path) -> str:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    model = BertForMaskedLM(BertConfig(vocab_size=len(TOKENS), max_position_embeddings=32, pad_token_id=0, **sizes))
    randomise(model, seed=4)
    model.save_pretrained(place)
    tokenizer = word_tokenizer()
    tokenizer.mask_token = MASK
    tokenizer.save_pretrained(place)
    return str(place)


def recipe(folder: Path, model: str, *more: str) -> Any:
    text = folder / "text.txt"
    text.write_text("\n".join(words(20, seed) for seed in range(600)))
    fixed = ["--output_dir", str(folder / "out"), "--model_name_or_path", model, "--train_file", str(text)]
    fixed += ["--task", "masked_language_modeling", "--max_length", "16", "--use_cpu", "--report_to", "none"]
    fixed += ["--measure_latency", "false", "--max_steps", "10", "--per_device_train_batch_size", "8"]
    fixed += ["--disable_tqdm", "--min_hidden", "8", "--num_pruning_events", "2", "--target_sparsity", "0.4"]
    return load_recipe(None, [*fixed, *more])


def test_an_encoder_is_pruned_while_it_predicts_masked_tokens(tmp_path: Path) -> None:
    given = recipe(tmp_path, saved_encoder(tmp_path / "model"))
    metrics = run.train(given)
    assert metrics["metric_name"] == "perplexity" and not metrics["greater_is_better"] and metrics["sparsity"] >= 0.4
    assert metrics["task_metric_low"] <= metrics["task_metric"] <= metrics["task_metric_high"]
    _, _, data = run.load_inputs(given.model, given)
    model, total, tokens = load_pruned(tmp_path / "out").eval(), 0.0, 0
    with torch.no_grad():
        for row in data.validation:
            inputs, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            number = int((labels != -100).sum())
            total += float(model(inputs, labels=labels).loss) * number if number else 0.0
            tokens += number
    assert math.isclose(metrics["task_metric"], math.exp(total / tokens), rel_tol=1e-4)
    assert run.evaluate(str(tmp_path / "out"))["validation_perplexity"] == metrics["task_metric"]


def test_hidden_tokens_follow_from_the_text(tmp_path: Path) -> None:
    given = recipe(tmp_path, saved_encoder(tmp_path / "model"), "--mask_probability", "0.3")
    first, second = (run.load_inputs(given.model, given)[2] for _ in range(2))
    assert first.validation[:] == second.validation[:] and first.fingerprint == second.fingerprint
    rows = [first.train[i] for i in range(64)]
    batch, same = (data.collator(rows) for data in (first, second))
    assert torch.equal(batch["input_ids"], same["input_ids"]) and torch.equal(batch["labels"], same["labels"])
    hidden = batch["labels"] != -100
    assert 0.25 < float(hidden.sum() / batch["attention_mask"].sum()) < 0.35
    whole = torch.tensor([row["input_ids"] for row in rows])
    assert torch.equal(batch["labels"][hidden], whole[hidden])
    assert torch.equal(batch["input_ids"][~hidden], whole[~hidden])
    assert 0.7 < float((batch["input_ids"][hidden] == NUMBER).float().mean()) < 0.9
    other = first.collator(rows[::-1])  # another epoch, another order
    assert not torch.equal(other["labels"].flip(0), batch["labels"])
    padded = first.collator([first.validation[0], {"input_ids": [5], "labels": [6]}])
    assert padded["labels"][1].tolist() == [6] + [-100] * (padded["labels"].shape[1] - 1)
    assert padded["attention_mask"][1].sum() == 1


def test_what_cannot_predict_masked_tokens_is_refused(tmp_path: Path) -> None:
    model = saved_encoder(tmp_path / "model")
    with pytest.raises(UserError, match="between 0 and 1"):
        dry_run.plan(recipe(tmp_path, model, "--mask_probability", "1"))
    word_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="the tokenizer has none"):
        dry_run.plan(recipe(tmp_path, model))
    tiny_llama().save_pretrained(tmp_path / "llama")
    word_tokenizer().save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="needs a model that is a encoder"):
        dry_run.plan(recipe(tmp_path, str(tmp_path / "llama")))
    with pytest.raises(UserError, match="mask_probability=0.2 has no meaning"):
        dry_run.plan(recipe(tmp_path, model, "--task", "classification", "--mask_probability", "0.2"))
