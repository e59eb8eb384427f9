"""Runs, and finished models, with the tokens of their own texts alone."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from texts import TOKENS, WORDS, save_dense
from transformers import AutoModelForCausalLM, AutoTokenizer

from apt_trainer import load_pruned
from apt_trainer.cli import main
from apt_trainer.errors import UserError
from apt_trainer.runs.dry_run import plan
from apt_trainer.runs.run import evaluate, train
from apt_trainer.runs.vocabulary import _rows
from apt_trainer.settings.recipe import Recipe, load_recipe
from integration.factories import weights_of
from integration.test_launchers import recipe

USED = WORDS[:20]
SPECIAL = 4


def _recipe(folder: Path, **changes: Any) -> Recipe:
    if not (folder / "model").exists():
        save_dense(folder, " ".join(USED[:9] * 3))
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(USED, k=draw.randint(6, 12)))} for _ in range(80)]
    teacher = {"distillation": "model", "teacher_name_or_path": str(folder / "model")}
    further = {"task": "language_modeling", "vocabulary": "used", "text_column": "text", "save_steps": 6, **teacher}
    return load_recipe(str(recipe(folder, rows, **{**further, **changes})))


def test_a_run_of_fewer_tokens_is_taught_resumes_and_loads(tmp_path: Path) -> None:
    given, out = _recipe(tmp_path), tmp_path / "out"
    told = plan(given)
    assert not out.exists()
    assert f"vocabulary   {len(USED) + SPECIAL} of {len(TOKENS)} tokens stay; validation rows take 0.0% more" in told
    metrics = train(given)
    record = metrics["vocabulary"]
    assert (record["tokens"], record["tokens_before"]) == (len(USED) + SPECIAL, len(TOKENS))
    assert record["training_rows_changed"] == 0
    gone = (len(TOKENS) - len(USED) - SPECIAL) * 32 * 2  # rows of embeddings and of outputs
    assert record["parameters_before"] - record["parameters"] == gone
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert metrics["total_params_dense"] == sum(p.numel() for p in dense.parameters())
    for which in ("", "_dense"):
        parts = metrics[f"parts{which}"]
        assert sum(part["params"] for part in parts.values()) == metrics[f"total_params{which}"]
    assert metrics["parts_dense"]["vocabulary"] == {"params": gone, "bytes": 4 * gone}
    assert metrics["parts"]["blocks"]["params"] == metrics["block_params"]
    assert not (out / "vocabulary").exists()

    tokenizer, model = AutoTokenizer.from_pretrained(out), load_pruned(out)
    assert tokenizer.get_vocab() == {token: place for place, token in enumerate(TOKENS[: len(tokenizer)])}
    assert tokenizer.convert_tokens_to_ids(WORDS[30]) == tokenizer.unk_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == model.config.vocab_size
    assert evaluate(str(out), given)["validation_perplexity"] == pytest.approx(metrics["task_metric"], rel=1e-5)

    straight = weights_of(model)
    for file in out.iterdir():
        if file.is_file() and file.name not in ("recipe.json", "events.jsonl"):
            file.unlink()
    shutil.rmtree(out / "checkpoint-12")
    again = _recipe(tmp_path, resume_from_checkpoint=True)
    assert train(again)["resumed"]
    resumed = weights_of(load_pruned(out))
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())


def test_a_text_adds_its_tokens_and_a_number_bounds_them(tmp_path: Path) -> None:
    further = tmp_path / "more.txt"
    further.write_text(" ".join(WORDS[40:45]))
    assert f"vocabulary   {len(USED) + SPECIAL + 5} of" in plan(_recipe(tmp_path, vocabulary=str(further)))
    told = plan(_recipe(tmp_path, vocabulary=15))
    assert "vocabulary   15 of" in told and " 0 training rows are split otherwise" not in told
    with pytest.raises(UserError, match="vocabulary=3: special tokens .* are 4 tokens"):
        plan(_recipe(tmp_path, vocabulary=3))
    with pytest.raises(UserError, match="vocabulary='nowhere.txt' does not exist"):
        plan(_recipe(tmp_path, vocabulary="nowhere.txt"))


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    given = _recipe(tmp_path)
    other = tmp_path / "teacher"
    shutil.copytree(tmp_path / "model", other)
    state = json.loads((other / "tokenizer.json").read_text())
    vocabulary = state["model"]["vocab"]
    vocabulary[WORDS[0]], vocabulary[WORDS[1]] = vocabulary[WORDS[1]], vocabulary[WORDS[0]]
    (other / "tokenizer.json").write_text(json.dumps(state))
    given = _recipe(tmp_path, teacher_name_or_path=str(other))
    with pytest.raises(UserError, match="has another tokenizer than the model, so its vocabulary cannot be cut alike"):
        plan(given)


def test_the_verb_cuts_a_finished_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_dense(tmp_path, " ".join(USED))
    (tmp_path / "other.txt").write_text(" ".join(WORDS[50:]))
    words = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(tmp_path / "text.txt"),
        "--output",
        str(tmp_path / "cut"),
    ]
    assert main(["vocabulary", *words, "--other", str(tmp_path / "other.txt")]) == 0
    told = capsys.readouterr().out
    assert f"{len(USED) + SPECIAL} of {len(TOKENS)} tokens" in told
    assert "tokens per word of the data: 1.000 (before 1.000)" in told and "of the other texts: 1.000" in told
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("model", "cut"))
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "cut")]
    text = " ".join(USED[3:12])
    with torch.no_grad():
        logits = [m(**t(text, return_tensors="pt")).logits for m, t in zip((old, new), tokenizers, strict=True)]
    assert torch.equal(logits[0][..., : len(USED) + SPECIAL], logits[1])
    assert main(["vocabulary", *words]) == 2
    assert "is not empty. Choose another folder." in capsys.readouterr().err


def test_all_texts_of_a_row_count(tmp_path: Path) -> None:
    save_dense(tmp_path, "")
    rows = [{"text": " ".join(USED[:9]), "label": name} for name in ("a", "b") * 8]
    several = [{**row, "second": WORDS[30]} for row in rows]
    given = {"task": "classification", "text_column": "text", "text_pair_column": "second", "vocabulary": "used"}
    dense = {"output_dir": str(tmp_path / "out"), "model_name_or_path": str(tmp_path / "model")}
    told = plan(load_recipe(str(recipe(tmp_path, several, **given, **dense))))
    assert f"vocabulary   {9 + 1 + SPECIAL} of" in told
    nested = Dataset.from_dict({"input_ids": [[[7, 8], [9]], [[7], [7]]]})
    assert [list(row) for row in _rows(nested, "input_ids")] == [[7, 8, 9], [7, 7]]
