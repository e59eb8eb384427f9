"""Summarization and translation: targets as labels, generated texts as predictions, scores on known strings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import EvalPrediction, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from apt_trainer import APTConfig
from apt_trainer.errors import UserError
from apt_trainer.runs.run import evaluate
from apt_trainer.settings import DataSettings
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.tasks import load_task
from apt_trainer.tasks.generation_scores import rouge_scores, translation_scores
from apt_trainer.tasks.trainer_options import data_options, set_task_arguments
from apt_trainer.training.evaluation_loop import plain_trainer

TEXT = "the old city lies by river and sea in france summarize: one two three four"
VOCABULARY = {piece: i for i, piece in enumerate(["<pad>", "</s>", "<unk>", *TEXT.split()])}
EOS = 1
ROWS = [
    {"article": "the old city lies by the river", "summary": "the city by the river"},
    {"article": "the sea and the city", "summary": "sea and city"},
    {"article": "one two three four", "summary": "one two three four one two"},
]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def ids(text: str) -> list[int]:
    return [VOCABULARY[word] for word in text.split()]


def given(tmp_path: Path, rows: Sequence[Mapping[str, Any]] = ROWS, **settings: Any) -> DataSettings:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    known = {"task": "summarization", "target_column": "summary", "text_column": "article"}
    return DataSettings(**{**known, "train_file": str(path), "validation_file": str(path), **settings})


def tiny_t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=EOS,
    )
    model = T5ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(1 + drawn if "norm" in name else drawn)
    return model.eval()


def arguments(tmp_path: Path, **changes: Any) -> APTConfig:
    return APTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[], per_device_eval_batch_size=2, **changes
    )


# ---------------------------------------------------------------------------------------- inputs and labels


def test_prefix_source_and_target(tmp_path: Path, tokenizer: Any) -> None:
    settings = given(tmp_path, source_prefix="summarize: ", max_length=6, max_target_length=4)
    task = load_task(settings, tokenizer, 0, architecture="encoder-decoder")
    assert task.train["input_ids"][0] == [*ids("summarize: the old city lies"), EOS]
    assert task.train["labels"][:] == [
        [*ids("the city by"), EOS],
        [*ids("sea and city"), EOS],
        [*ids("one two three"), EOS],
    ]
    assert task.validation["labels"][2] == [*ids("one two three four one two"), EOS]  # references stay whole
    assert (task.model_class, task.metric_name, task.generation_length) == ("AutoModelForSeq2SeqLM", "rougeL", 5)
    assert task.greater_is_better and task.preprocess_logits is None
    batch = task.collator([task.validation[i] for i in (0, 1)])
    assert batch["labels"].tolist() == [[*ids("the city by the river"), EOS], [*ids("sea and city"), EOS, -100, -100]]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)


PAIRS = [
    {"id": i, "translation": {"fr": row["article"], "en": row["summary"]}, "article.x": "sea"}
    for i, row in enumerate(ROWS)
]
NESTED = {"task": "translation", "text_column": "translation.fr", "target_column": "translation.en"}


def test_fields_of_records_are_columns_by_their_dotted_names(tmp_path: Path, tokenizer: Any) -> None:
    flat = load_task(given(tmp_path, task="translation"), tokenizer, 0)
    nested = load_task(given(tmp_path, PAIRS, **NESTED), tokenizer, 0)
    assert nested.train[:] == flat.train[:] and nested.validation[:] == flat.validation[:]
    changes = {"validation_fraction": 0.4, "validation_file": None}
    held_out = load_task(given(tmp_path, PAIRS, **NESTED, **changes), tokenizer, 0)
    same = load_task(given(tmp_path, task="translation", **changes), tokenizer, 0)
    assert held_out.validation[:] == same.validation[:] and len(held_out.train) == 2
    named_so = load_task(given(tmp_path, PAIRS, **NESTED | {"text_column": "article.x"}), tokenizer, 0)
    assert named_so.train["input_ids"][:] == [[*ids("sea"), EOS]] * 3


def test_pairs_as_the_hub_has_them(tmp_path: Path, tokenizer: Any) -> None:
    features = datasets.Features({"translation": datasets.Translation(languages=["fr", "en"])})
    file = tmp_path / "pairs.parquet"
    rows = {"translation": [row["translation"] for row in PAIRS]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    task = load_task(DataSettings(train_file=str(file), validation_file=str(file), **NESTED), tokenizer, 0)
    assert task.train[:] == load_task(given(tmp_path, task="translation"), tokenizer, 0).train[:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_column": "translation.eng"},
            "target_column='translation.eng' is not a column of the training data. Its columns are: id, translation, "
            "translation.fr, translation.en, article.x. Did you mean 'translation.en'?",
        ),
        ({"target_column": None}, "training data are: id, translation, translation.fr, translation.en, article.x."),
        ({"target_column": "translation"}, "target_column='translation' of the training data must hold text, but"),
        (
            {"target_column": "id.en"},
            "article.x. Not every row of 'id' is a record with the same fields.",
        ),
    ],
)
def test_a_wrong_field_is_told(tmp_path: Path, tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(given(tmp_path, PAIRS, **NESTED | changes), tokenizer, 0)
    assert message in str(caught.value)


def test_a_missing_field_is_an_empty_cell(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*PAIRS, {"id": 3, "translation": {"fr": "sea", "en": None}, "article.x": "sea"}]
    with pytest.raises(
        UserError, match="'translation.en' of the training data is empty in 1 of 4 rows, first in row 3"
    ):
        load_task(given(tmp_path, rows, **NESTED), tokenizer, 0)


# ---------------------------------------------------------------------------------------- scores


def test_rouge_by_hand() -> None:
    scores = rouge_scores(["the city lies", "Sea. River lies"], ["the old city lies", "River lies.\nSea"])
    # 1: words 3 of 3 and 3 of 4; pairs 1 of 2 and 1 of 3; longest common sequence 3
    # 2: words 3 of 3; pairs 1 of 2; longest common sequence 2, but by sentence all 3
    assert scores["rouge1"] == pytest.approx((6 / 7 + 1) / 2)
    assert scores["rouge2"] == pytest.approx((2 / 5 + 1 / 2) / 2)
    assert scores["rougeL"] == pytest.approx((6 / 7 + 2 / 3) / 2)
    assert scores["rougeLsum"] == pytest.approx((6 / 7 + 1) / 2)


def test_bleu_by_hand() -> None:
    scores = translation_scores(["the old city lies by the sea"], ["the old city lies by the river"])
    precisions = (6 / 7) * (5 / 6) * (4 / 5) * (3 / 4)
    assert scores["bleu"] == pytest.approx(precisions**0.25)
    assert 0.5 < scores["chrf"] < 1
    assert translation_scores(["one two three four"], ["one two three four"]) == pytest.approx({"bleu": 1, "chrf": 1})


def test_scores_of_generated_token_ids(tmp_path: Path, tokenizer: Any) -> None:
    task = load_task(given(tmp_path), tokenizer, 0)
    predicted = [[0, *ids("the city by the river"), EOS], [0, *ids("sea city"), EOS, 0, 0, -100]]
    width = max(map(len, predicted))
    predictions = np.array([row + [-100] * (width - len(row)) for row in predicted])
    labels = np.array([[*ids("the city by the river"), EOS], [*ids("sea and city"), EOS, -100, -100]])
    scores = task.metrics["validation"](EvalPrediction(predictions=predictions, label_ids=labels))
    assert scores["rouge1"] == scores["rougeL"] == pytest.approx((1 + 4 / 5) / 2)
    translated = load_task(given(tmp_path, task="translation"), tokenizer, 0)
    assert translated.metric_name == "bleu"
    same = EvalPrediction(predictions=labels, label_ids=labels)
    assert translated.metrics["validation"](same) == {"bleu": pytest.approx(1.0), "chrf": pytest.approx(1.0)}


def test_a_trainer_generates_and_scores(tmp_path: Path, tokenizer: Any) -> None:
    task, model, args = load_task(given(tmp_path), tokenizer, 0), tiny_t5(), arguments(tmp_path)
    set_task_arguments(args, task, {})
    assert args.predict_with_generate and args.generation_max_length == 129
    args.generation_max_length = 7
    trainer = plain_trainer(
        model, args, eval_dataset=task.validation, processing_class=tokenizer, **data_options(task, "validation")
    )
    found = trainer.evaluate()
    texts = []
    for row in task.validation:
        generated = model.generate(torch.tensor([row["input_ids"]]), max_length=7)
        texts.append(tokenizer.decode(generated[0], skip_special_tokens=True))
    assert {len(text.split()) for text in texts} <= set(range(7)) and any(texts)
    expected = rouge_scores(texts, [row["summary"] for row in ROWS])
    assert expected["rougeL"] > 0
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize("task_name", ["summarization", "translation"])
def test_perplexity_of_targets_needs_no_generation(tmp_path: Path, tokenizer: Any, task_name: str) -> None:
    task = load_task(given(tmp_path, task=task_name, metric="perplexity"), tokenizer, 0)
    model, args = tiny_t5(), arguments(tmp_path, metric_for_best_model="perplexity")
    assert args.greater_is_better is True  # what TrainingArguments guess
    set_task_arguments(args, task, {})
    assert args.predict_with_generate is False and args.greater_is_better is False
    trainer = plain_trainer(
        model, args, eval_dataset=task.validation, processing_class=tokenizer, **data_options(task, "validation")
    )
    losses, tokens = 0.0, 0
    for row in task.validation:
        with torch.no_grad():
            mean = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        losses, tokens = losses + float(mean) * len(row["labels"]), tokens + len(row["labels"])
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(math.exp(losses / tokens), rel=1e-5)


def test_what_the_recipe_says_of_generation_wins(tmp_path: Path, tokenizer: Any) -> None:
    task, args = load_task(given(tmp_path), tokenizer, 0), arguments(tmp_path, generation_max_length=9)
    set_task_arguments(args, task, {})
    assert args.generation_max_length == 9
    args = arguments(tmp_path, metric_for_best_model="eval_rougeL", greater_is_better=False)
    set_task_arguments(args, task, {"greater_is_better": False})
    assert args.greater_is_better is False


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({}, {"target_column": None}, "target_column is not set, which task: summarization needs.*: article, summary"),
        ({}, {"target_column": "sumary"}, "target_column='sumary' is not a column.*mean 'summary'"),
        ({"summary": " "}, {}, "target_column='summary' of the training data holds no text"),
        ({"article": ""}, {}, "text_column='article' of the training data holds no text"),
        ({}, {"source_prefix": "one two three ", "max_length": 4}, "takes 4 tokens .* no room for a text"),
        ({}, {"max_target_length": 1}, "max_target_length=1 must exceed the 1 special tokens"),
        ({}, {"max_target_length": 257}, "max_target_length=257 is more than the 256 tokens"),
        ({}, {"metric": "bleu"}, "metric='bleu' is not known. Choose one of: rougeL, rouge1"),
        ({}, {"packing": True}, "packing=True has no meaning for task: summarization"),
    ],
)
def test_what_the_user_is_told(
    tmp_path: Path, tokenizer: Any, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_task(given(tmp_path, [ROWS[0] | row], **settings), tokenizer, 0, max_positions=256)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        load_task(given(tmp_path), tokenizer, 0)


def test_a_saved_encoder_decoder_is_evaluated_by_its_recipe(tmp_path: Path, tokenizer: Any) -> None:
    folder, data = tmp_path / "model", given(tmp_path, max_length=32, max_target_length=7)
    tiny_t5().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    names = (
        "task",
        "train_file",
        "validation_file",
        "max_length",
        "max_target_length",
        "text_column",
        "target_column",
    )
    settings |= {name: getattr(data, name) for name in names}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    scores = evaluate(str(folder), load_recipe(str(tmp_path / "recipe.yaml")))
    texts = []
    for row in load_task(data, tokenizer, 0).validation:
        generated = tiny_t5().generate(torch.tensor([row["input_ids"]]), max_length=8)
        texts.append(tokenizer.decode(generated[0], skip_special_tokens=True))
    expected = rouge_scores(texts, [row["summary"] for row in ROWS])
    assert {name: scores[f"validation_{name}"] for name in expected} == pytest.approx(expected)
