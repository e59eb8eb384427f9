"""Labels, where their numbers, their order or their kind could be mistaken without a word."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from integration.factories import config
from scipy import stats
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight
from texts import TOKENS, WORDS, word_tokenizer
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    EvalPrediction,
    PreTrainedModel,
    set_seed,
)
from transformers.utils import ModelOutput

from apt_trainer import APTTrainer, UserError, load_pruned
from apt_trainer.cli import main
from apt_trainer.distillation.losses import prediction_loss
from apt_trainer.evaluate.bootstrap import RESAMPLES
from apt_trainer.evaluate.task_intervals import score_intervals
from apt_trainer.runs import dry_run, run
from apt_trainer.scoring.sublayers.windows import from_rows
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.tasks.metrics import classification_scores, multi_label_scores
from apt_trainer.tasks.summed_scores import multi_label_sums

NAMES = ("zebra", "ant", "mole")
"""In the order of ids, which is not that of letters."""
ROWS = 24


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---------------------------------------------------------------------------- models and data


def bert(**changes: Any) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(vocab_size=len(TOKENS), max_position_embeddings=32, pad_token_id=0, **sizes, **quiet, **changes)


def named(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def text_of(label: int, row: int = 0) -> str:
    """The first word tells the label, or (of a number of three bits) which labels there are."""
    return f"{WORDS[label]} {WORDS[20 + row % 5]}"


def fit(model: PreTrainedModel, targets: torch.Tensor) -> PreTrainedModel:
    """``model`` so that it says ``targets`` [words] of the texts that begin with each word."""
    inputs = word_tokenizer()([text_of(i, row) for i in range(len(targets)) for row in range(5)], return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    labels = targets.repeat_interleave(5, dim=0)
    if isinstance(model, BertForTokenClassification):
        labels = torch.stack([labels, torch.zeros_like(labels)], dim=1)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    return model.eval()


@cache
def fitted(names: tuple[str, ...] = NAMES, order: tuple[int, ...] = (0, 1, 2)) -> PreTrainedModel:
    """A classifier of texts: the word ``i`` is the label ``order[i]``, called by ``names``; "" gives no names."""
    set_seed(1)
    settings = bert(**named(names)) if names[0] else bert(num_labels=len(names))
    return fit(BertForSequenceClassification(settings), torch.tensor(order))


@cache
def several(order: tuple[int, ...] = (0, 1, 2)) -> PreTrainedModel:
    """A model for several labels per text: those of the bits of the first word's number, in that ``order`` of ids."""
    set_seed(2)
    names = [NAMES[list(order).index(i)] for i in range(3)]
    settings = bert(**named(names), problem_type="multi_label_classification")
    bits = torch.tensor([[word >> list(order).index(i) & 1 for i in range(3)] for word in range(8)]).float()
    return fit(BertForSequenceClassification(settings), bits)


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(labels: Sequence[Any], words: Sequence[int], number: int = ROWS) -> list[dict[str, Any]]:
    """Texts that begin with each of ``words`` in turn, labelled by ``labels``."""
    pairs = list(zip(words, labels, strict=True))
    return [{"text": text_of(pairs[i % len(pairs)][0], i), "label": pairs[i % len(pairs)][1]} for i in range(number)]


def csv(path: Path, labels: Sequence[str]) -> str:
    path.write_text("text,label\n" + "".join(f"{text_of(i % 3, i)},{label}\n" for i, label in enumerate(labels)))
    return str(path)


def recipe(folder: Path, model: str, train: str, *words: str) -> Any:
    fixed = ["--output_dir", str(folder / "out"), "--model_name_or_path", model, "--train_file", train]
    fixed += ["--max_length", "8", "--use_cpu", "--report_to", "none", "--measure_latency", "false", "--lora_r", "2"]
    fixed += ["--per_device_train_batch_size", "8", "--max_steps", "40", "--disable_tqdm", "--min_hidden", "8"]
    fixed += ["--num_pruning_events", "2"]
    return load_recipe(None, [*fixed, *words])


def accuracy(folder: Path, model: str, train: str, *words: str) -> float:
    return run.evaluate(model, recipe(folder, model, train, *words))["validation_accuracy"]


# ---------------------------------------------------------------------------- evaluate


FORMS: dict[str, Sequence[Any]] = {
    "names": NAMES,
    "other case": ("ZEBRA", "Ant", "MOLE"),
    "white space": ("zebra", " ant", "mole "),
    "numbers": (0, 1, 2),
    "numbers as text": ("0", "1", "2"),
}


@pytest.mark.parametrize("words", [(0, 1, 2), (2, 0)], ids=["all", "without ant"])
@pytest.mark.parametrize("form", list(FORMS))
def test_evaluate_numbers_labels_by_the_model(form: str, words: tuple[int, ...], tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of([FORMS[form][word] for word in words], words))
    model = saved(fitted(), tmp_path / "model")
    assert accuracy(tmp_path, model, data, "--validation_file", data) == 1.0


def test_evaluate_numbers_the_classes_of_a_data_set_by_their_names(tmp_path: Path) -> None:
    """Also where the file that is tested on has another order than the one for training."""
    paths = []
    for names in (("ant", "mole", "zebra"), ("mole", "ant", "zebra", "newt")):
        rows = rows_of([names.index(name) for name in NAMES], (0, 1, 2))
        features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
        paths.append(str(tmp_path / f"{names[0]}.parquet"))
        Dataset.from_list(rows, features=features).to_parquet(paths[-1])
    model = saved(fitted(), tmp_path / "model")
    assert accuracy(tmp_path, model, paths[0], "--validation_file", paths[1]) == 1.0


def test_evaluate_takes_truth_values_for_two_labels(tmp_path: Path) -> None:
    model = saved(fitted(("ham", "spam"), (0, 1)), tmp_path / "model")
    data = jsonl(tmp_path / "data.jsonl", rows_of((True, False), (1, 0)))
    assert accuracy(tmp_path, model, data, "--validation_file", data) == 1.0


def test_evaluate_tells_unnamed_labels_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = saved(fitted(("", "", "")), tmp_path / "model")
    for labels, words in (((2, 1), (2, 1)), (("LABEL_2", "LABEL_0"), (2, 0)), (("a", "b", "c"), (0, 1, 2))):
        data = jsonl(tmp_path / "data.jsonl", rows_of(labels, words))
        assert accuracy(tmp_path, model, data, "--validation_file", data) == 1.0
    assert caplog.text.count("taken in their order: 0 is a, 1 is b, 2 is c") == 1
    data = jsonl(tmp_path / "data.jsonl", rows_of(("b", "c"), (1, 2)))  # which of three labels these are nobody knows
    with pytest.raises(
        UserError, match=r"labels that the model does not have: b, c.*model: LABEL_0, LABEL_1, LABEL_2"
    ):
        accuracy(tmp_path, model, data, "--validation_file", data)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("zebra", "newt"), "labels that the model does not have: newt. Labels of the model: zebra, ant, mole"),
        ((0, 3), "labels that the model does not have: 0, 3"),
        (("zebra", "-1"), "training data holds -1|labels that the model does not have: -1"),
        ((0, -100), "training data holds -100, which marks what has no label"),
    ],
)
def test_evaluate_refuses_labels_that_the_model_does_not_have(
    labels: Sequence[Any], message: str, tmp_path: Path
) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(labels, (0, 1)))
    model = saved(fitted(), tmp_path / "model")
    with pytest.raises(UserError, match=message):
        accuracy(tmp_path, model, data, "--validation_file", data)


