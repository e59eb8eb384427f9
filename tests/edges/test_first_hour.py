"""A person's first hour: a recipe for a file of one's own, a run of it, predictions, a chat, a schema for editors."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_before_the_first_step import FILM
from texts import tiny_llama, word_tokenizer
from tiny import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertModel, PreTrainedTokenizerFast

from apt_trainer import cli
from apt_trainer.settings.recipe import load_recipe

SHORT = ["--max_steps", "6", "--measure_latency", "false", "--use_cpu", "--disable_tqdm", "--eval_strategy", "no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny encoder in ``encoder``, a tiny decoder in ``decoder``, and files as people have them."""
    folder = tmp_path_factory.mktemp("hour")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(FILM)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(folder / "encoder")
    BertModel(tiny_config("bert")).save_pretrained(folder / "encoder")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' }}{% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] + ' </s> ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder / "decoder")
    tiny_llama().save_pretrained(folder / "decoder")
    _write_reviews(folder / "reviews.csv")
    _write_chats(folder / "chats.jsonl")
    return folder


def _write_reviews(file: Path) -> None:
    """Labels are strings; a text and a label are empty, one label occurs once, texts have emojis, quotes and lines."""
    rows = [[str(i), f"a {FILM[4 + i % 2]} film 🎬 {i}", ("👍 good", "👎 bad")[i % 2]] for i in range(60)]
    rows[7][2] = rows[12][1] = ""
    rows[20][2] = "once only"
    rows[33][1] = 'she said "no", twice,\nand left'
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([["id", "Review", "verdict"], *rows])


def _write_chats(file: Path) -> None:
    rows = [
        [{"role": "user", "content": f"w{i} w1"}, {"role": "assistant", "content": f"w{i} w2 w3"}] for i in range(24)
    ]
    rows[5] = rows[5][:1]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))


@pytest.fixture
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(place)
    yield place


@pytest.fixture(scope="module")
def classifier_run(place: Path) -> Path:
    """A recipe that ``init`` wrote for the reviews, and the folder of a run of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ["--model", "encoder", "--train_file", "reviews.csv", "--output", "reviews.yaml"]
        assert cli.main(["init", *words]) == 0
        assert cli.main(["train", "--config", "reviews.yaml", *SHORT]) == 0
    return place / "out/encoder_reviews"


def test_a_recipe_for_a_csv_with_odd_rows_trains(
    inside: Path, classifier_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("reviews.yaml").read_text(encoding="utf-8")
    given = load_recipe("reviews.yaml").given
    assert (given["task"], given["text_column"], given["label_column"]) == ("classification", "Review", "verdict")
    assert given["drop_empty_texts"] and given["drop_unlabeled"] and given["max_length"] == 16
    assert given["target_sparsity"] == 0.6 and given["pruning_time"] == "early"
    for odd in ("1 row (12, counted from 0) without text", "1 row (7, counted from 0) without a label", "(row 20)"):
        assert odd in text
    assert json.loads((classifier_run / "config.json").read_text())["id2label"]["2"] == "👎 bad"
    assert (classifier_run / "metrics.json").is_file()
    assert cli.main(["init", "--model", "encoder", "--train_file", "reviews.csv", "--output", "reviews.yaml"]) == 2
    assert "reviews.yaml is there already and is not written over" in capsys.readouterr().err
    assert Path("reviews.yaml").read_text(encoding="utf-8") == text


def test_keys_that_are_given_stand_and_what_cannot_be_told_is_asked(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "encoder", "--train_file", "reviews.csv"]
    assert (
        cli.main(["init", *words, "--target_sparsity", "0.4", "--output_dir", "out/other", "--weight_decay", "0.1"])
        == 0
    )
    said = capsys.readouterr()
    assert "target_sparsity: 0.4\n" in said.out and "output_dir: out/other\n" in said.out
    assert "### as asked\nweight_decay: 0.1\n" in said.out and "labels       3 in the training rows" in said.err
    assert cli.main(["init", *words, "--label_column", "verdit"]) == 2
    assert "Did you mean 'verdict'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "file", "expected"),
    [
        ("decoder", "chats.jsonl", {"task": "instruction_tuning", "pruning_time": "before", "drop_empty_texts": True}),
        ("encoder", "pairs.csv", {"task": "regression", "text_pair_column": "sentence2", "max_length": 16}),
        ("encoder", "texts", {"task": "classification", "text_column": "text"}),
        ("decoder", "prose.txt", {"task": "language_modeling", "max_length": 32}),
        ("compares", "pairs.csv", {"task": "embedding", "label_column": "score", "prediction_weight": 10.0}),
    ],
)
def test_each_form_of_data_has_a_recipe_that_can_be_run(
    inside: Path, model: str, file: str, expected: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """``init`` tries its recipe, as ``plan`` does."""
    Path("pairs.csv").write_text(
        "sentence1,sentence2,score\n" + "".join(f"good film {i},bad film {i},{i / 7}\n" for i in range(40))
    )
    Path("prose.txt").write_text("".join(f"w{i % 50} w{i % 7} w3\n" for i in range(4000)))
    for i in range(20):
        Path("texts", str(i % 2)).mkdir(parents=True, exist_ok=True)
        Path("texts", str(i % 2), f"{i}.txt").write_text(f"a good film {i}")
    if model == "compares" and not Path(model).exists():
        shutil.copytree("encoder", model)
        Path(model, "modules.json").write_text("[]")
    assert cli.main(["init", "--model", model, "--train_file", file, "--output_dir", f"out/{model}{file}"]) == 0
    said = capsys.readouterr()
    given = yaml.safe_load(said.out)
    assert {name: given.get(name) for name in expected} == expected
    assert "estimated at the first step" in said.err


def test_a_recipe_that_lacks_a_package_is_written_all_the_same(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_trainer.settings.packages.Package.is_installed", False)
    words = ["--model", "encoder", "--train_file", "reviews.csv", "--output_dir", "out/lacks", "--lm_eval_tasks", "a"]
    assert cli.main(["init", *words, "--output", "lacks.yaml"]) == 2
    assert "The recipe is written, but a run of it would not start yet." in capsys.readouterr().err
    assert Path("lacks.yaml").is_file()
