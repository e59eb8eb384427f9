"""What rows are for, told by their columns and cells: as a stranger names and fills them."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Translation, Value

from apt_trainer import UserError
from apt_trainer.tasks.architecture import DECODER, ENCODER, ENCODER_DECODER
from apt_trainer.tasks.guess import guess

N = 24
TEXTS = [f"this is sentence number {i} of a file, longer than any label" for i in range(N)]
OTHERS = [f"another sentence, {i}, which differs from the first one in words" for i in range(N)]
TALK = [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"hello {i}"}] for i in range(N)]


def cycle(*values: Any) -> list[Any]:
    return [values[i % len(values)] for i in range(N)]


CASES: list[tuple[str, str, dict[str, list[Any]], dict[str, Any]]] = [
    ("strings", ENCODER, {"id": [*range(N)], "review": TEXTS, "verdict": cycle("good", "bad")},
     {"task": "classification", "text_column": "review", "label_column": "verdict"}),
    ("whole numbers", ENCODER, {"label": cycle(0, 1, 2), "sentence": TEXTS},
     {"task": "classification", "text_column": "sentence", "label_column": "label"}),
    ("names beside numbers", ENCODER, {"text": TEXTS, "label": cycle(0, 1), "label_text": cycle("no", "yes")},
     {"task": "classification", "label_column": "label_text"}),
    ("years", ENCODER, {"text": TEXTS, "year": [1900 + i for i in range(22)] + [1900, 1901]}, {"task": "regression"}),
    ("many classes", ENCODER, {"text": TEXTS * 6, "label": [*range(24)] * 6}, {"task": "classification"}),
    ("truth", ENCODER, {"spam": cycle(True, False), "body": TEXTS},
     {"task": "classification", "text_column": "body", "label_column": "spam"}),
    ("numbers as text, some empty", ENCODER, {"text": TEXTS, "price": [*cycle("1.5", "2.25", "3", "4.5")[:-1], ""]},
     {"task": "regression", "label_column": "price", "drop_unlabeled": True}),
    ("fractions", ENCODER, {"sentence1": TEXTS, "sentence2": OTHERS, "score": [i / 7 for i in range(N)]},
     {"task": "regression", "text_column": "sentence1", "text_pair_column": "sentence2", "label_column": "score"}),
    ("pairs with labels", ENCODER, {"premise": TEXTS, "hypothesis": OTHERS, "gold": cycle("yes", "no", "maybe")},
     {"task": "classification", "text_column": "premise", "text_pair_column": "hypothesis", "label_column": "gold"}),
    ("labels of a list", ENCODER, {"text": TEXTS, "topics": cycle(["a", "b"], ["b"], [])},
     {"task": "multi_label_classification", "label_column": "topics"}),
    ("labels parted by a bar", ENCODER, {"text": TEXTS, "tags": cycle("war|art", "art", "war|sport", "sport")},
     {"task": "multi_label_classification", "label_column": "tags", "label_separator": "|"}),
    ("a column for each label", ENCODER, {"text": TEXTS, "toxic": cycle(0, 1), "rude": cycle(1, 0, 0)},
     {"task": "multi_label_classification", "label_columns": ["toxic", "rude"]}),
    ("words and tags", ENCODER, {"tokens": [[f"w{i}", f"v{i}"] for i in range(N)], "ner_tags": [["O", "B-X"]] * N},
     {"task": "token_classification", "text_column": "tokens", "label_column": "ner_tags"}),
    ("answers", ENCODER,
     {"id": [*map(str, range(N))], "question": TEXTS, "context": OTHERS,
      "answers": [{"text": ["another"], "answer_start": [0]}] * N},
     {"task": "question_answering"}),
    ("pairs alone", ENCODER, {"anchor": TEXTS, "positive": OTHERS},
     {"task": "embedding", "text_column": "anchor", "text_pair_column": "positive"}),
    ("triplets", ENCODER, {"anchor": TEXTS, "positive": OTHERS, "negative": TEXTS[::-1]},
     {"task": "embedding", "negative_column": "negative"}),
    ("messages", DECODER, {"messages": TALK}, {"task": "instruction_tuning", "messages_column": "messages"}),
    ("sharegpt", DECODER, {"conversations": [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * N},
     {"task": "instruction_tuning", "messages_column": "conversations"}),
    ("prompts", DECODER, {"prompt": TEXTS, "completion": OTHERS},
     {"task": "instruction_tuning", "prompt_column": "prompt", "completion_column": "completion",
      "use_chat_template": True}),
    ("alpaca", DECODER, {"instruction": TEXTS, "input": cycle("", "x"), "output": OTHERS},
     {"prompt_column": "instruction", "input_column": "input", "completion_column": "output"}),
    ("a decoder as a classifier", DECODER, {"text": TEXTS, "label": cycle("a", "b")}, {"task": "classification"}),
    ("plain text", DECODER, {"text": TEXTS}, {"task": "language_modeling", "text_column": "text"}),
    ("texts alone", ENCODER, {"text": TEXTS}, {"task": "masked_language_modeling", "text_column": "text"}),
    ("summaries", ENCODER_DECODER, {"article": TEXTS, "highlights": OTHERS},
     {"task": "summarization", "text_column": "article", "target_column": "highlights"}),
    ("short texts of long ones", ENCODER_DECODER, {"a": [text * 3 for text in TEXTS], "b": OTHERS},
     {"task": "summarization", "text_column": "a", "target_column": "b"}),
    ("two languages", ENCODER_DECODER, {"en": TEXTS, "de": OTHERS},
     {"task": "translation", "text_column": "en", "target_column": "de"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "columns", "expected"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_task_and_columns(architecture: str, columns: dict[str, list[Any]], expected: dict[str, Any]) -> None:
    found = guess(Dataset.from_dict(columns), {}, architecture, has_chat=True).settings
    assert {name: found.get(name) for name in expected} == expected
    named = {value for name, value in found.items() if name.endswith("_column")} | set(found.get("label_columns", []))
    assert named <= set(columns)


def test_columns_that_say_what_they_are() -> None:
    features = Features({"t": Value("string"), "c": ClassLabel(names=["no", "yes"])})
    found = guess(Dataset.from_dict({"t": TEXTS, "c": cycle(0, 1)}, features=features), {}, ENCODER)
    assert found.settings == {"task": "classification", "label_column": "c", "text_column": "t"}
    pairs = Features({"translation": Translation(["de", "en"])})
    rows = Dataset.from_dict({"translation": [{"de": a, "en": b} for a, b in zip(TEXTS, OTHERS, strict=True)]}, pairs)
    found = guess(rows, {}, ENCODER_DECODER)
    assert found.settings["text_column"] == "translation.de" and found.settings["target_column"] == "translation.en"
    tags = Features({"words": List(Value("string")), "tags": List(ClassLabel(names=["O", "X"]))})
    words = {"words": [[f"a{i}", f"b{i}"] for i in range(N)], "tags": [[0, 1]] * N}
    assert guess(Dataset.from_dict(words, tags), {}, ENCODER).settings["label_column"] == "tags"


def test_a_model_of_embeddings_compares() -> None:
    rows = Dataset.from_dict({"sentence1": TEXTS, "sentence2": OTHERS, "score": [i / 7 for i in range(N)]})
    found = guess(rows, {}, ENCODER, embeds=True)
    assert found.settings["task"] == "embedding" and found.settings["label_column"] == "score"
    labelled = Dataset.from_dict({"text": TEXTS, "label": cycle("a", "b")})
    assert guess(labelled, {}, ENCODER, embeds=True).settings["task"] == "classification"


def test_what_is_given_is_taken() -> None:
    rows = Dataset.from_dict({"title": cycle("x y z", "u v w"), "body": TEXTS, "stars": cycle(1, 2, 3)})
    found = guess(rows, {"task": "regression", "text_column": "title"}, ENCODER).settings
    assert (found["task"], found["text_column"], found["label_column"]) == ("regression", "title", "stars")
    named = guess(rows, {"label_column": "title"}, ENCODER).settings
    assert (named["label_column"], named["text_column"]) == ("title", "body")
    templated = guess(rows, {"template": "{title}: {body}"}, DECODER, has_chat=True).settings
    assert templated == {"task": "instruction_tuning", "template": "{title}: {body}"}


def test_named_columns_of_labels_tell_the_task() -> None:
    rows = Dataset.from_dict({"text": TEXTS, "x": [i / 7 for i in range(N)], "y": [*range(N)], "a": cycle(0, 1)})
    for names, task in ((["x", "y"], "regression"), (["a", "x"], "regression")):
        found = guess(rows, {"label_columns": names}, ENCODER).settings
        assert found == {"task": task, "label_columns": names, "text_column": "text"}
    flags = Dataset.from_dict({"text": TEXTS, "a": cycle(0, 1), "b": cycle(True, False), "label": cycle("c", "d")})
    found = guess(flags, {"label_columns": ["b", "a"]}, ENCODER).settings
    assert (found["task"], found["label_columns"]) == ("multi_label_classification", ["b", "a"])


def test_a_label_may_be_a_field_of_a_record() -> None:
    names = ["once", *cycle("good", "bad")[2:], ""]
    rows = Dataset.from_dict(
        {"text": TEXTS, "meta": [{"label": name, "score": i / 7} for i, name in enumerate(names)]}
    )
    found = guess(rows, {"label_column": "meta.label"}, ENCODER)
    assert found.settings["task"] == "classification" and found.settings["drop_unlabeled"]
    assert "(row 0)" in " ".join(found.checks) and "Not used" not in " ".join(found.checks)
    assert guess(rows, {"label_column": "meta.score"}, ENCODER).settings["task"] == "regression"


def test_what_cannot_be_told_is_asked() -> None:
    several = Dataset.from_dict({"text": TEXTS, "shop": cycle("a", "b"), "town": cycle("c", "d", "e")})
    with pytest.raises(UserError, match="'shop', 'town' may all be labels. Say it: --label_column"):
        guess(several, {}, ENCODER)
    with pytest.raises(UserError, match="what is to be learnt"):
        guess(Dataset.from_dict({"text": TEXTS, "other": OTHERS, "third": OTHERS[::-1]}), {}, DECODER)


def test_odd_rows_are_named() -> None:
    texts, labels = list(TEXTS), cycle("good", "bad")
    texts[3], texts[5], texts[9] = "", "bro\ufffdken", texts[8]
    labels[7], labels[11], labels[13] = "", "once", "Good"
    found = guess(Dataset.from_dict({"text": texts, "label": labels, "source": TEXTS}), {}, ENCODER)
    assert found.settings["drop_empty_texts"] and found.settings["drop_unlabeled"]
    told = "\n".join(found.checks)
    assert "1 row (3, counted from 0) without text" in told and "1 row (7, counted from 0) without a label" in told
    assert "'once' (row 11)" in told and "1 row (5, counted from 0) with characters that were lost" in told
    assert "differ in case only, and count as different ones: Good, good" in told
    assert "2 rows (8, 9, counted from 0) with a text that has another label" in told and "Not used: 'source'." in told


def test_conversations_that_teach_nothing_are_named() -> None:
    rows = [*TALK[:-3], [], TALK[0][:1], [*TALK[0][:1], {"role": "assistant", "content": " "}]]
    found = guess(Dataset.from_dict({"messages": rows}), {}, DECODER)
    assert "3 rows (21, 22, 23, counted from 0) without text" in found.checks[0]


def test_rows_without_one_of_several_labels_are_left_out() -> None:
    flags = {"text": TEXTS, "toxic": [*cycle(0, 1)[:-1], None], "rude": cycle(1, 0, 0)}
    found = guess(Dataset.from_dict(flags), {}, ENCODER)
    assert found.settings["label_columns"] == ["toxic", "rude"] and found.settings["drop_unlabeled"]
    lists = {"text": TEXTS, "topics": [*cycle(["a"], ["b", "a"], [])[:-1], None]}
    found = guess(Dataset.from_dict(lists), {}, ENCODER)
    assert found.settings["drop_unlabeled"] and "1 row (23, counted from 0) without a label" in found.checks[0]
