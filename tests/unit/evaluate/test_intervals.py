"""Intervals of answers, tags and translations: sums of all rows give the score, those of drawn rows its interval."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from texts import TOKENS, word_tokenizer, words
from tiny import randomise
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    EvalPrediction,
    T5Config,
    T5ForConditionalGeneration,
)

from apt_trainer.errors import UserError
from apt_trainer.evaluate import bootstrap
from apt_trainer.evaluate.bootstrap import mean_interval, summed_intervals
from apt_trainer.runs.run import evaluate
from apt_trainer.settings import DataSettings
from apt_trainer.settings.recipe import Recipe, load_recipe
from apt_trainer.tasks import load_task
from apt_trainer.tasks.generation_scores import translation_scores
from apt_trainer.tasks.metrics import entity_scores, squad_scores, tag_scores
from apt_trainer.tasks.summed_scores import SummedScores, answer_sums, tag_sums, translation_sums


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _whole(summed: SummedScores) -> dict[str, float]:
    """Scores of all rows, each once."""
    return {name: float(value[0]) for name, value in summed.scores(summed.rows.sum(0, keepdims=True)).items()}


def _redrawn(score: Callable[..., dict[str, float]], *of: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """95 % intervals from scoring 300 data sets of drawn rows, each as a whole."""
    generator, n = np.random.default_rng(7), len(of[0])
    found = [score(*([rows[i] for i in drawn] for rows in of)) for drawn in generator.integers(n, size=(300, n))]
    ends = {name: np.quantile([each[name] for each in found], (0.025, 0.975)) for name in found[0]}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def _assert_agree(summed: SummedScores, score: Callable[..., dict[str, float]], *of: Sequence[Any]) -> None:
    """On all rows exactly, on draws as far as 300 of them tell."""
    assert _whole(summed) == pytest.approx(score(*of), abs=1e-12)
    found = summed_intervals(summed.rows, summed.scores)
    for name, ends in _redrawn(score, *of).items():
        assert tuple(found[name]) == pytest.approx(ends, abs=0.2 * (ends[1] - ends[0])), name
        assert found[name].low < score(*of)[name] < found[name].high


# ---------------------------------------------------------------------------------------- sums


def test_what_follows_from_sums_is_drawn_as_means_are(monkeypatch: pytest.MonkeyPatch) -> None:
    values, weights = np.random.default_rng(3).normal(size=50), np.arange(1, 51)
    rows = np.column_stack([values * weights, weights])

    def mean(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": sums[:, 0] / sums[:, 1]}

    found = summed_intervals(rows, mean, resamples=301, seed=5)
    assert found["mean"] == pytest.approx(mean_interval(values, weights, resamples=301, seed=5), rel=1e-9)
    monkeypatch.setattr(bootstrap, "CELLS", 50 * 100)
    assert summed_intervals(rows, mean, resamples=301, seed=5)["mean"] == pytest.approx(found["mean"], rel=1e-9)
    narrow = summed_intervals(rows, mean, confidence=0.5)["mean"]
    wide = summed_intervals(rows, mean)["mean"]
    assert wide.low < narrow.low < narrow.high < wide.high
    with pytest.raises(UserError, match="no examples"):
        summed_intervals(rows[:0], mean)


# ---------------------------------------------------------------------------------------- answers


def test_answers_are_means_over_questions_with_and_without_an_answer() -> None:
    predicted = ["the old city", "river", "", "sea", "old town", ""] * 8
    golds = [["city", "old city"], ["river"], [], [], ["old city"], ["sea"]] * 8
    summed = answer_sums(predicted, golds)
    found = summed_intervals(summed.rows, summed.scores)
    assert _whole(summed) == squad_scores(predicted, golds)
    # exact: right with an answer, right, rightly none, wrongly one, half right, wrongly none
    assert found["exact_match"] == pytest.approx(mean_interval([1, 1, 1, 0, 0, 0] * 8))
    assert found["f1"] == pytest.approx(mean_interval([1, 1, 1, 0, 0.5, 0] * 8))
    assert found["exact_match"].low < 0.5 < found["exact_match"].high


# ---------------------------------------------------------------------------------------- tags

NAMES = ("B-A", "B-B", "I-A", "I-B", "O")


def _tags(names: Sequence[str], rows: int) -> tuple[list[list[str]], list[list[str]]]:
    """(predicted, expected): sentences of 1 to 9 words, two of three tags right."""
    generator = np.random.default_rng(1)
    expected = [list(generator.choice(names, size=generator.integers(1, 10))) for _ in range(rows)]
    predicted = [[t if generator.random() < 0.66 else generator.choice(names) for t in row] for row in expected]
    return predicted, expected


def test_entities_are_drawn_by_sentence() -> None:
    predicted, expected = _tags(NAMES, 60)

    def scores(*of: list[list[str]]) -> dict[str, float]:
        return tag_scores(*of) | entity_scores(*of)

    _assert_agree(tag_sums(predicted, expected, NAMES), scores, predicted, expected)


def test_tags_that_are_no_entities_are_drawn_by_sentence() -> None:
    predicted, expected = _tags(("N", "V", "O"), 60)
    summed = tag_sums(predicted, expected, ("N", "O", "V"))
    assert set(_whole(summed)) == {"accuracy", "f1", "f1_macro", "f1_micro"}
    _assert_agree(summed, tag_scores, predicted, expected)


def test_one_right_and_one_missed_sentence_make_these_draws() -> None:
    """Of two sentences a draw holds the first twice, both or the second twice: F1 1, 2/3 (1 of 2 found) and 0."""
    predicted, expected = [["B-A", "O"], ["O", "O"]], [["B-A", "O"], ["B-A", "O"]]
    summed = tag_sums(predicted, expected, ("B-A", "O"))
    draws = summed.scores(np.array([[2, 0], [1, 1], [0, 2]]) @ summed.rows)
    assert draws["f1"].tolist() == pytest.approx([1, 2 / 3, 0])
    assert draws["precision"].tolist() == [1, 1, 0] and draws["recall"].tolist() == [1, 0.5, 0]
    assert draws["accuracy"].tolist() == [1, 0.75, 0.5]
    nothing = tag_sums([["O"]], [["O"]], ("B-A", "O"))
    assert _whole(nothing) == tag_scores([["O"]], [["O"]]) | entity_scores([["O"]], [["O"]])


# ---------------------------------------------------------------------------------------- translations


def _translations(rows: int) -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(2)
    expected = [words(int(generator.integers(5, 14)), 100 + i) for i in range(rows)]
    noise = ["Paris,", "it's", "u.s.", "a", ""]
    predicted = [
        " ".join(w if generator.random() < 0.8 else generator.choice(noise) for w in t.split()) for t in expected
    ]
    return predicted, expected


def test_bleu_and_chrf_of_draws_are_those_of_the_drawn_corpus() -> None:
    predicted, expected = _translations(50)
    _assert_agree(translation_sums(predicted, expected), translation_scores, predicted, expected)


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [
        (["a"], ["a"]),  # no pair of words, no pair of characters
        (["one two"], ["three four"]),
        (["", "one"], ["one two", "a"]),
        (["one two three four five", "longer than it is"], ["one two four five three", "it"]),
        (["one two three"], ["one two three four five six"]),
    ],
)
def test_bleu_and_chrf_of_short_texts(predicted: list[str], expected: list[str]) -> None:
    assert _whole(translation_sums(predicted, expected)) == pytest.approx(translation_scores(predicted, expected))


# ---------------------------------------------------------------------------------------- whole evaluations

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def _evaluated(folder: Path, model: Any, rows: list[dict[str, Any]], **settings: Any) -> dict[str, float]:
    randomise(model, seed=6)
    model.save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    return evaluate(str(folder / "model"), _recipe(folder, rows, **settings))


def _recipe(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> Recipe:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train_file": str(file), "test_file": str(file), "max_length": 24, "use_cpu": True, "disable_tqdm": True}
    given |= {"output_dir": str(folder / "out"), "report_to": "none", "per_device_eval_batch_size": 4} | settings
    (folder / "recipe.yaml").write_text(json.dumps(given))
    return load_recipe(str(folder / "recipe.yaml"))


def _assert_within(scores: dict[str, float], *names: str) -> None:
    for name in names:
        low, value, high = (scores[f"test_{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high and low < high, name


def test_evaluating_answers_gives_their_intervals(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        context, answers = words(12, i), {"text": [], "answer_start": []}
        if i % 3:
            text = context.split()[i % 10]
            answers = {"text": [text], "answer_start": [context.index(text)]}
        rows.append({"question": words(3, 90 + i), "context": context, "answers": answers})
    config = BertConfig(vocab_size=len(TOKENS), max_position_embeddings=24, **SIZES)
    options = {"task": "question_answering", "doc_stride": 2}
    scores = _evaluated(tmp_path, BertForQuestionAnswering(config), rows, **options)
    _assert_within(scores, "f1")
    data = DataSettings(
        train_file=str(tmp_path / "rows.jsonl"), validation_file=str(tmp_path / "rows.jsonl"), max_length=24, **options
    )
    task = load_task(data, word_tokenizer(), seed=0)
    logits = np.zeros((len(task.validation), 24))
    for i, row in enumerate(task.validation):
        logits[i, row["start_positions"] if i % 2 else 5] = 3  # every second answer, if it is one word, is right
    prediction = EvalPrediction(predictions=(logits, logits), label_ids=None)
    summed = task.sums["validation"](prediction)
    assert summed.rows.shape == (30, 3)
    assert _whole(summed) == pytest.approx(task.metrics["validation"](prediction))
    assert 0.4 < _whole(summed)["exact_match"] < 0.8


def test_evaluating_tags_gives_their_intervals(tmp_path: Path) -> None:
    rows = [{"tokens": words(6, i).split(), "tags": _tags(NAMES, 40)[1][i % 40][:6]} for i in range(40)]
    rows = [row | {"tokens": row["tokens"][: len(row["tags"])]} for row in rows]
    config = BertConfig(vocab_size=len(TOKENS), max_position_embeddings=24, num_labels=5, **SIZES)
    options = {"task": "token_classification", "label_column": "tags"}
    scores = _evaluated(tmp_path, BertForTokenClassification(config), rows, **options)
    _assert_within(scores, "accuracy", "f1", "precision", "recall", "f1_macro", "f1_micro")


def test_evaluating_translations_gives_their_intervals(tmp_path: Path) -> None:
    rows = [{"source": words(5, i), "target": words(6, 70 + i)} for i in range(12)]
    config = T5Config(
        vocab_size=len(TOKENS),
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    options = {"task": "translation", "text_column": "source", "target_column": "target", "max_target_length": 8}
    scores = _evaluated(tmp_path, T5ForConditionalGeneration(config), rows, **options)
    _assert_within(scores, "chrf")
    assert scores["test_bleu_low"] <= scores["test_bleu"] <= scores["test_bleu_high"]
    by_tokens = evaluate(str(tmp_path / "model"), _recipe(tmp_path, rows, metric="perplexity", **options))
    _assert_within(by_tokens, "perplexity")


def test_rows_that_several_processes_repeat_are_not_counted(tmp_path: Path) -> None:
    rows = [{"tokens": ["w1", "w2"], "tags": ["N", "V"]}, {"tokens": ["w3"], "tags": ["V"]}]
    recipe = _recipe(tmp_path, rows, task="token_classification", label_column="tags")
    task = load_task(recipe.data, word_tokenizer(), seed=0)
    labels = np.array([[0, 1], [1, -100], [0, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 0], [1, 0], [1, 1]])).numpy()
    summed = task.sums["test"](EvalPrediction(predictions=logits, label_ids=labels))
    assert len(summed.rows) == 2 and _whole(summed)["accuracy"] == pytest.approx(2 / 3)