def test_evaluate_refuses_hidden_labels_of_a_test_split(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", rows_of((0, 1, 2), (0, 1, 2)))
    test = jsonl(tmp_path / "test.jsonl", rows_of((-1,), (0,)))
    model = saved(fitted(), tmp_path / "model")
    with pytest.raises(UserError, match="test data holds -1, which marks hidden"):
        run.evaluate(model, recipe(tmp_path, model, train, "--test_file", test))


@pytest.mark.parametrize("names", [("O", "B-PER", "B-LOC"), ("B-LOC", "O", "B-PER")])
def test_evaluate_numbers_tags_by_the_model(names: tuple[str, ...], tmp_path: Path) -> None:
    set_seed(1)
    tags = {WORDS[0]: "O", WORDS[1]: "B-PER", WORDS[2]: "B-LOC"}
    model = BertForTokenClassification(bert(**named(names)))
    ids = {name: i for i, name in enumerate(names)}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        for sentence in (list(tags), [WORDS[0], WORDS[2]]):
            inputs = word_tokenizer()([" ".join(sentence)], return_tensors="pt")["input_ids"]
            model(input_ids=inputs, labels=torch.tensor([[ids[tags[word]] for word in sentence]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    path = saved(model, tmp_path / "model")
    rows = [{"text": [WORDS[0], WORDS[2]], "label": ["O", "B-LOC"]}] * 4  # no person
    file = jsonl(tmp_path / "data.jsonl", rows)
    scores = run.evaluate(
        path, recipe(tmp_path, path, file, "--validation_file", file, "--task", "token_classification")
    )
    assert scores["validation_accuracy"] == 1.0 and scores["validation_f1"] == 1.0


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        (lambda: BertModel(bert()), "classification", "is a BertModel, which has no trained head for this task"),
        (fitted, "token_classification", "is a BertForSequenceClassification, which has no trained head"),
        (several, "classification", "was trained for multi_label_classification, but the task is single_label"),
        (
            lambda: fitted(("", "", "")),
            "regression",
            "was trained for single_label.*, but the task is regression",
        ),
    ],
)
def test_evaluate_refuses_a_model_for_another_task(model: Any, task: str, message: str, tmp_path: Path) -> None:
    labels: Sequence[Any] = ([0], [1]) if task == "token_classification" else (0, 1)
    rows = rows_of(labels, (0, 1))
    if task == "token_classification":
        rows = [row | {"text": row["text"].split()[:1]} for row in rows]
    data, path = jsonl(tmp_path / "data.jsonl", rows), saved(model(), tmp_path / "model")
    with pytest.raises(UserError, match=message):
        run.evaluate(path, recipe(tmp_path, path, data, "--validation_file", data, "--task", task))


# ---------------------------------------------------------------------------- training goes on


def test_a_classifier_that_is_trained_further_keeps_its_labels(tmp_path: Path) -> None:
    """All of them, where the data hold some: one in training, another one in validation."""
    train = jsonl(tmp_path / "train.jsonl", rows_of(("mole", "zebra"), (2, 0)))
    validation = jsonl(tmp_path / "validation.jsonl", rows_of(("ant", "zebra"), (1, 0)))
    model = saved(fitted(), tmp_path / "model")
    asked = recipe(tmp_path, model, train, "--validation_file", validation, "--learning_rate", "1e-6")
    metrics = run.train(recipe_without_pruning(asked))
    assert metrics["task_metric"] == 1.0
    found = AutoConfig.from_pretrained(tmp_path / "out")
    assert found.id2label == dict(enumerate(NAMES)) and found.problem_type == "single_label_classification"


def recipe_without_pruning(asked: Any) -> Any:
    asked.training.target_sparsity, asked.training.distillation = None, "none"
    return asked


def test_other_labels_get_a_numbering_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(("newt", "bat"), (0, 1)))
    model = saved(fitted(), tmp_path / "model")
    text = dry_run.plan(recipe(tmp_path, model, data, "--validation_file", data))
    assert 'labels       2 in the training rows: "bat" × 12, "newt" × 12' in text
    assert "The model has the labels zebra, ant, mole, the data have others (bat, newt)" in caplog.text


def test_validation_labels_that_no_training_row_has_are_an_error(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", rows_of(("mole", "zebra"), (2, 0)))
    validation = jsonl(tmp_path / "validation.jsonl", rows_of(("ant", "zebra"), (1, 0)))
    model = saved(BertModel(bert()), tmp_path / "model")
    with pytest.raises(UserError, match="validation data has the label 'ant', which the training data does not have"):
        dry_run.plan(recipe(tmp_path, model, train, "--validation_file", validation))


def test_labels_without_a_training_row_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*rows_of(("a", "b"), (0, 1)), {"text": WORDS[2], "label": "c"}]
    data = jsonl(tmp_path / "data.jsonl", rows)
    model = saved(BertModel(bert()), tmp_path / "model")
    dry_run.plan(recipe(tmp_path, model, data, "--validation_file", data, "--max_train_samples", "4"))
    assert "no example of label c, so it cannot be learned" in caplog.text


def test_labels_that_differ_in_case_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(("pos", "Pos", "neg"), (0, 1, 2)))
    dry_run.plan(recipe(tmp_path, saved(BertModel(bert()), tmp_path / "model"), data, "--validation_file", data))
    assert "differ in case only: Pos, pos" in caplog.text


def test_labels_that_other_programs_write_for_a_missing_one_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = csv(tmp_path / "data.csv", ["a", "nan", "b", "None"] * 6)
    model = saved(BertModel(bert()), tmp_path / "model")
    assert "labels       4 in" in dry_run.plan(recipe(tmp_path, model, data, "--validation_file", data))
    assert "holds the text None, nan, which is a label here" in caplog.text


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_file_with_another_delimiter_is_told(mark: str, tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text(f"text{mark}label\n" + f"w1 w2{mark}a\n" * 8)
    model = saved(BertModel(bert()), tmp_path / "model")
    with pytest.raises(UserError, match="columns seem to be parted by .*by commas, or by tabs in a .tsv"):
        dry_run.plan(recipe(tmp_path, model, str(tmp_path / "data.csv")))


def test_rows_without_text_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row | {"pair": "w7"} for row in [*rows_of(NAMES, (0, 1, 2)), {"text": " ", "label": "ant"}]]
    data = jsonl(tmp_path / "data.jsonl", rows)
    words = ("--validation_file", data, "--text_column", "text", "--text_pair_column", "pair")
    dry_run.plan(recipe(tmp_path, saved(BertModel(bert()), tmp_path / "model"), data, *words))
    assert "1 of 25 rows of the training data have no text in 'text'" in caplog.text


