"""The data side of a run: reading, splitting, encoding, scoring, and what is said when the data cannot work."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    EvalPrediction,
    PreTrainedTokenizerFast,
)

from apt_trainer.errors import UserError
from apt_trainer.settings import TASKS, DataSettings
from apt_trainer.settings.config import APTConfig
from apt_trainer.tasks import TASK_KINDS, TaskData, load_task
from apt_trainer.tasks.metrics import (
    answer_f1,
    bio_spans,
    classification_scores,
    entity_scores,
    looks_like_bio,
    normalise_answer,
    regression_scores,
    squad_scores,
    tag_scores,
)
from apt_trainer.tasks.question_answering import best_answers
from apt_trainer.tasks.trainer_options import set_task_arguments

TEXT = "good bad film music un ##like ##ly paris in lies france who where is the a old city river x ,"
VOCABULARY = {piece: i for i, piece in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *TEXT.split()])}
PAD, CLS, SEP = 0, 2, 3


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def ids(*pieces: str) -> list[int]:
    return [CLS, *(SEP if piece == "|" else VOCABULARY[piece] for piece in pieces), SEP]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentiment(count: int) -> list[dict[str, Any]]:
    """``count`` rows, every fourth of them negative; each text is told apart by its length."""
    return [
        {"text": " ".join(["bad" if i % 4 == 0 else "good", *["x"] * i]), "label": int(i % 4 != 0)}
        for i in range(count)
    ]


def texts_of(rows: Dataset) -> list[tuple[int, ...]]:
    return [tuple(row) for row in rows["input_ids"][:]]


# ---------------------------------------------------------------------------------------- classification


def test_every_task_of_the_settings_has_a_kind() -> None:
    assert tuple(TASK_KINDS) == TASKS


def test_classification_tokenises_and_numbers_sorted_labels(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(
        tmp_path / "train.jsonl",
        [{"text": "good film", "label": "pos"}, {"text": "bad music in film", "label": "neg"}],
    )
    validation = jsonl(tmp_path / "validation.jsonl", [{"text": "unlikely good", "label": "pos"}])
    task = load_task(DataSettings(train_file=train, validation_file=validation, max_length=5), tokenizer, seed=0)
    assert task.label_names == ("neg", "pos")
    assert task.train["labels"][:] == [1, 0]
    assert texts_of(task.train) == [tuple(ids("good", "film")), tuple(ids("bad", "music", "in"))]  # cut to 5
    assert texts_of(task.validation) == [tuple(ids("un", "##like", "##ly"))]
    assert set(task.train.column_names) <= {*tokenizer.model_input_names, "labels"}
    assert task.test is task.validation and task.test_name == "validation"
    assert task.metrics["test"] is task.metrics["validation"]
    assert task.model_kwargs == {
        "num_labels": 2,
        "id2label": {0: "neg", 1: "pos"},
        "label2id": {"neg": 0, "pos": 1},
        "problem_type": "single_label_classification",
    }
    batch = task.collator([task.train[i] for i in range(2)])
    assert batch["input_ids"].tolist() == [[*ids("good", "film"), PAD], ids("bad", "music", "in")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"].tolist() == [1, 0]


def test_pairs_share_one_input(tmp_path: Path, tokenizer: Any) -> None:
    row = {"premise": "old city", "claim": "old river", "label": 1}
    train = jsonl(tmp_path / "train.json", [row, {**row, "label": 0}])
    settings = DataSettings(train_file=train, validation_file=train, text_pair_column="claim")
    task = load_task(settings, tokenizer, seed=0)  # the text column is the one that is left
    assert texts_of(task.train)[0] == tuple(ids("old", "city", "|", "old", "river"))


def test_integer_labels_sort_by_size_and_match_other_formats(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "t.jsonl", [{"text": "film", "label": label} for label in (10, 2, -1)])
    other = tmp_path / "v.csv"
    other.write_text('text,label\n"good, old",10\n"null",2\n"",-1\n')
    task = load_task(DataSettings(train_file=train, validation_file=str(other)), tokenizer, seed=0)
    assert task.label_names == ("-1", "2", "10")
    assert task.validation["labels"][:] == [2, 1, 0]
    assert texts_of(task.validation)[0] == tuple(ids("good", ",", "old"))
    assert texts_of(task.validation)[2] == (CLS, SEP)  # an empty text is a text


def test_tab_separated_files_keep_quotation_marks(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "train.tsv"
    path.write_text('text\tlabel\n"good film\t1\nbad film\t0\n')
    task = load_task(DataSettings(train_file=str(path), validation_file=str(path)), tokenizer, seed=0)
    assert len(task.train) == 2
    assert texts_of(task.train)[1] == tuple(ids("bad", "film"))


def test_a_path_with_brackets_is_no_pattern(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "run[1]").mkdir()
    train = jsonl(tmp_path / "run[1]" / "train*.jsonl", sentiment(20))
    jsonl(tmp_path / "run[1]" / "train2.jsonl", sentiment(20))
    assert len(load_task(DataSettings(train_file=train), tokenizer, seed=0).train) == 18


def test_parquet_and_a_label_column_called_labels(tmp_path: Path, tokenizer: Any) -> None:
    path = str(tmp_path / "train.parquet")
    Dataset.from_dict({"text": ["film", "music"], "labels": ["no", "yes"]}).to_parquet(path)
    settings = DataSettings(train_file=path, validation_file=path, label_column="labels")
    assert load_task(settings, tokenizer, seed=0).train["labels"][:] == [0, 1]


def folder(path: Path) -> Path:
    for label, name, text in (
        ("neg", "b.txt", b"bad film"),
        ("neg", "a.txt", b"bad \xff music"),
        ("pos", "c.txt", b"good film"),
        ("pos", "readme.md", b"not data"),
    ):
        (path / label).mkdir(parents=True, exist_ok=True)
        (path / label / name).write_bytes(text)
    (path / "__pycache__").mkdir()
    return path


def test_folder_of_texts_inside_a_package(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny_corpus").mkdir()
    (tmp_path / "tiny_corpus" / "__init__.py").write_text("")
    folder(tmp_path / "tiny_corpus" / "reviews")
    monkeypatch.syspath_prepend(str(tmp_path))
    given = "package:tiny_corpus/reviews"
    task = load_task(DataSettings(train_file=given, validation_file=given), tokenizer, seed=0)
    assert task.label_names == ("neg", "pos")
    assert task.train["labels"][:] == [0, 0, 1]
    assert texts_of(task.train) == [
        (CLS, VOCABULARY["bad"], 1, VOCABULARY["music"], SEP),  # an undecodable byte is an unknown token
        tuple(ids("bad", "film")),
        tuple(ids("good", "film")),
    ]


def hub_like(path: Path, test_labels: list[int], validation_labels: tuple[int, ...] = (1, 0)) -> str:
    """A folder of parquet files, which ``load_dataset`` reads as it reads the hub; labels named out of order."""
    path.mkdir()
    names = ClassLabel(names=["zebra", "ant"])
    features = Features({"sentence": Value("string"), "label": names, "idx": Value("int32")})
    for split, labels in (("train", [0, 1] * 10), ("validation", validation_labels), ("test", test_labels)):
        if not labels:
            continue
        rows = {"sentence": ["film"] * len(labels), "label": list(labels), "idx": list(range(len(labels)))}
        Dataset.from_dict(rows, features=features).to_parquet(str(path / f"{split}.parquet"))
    return str(path)


def test_hub_data_keeps_the_names_and_splits_it_comes_with(tmp_path: Path, tokenizer: Any) -> None:
    name = hub_like(tmp_path / "data", [1])
    task = load_task(DataSettings(dataset_name=name, test_split="test"), tokenizer, seed=0)
    assert task.label_names == ("zebra", "ant")
    assert (len(task.train), len(task.validation), len(task.test)) == (20, 2, 1)
    assert task.validation["labels"][:] == [1, 0]
    assert task.test_name == "test"


def test_hidden_test_labels_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    name = hub_like(tmp_path / "data", [-1, -1])
    assert load_task(DataSettings(dataset_name=name), tokenizer, seed=0).test_name == "validation"
    with pytest.raises(UserError, match="test data holds -1, which marks hidden"):
        load_task(DataSettings(dataset_name=name, test_split="test"), tokenizer, seed=0)


def test_missing_splits(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    name = hub_like(tmp_path / "data", [1], ())
    task = load_task(DataSettings(dataset_name=name), tokenizer, seed=0)
    assert (len(task.train), len(task.validation)) == (18, 2)
    assert "held out instead" in caplog.text
    with pytest.raises(UserError, match="validation_split='tset'.*Did you mean 'test'"):
        load_task(DataSettings(dataset_name=name, validation_split="tset"), tokenizer, seed=0)
    with pytest.raises(UserError, match="test_split='final' is not known"):
        load_task(DataSettings(dataset_name=name, test_split="final"), tokenizer, seed=0)


def test_a_file_takes_the_place_of_a_split(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"sentence": "music", "label": "ant"}] * 3  # named, where the hub data is numbered
    settings = DataSettings(
        dataset_name=hub_like(tmp_path / "data", [1]),
        validation_split="nowhere",
        validation_file=jsonl(tmp_path / "validation.jsonl", rows),
    )
    assert load_task(settings, tokenizer, seed=0).validation["labels"][:] == [1, 1, 1]


# ---------------------------------------------------------------------------------------- splits and seeds


def test_held_out_parts_are_stratified_disjoint_and_follow_the_seed(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", sentiment(80))
    settings = DataSettings(train_file=train, validation_fraction=0.1, test_fraction=0.2)
    task = load_task(settings, tokenizer, seed=1)
    assert (len(task.train), len(task.validation), len(task.test)) == (56, 8, 16)
    assert task.test_name == "test"
    for part in (task.train, task.validation, task.test):
        assert np.mean(part["labels"][:]) == 0.75
    parts = [set(texts_of(part)) for part in (task.train, task.validation, task.test)]
    assert len(set.union(*parts)) == 80
    again, other = load_task(settings, tokenizer, seed=1), load_task(settings, tokenizer, seed=2)
    assert texts_of(again.train) == texts_of(task.train) and again.fingerprint == task.fingerprint
    assert texts_of(other.validation) != texts_of(task.validation) and other.fingerprint != task.fingerprint
    fixed = load_task(settings, tokenizer, seed=2, split_seed=1)
    assert texts_of(fixed.validation) == texts_of(task.validation)
    assert fixed.fingerprint == task.fingerprint


def test_a_label_too_rare_to_stratify_is_split_all_the_same(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*sentiment(20), {"text": "river", "label": 7}]
    task = load_task(DataSettings(train_file=jsonl(tmp_path / "t.jsonl", rows)), tokenizer, seed=0)
    assert (len(task.train), len(task.validation)) == (19, 2)
    assert task.label_names == ("0", "1", "7")


def test_limits_on_rows(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", sentiment(40))
    limits: dict[str, Any] = {"max_train_samples": 10, "max_validation_samples": 3, "max_test_samples": 4}
    settings = DataSettings(train_file=train, validation_file=train, test_file=train, **limits)
    task = load_task(settings, tokenizer, seed=0)
    everything = texts_of(load_task(DataSettings(train_file=train, validation_file=train), tokenizer, seed=0).train)
    assert texts_of(task.validation) == everything[:3]
    assert texts_of(task.test) == everything[:4]
    assert len(set(texts_of(task.train))) == 10
    assert texts_of(task.train) != everything[:10]
    assert texts_of(load_task(settings, tokenizer, seed=0).train) == texts_of(task.train)
    assert texts_of(load_task(settings, tokenizer, seed=5).train) != texts_of(task.train)
    settings.max_train_samples = 1000
    assert texts_of(load_task(settings, tokenizer, seed=0).train) == everything


def test_a_model_trains_on_the_batches(tmp_path: Path, tokenizer: Any) -> None:
    task = load_task(DataSettings(train_file=jsonl(tmp_path / "t.jsonl", sentiment(20))), tokenizer, seed=0)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        **task.model_kwargs,
    )
    output = BertForSequenceClassification(config)(**task.collator([task.train[i] for i in range(4)]))
    assert output.logits.shape == (4, 2)
    assert torch.isfinite(output.loss)


# ---------------------------------------------------------------------------------------- regression


def test_regression(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["text", "score"], ["good film", "4.5"], ["bad film", "1"], ["film", "2.5"]])
    settings = DataSettings(
        task="regression", train_file=str(path), validation_file=str(path), label_column="score", metric="spearman"
    )
    task = load_task(settings, tokenizer, seed=0)
    assert task.model_kwargs == {"num_labels": 1, "problem_type": "regression"}
    assert task.label_names == () and task.metric_name == "spearman"
    batch = task.collator([task.train[i] for i in range(3)])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [4.5, 1.0, 2.5]
    prediction = EvalPrediction(predictions=np.array([[4.0], [1.0], [3.0]]), label_ids=np.array([4.5, 1.0, 2.5]))
    scores = task.metrics["validation"](prediction)
    assert scores["spearman"] == pytest.approx(1.0)
    assert scores["mse"] == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("bad", ["high", None, float("nan")])
def test_regression_needs_numbers(tmp_path: Path, tokenizer: Any, bad: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "film", "label": "1.5"},
        {"text": "film", "label": bad if bad is None else str(bad)},
    ]
    settings = DataSettings(
        task="regression", train_file=jsonl(tmp_path / "t.jsonl", rows), validation_file=str(tmp_path / "t.jsonl")
    )
    with pytest.raises(UserError, match=r"training data (holds|is empty).*row 1"):
        load_task(settings, tokenizer, seed=0)


def test_regression_refuses_hidden_labels(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "t.jsonl", [{"text": "film", "label": 0.5}, {"text": "music", "label": 2.0}])
    test = jsonl(tmp_path / "test.jsonl", [{"text": "film", "label": -1.0}] * 2)
    settings = DataSettings(task="regression", train_file=train, validation_file=train, test_file=test)
    with pytest.raises(UserError, match="holds only -1, which marks hidden"):
        load_task(settings, tokenizer, seed=0)


# ---------------------------------------------------------------------------------------- token classification


def tagged(tmp_path: Path, rows: list[tuple[list[str], list[Any]]], name: str = "tags.jsonl") -> DataSettings:
    path = jsonl(tmp_path / name, [{"tokens": words, "tags": tags} for words, tags in rows])
    return DataSettings(task="token_classification", train_file=path, validation_file=path, label_column="tags")


def test_only_the_first_piece_of_a_word_bears_its_tag(tmp_path: Path, tokenizer: Any) -> None:
    rows = [(["unlikely", "paris", "unlikely"], ["O", "B-LOC", "I-LOC"]), (["film"], ["O"])]
    settings = tagged(tmp_path, rows)
    settings.max_length = 7
    task = load_task(settings, tokenizer, seed=0)
    assert task.label_names == ("B-LOC", "I-LOC", "O")
    assert texts_of(task.train)[0] == tuple(ids("un", "##like", "##ly", "paris", "un"))
    assert task.train["labels"][:] == [[-100, 2, -100, -100, 0, 1, -100], [-100, 2, -100]]
    batch = task.collator([task.train[i] for i in range(2)])
    assert batch["labels"].tolist() == [[-100, 2, -100, -100, 0, 1, -100], [-100, 2, *[-100] * 5]]
    assert batch["input_ids"].shape == (2, 7)
    assert task.model_class == "AutoModelForTokenClassification"


def test_integer_tags_and_named_tags(tmp_path: Path, tokenizer: Any) -> None:
    task = load_task(tagged(tmp_path, [(["old", "city"], [10, 9])]), tokenizer, seed=0)
    assert task.label_names == ("9", "10")
    assert task.train["labels"][:] == [[-100, 1, 0, -100]]
    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=["O", "B-X", "I-X"]))})
    path = str(tmp_path / "tags.parquet")
    Dataset.from_dict({"tokens": [["old", "city"]], "tags": [[1, 2]]}, features=features).to_parquet(path)
    settings = DataSettings(task="token_classification", train_file=path, validation_file=path, label_column="tags")
    task = load_task(settings, tokenizer, seed=0)
    assert task.label_names == ("O", "B-X", "I-X")
    assert task.train["labels"][:] == [[-100, 1, 2, -100]]


def test_entity_metrics_ignore_padding_and_further_pieces(tmp_path: Path, tokenizer: Any) -> None:
    task = load_task(tagged(tmp_path, [(["old", "city"], ["B-X", "I-X"]), (["film"], ["O"])]), tokenizer, seed=0)
    labels = np.array([[-100, 0, 1, -100], [-100, 2, -100, -100]])
    logits = np.zeros((2, 4, 3))
    for row, column, tag in ((0, 1, 0), (0, 2, 1), (1, 1, 0), (0, 0, 0), (1, 3, 1)):
        logits[row, column, tag] = 1  # right entity, plus a false one-word entity; the last two must not count
    scores = task.metrics["validation"](EvalPrediction(predictions=(logits, "hidden states"), label_ids=labels))
    assert scores["precision"] == 0.5 and scores["recall"] == 1.0
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["accuracy"] == pytest.approx(2 / 3)


def test_words_get_the_space_that_a_byte_level_tokenizer_expects(tmp_path: Path) -> None:
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<unk>", "Ġ", "a", "b", "x", "Ġa", "Ġb", "Ġx"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ġ", "a"), ("Ġ", "b"), ("Ġ", "x")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    task = load_task(tagged(tmp_path, [(["a", "ba"], ["X", "Y"])]), byte_level, seed=0)
    assert texts_of(task.train) == [tuple(vocabulary[piece] for piece in ("Ġa", "Ġb", "a"))]
    assert task.train["labels"][:] == [[0, 1, -100]]


def test_token_classification_errors(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="Row 1 .* 1 words in 'tokens' and 2 tags"):
        load_task(tagged(tmp_path, [(["old"], ["A"]), (["city"], ["A", "B"])]), tokenizer, seed=0)
    with pytest.raises(UserError, match="must hold a list of tags per row"):
        path = jsonl(tmp_path / "flat.jsonl", [{"tokens": ["old"], "label": "A"}])
        load_task(DataSettings(task="token_classification", train_file=path), tokenizer, seed=0)
    settings = tagged(tmp_path, [(["old", "city"], ["A", "B"])], "good.jsonl")
    settings.validation_file = tagged(tmp_path, [(["old"], ["C"])], "other.jsonl").train_file
    with pytest.raises(UserError, match="validation data has the label 'C'.*training data: A, B"):
        load_task(settings, tokenizer, seed=0)
    settings.text_pair_column = "tokens"
    with pytest.raises(UserError, match="no meaning for task: token_classification"):
        load_task(settings, tokenizer, seed=0)


# ---------------------------------------------------------------------------------------- question answering

CONTEXT = "paris is the old city in france , the river lies in the city"


def question(text: str, answer: str | None, context: str = CONTEXT) -> dict[str, Any]:
    found = (
        {"text": [], "answer_start": []}
        if answer is None
        else {
            "text": [answer],
            "answer_start": [context.index(answer)],
        }
    )
    return {"id": text, "question": text, "context": context, "answers": found}


def squad(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> DataSettings:
    path = jsonl(tmp_path / "squad.jsonl", rows)
    return DataSettings(task="question_answering", train_file=path, validation_file=path, **settings)


def test_question_answering_features(tmp_path: Path, tokenizer: Any) -> None:
    rows = [question("where is paris", "in france"), question("who lies", "river")]
    task = load_task(squad(tmp_path, rows, max_length=14, doc_stride=3), tokenizer, seed=0)
    assert set(task.train.column_names) == {*tokenizer.model_input_names, "start_positions", "end_positions"}
    spans = []
    for row in task.train:
        assert len(row["input_ids"]) <= 14
        spans.append(tuple(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]))
    answer, absent, river = (VOCABULARY["in"], VOCABULARY["france"]), (CLS,), (VOCABULARY["river"],)
    # 14 context tokens in pieces of 8 (9 for the shorter question) that overlap by 3: 0-7, 5-12, 10-13; 0-8, 6-13
    assert spans == [answer, answer, absent, absent, river]
    assert task.model_class == "AutoModelForQuestionAnswering" and task.model_kwargs == {}


def test_planted_logits_give_exact_spans(tmp_path: Path, tokenizer: Any) -> None:
    rows = [question("where is paris", "in france"), question("who lies", "river"), question("is the a", "old city")]
    task = load_task(squad(tmp_path, rows, max_length=14, doc_stride=3), tokenizer, seed=0)
    features = [task.validation[i] for i in range(len(task.validation))]
    width = max(len(row["input_ids"]) for row in features) + 2
    start, end = np.full((len(features), width), -100.0), np.full((len(features), width), -100.0)  # padded as by HF
    for i, row in enumerate(features):
        start[i, : len(row["input_ids"])] = end[i, : len(row["input_ids"])] = 0
        start[i, row["start_positions"]] = end[i, row["end_positions"]] = 5
        start[i, 1] = end[i, 1] = 50  # the question is no place for an answer
        start[i, -1] = end[i, -1] = 90  # nor is padding
    prediction = EvalPrediction(predictions=(start, end), label_ids=None)
    assert task.metrics["validation"](prediction) == {"exact_match": 1.0, "f1": 1.0}
    batch = task.collator(features)
    config = BertConfig(
        vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    assert torch.isfinite(BertForQuestionAnswering(config)(**batch).loss)


def piece(question: int, spans: list[tuple[int, int]]) -> dict[str, Any]:
    """One feature: a null position, then context tokens at the given characters."""
    return {
        "question": question,
        "span_start": [-1, *(first for first, _ in spans)],
        "span_end": [-1, *(after for _, after in spans)],
        "null_position": 0,
    }


def test_best_answers_by_hand() -> None:
    context = "old city by the river"
    left, right = piece(0, [(0, 3), (4, 8), (9, 11)]), piece(0, [(9, 11), (12, 15), (16, 21)])
    start = np.array([[1.0, 0.0, 3.0, 9.0], [4.0, 0.0, 2.0, 1.0]])
    end = np.array([[1.0, 9.0, 2.0, 1.0], [4.0, 0.0, 1.0, 6.0]])

    def answer(**options: Any) -> list[str]:
        return best_answers(start, end, [left, right], [context], **options)

    # left: the best is "by" (9 + 1 = 10), since "by" back to "old" (18) runs backwards; right: "the river" 8
    assert answer(null_allowed=False) == ["by"]
    assert answer(null_allowed=True) == ["by"]
    start[0, 3] = 0  # left: "old" (0 + 9 = 9)
    assert answer(null_allowed=False) == ["old"]
    end[0, 1] = 0  # left: "city" (5); right: "the river" (8), or "river" (7) where one token is the most
    assert answer(null_allowed=False) == ["the river"]
    assert answer(null_allowed=False, max_answer_tokens=1) == ["river"]
    start[0, 0] = 20  # null scores 21 and 8: the least counts, and 8 does not exceed 8
    assert answer(null_allowed=True) == ["the river"]
    end[1, 0] = 5
    assert answer(null_allowed=True) == [""]
    assert answer(null_allowed=False) == ["the river"]


def test_unanswerable_questions_are_left_unanswered_where_training_has_some(tmp_path: Path, tokenizer: Any) -> None:
    rows = [question("who is old", None), question("who lies", "river")]
    task = load_task(squad(tmp_path, rows, max_length=32, doc_stride=3), tokenizer, seed=0)
    assert (task.train[0]["start_positions"], task.train[0]["end_positions"]) == (0, 0)
    logits = np.zeros((2, 32))
    logits[:, 0] = 1
    logits[1, task.validation[1]["start_positions"]] = 2
    scores = task.metrics["validation"](EvalPrediction(predictions=(logits, logits), label_ids=None))
    assert scores == {"exact_match": 1.0, "f1": 1.0}


def test_long_questions_are_cut_and_padding_is_on_the_right(tmp_path: Path, tokenizer: Any) -> None:
    rows = [question("where " * 30, "in france"), question("who lies", "river")]
    tokenizer.padding_side = "left"
    task = load_task(squad(tmp_path, rows, max_length=14, doc_stride=3), tokenizer, seed=0)
    assert max(map(len, task.train["input_ids"][:])) <= 14
    assert task.train[0]["input_ids"][:9] == [CLS, *[VOCABULARY["where"]] * 7, SEP]
    short = min(range(len(task.train)), key=lambda i: len(task.train[i]["input_ids"]))
    batch = task.collator([task.train[0], task.train[short]])
    assert batch["input_ids"][1, 0] == CLS and batch["input_ids"][1, -1] == PAD
    assert tokenizer.padding_side == "left"


def test_question_answering_errors(tmp_path: Path, tokenizer: Any) -> None:
    good = question("who lies", "river")
    with pytest.raises(UserError, match="max_length=64 leaves no room for a question beside doc_stride=64"):
        load_task(squad(tmp_path, [good], max_length=64), tokenizer, seed=0)
    with pytest.raises(UserError, match="none of 1 answers is found at its answer_start"):
        load_task(squad(tmp_path, [{**good, "answers": {"text": ["river"], "answer_start": [2]}}]), tokenizer, seed=0)
    with pytest.raises(UserError, match=r"row 0 .*Each row must be"):
        load_task(squad(tmp_path, [{**good, "answers": {"text": "river", "answer_start": 2}}]), tokenizer, seed=0)
    with pytest.raises(UserError, match="no question of the training data has an answer"):
        load_task(squad(tmp_path, [{**good, "answers": {"text": [], "answer_start": []}}]), tokenizer, seed=0)
    with pytest.raises(UserError, match="text_column='question'.*Did you mean 'questions'"):
        renamed = {"questions" if key == "question" else key: value for key, value in good.items()}
        load_task(squad(tmp_path, [renamed]), tokenizer, seed=0)
    settings = squad(tmp_path, [good])
    settings.test_file = jsonl(tmp_path / "test.jsonl", [{**good, "answers": {"text": [], "answer_start": []}}])
    with pytest.raises(UserError, match="no question of the test data has an answer"):
        load_task(settings, tokenizer, seed=0)


# ---------------------------------------------------------------------------------------- errors of the data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_file": None}, "No training data was given"),
        ({"dataset_name": "some/data"}, "Give one of them"),
        ({"train_file": "missing.json"}, "train_file='missing.json' does not exist"),
        ({"validation_file": "absent.txt"}, "does not exist"),
        ({"test_file": "{folder}/notes.xml"}, r"the format '.xml' is not known.*\.parquet"),
        ({"test_file": "{folder}/empty.csv"}, r"test_file=.*empty\.csv' has no rows"),
        ({"test_file": "{folder}/header.csv"}, r"test_file=.*header\.csv' has no rows"),
        ({"test_file": "{folder}/broken.json"}, "cannot be read as .json"),
        ({"test_file": "{folder}"}, r"no sub-folders with \*\.txt files"),
        ({"task": "regression", "train_file": "{folder}"}, "fits task: classification and image_classification only"),
        ({"label_column": "lable"}, "label_column='lable' is not a column .* are: text, label, note.*mean 'label'"),
        ({"text_column": "texts"}, "text_column='texts'.*Did you mean 'text'"),
        ({"text_pair_column": "zzz"}, "text_pair_column='zzz'.*Set text_pair_column"),
        ({"text_column": None}, r"several columns hold text \(text, note\)"),
        ({"text_column": "label", "label_column": "note"}, "must hold text, but holds"),
        ({"test_file": "{folder}/other.jsonl"}, "test data has the label '5'.*training data: 0, 1"),
        ({"test_file": "{folder}/null.jsonl"}, "label_column='label' of the test data is empty in 1 of 2 rows.*row 1"),
        ({"train_file": "{folder}/single.jsonl"}, "all training data has the label '1'"),
        ({"train_file": "{folder}/fractions.jsonl"}, "holds 0.5, which is no class"),
        ({"metric": "acuracy"}, "metric='acuracy' is not known.*Did you mean 'accuracy'"),
        ({"task": "clasification"}, "task='clasification' is not known"),
        ({"max_length": 65}, "max_length=65 is more than the 64 tokens"),
        ({"max_length": 2}, "must exceed the 2 special tokens"),
        ({"max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0 must lie between 0 and 1"),
        ({"validation_file": None, "validation_fraction": 0.0}, "There is no validation data"),
        ({"validation_file": None, "validation_fraction": 0.9, "test_fraction": 0.5}, "too few to hold out"),
        ({"dataset_name": "{folder}/nowhere", "train_file": None}, "cannot be loaded"),
    ],
)
def test_what_the_user_is_told(tmp_path: Path, tokenizer: Any, changes: dict[str, Any], message: str) -> None:
    rows = [{**row, "note": "x"} for row in sentiment(8)]
    train = jsonl(tmp_path / "train.jsonl", rows)
    jsonl(tmp_path / "other.jsonl", [{**rows[0], "label": 5}])
    jsonl(tmp_path / "null.jsonl", [rows[0], {**rows[1], "label": None}])
    jsonl(tmp_path / "single.jsonl", [rows[1]])
    jsonl(tmp_path / "fractions.jsonl", [rows[1], {**rows[0], "label": 0.5}])
    for name, text in (
        ("notes.xml", "<a/>"),
        ("empty.csv", ""),
        ("header.csv", "text,label,note\n"),
        ("broken.json", '[{"text": "film",'),
    ):
        (tmp_path / name).write_text(text)
    given: dict[str, Any] = {"train_file": train, "validation_file": train, "text_column": "text", "max_length": 64}
    for name, value in changes.items():
        given[name] = value.format(folder=tmp_path) if isinstance(value, str) else value
    with pytest.raises(UserError, match=message):
        load_task(DataSettings(**given), tokenizer, seed=0, max_positions=64)


def test_tokenizers_that_cannot_serve(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tagged(tmp_path, [(["old", "city"], ["A", "B"])])
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(UserError, match="Use a model with a fast tokenizer"):
        load_task(settings, tokenizer, seed=0)
    monkeypatch.undo()
    tokenizer.pad_token = None
    with pytest.raises(UserError, match="no padding token"):
        load_task(settings, tokenizer, seed=0)


# ---------------------------------------------------------------------------------------- metrics


def test_classification_scores_by_hand() -> None:
    logits = np.array([[0, 1], [0, 1], [1, 0], [1, 0], [0, 1]])
    scores = classification_scores(logits, np.array([1, 0, 0, 1, 1]))
    assert scores["accuracy"] == pytest.approx(0.6)
    assert scores["f1"] == pytest.approx(2 / 3)  # 2 true, 1 false positive, 1 false negative
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / 6)
    three = classification_scores(np.eye(3)[[0, 1, 1]], np.array([0, 1, 2]))
    assert three["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_regression_scores_by_hand() -> None:
    scores = regression_scores(np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 3.0]))
    assert scores["pearson"] == pytest.approx(6 / np.sqrt(84))
    assert scores["spearman"] == pytest.approx(0.5)
    assert scores["mse"] == pytest.approx(1.0)
    constant = regression_scores(np.ones(3), np.array([2.0, 1.0, 3.0]))
    assert (constant["pearson"], constant["spearman"]) == (0.0, 0.0)


def test_tag_scores_by_hand() -> None:
    scores = tag_scores([["N", "V"], ["O", "N"]], [["N", "N"], ["O", "V"]])
    assert scores["accuracy"] == 0.5
    assert scores["f1"] == scores["f1_macro"] == pytest.approx((0.5 + 0.0) / 2)
    assert scores["f1_micro"] == pytest.approx(1 / 3)  # the two right "O" and "N", of which only "N" counts
    assert tag_scores([["O"]], [["O"]])["f1"] == 0.0


def test_spans_and_entity_scores_by_hand() -> None:
    tags = ["I-A", "I-A", "B-A", "O", "B-A", "I-B", "I-B", "O", "I-B"]
    assert bio_spans(tags) == [("A", 0, 2), ("A", 2, 3), ("A", 4, 5), ("B", 5, 7), ("B", 8, 9)]
    assert bio_spans(["O", "B-A-x", "I-A-x"]) == [("A-x", 1, 3)]
    scores = entity_scores([["B-A", "I-A", "O", "B-B"]], [["B-A", "I-A", "O", "O"]])
    assert scores == {"f1": pytest.approx(2 / 3), "precision": 0.5, "recall": 1.0}
    assert entity_scores([["O"]], [["O"]]) == {"f1": 0.0, "precision": 0.0, "recall": 0.0}
    assert looks_like_bio(["O", "B-PER", "I-PER"])
    assert not looks_like_bio(["O"]) and not looks_like_bio(["NN", "B-PER"]) and not looks_like_bio(["S-PER", "O"])


def test_squad_scores_by_hand() -> None:
    assert normalise_answer("The  Old,\tcity's an Area!") == "old citys area"
    assert answer_f1("the old city", "old river city") == pytest.approx(2 * 2 / (2 + 3))
    assert answer_f1("city city", "city") == pytest.approx(2 / 3)
    assert (answer_f1("", ""), answer_f1("the", ""), answer_f1("", "city"), answer_f1("sea", "city")) == (1, 1, 0, 0)
    scores = squad_scores(
        ["The Old City.", "old town", "", "river", ""],
        [["city", "old city"], ["old city", "town"], [], [], ["river", "the"]],
    )
    # exact: 1, 0, 1, 0, 0; F1: 1, the better of 1/2 ("old city") and 2/3 ("town"), 1, 0, 0
    assert scores == {"exact_match": pytest.approx(2 / 5), "f1": pytest.approx((1 + 2 / 3 + 1) / 5)}


@pytest.mark.parametrize(
    ("task", "default"),
    [("classification", "accuracy"), ("regression", "pearson"), ("token_classification", "f1")],
)
def test_default_metric_is_in_the_scores(tmp_path: Path, tokenizer: Any, task: str, default: str) -> None:
    settings = tagged(tmp_path, [(["old", "city"], ["N", "V"])])
    if task != "token_classification":
        path = jsonl(tmp_path / "train.jsonl", sentiment(4))
        settings = DataSettings(task=task, train_file=path, validation_file=path)
    loaded: TaskData = load_task(settings, tokenizer, seed=0)
    logits = {"classification": np.eye(2)[[0, 1]], "regression": np.ones((2, 1))}.get(task, np.zeros((2, 4, 2)))
    labels = np.array([[-100, 0, 1, -100]] * 2) if task == "token_classification" else np.array([0, 1])
    scores = loaded.metrics["test"](EvalPrediction(predictions=logits, label_ids=labels))
    assert loaded.metric_name == default and default in scores
    assert all(isinstance(value, float) for value in scores.values())


def test_answers_need_the_order_of_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [question("where is paris", "in france"), question("who lies", "river")]
    task = load_task(squad(tmp_path, rows, max_length=14, doc_stride=3), tokenizer, seed=0)
    args = APTConfig(output_dir=str(tmp_path / "out"), use_cpu=True, train_sampling_strategy="group_by_length")
    with pytest.raises(UserError, match="Set train_sampling_strategy: random"):
        set_task_arguments(args, task, {})
    number = len(task.validation)
    logits = np.random.default_rng(0).normal(size=(number + 2, 14))  # two rows repeated by other processes
    scores = task.metrics["validation"](EvalPrediction(predictions=(logits, logits), label_ids=None))
    same = EvalPrediction(predictions=(logits[:number], logits[:number]), label_ids=None)
    assert scores == task.metrics["validation"](same)