def test_names_that_stand_in_label2id_alone(tmp_path: Path) -> None:
    model = saved(fitted(), tmp_path / "model")
    data = jsonl(tmp_path / "data.jsonl", rows_of(("mole", "ant"), (2, 1)))
    file = tmp_path / "model" / "config.json"
    settings = json.loads(file.read_text())
    named_otherwise = settings | {"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}
    file.write_text(json.dumps(named_otherwise))
    assert accuracy(tmp_path, model, data, "--validation_file", data) == 1.0
    file.write_text(json.dumps(settings | {"id2label": {"0": "ant", "1": "zebra", "2": "mole"}}))
    with pytest.raises(UserError, match=r"id2label of the model \(ant, zebra, mole\) and its label2id .* disagree"):
        accuracy(tmp_path, model, data, "--validation_file", data)


def test_one_name_for_two_labels_is_an_error(tmp_path: Path) -> None:
    model = saved(fitted(), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    settings["id2label"]["2"] = "ant"
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    data = jsonl(tmp_path / "data.jsonl", rows_of(("ant", "zebra"), (1, 0)))
    with pytest.raises(UserError, match="gives the name 'ant' to several labels"):
        accuracy(tmp_path, model, data, "--validation_file", data)


# ---------------------------------------------------------------------------- rows without a label


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_label_cells_are_named_with_their_rows(empty: str, tmp_path: Path) -> None:
    train = csv(tmp_path / "train.csv", ["a", "b", empty, "a", "b", empty] * 4)
    model = saved(BertModel(bert()), tmp_path / "model")
    message = (
        r"label_column='label' of the training data is empty in 8 of 24 rows: "
        r"row 2, 5, 8, 11, 14, … \(counted from 0\).*drop_unlabeled: true"
    )
    for start in (dry_run.plan, run.train):
        with pytest.raises(UserError, match=message):
            start(recipe(tmp_path, model, train, "--validation_file", train))
    text = dry_run.plan(recipe(tmp_path, model, train, "--validation_file", train, "--drop_unlabeled"))
    assert "16 training rows, 1 of them held out" in text and '"a" × 8, "b" × 8' in text


@pytest.mark.parametrize(("task", "labels"), [("classification", ["a", None, "b"]), ("regression", [1.5, None, 2.0])])
def test_missing_labels_of_json_rows(task: str, labels: list[Any], tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", rows_of(labels, (0, 1, 2)))
    good = jsonl(tmp_path / "good.jsonl", rows_of(labels[::2], (0, 2)))
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ("--validation_file", train, "--task", task)
    with pytest.raises(UserError, match="is empty in 8 of 24 rows: row 1, 4"):
        dry_run.plan(recipe(tmp_path, model, train, *words))
    with pytest.raises(UserError, match="validation data is empty in 8 of 24 rows"):
        dry_run.plan(recipe(tmp_path, model, good, *words))
    assert "16 training rows" in dry_run.plan(recipe(tmp_path, model, train, *words, "--drop_unlabeled", "true"))


def test_numbers_that_are_not_a_number_are_missing(tmp_path: Path) -> None:
    path = str(tmp_path / "train.parquet")
    labels = [0.0, float("nan"), 1.0] * 8
    Dataset.from_dict({"text": [text_of(i % 3, i) for i in range(24)], "label": labels}).to_parquet(path)
    model = saved(BertModel(bert()), tmp_path / "model")
    with pytest.raises(UserError, match="is empty in 8 of 24 rows: row 1, 4"):
        dry_run.plan(recipe(tmp_path, model, path, "--validation_file", path))


def test_a_label_column_without_any_label(tmp_path: Path) -> None:
    train = csv(tmp_path / "train.csv", [""] * 6)
    with pytest.raises(UserError, match="is empty in 6 of 6 rows. Give labels"):
        dry_run.plan(recipe(tmp_path, saved(BertModel(bert()), tmp_path / "model"), train, "--drop_unlabeled"))


def test_empty_and_ignored_tags_are_errors(tmp_path: Path) -> None:
    model = saved(BertModel(bert()), tmp_path / "model")
    for tags, message in ((["O", ""], "lacks a part, in 4 of 4"), ([0, -100], "holds -100.*Leave out each word")):
        data = jsonl(tmp_path / "data.jsonl", [{"text": WORDS[:2], "label": tags}] * 4)
        words = ("--validation_file", data, "--task", "token_classification")
        with pytest.raises(UserError, match=message):
            dry_run.plan(recipe(tmp_path, model, data, *words))


@pytest.mark.parametrize(
    ("task", "labels", "missing", "left"),
    [
        ("multi_label_classification", [["a", "b"], None, [], ["b"]], "row 1, 5", [0, 2, 3]),
        ("multi_label_classification", [[1.0, 0.0], [1.0, None], [0.0, 0.0], [0.0, 1.0]], "row 1, 5", [0, 2, 3]),
        ("regression", [[1.0, 0.5], [None, 1.0], None, [2.0, 3.0]], "row 1, 2, 5", [0, 3]),
        ("token_classification", [["A"], [""], None, ["B"]], "row 1, 2, 5", [0, 3]),
    ],
)
def test_rows_that_lack_labels_are_left_out_of_every_task(
    task: str, labels: list[Any], missing: str, left: list[int], tmp_path: Path
) -> None:
    """An empty list of labels is none: it says that a row has no label."""
    rows: list[dict[str, Any]] = rows_of(labels, (0, 1, 2, 3))
    if task == "token_classification":
        rows = [row | {"text": row["text"].split()[:1]} for row in rows]
    data = jsonl(tmp_path / "data.jsonl", rows)
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ["--task", task, "--validation_file", data]
    with pytest.raises(
        UserError, match=f"lacks a part, in {24 - 6 * len(left)} of 24 rows: {missing}.*drop_unlabeled"
    ):
        dry_run.plan(recipe(tmp_path, model, data, *words))
    asked = recipe(tmp_path, model, data, *words, "--drop_unlabeled")
    assert f"{6 * len(left)} training rows" in dry_run.plan(asked)
    found = run.load_inputs(asked.model, asked)[2].train["input_ids"][:4]
    word = [row["text"] if task != "token_classification" else row["text"][0] for row in rows]
    assert [ids[0] for ids in found] == [
        word_tokenizer()(word[4 * i + j].split()[0])["input_ids"][0] for i in range(2) for j in left
    ][:4]


def test_an_empty_text_of_labels_is_no_label_and_null_is_none_given(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(["a|b", "", None, "b"], (0, 1, 2, 3)))
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ["--task", "multi_label_classification", "--label_separator", "|", "--validation_file", data]
    with pytest.raises(UserError, match="is empty in 6 of 24 rows: row 2"):
        dry_run.plan(recipe(tmp_path, model, data, *words))
    told = dry_run.plan(recipe(tmp_path, model, data, *words, "--drop_unlabeled"))
    assert "18 training rows" in told and '"b" × 12, "a" × 6' in told


def test_rows_without_tags_are_left_out(tmp_path: Path) -> None:
    rows = [{"text": ["w0"], "label": ["A"]}, {"text": ["w1"], "label": ["B"]}, {"text": ["w2"], "label": []}] * 4
    data = jsonl(tmp_path / "data.jsonl", rows)
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ["--task", "token_classification", "--validation_file", data]
    with pytest.raises(UserError, match="Row 2 .* 1 words in 'text' and 0 tags"):
        dry_run.plan(recipe(tmp_path, model, data, *words))
    assert "8 training rows" in dry_run.plan(recipe(tmp_path, model, data, *words, "--drop_unlabeled"))


# ---------------------------------------------------------------------------- rows for analyze, drop, paint


@pytest.mark.parametrize(
    ("labels", "wanted"), [((*NAMES,), [0, 1, 2]), (("ANT", "mole"), [1, 2]), (("2", 1.0), [2, 1])]
)
def test_rows_for_scores_are_numbered_by_the_model(labels: Sequence[Any], wanted: list[int]) -> None:
    lines = [json.dumps({"text": "w0", "label": label}) for label in labels]
    assert from_rows(lines, word_tokenizer(), fitted(), 8, 8).batches[0]["labels"].tolist() == wanted


def test_rows_for_scores_may_have_several_labels() -> None:
    lines = [json.dumps({"text": "w0", "label": label}) for label in (["mole", "zebra"], [], ["ant"])]
    labels = from_rows(lines, word_tokenizer(), several(), 8, 8).batches[0]["labels"]
    assert labels.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_rows_for_scores_may_say_0_or_1_for_each_label() -> None:
    for rows in ([[1, 0, 1], [0, 0, 0]], [[True, False, True], [False] * 3], [[1.0, 0.0, 1.0], [0.0] * 3]):
        lines = [json.dumps({"text": "w0", "label": label}) for label in rows]
        labels = from_rows(lines, word_tokenizer(), several(), 8, 8).batches[0]["labels"]
        assert labels.tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    lines = [json.dumps({"text": "w0", "label": label}) for label in ([1, 0, 1], [1])]
    with pytest.raises(UserError, match=r"Row 1 has the labels \[1, 0, 1\], one twice.*3 times 0 or 1"):
        from_rows(lines, word_tokenizer(), several(), 8, 8)


def test_rows_for_scores_are_for_texts_as_a_whole() -> None:
    model = BertForTokenClassification(bert(**named(NAMES)))
    with pytest.raises(UserError, match="the model is a BertForTokenClassification. Give a text"):
        from_rows([json.dumps({"text": "w0", "label": "ant"})], word_tokenizer(), model, 8, 8)


def test_rows_for_scores_of_a_regression_are_no_ids() -> None:
    lines = [json.dumps({"text": "w0", "label": label}) for label in (4, 2.5)]
    model = BertForSequenceClassification(bert(num_labels=1))
    assert from_rows(lines, word_tokenizer(), model, 8, 8).batches[0]["labels"].tolist() == [4.0, 2.5]


@pytest.mark.parametrize(("label", "model"), [("newt", fitted), (-1, fitted), (None, fitted), (float("nan"), fitted)])
def test_rows_for_scores_with_unknown_labels(label: Any, model: Any) -> None:
    lines = [json.dumps({"text": "w0", "label": value}) for value in ("ant", label)]
    with pytest.raises(UserError, match="Row 2 has the label .*; the model has 3 labels: zebra, ant, mole"):
        from_rows(lines, word_tokenizer(), model(), 8, 8)


# ---------------------------------------------------------------------------- a teacher in another order

MOVED = ("mole", "zebra", "ant")
"""The names of a teacher that has its labels in another order."""


def taught(folder: Path, student: PreTrainedModel, teacher: PreTrainedModel, words: int, label: Any) -> Any:
    """The student, trained from the teacher alone on texts that begin with ``words`` words; what ``label`` gives for
    each of them is wrong."""
    texts = [(word, text_of(word, row)) for row in range(5) for word in range(words)]
    rows = [{"input_ids": word_tokenizer()(text)["input_ids"], "labels": label(word)} for word, text in texts]
    settings = {"max_steps": 120, "distillation": "model", "teacher_name_or_path": "given", "layer_weight": 0.0}
    settings |= {"target_sparsity": None, "tune": "full", "tune_embeddings": True, "full_learning_rate": 5e-3}
    settings |= {"learning_rate": 5e-3, "distillation_start": 0, "distillation_end": 120}
    trainer = APTTrainer(student, config(folder, **settings), rows, teacher=teacher, processing_class=word_tokenizer())
    trainer.train()
    return trainer.model.eval()


def said(model: PreTrainedModel, words: int) -> torch.Tensor:
    inputs = word_tokenizer()([text_of(i, 3) for i in range(words)], return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


@pytest.mark.parametrize("names", [MOVED, tuple(map(str.upper, MOVED))], ids=["names", "other case"])
def test_a_teacher_in_another_order_teaches_the_right_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    order = tuple(MOVED.index(name) for name in NAMES)
    set_seed(4)
    student = BertForSequenceClassification(bert(**named(NAMES)))
    model = taught(tmp_path, student, fitted(names, order), 3, lambda word: (word + 1) % 3)
    assert said(model, 3).argmax(-1).tolist() == [0, 1, 2]


def test_a_teacher_for_several_labels_teaches_all_of_them(tmp_path: Path) -> None:
    """By Bernoulli divergence: a softmax would not see what all labels have in common."""
    set_seed(4)
    student = BertForSequenceClassification(bert(**named(NAMES), problem_type="multi_label_classification"))
    teacher = several((1, 2, 0))
    assert teacher.config.id2label == {0: "mole", 1: "zebra", 2: "ant"}
    model = taught(tmp_path, student, teacher, 8, lambda word: [0.0, 0.0, 0.0])
    bits = [[bool(word >> i & 1) for i in range(3)] for word in range(8)]
    assert (said(model, 8) > 0).tolist() == bits


def test_a_teacher_without_names_counts_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_seed(4)
    student = BertForSequenceClassification(bert(**named(NAMES)))
    model = taught(tmp_path, student, fitted(("", "", "")), 3, lambda word: (word + 1) % 3)
    assert "Labels are matched by number" in caplog.text and "The teacher: LABEL_0" in caplog.text
    assert said(model, 3).argmax(-1).tolist() == [0, 1, 2]


def teacher_with(**changes: Any) -> PreTrainedModel:
    return BertForSequenceClassification(bert(**{**named(NAMES), **changes}))


REFUSED: list[tuple[Any, str]] = [
    (lambda: teacher_with(**named(("zebra", "ant", "newt"))), "other names than those of the model.*zebra, ant, newt"),
    (lambda: teacher_with(**named(("zebra", "ant"))), "has 2 labels and the model 3"),
    (several, "was trained for multi_label_classification and the model is for single_label"),
    (lambda: BertForTokenClassification(bert(**named(NAMES))), "BertForTokenClassification|no trained head"),
]


def wider_vocabulary() -> PreTrainedModel:
    model = teacher_with()
    model.resize_token_embeddings(len(TOKENS) + 3)
    return model


@pytest.mark.parametrize(
    ("teacher", "message"), [*REFUSED, (wider_vocabulary, "teacher has 63 tokens and the model 60")]
)
def test_a_teacher_that_does_not_fit_is_refused_at_construction(teacher: Any, message: str, tmp_path: Path) -> None:
    student = BertForSequenceClassification(bert(**named(NAMES), problem_type="single_label_classification"))
    args = config(tmp_path, distillation="model", teacher_name_or_path="given")
    with pytest.raises(UserError, match=message):
        APTTrainer(student, args, [{"input_ids": [4], "labels": 0}] * 20, teacher=teacher())


def plan_with_teacher(folder: Path, teacher: str, *words: str) -> Any:
    data = jsonl(folder / "data.jsonl", rows_of(NAMES, (0, 1, 2)))
    student = saved(BertModel(bert()), folder / "model")
    words = ("--validation_file", data, "--distillation", "model", "--teacher_name_or_path", teacher, *words)
    return recipe(folder, student, data, *words)


@pytest.mark.parametrize(
    ("teacher", "message"), [*REFUSED, (lambda: BertModel(bert()), "is a BertModel, which has no trained head")]
)
def test_the_plan_refuses_a_teacher_that_does_not_fit(teacher: Any, message: str, tmp_path: Path) -> None:
    path = saved(teacher(), tmp_path / "teacher")
    for start in (dry_run.plan, run.train):
        with pytest.raises(UserError, match=message):
            start(plan_with_teacher(tmp_path, path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [(4, 0), (0, 4)], ids=["of the teacher", "of the student"])
def test_a_vocabulary_may_be_padded(rows: tuple[int, int], tmp_path: Path) -> None:
    """In Python with the tokenizer at hand, and from the command line."""
    teacher, student = teacher_with(), BertModel(bert())
    teacher.resize_token_embeddings(len(TOKENS) + rows[0])
    student.resize_token_embeddings(len(TOKENS) + rows[1])
    asked = plan_with_teacher(tmp_path, saved(teacher, tmp_path / "teacher"), "--max_steps", "4")
    saved(student, tmp_path / "model")
    dry_run.plan(asked)
    assert run.train(asked)["train_steps"] == 4
    small = teacher_with()
    small.resize_token_embeddings(len(TOKENS) + rows[1])
    args = config(tmp_path, distillation="model", teacher_name_or_path="given")
    options: dict[str, Any] = {"teacher": teacher, "processing_class": word_tokenizer()}
    APTTrainer(small, args, [{"input_ids": [4], "labels": 0}] * 20, **options)


def test_words_that_only_one_vocabulary_has_are_not_taught() -> None:
    generator = torch.Generator().manual_seed(0)
    wide, narrow = torch.randn(2, 3, 9, generator=generator), torch.randn(2, 3, 7, generator=generator)
    for student, teacher in ((wide, narrow), (narrow, wide)):
        found = prediction_loss(ModelOutput(logits=student), ModelOutput(logits=teacher), 1.0)
        own, taught = (F.log_softmax(logits[..., :7], -1) for logits in (student, teacher))
        assert found.item() == pytest.approx((taught.exp() * (taught - own)).sum(-1).mean().item(), rel=1e-5)


def test_more_tokens_than_the_teacher_knows_are_refused(tmp_path: Path) -> None:
    tokenizer, teacher = word_tokenizer(), teacher_with()
    teacher.resize_token_embeddings(len(TOKENS) - 4)
    args = config(tmp_path, distillation="model", teacher_name_or_path="given")
    with pytest.raises(UserError, match=r"teacher has 56 tokens and the model 60.*teacher.resize_token_embeddings"):
        APTTrainer(
            teacher_with(), args, [{"input_ids": [4], "labels": 0}] * 20, teacher=teacher, processing_class=tokenizer
        )


def test_a_teacher_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    path = saved(fitted(), tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    settings = json.loads(file.read_text())
    ids = settings["model"]["vocab"]
    ids["w0"], ids["w1"] = ids["w1"], ids["w0"]
    file.write_text(json.dumps(settings))
    with pytest.raises(UserError, match="another vocabulary than the model: 2 of 60 tokens .*such as 'w0'"):
        dry_run.plan(plan_with_teacher(tmp_path, path))


def test_a_run_learns_from_a_teacher_folder_in_another_order(tmp_path: Path) -> None:
    """From the teacher alone: the labels of the training rows are wrong. Those of the student are in the order of
    letters."""
    teacher = saved(fitted(MOVED, tuple(MOVED.index(name) for name in NAMES)), tmp_path / "teacher")
    words = ["--target_sparsity", "null", "--tune", "full", "--learning_rate", "5e-3", "--layer_weight", "0"]
    words += ["--distillation_weight", "1", "--distillation_start", "0", "--distillation_end", "80"]
    words += ["--max_steps", "80", "--full_learning_rate", "5e-3"]
    wrong = jsonl(tmp_path / "wrong.jsonl", rows_of(NAMES, (1, 2, 0)))
    asked = plan_with_teacher(tmp_path, teacher, *words, "--train_file", wrong)
    assert run.train(asked)["task_metric"] == 1.0
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "ant", 1: "mole", 2: "zebra"}


# ---------------------------------------------------------------------------- several labels a row


def several_rows(number: int = 48) -> list[dict[str, Any]]:
    words = [i % 8 for i in range(number)]
    return [{"text": text_of(w, i), "label": [NAMES[b] for b in range(3) if w >> b & 1]} for i, w in enumerate(words)]


TO_LEARN = ["--tune", "full", "--learning_rate", "5e-3", "--max_steps", "150", "--target_sparsity", "null"]
TO_LEARN += ["--distillation", "none", "--full_learning_rate", "5e-3"]


@pytest.mark.parametrize("separator", [None, "|"])
def test_a_task_with_several_labels_a_row(separator: str | None, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = several_rows()
    words = ["--task", "multi_label_classification"]
    if separator is not None:
        rows = [row | {"label": f" {separator} ".join(row["label"])} for row in rows]
        words += ["--label_separator", separator]
    data = jsonl(tmp_path / "data.jsonl", rows)
    model = saved(BertModel(bert()), tmp_path / "model")
    asked = recipe(tmp_path, model, data, "--validation_file", data, *words, *TO_LEARN)
    assert 'labels       3 in the training rows: "ant" × 24, "mole" × 24, "zebra" × 24' in dry_run.plan(asked)
    metrics = run.train(asked)
    scores = {name.removeprefix("validation_"): value for name, value in metrics["scores"].items()}
    assert metrics["metric_name"] == "f1_micro" and metrics["task_metric"] == 1.0
    assert scores["f1_macro"] == scores["subset_accuracy"] == 1.0
    found = AutoConfig.from_pretrained(tmp_path / "out")
    assert found.problem_type == "multi_label_classification"
    assert found.id2label == {0: "ant", 1: "mole", 2: "zebra"}
    again = run.evaluate(str(tmp_path / "out"))
    assert again["validation_f1_macro"] == again["validation_f1_macro_low"] == 1.0


def hot_rows(kind: str) -> list[dict[str, Any]]:
    """:func:`several_rows` with 0 or 1 for each of NAMES, in one list or in one column each."""
    rows = []
    for row in several_rows():
        values: list[Any] = [float(name in row["label"]) for name in NAMES]
        if kind == "truth":
            values = list(map(bool, values))
        if kind == "text":
            values = [str(int(value)) for value in values]
        if kind == "columns":
            rows.append({"text": row["text"], **dict(zip(NAMES, values, strict=True))})
        else:
            rows.append({"text": row["text"], "label": ", ".join(values) if kind == "text" else values})
    return rows


HOT = {"numbers": [], "truth": [], "text": ["--label_separator", ","], "columns": ["--label_columns", *NAMES[::-1]]}


@pytest.mark.parametrize("kind", list(HOT))
def test_0_and_1_for_each_label(kind: str, tmp_path: Path) -> None:
    """By the order of the model's labels, or of the columns by their names; also in data where a label is absent."""
    rows, words = hot_rows(kind), ["--task", "multi_label_classification", *HOT[kind]]
    data = jsonl(tmp_path / "data.jsonl", rows)
    without = jsonl(tmp_path / "without.jsonl", [row for i, row in enumerate(rows) if i % 8 < 4])  # the last label
    known, fresh = saved(several(), tmp_path / "known"), saved(BertModel(bert()), tmp_path / "fresh")
    for test in (data, without):
        found = run.evaluate(known, recipe(tmp_path, known, data, "--validation_file", test, *words))
        assert found["validation_subset_accuracy"] == 1.0
    names = NAMES[::-1] if kind == "columns" else ["LABEL_0", "LABEL_1", "LABEL_2"]
    told = ", ".join(f'"{name}" × 24' for name in names)
    asked = recipe(tmp_path, fresh, data, "--validation_file", data, *words)
    assert f"labels       3 in the training rows: {told}" in dry_run.plan(asked)
    labels = run.load_inputs(asked.model, asked)[2].train["labels"][:]
    wanted = [[float(w >> bit & 1) for bit in ((2, 1, 0) if kind == "columns" else (0, 1, 2))] for w in range(8)]
    assert labels[:8] == wanted


def test_0_and_1_of_a_csv_file_with_a_column_for_each_label(tmp_path: Path) -> None:
    """Trained, and measured again; a cell that is empty makes its row one without labels."""
    lines = ["text,toxic,mild", *(f"{text_of(i % 4, i)},{i % 2},{i // 2 % 2}" for i in range(48))]
    (tmp_path / "data.csv").write_text("\n".join([*lines, "w9,1,"]) + "\n")
    model, data = saved(BertModel(bert()), tmp_path / "model"), str(tmp_path / "data.csv")
    words = ["--task", "multi_label_classification", "--label_columns", "toxic", "mild", "--validation_file", data]
    with pytest.raises(UserError, match="'toxic, mild' of the training data is empty, or lacks a part, in 1 of 49"):
        dry_run.plan(recipe(tmp_path, model, data, *words))
    assert run.train(recipe(tmp_path, model, data, *words, "--drop_unlabeled", *TO_LEARN))["task_metric"] == 1.0
    assert AutoConfig.from_pretrained(tmp_path / "out").id2label == {0: "toxic", 1: "mild"}
    assert run.evaluate(str(tmp_path / "out"))["validation_f1_macro"] == 1.0


@pytest.mark.parametrize(
    ("row", "words", "message"),
    [
        ({"label": [1, 0, 1, 0]}, [], "0 or 1 for 4 labels, and the model has 3: zebra, ant, mole"),
        ({"a": 1, "b": 2}, ["--label_columns", "a", "b"], "hold 2, but say for each label whether .* Give 0 and 1"),
        ({"a": 1, "b": "x"}, ["--label_columns", "a", "b"], "'b' of the training data holds 'x'. Give numbers"),
        ({"ab": 1, "b": 1}, ["--label_columns", "b", "a"], "label_columns='a' is not a column .* Did you mean 'ab'"),
        ({"a": 1}, ["--label_columns", "a", "a"], "must name at least one column, and each of them once"),
        ({"a": 1}, ["--label_columns", "a", "--label_column", "a"], "Both label_columns and label_column were given"),
        ({"a": 1, "b": 0}, ["--label_columns", "a", "b"], "labels that the model does not have"),
    ],
)
def test_0_and_1_that_cannot_be_read(row: dict[str, Any], words: list[str], message: str, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", [{"text": "w0", **row}, {"text": "w1", **row}])
    model = saved(several(), tmp_path / "model")
    words = ["--task", "multi_label_classification", "--validation_file", data, *words]
    with pytest.raises(UserError, match=message):
        run.evaluate(model, recipe(tmp_path, model, data, *words))


def test_lists_of_0_and_1_of_different_lengths_are_an_error(tmp_path: Path) -> None:
    model = saved(BertModel(bert()), tmp_path / "model")
    for lists in ([[1, 0, 1], [1, 0]], [["1", "0", "1"], ["1", "0"]]):
        data = jsonl(tmp_path / "data.jsonl", [{"text": "w0", "label": label} for label in lists])
        words = ["--task", "multi_label_classification", "--validation_file", data]
        with pytest.raises(UserError, match="names a label twice. If these are 0 and 1 .* all rows .* need as many"):
            dry_run.plan(recipe(tmp_path, model, data, *words))


def test_several_labels_survive_a_cut(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", several_rows())
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ["--task", "multi_label_classification", "--validation_file", data, "--target_sparsity", "0.4"]
    words += ["--max_steps", "24", "--num_pruning_events", "2", "--round_to", "4", "--learning_rate", "5e-3"]
    words += ["--metric_for_best_model", "f1_macro", "--eval_strategy", "steps", "--eval_steps", "6"]
    metrics = run.train(recipe(tmp_path, model, data, *words))
    small = load_pruned(tmp_path / "out")
    assert small.config.problem_type == "multi_label_classification" and small.config.num_labels == 3
    assert small.config.label2id == {"ant": 0, "mole": 1, "zebra": 2}
    assert run.evaluate(str(tmp_path / "out"))["validation_f1_micro"] == pytest.approx(metrics["task_metric"])
    words = ["--task", "multi_label_classification", "--validation_file", data, "--distillation", "model"]
    words += ["--teacher_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "next")]
    assert run.train(recipe(tmp_path, model, data, *words, "--max_steps", "24"))["train_steps"] == 24


@pytest.mark.parametrize(
    ("label", "words", "message"),
    [
        ("a,b", [], "must hold a list of labels per row, or of 0 and 1.*label_separator: ','"),
        (["a", "b"], ["--label_separator", ","], "must hold text, as label_separator is set"),
        ([2, 0, 2], [], r"row 0 of those used \(counted from 0\): \[2, 0, 2\] names a label twice"),
        ([0.3, 0.7], [], "0.3 is no label. Give names, numbers of labels, or 0 and 1 for each"),
        (["a", " "], [], "holds an empty label"),
        (["a"], [], "all training data has the label 'a'"),
    ],
)
def test_several_labels_that_cannot_be_read(label: Any, words: list[str], message: str, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", [{"text": "w0", "label": label}] * 4)
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ["--task", "multi_label_classification", "--validation_file", data, *words]
    with pytest.raises(UserError, match=message):
        dry_run.plan(recipe(tmp_path, model, data, *words))


def test_classes_of_a_data_set_may_be_several_a_row(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["mole", "ant", "zebra"]))})
    ids = {"mole": 0, "ant": 1, "zebra": 2}
    rows = [row | {"label": [ids[name] for name in row["label"]]} for row in several_rows()]
    path = str(tmp_path / "data.parquet")
    Dataset.from_list(rows, features=features).to_parquet(path)
    model = saved(several(), tmp_path / "model")
    words = ("--validation_file", path, "--task", "multi_label_classification")
    assert run.evaluate(model, recipe(tmp_path, model, path, *words))["validation_subset_accuracy"] == 1.0


def test_scores_of_several_labels_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 4)), (generator.random((200, 4)) < 0.3).astype(np.float32)
    labels[:, 3] = 0
    predicted = 1 / (1 + np.exp(-logits)) >= 0.5
    scores = multi_label_scores(logits, labels)
    for name, average in (("f1_micro", "micro"), ("f1_macro", "macro")):
        assert scores[name] == pytest.approx(f1_score(labels, predicted, average=average, zero_division=0))
    assert scores["subset_accuracy"] == np.mean([(a == b).all() for a, b in zip(predicted, labels, strict=True)])
    summed = multi_label_sums(logits, labels)
    drawn = generator.integers(200, size=(3, 200))
    found = summed.scores(np.stack([summed.rows[rows].sum(axis=0) for rows in drawn]))
    for draw, rows in enumerate(drawn):
        for name, value in multi_label_scores(logits[rows], labels[rows]).items():
            assert found[name][draw] == pytest.approx(value), name


@pytest.mark.parametrize("classes", [2, 3])
def test_macro_f1_of_one_label_a_row(classes: int) -> None:
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(60, classes)), generator.integers(classes, size=60)
    scores = classification_scores(logits, labels)
    assert scores["f1_macro"] == pytest.approx(f1_score(labels, logits.argmax(1), average="macro"))
    found = score_intervals("classification", "accuracy", EvalPrediction(logits, labels), lambda _: {})["f1_macro"]
    rows = generator.integers(60, size=(RESAMPLES // 10, 60))
    values = [f1_score(labels[r], logits[r].argmax(1), average="macro", zero_division=0) for r in rows]
    assert found == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.03)


def test_macro_f1_may_choose_the_best_checkpoint(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(NAMES, (0, 1, 2)))
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ["--metric", "f1_macro", "--metric_for_best_model", "f1_macro", "--load_best_model_at_end", "true"]
    words += ["--eval_strategy", "steps", "--eval_steps", "20", "--save_strategy", "steps", "--save_steps", "20"]
    metrics = run.train(recipe(tmp_path, model, data, "--validation_file", data, *words, *TO_LEARN))
    assert metrics["metric_name"] == "f1_macro" and metrics["task_metric"] == 1.0 and "best_checkpoint" in metrics


def test_settings_of_labels_have_no_meaning_elsewhere(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of((1.5, 2.0), (0, 1)))
    model = saved(BertModel(bert()), tmp_path / "model")
    for words in (["--label_separator", ","], ["--class_weights", "balanced"]):
        with pytest.raises(UserError, match="has no meaning for task: regression"):
            dry_run.plan(recipe(tmp_path, model, data, "--task", "regression", *words))


# ---------------------------------------------------------------------------- several numbers a row


def numbers_of(word: int) -> list[float]:
    return [word / 2, 3.0 - word, float(word % 2)]


SCALES = ("size", "price", "odd")


@pytest.mark.parametrize("form", ["list", "columns", "csv"])
def test_a_regression_of_several_numbers(form: str, tmp_path: Path) -> None:
    """Each is measured, as scipy and scikit-learn do from the predictions of the saved model."""
    lists = [(text_of(i % 4, i), numbers_of(i % 4)) for i in range(48)]
    words = ["--task", "regression"]
    if form == "csv":
        data = str(tmp_path / "data.csv")
        lines = [",".join([text, *map(str, numbers)]) for text, numbers in lists]
        Path(data).write_text("\n".join([",".join(["text", *SCALES]), *lines]) + "\n")
    elif form == "columns":
        rows = [{"text": text, **dict(zip(SCALES, numbers, strict=True))} for text, numbers in lists]
        data = jsonl(tmp_path / "data.jsonl", rows)
    else:
        data = jsonl(tmp_path / "data.jsonl", [{"text": text, "label": numbers} for text, numbers in lists])
    if form != "list":
        words += ["--label_columns", *SCALES]
    model = saved(BertModel(bert()), tmp_path / "model")
    learn = [word if word != "150" else "60" for word in TO_LEARN]
    metrics = run.train(recipe(tmp_path, model, data, "--validation_file", data, *words, *learn))
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert small.config.problem_type == "regression" and small.config.num_labels == 3
    inputs = word_tokenizer()([text for text, _ in lists], return_tensors="pt")
    with torch.no_grad():
        found = small(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.double().numpy()
    wanted = np.array([numbers for _, numbers in lists])
    names = SCALES if form != "list" else ("0", "1", "2")
    scores = {name.removeprefix("validation_"): value for name, value in metrics["scores"].items()}
    for i, name in enumerate(names):
        assert scores[f"pearson_{name}"] == pytest.approx(
            stats.pearsonr(found[:, i], wanted[:, i]).statistic, abs=1e-4
        )
        assert scores[f"mse_{name}"] == pytest.approx(((found - wanted)[:, i] ** 2).mean(), rel=1e-3, abs=1e-5)
    for score in ("pearson", "spearman", "mse"):
        assert scores[score] == pytest.approx(np.mean([scores[f"{score}_{name}"] for name in names]))
    assert metrics["task_metric"] == scores["pearson"] > 0.5
    again = run.evaluate(str(tmp_path / "out"))
    for score in ("pearson", f"spearman_{names[1]}", f"mse_{names[2]}"):
        low, value, high = (again[f"validation_{score}{end}"] for end in ("_low", "", "_high"))
        assert low <= value <= high


def test_numbers_are_matched_to_the_outputs_of_the_model_by_name(tmp_path: Path) -> None:
    set_seed(1)
    settings = bert(**named(SCALES), problem_type="regression")
    model = fit(BertForSequenceClassification(settings), torch.tensor([numbers_of(word) for word in range(4)]))
    rows = [{"text": text_of(i % 4, i), **dict(zip(SCALES, numbers_of(i % 4), strict=True))} for i in range(ROWS)]
    path, data = saved(model, tmp_path / "model"), jsonl(tmp_path / "data.jsonl", rows)
    words = ["--task", "regression", "--validation_file", data, "--label_columns"]
    found = run.evaluate(path, recipe(tmp_path, path, data, *words, "odd", "size", "price"))
    assert found["validation_mse"] < 0.1 and found["validation_pearson_price"] > 0.9
    with pytest.raises(
        UserError, match="are some of the numbers that the model predicts. Give .* each: size, price, odd"
    ):
        run.evaluate(path, recipe(tmp_path, path, data, *words, "odd", "size"))
    other = jsonl(tmp_path / "other.jsonl", [row | {"weight": 1.0} for row in rows])
    words = ["--task", "regression", "--validation_file", other, "--label_columns"]
    with pytest.raises(UserError, match="labels that the model does not have: weight"):
        run.evaluate(path, recipe(tmp_path, path, other, *words, "odd", "size", "weight"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (([1.0, 2.0], [1.0]), r"holds \[1.0\] \(row 1 of those used\), but other rows 2 numbers"),
        (([1.0, 2.0], [1.0, float("inf")]), "needs finite numbers"),
        ((["a", "b"], ["a", "b"]), "needs finite numbers"),
    ],
)
def test_several_numbers_that_cannot_be_read(labels: Sequence[Any], message: str, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(labels, (0, 1)))
    model = saved(BertModel(bert()), tmp_path / "model")
    with pytest.raises(UserError, match=message):
        dry_run.plan(recipe(tmp_path, model, data, "--validation_file", data, "--task", "regression"))


def test_a_number_is_none_that_is_ignored(tmp_path: Path) -> None:
    """-100 marks what has no label among ids, and is a temperature elsewhere."""
    model = BertForSequenceClassification(bert(num_labels=1))
    batch = batch_of(torch.tensor([-100.0, 5.0, 7.0, -100.0]))
    trainer = APTTrainer(model.eval(), config(tmp_path, per_device_eval_batch_size=3), examples(batch) * 5)
    found = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    rows = [trainer.train_dataset[i]["labels"] for i in range(len(trainer.train_dataset))]
    with torch.no_grad():
        inputs = torch.stack([trainer.train_dataset[i]["input_ids"] for i in range(len(rows))])
        logits = model(input_ids=inputs).logits[:, 0]
    assert found == pytest.approx(F.mse_loss(logits, torch.stack(rows)).item(), rel=1e-4)


# ---------------------------------------------------------------------------- weights of classes

WEIGHTS = [0.5, 2.0, 4.0]


def batch_of(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, len(TOKENS), (len(labels), 6), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def examples(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))]


@pytest.mark.parametrize("size", [3, 8, 16])
@pytest.mark.parametrize("kind", ["one", "several"])
def test_weighted_losses_of_training_and_evaluation_are_those_of_torch(kind: str, size: int, tmp_path: Path) -> None:
    set_seed(1)
    labels = (
        torch.tensor([0, 1, 2, 0, 0, 1, 0, 0, 2, 0, 0]) if kind == "one" else (torch.arange(33) % 4 < 1).view(11, 3)
    )
    batch = batch_of(labels if kind == "one" else labels.float())
    model = BertForSequenceClassification(bert(num_labels=3)).eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    weights = torch.tensor(WEIGHTS)
    if kind == "one":
        expected = F.cross_entropy(logits, batch["labels"], weights)
        assert expected != pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-3)
    else:
        expected = F.binary_cross_entropy_with_logits(logits, batch["labels"], pos_weight=weights)
    args = config(tmp_path, per_device_eval_batch_size=size)
    trainer = APTTrainer(model, args, examples(batch) * 2, class_weights=WEIGHTS, eval_dataset=examples(batch))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_balanced_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    labels = ["ant"] * 12 + ["mole"] * 3 + ["zebra"] * 9
    data = jsonl(tmp_path / "data.jsonl", [{"text": text_of(0, i), "label": name} for i, name in enumerate(labels)])
    model = saved(BertModel(bert()), tmp_path / "model")
    asked = recipe(tmp_path, model, data, "--validation_file", data, "--class_weights", "balanced")
    expected = compute_class_weight("balanced", classes=np.array(["ant", "mole", "zebra"]), y=labels)
    assert run.load_inputs(asked.model, asked)[2].class_weights == pytest.approx(tuple(expected))
    assert '"ant" × 12 (weight 0.667), "zebra" × 9 (weight 0.889), "mole" × 3 (weight 2.67)' in dry_run.plan(asked)


def test_balanced_weights_of_several_labels_are_absences_by_presences(tmp_path: Path) -> None:
    rows = [{"text": "w0", "label": ["a"] * (i % 4 == 0) + ["b"] * (i % 2)} for i in range(24)]
    data = jsonl(tmp_path / "data.jsonl", rows)
    model = saved(BertModel(bert()), tmp_path / "model")
    words = ("--task", "multi_label_classification", "--class_weights", "balanced", "--validation_file", data)
    asked = recipe(tmp_path, model, data, *words)
    assert run.load_inputs(asked.model, asked)[2].class_weights == (3.0, 1.0)


def test_weights_reach_the_loss_of_a_run_and_of_its_evaluation(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of((*NAMES, "ant"), (0, 1, 2, 1)))
    model = saved(fitted(), tmp_path / "model")
    asked = recipe(tmp_path, model, data, "--validation_file", data, "--class_weights", "0.5", "2", "4")
    asked.training.per_device_eval_batch_size = 5
    found = run.evaluate(model, asked)["validation_loss"]
    rows = rows_of((*NAMES, "ant"), (0, 1, 2, 1))
    inputs = word_tokenizer()([row["text"] for row in rows], return_tensors="pt")
    with torch.no_grad():
        logits = fitted()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = torch.tensor([NAMES.index(row["label"]) for row in rows])
    assert found == pytest.approx(F.cross_entropy(logits, labels, torch.tensor(WEIGHTS)).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--class_weights", "equal"], "class_weights='equal' is not known. Choose one of: balanced"),
        (["--class_weights", "1", "2"], r"gives 2 weights for 3 labels.*in this order: ant, mole, zebra"),
        (["--class_weights", "1", "-2", "1"], "must be finite and not negative"),
        (["--class_weights", "balanced", "--label_smoothing_factor", "0.1"], "Remove one of them"),
    ],
)
def test_weights_that_cannot_be(words: list[str], message: str, tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(NAMES, (0, 1, 2)))
    model = saved(BertModel(bert()), tmp_path / "model")
    with pytest.raises(UserError, match=message):
        dry_run.plan(recipe(tmp_path, model, data, "--validation_file", data, *words))


def test_weights_of_a_trainer_that_cannot_be(tmp_path: Path) -> None:
    rows = examples(batch_of(torch.tensor([0, 1] * 10)))
    for model, options, message in (
        (fitted(), {"class_weights": [1.0, 2.0]}, "gives 2 weights and the model has 3 labels"),
        (fitted(), {"class_weights": WEIGHTS, "compute_loss_func": lambda *a, **k: None}, "both make the loss"),
        (BertForSequenceClassification(bert(num_labels=1)), {"class_weights": [1.0]}, "is for classification"),
    ):
        model = type(model)(model.config)
        with pytest.raises(UserError, match=message):
            APTTrainer(model, config(tmp_path), rows, **options)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_smoothing_is_for_one_label_a_row(problem: str, tmp_path: Path) -> None:
    model = BertForSequenceClassification(bert(num_labels=3, problem_type=problem))
    rows = examples(batch_of(torch.zeros(20, 3)))
    with pytest.raises(UserError, match=f"label_smoothing_factor=0.1 .*model for {problem}"):
        APTTrainer(model, config(tmp_path, label_smoothing_factor=0.1), rows)


# ---------------------------------------------------------------------------- the command line


def test_the_command_line_evaluates_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(("mole", "ant"), (2, 1)))
    model = saved(fitted(), tmp_path / "model")
    words = ["--train_file", data, "--validation_file", data, "--max_length", "8", "--use_cpu", "--report_to", "none"]
    assert main(["evaluate", model, "--output", str(tmp_path / "found.json"), *words]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["task"]["validation_accuracy"] == 1.0


def test_the_command_line_evaluates_without_training_data(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "data.jsonl", rows_of(("mole",), (2,), 1))  # one row, one class
    model = saved(fitted(), tmp_path / "model")
    words = ["--test_file", data, "--max_length", "8", "--use_cpu", "--report_to", "none"]
    assert main(["evaluate", model, "--output", str(tmp_path / "found.json"), *words]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["task"]["test_accuracy"] == 1.0


def test_the_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    for key in ("multi_label_classification", "label_separator", "drop_unlabeled", "class_weights"):
        assert key in printed


def test_a_classifier_loads_with_its_names_in_a_stock_model(tmp_path: Path) -> None:
    """What a user sees of a result: the label and its name."""
    data = jsonl(tmp_path / "data.jsonl", rows_of(NAMES, (0, 1, 2)))
    model = saved(BertModel(bert()), tmp_path / "model")
    run.train(recipe(tmp_path, model, data, "--validation_file", data, *TO_LEARN))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    assert [found.config.id2label[i] for i in said(found, 3).argmax(-1).tolist()] == list(NAMES)
