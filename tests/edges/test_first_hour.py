"""A person's first hour: a recipe for a file of one's own, a run of it, predictions, a chat, a schema for editors."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from integration.factories import DEFAULTS, Rows, make_trainer
from integration.factories import SHORT as SHORT_RUN
from test_before_the_first_step import FILM
from test_saving import FailsAtTheEnd
from texts import tiny_llama, word_tokenizer
from tiny import tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

import apt_trainer
from apt_trainer import APTConfig, APTTrainer, DataSettings, UserError, __version__, cli, load_pruned
from apt_trainer.errors import RunError
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.store.pretrained import load_inputs
from apt_trainer.tasks import load_task
from apt_trainer.tasks.loading import read_file
from apt_trainer.tasks.trainer_options import set_task_arguments

ROOT = Path(apt_trainer.__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
SHORT = ["--max_steps", "6", "--measure_latency", "false", "--use_cpu", "--disable_tqdm", "--eval_strategy", "no"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models (``encoder``, the same as a SentenceTransformer ``compares``, ``decoder``) and files as people have
    them."""
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
    shutil.copytree(folder / "encoder", folder / "compares")
    (folder / "compares" / "modules.json").write_text("[]")
    pairs = [f"good film {i},bad film {i},{i / 7}" for i in range(40)]
    (folder / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *pairs]))
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
    assert cli.main(["init", *words, "--task", "clasification"]) == 2
    assert "Did you mean 'classification'?" in capsys.readouterr().err
    assert cli.main(["init", *words, "--label_column", "verdit"]) == 2
    assert "Did you mean 'verdict'?" in capsys.readouterr().err
    Path("latin.csv").write_bytes("text,label\nna\xefve,good\nfilm,bad\n".encode("latin-1"))
    assert cli.main(["init", *words[:2], "--train_file", "latin.csv"]) == 2
    assert "Save it in UTF-8" in capsys.readouterr().err


def test_init_says_each_thing_once_and_as_plan_says_it(
    inside: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Rows, steps and labels are those of the run that the recipe describes; what is odd stands in one list."""
    labels = {3: "Good", 9: "meh", 50: "Bad"}
    rows = [f"a film of number {i},{labels.get(i, ('good', 'bad')[i % 2])}" for i in range(116)]
    Path("meh.csv").write_text("\n".join(["text,label", *rows, ",good"]))
    words = ["init", "--model", "encoder", "--train_file", "meh.csv", "--per_device_train_batch_size", "8"]
    for further in ([], ["--seed", "7"], ["--max_train_samples", "40", "--heldout_fraction", "0.2"]):
        caplog.clear()
        assert cli.main([*words, *further]) == 0
        said = capsys.readouterr()
        assert not [record for record in caplog.records if record.name.startswith("apt_trainer.tasks")]
        assert said.err.count("differ in case only") == said.err.count("without text") == 1
        told = re.search(r"data +(\d+) training rows, (\d+) of them held out to choose the teacher", said.err)
        steps = re.search(r"steps +([\d,]+) of 8 rows", said.err)
        assert told and steps and f"about {told[1]} rows to train on" in said.out
        assert f"about {steps[1]} steps" in said.out and told[2] == ("8" if "0.2" in further else "5")
        assert said.err.rstrip().endswith("Nothing is written. To keep the recipe: add --output my.yaml")
    assert cli.main([*words, "--num_pruning_events", "0"]) == 2
    assert "This recipe would not start yet." in capsys.readouterr().err


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
    Path("prose.txt").write_text("".join(f"w{i % 50} w{i % 7} w3\n" for i in range(4000)))
    for i in range(20):
        Path("texts", str(i % 2)).mkdir(parents=True, exist_ok=True)
        Path("texts", str(i % 2), f"{i}.txt").write_text(f"a good film {i}")
    assert cli.main(["init", "--model", model, "--train_file", file, "--output_dir", f"out/{model}{file}"]) == 0
    said = capsys.readouterr()
    given = yaml.safe_load(said.out)
    assert {name: given.get(name) for name in expected} == expected
    assert "estimated at the first step" in said.err
    use = {"instruction_tuning": "chat {}", "regression": "predict {} --text '…' --text_pair '…'"}
    command = use.get(given["task"], "predict {} --text '…'").format(given["output_dir"])
    assert f"#   apt-trainer {command}\n" in said.out


def test_a_recipe_names_no_command_that_is_refused(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """No template to chat with, gaps to fill."""
    plain = tmp_path / "plain"
    tiny_llama().save_pretrained(plain)
    word_tokenizer().save_pretrained(plain)
    rows = [json.dumps({"prompt": f"w{i} w1", "completion": "w2 w3"}) for i in range(24)]
    (tmp_path / "asked.jsonl").write_text("\n".join(rows))
    (tmp_path / "prose.txt").write_text("a good film\n" * 4000)
    masked = save(BertForMaskedLM(tiny_config("bert")), tmp_path / "masked")
    tokenizer = AutoTokenizer.from_pretrained(masked)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(masked)
    for model, file, command in (
        (plain, "asked.jsonl", "predict out/x --text '…'"),
        (masked, "prose.txt", None),
    ):
        words = ["--model", str(model), "--train_file", str(tmp_path / file), "--output_dir", "out/x"]
        assert cli.main(["init", *words]) == 0, capsys.readouterr().err
        heading = capsys.readouterr().out.partition("### model")[0]
        assert re.findall(r"apt-trainer ((?:chat|predict) .*)", heading) == ([] if command is None else [command])


def test_a_recipe_that_lacks_a_package_is_written_all_the_same(
    inside: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apt_trainer.settings.packages.Package.is_installed", False)
    words = ["--model", "encoder", "--train_file", "reviews.csv", "--output_dir", "out/lacks", "--lm_eval_tasks", "a"]
    assert cli.main(["init", *words, "--output", "lacks.yaml"]) == 2
    assert "The recipe is written, but a run of it would not start yet." in capsys.readouterr().err
    assert Path("lacks.yaml").is_file()


# ---------------------------------------------------------------------------- predictions


def predicted(words: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli.main(["predict", *words]) == 0, capsys.readouterr().err
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_a_pruned_classifier_tells_labels_of_texts_and_files(
    inside: Path, classifier_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The column is that of the run; numbers are those of the model called by hand."""
    first, second = predicted([str(classifier_run), "--text", "a good film", "😀"], capsys)
    assert first["Review"] == "a good film" and (first["row"], second["row"]) == (0, 1)
    tokenizer = AutoTokenizer.from_pretrained(classifier_run)
    model = load_pruned(str(classifier_run)).eval()
    with torch.no_grad():
        shares = model(**tokenizer("a good film", return_tensors="pt")).logits.softmax(-1)[0]
    assert list(first["scores"]) == [model.config.id2label[i] for i in shares.argsort(descending=True).tolist()]
    assert first["label"] == model.config.id2label[int(shares.argmax())]
    assert first["score"] == pytest.approx(float(shares.max()), abs=1e-6)
    assert sum(first["scores"].values()) == pytest.approx(1.0, abs=1e-5)
    words = [str(classifier_run), "--file", "reviews.csv", "--batch_size", "7", "--output", "told.jsonl"]
    assert cli.main(["predict", *words]) == 0
    rows = [json.loads(line) for line in Path("told.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in rows] == [*range(60)] and rows[12] == {"row": 12, "Review": "", "error": "no text"}
    assert rows[33]["Review"].endswith("\nand left")
    alone = predicted([str(classifier_run), "--text", rows[8]["Review"]], capsys)[0]
    assert alone["score"] == pytest.approx(rows[8]["score"], abs=1e-6)
    Path("lines.txt").write_text("a good film\r\na\u2028bad\x85 film\x0c\n", encoding="utf-8")
    told = predicted([str(classifier_run), "--file", "lines.txt"], capsys)
    assert [row["Review"] for row in told] == ["a good film", "a\u2028bad\x85 film\x0c"]
    Path("latin.txt").write_bytes("na\xefve\n".encode("latin-1"))
    assert cli.main(["predict", str(classifier_run), "--file", "latin.txt"]) == 2
    assert "is not text in UTF-8" in capsys.readouterr().err


def save(model: Any, folder: Path, tokenizer: str = "encoder") -> str:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return str(folder)


def test_models_that_nobody_pruned_tell_what_a_pipeline_tells(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    texts = ["a good film", "the bad film a good film"]
    sequence = save(tiny_model("bert"), tmp_path / "sequence")
    theirs = pipeline("text-classification", sequence, top_k=None)(texts)
    for one, other in zip(predicted([sequence, "--text", *texts], capsys), theirs, strict=True):
        assert one["scores"] == pytest.approx({each["label"]: each["score"] for each in other}, abs=1e-5)
    tokens = save(tiny_model("bert", "ForTokenClassification"), tmp_path / "tokens")
    theirs = pipeline("token-classification", tokens)(texts[0])
    (one,) = predicted([tokens, "--text", texts[0]], capsys)
    assert [(tag["word"], tag["label"]) for tag in one["tags"]] == [(tag["word"], tag["entity"]) for tag in theirs]
    assert [tag["score"] for tag in one["tags"]] == pytest.approx([float(tag["score"]) for tag in theirs], abs=1e-5)
    (cut,) = predicted([tokens, "--text", "a good film a bad film", "--max_length", "4"], capsys)
    assert [tag["word"] for tag in cut["tags"]] == ["a", "good", "film", "a", "bad", "film"]
    missing = {"label": None, "score": None}
    assert cut["tags"][-2:] == [{"word": "bad", **missing}, {"word": "film", **missing}] and cut["tags"][0]["label"]
    plain = save(tiny_model("bert", "ForQuestionAnswering"), tmp_path / "answers")
    (one,) = predicted([plain, "--text", "good film", "--text_pair", texts[1], "--doc_stride", "4"], capsys)
    assert one["answer"] in texts[1]


def test_several_labels_and_numbers(inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for problem in ("multi_label_classification", "regression"):
        model = tiny_model("bert", problem_type=problem)
        path = save(model, tmp_path / problem)
        (told,) = predicted([path, "--text", "a good film", "--text_pair", "the film"], capsys)
        inputs = AutoTokenizer.from_pretrained(path)("a good film", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        if problem == "regression":
            assert list(told["values"].values()) != pytest.approx(logits.tolist(), abs=1e-5)  # of both texts
            (told,) = predicted([path, "--text", "a good film"], capsys)
            assert list(told["values"].values()) == pytest.approx(logits.tolist(), abs=1e-5)
        else:
            (told,) = predicted([path, "--text", "a good film"], capsys)
            assert told["labels"] == [f"LABEL_{i}" for i, value in enumerate(logits.tolist()) if value > 0]
            assert told["scores"]["LABEL_1"] == pytest.approx(float(logits[1].sigmoid()), abs=1e-5)


def test_embeddings_of_a_plain_encoder_and_of_sentence_transformers(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    path = save(BertModel.from_pretrained("encoder"), tmp_path / "plain")
    plain = predicted([path, "--text", "a good film", "bad"], capsys)
    parts = [modules.Transformer("encoder"), modules.Pooling(16, "cls")]
    SentenceTransformer(modules=parts).save(str(tmp_path / "cls"))
    theirs = SentenceTransformer(str(tmp_path / "cls")).encode(["a good film", "bad"])
    ours = predicted([str(tmp_path / "cls"), "--text", "a good film", "bad"], capsys)
    assert [row["embedding"] for row in ours] == [pytest.approx(row.tolist(), abs=1e-5) for row in theirs]
    SentenceTransformer(modules=[modules.Transformer("encoder"), modules.Pooling(16, "mean")]).save(
        str(tmp_path / "m")
    )
    theirs = SentenceTransformer(str(tmp_path / "m")).encode(["a good film", "bad"], normalize_embeddings=True)
    assert [row["embedding"] for row in plain] == [pytest.approx(row.tolist(), abs=1e-5) for row in theirs]
    commit, cached = "0" * 40, tmp_path / "cache" / "models--me--cls"  # as it lies here once downloaded from the hub
    shutil.copytree(tmp_path / "cls", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "v2").write_text(commit)
    named = ["me/cls", "--model_revision", "v2", "--model_init_kwargs", json.dumps({"cache_dir": f"{tmp_path}/cache"})]
    assert predicted([*named, "--text", "a good film", "bad"], capsys) == ours
    (both,) = predicted([path, "--text", "a good film", "--text_pair", "bad"], capsys)
    assert both["similarity"] == pytest.approx(float(theirs[0] @ theirs[1]), abs=1e-5)


def test_what_cannot_be_predicted_is_said(inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    masked = save(tiny_model("bert", "ForMaskedLM"), tmp_path / "masked")
    classifier = save(tiny_model("bert"), tmp_path / "classifier")
    for words, said in (
        ([masked, "--text", "a"], "BertForMaskedLM, which has not been trained to tell anything of a text"),
        ([classifier, "--file", "reviews.csv", "--text_column", "Revue"], "Did you mean 'Review'?"),
        ([classifier, "--text", "a", "b", "--text_pair", "c"], "2 texts and 1 second texts were given"),
        ([classifier, "--text", "a", "--seed", "1"], "seed says nothing about model or data"),
    ):
        assert cli.main(["predict", *words]) == 2
        assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------- what language models write


@pytest.fixture(scope="module")
def chat_run(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ["--model", "decoder", "--train_file", "chats.jsonl", "--output", "chats.yaml"]
        assert cli.main(["init", *words]) == 0
        assert cli.main(["train", "--config", "chats.yaml", *SHORT]) == 0
    return place / "out/decoder_chats"


def test_a_pruned_decoder_converses_and_goes_on_from_texts(
    inside: Path, chat_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are those that ``generate`` of transformers takes one by one."""
    model, tokenizer = load_pruned(str(chat_run)).eval(), AutoTokenizer.from_pretrained(chat_run)

    def greedy(text: str, number: int) -> str:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        length = ids.shape[1]
        for _ in range(number):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            if int(ids[0, -1]) == model.generation_config.eos_token_id:
                break
        return tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()

    expected = greedy("<s> user w3 w1 <s> assistant", 5)
    (told,) = predicted([str(chat_run), "--text", "w3 w1", "--max_new_tokens", "5"], capsys)
    assert told["generated"] == expected
    assert cli.main(["chat", str(chat_run), "--prompt", "w3 w1", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.strip() == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("w3 w1\nw2\n\n"))
    assert cli.main(["chat", str(chat_run), "--max_new_tokens", "5"]) == 0
    second = greedy(f"<s> user w3 w1 <s> assistant {expected} </s> <s> user w2 <s> assistant", 5)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [expected, second]


def test_a_batch_of_prompts_is_written_as_each_alone(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = save(tiny_llama(), tmp_path / "plain", "decoder")
    words = [path, "--use_chat_template", "false", "--max_new_tokens", "6"]
    prompts = ["w1 w2 w3 w4", "w5", "w6 w7"]
    together = predicted([*words, "--text", *prompts], capsys)
    alone = [predicted([*words, "--text", prompt], capsys)[0] for prompt in prompts]
    assert [row["generated"] for row in together] == [row["generated"] for row in alone]
    (tmp_path / "asked.jsonl").write_text('{"q": "w1 w2", "a": "w9"}\n')
    template = ["--template", "{q} w8 {a}", "--file", str(tmp_path / "asked.jsonl")]
    (told,) = predicted([*words, *template], capsys)
    recipe = {"task": "language_modeling", "text_column": "body", "max_length": 8}
    (Path(path) / "recipe.json").write_text(json.dumps(recipe))
    assert predicted([path, "--max_new_tokens", "6", "--text", prompts[0]], capsys)[0] == {
        "row": 0,
        "body": prompts[0],
        "generated": together[0]["generated"],
    }
    (Path(path) / "recipe.json").unlink()
    assert told["generated"] == predicted([*words, "--text", "w1 w2 w8"], capsys)[0]["generated"] and "a" not in told


def test_columns_of_a_file_tell_the_form_where_the_recipe_names_none(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A tokenizer with a chat template is no sign that a run was trained on conversations."""
    path = save(tiny_llama(), tmp_path / "run", "decoder")
    (tmp_path / "asked.jsonl").write_text('{"prompt": "w1 w2", "completion": "w9"}\n')
    message = '[{"%s": "%s", "%s": "w1 w2"}]'
    (tmp_path / "said.jsonl").write_text(f'{{"conversations": {message % ("from", "human", "value")}}}\n')
    words = [path, "--max_new_tokens", "4"]
    bare = predicted([*words, "--use_chat_template", "false", "--text", "w1 w2"], capsys)[0]["generated"]
    turn = predicted([*words, "--text", "w1 w2"], capsys)[0]["generated"]
    (Path(path) / "recipe.json").write_text(json.dumps({"task": "instruction_tuning", "max_length": 8}))
    of_files = [predicted([*words, "--file", str(tmp_path / name)], capsys) for name in ("asked.jsonl", "said.jsonl")]
    assert [rows[0]["generated"] for rows in of_files] == [bare, turn] and bare != turn
    assert predicted([*words, "--text", "w1 w2"], capsys)[0]["generated"] == turn


def test_long_prompts_change_nothing_about_the_others(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """One that leaves little room, one that leaves none, and a short one; alone and together."""
    model = tiny_llama()
    model.generation_config.eos_token_id = None  # nothing but the room ends what is written
    path = save(model, tmp_path / "plain", "decoder")
    words = [path, "--use_chat_template", "false", "--max_new_tokens", "9", "--text"]
    prompts = ["w1 w2", "w3 " * 28, "w4 " * 40, "w5"]
    together = predicted([*words, *prompts], capsys)
    assert "leaves no room within the 32 positions of the model" in together[2].pop("error")
    for row in (0, 1, 3):
        (alone,) = predicted([*words, prompts[row]], capsys)
        assert together[row]["generated"] == alone["generated"]
    assert [len(together[row]["generated"].split()) > 4 for row in (0, 1, 3)] == [True, False, True]


def test_a_batch_for_two_stacks_with_learned_positions_is_written_as_each_alone(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Learned positions do not see the mask: padding belongs behind."""
    path = save(tiny_model("bart", "ForConditionalGeneration", vocab_size=60), tmp_path / "stacks", "decoder")
    prompts = ["w1 w2 w3 w4 w5 w6", "w7", "w8 w9"]
    words = [path, "--max_new_tokens", "6", "--text"]
    together = predicted([*words, *prompts], capsys)
    alone = [predicted([*words, prompt], capsys)[0]["generated"] for prompt in prompts]
    assert [row["generated"] for row in together] == alone and len(set(alone)) > 1


def test_a_model_of_two_stacks_writes_what_generate_writes(
    inside: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tiny_model("t5", "ForConditionalGeneration", vocab_size=60)
    path = save(model, tmp_path / "stacks", "decoder")
    (told,) = predicted([path, "--text", "w4 w5", "--source_prefix", "w1 ", "--max_new_tokens", "4"], capsys)
    tokenizer = AutoTokenizer.from_pretrained("decoder")
    ids = model.generate(**tokenizer("w1 w4 w5", return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert told["generated"] == tokenizer.decode(ids[0], skip_special_tokens=True).strip() != ""


def test_what_does_not_converse_is_said(
    inside: Path, classifier_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["chat", str(classifier_run), "--prompt", "a"]) == 2
    assert "BertForSequenceClassification, which does not converse" in capsys.readouterr().err
    tiny_llama().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert cli.main(["chat", str(tmp_path), "--prompt", "a"]) == 2
    assert "has no chat template, so it was not trained to converse" in capsys.readouterr().err
    path = save(tiny_llama(), tmp_path / "long", "decoder")
    assert cli.main(["chat", path, "--prompt", "w1 " * 40]) == 2
    assert "leaves no room within the 32 positions of the model" in capsys.readouterr().err


# ---------------------------------------------------------------------------- from Python as from a recipe


def test_rows_as_people_have_them_train_in_python_as_in_a_recipe(inside: Path, tmp_path: Path) -> None:
    """Conversations, templates and labels that are strings: token by token what a recipe makes of the same file."""
    reviews = read_file("reviews.csv", "train_file", "classification")
    of_reviews = {"text_column": "Review", "label_column": "verdict", "max_length": 16}
    of_reviews |= {"drop_empty_texts": True, "drop_unlabeled": True}
    chats = Dataset.from_list(
        [json.loads(line) for line in Path("chats.jsonl").read_text().splitlines() if "w2" in line]
    )
    asked = Dataset.from_dict({"q": [f"w{i}" for i in range(20)], "a": [f"w{i + 1}" for i in range(20)]})
    chats.to_json(tmp_path / "chats.jsonl")
    asked.to_json(tmp_path / "asked.jsonl")
    decoder, encoder = AutoModelForCausalLM, AutoModelForSequenceClassification
    for rows, file, cls, settings in (
        (reviews, "reviews.csv", encoder, of_reviews),
        (chats, str(tmp_path / "chats.jsonl"), decoder, {"task": "instruction_tuning", "max_length": 16}),
        (asked, str(tmp_path / "asked.jsonl"), decoder,
         {"task": "instruction_tuning", "max_length": 16, "template": "w9 {q} w8 {a}"}),
    ):  # fmt: skip
        folder = "encoder" if cls is encoder else "decoder"
        labels = {"num_labels": 3} if cls is encoder else {}
        model, tokenizer = cls.from_pretrained(folder, **labels), AutoTokenizer.from_pretrained(folder)
        args = APTConfig(str(tmp_path / folder), **DEFAULTS | SHORT_RUN | {"distillation": "none"})
        trainer = APTTrainer(model, args, rows, processing_class=tokenizer, data=DataSettings(**settings))
        recipe = load_task(DataSettings(train_file=file, **settings), tokenizer, args.seed, config=model.config)
        assert trainer.train_dataset[:] == recipe.train[:] and trainer.eval_dataset[:] == recipe.validation[:]
    trainer.train()
    assert f"eval_{recipe.metric_name}" in trainer.evaluate()
    assert trainer.args is not args and trainer.model.config.model_type == "llama"


def test_metrics_in_python_are_those_that_were_asked_for(inside: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict(
        {"text": [["bad film", "good film good film"][i % 2] for i in range(40)], "label": [i % 2 for i in range(40)]}
    )
    model = AutoModelForSequenceClassification.from_pretrained("encoder", num_labels=2)
    waits = {"early_stopping_patience": 2, "eval_strategy": "epoch", "metric_for_best_model": "f1_macro"}
    args = APTConfig(str(tmp_path), **DEFAULTS | SHORT_RUN | {"distillation": "none"} | waits)
    tokenizer = AutoTokenizer.from_pretrained("encoder")
    data = DataSettings(text_column="text", max_length=8)
    trainer = APTTrainer(model, args, rows, processing_class=tokenizer, data=data)
    assert trainer.args.metric_for_best_model == "f1_macro" and trainer.args.greater_is_better is True
    assert len(trainer.eval_dataset) < len(trainer.train_dataset)
    predicted = trainer.predict(trainer.train_dataset)
    right = predicted.predictions.argmax(-1) == predicted.label_ids
    assert predicted.metrics["test_accuracy"] == pytest.approx(right.mean())


def test_the_example_of_the_recipes_page_runs(inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "recipes/README.md").read_text(encoding="utf-8").split("## A recipe for data of your own")[1]
    tokenizer = AutoTokenizer.from_pretrained("decoder")
    rows = Dataset.from_dict({"question": [f"w{i}" for i in range(20)], "answer": [f"w{i + 1}" for i in range(20)]})
    space = {"model": tiny_llama(max_position_embeddings=512), "tokenizer": tokenizer, "rows": rows}
    monkeypatch.chdir(tmp_path)
    exec(compile(page.split("```python\n")[1].split("```")[0], "README.md", "exec"), space)
    trainer: Any = space["trainer"]
    assert trainer.args.early_stopping_patience == 3 and len(trainer.eval_dataset) == 2
    assert tokenizer.decode([i for i in trainer.train_dataset[0]["labels"] if i >= 0]).endswith("</s>")


def test_what_does_not_fit_in_python_is_said(inside: Path, tmp_path: Path) -> None:
    rows = read_file("reviews.csv", "train_file", "classification")
    settings = {"text_column": "Review", "label_column": "verdict", "max_length": 16, "drop_empty_texts": True}
    data = DataSettings(**settings, drop_unlabeled=True)
    args = APTConfig(str(tmp_path), **DEFAULTS)
    tokenizer = AutoTokenizer.from_pretrained("encoder")
    two = AutoModelForSequenceClassification.from_pretrained("encoder", num_labels=2)
    with pytest.raises(UserError, match="2 outputs, and the data need 3.*num_labels=3"):
        APTTrainer(two, args, rows, processing_class=tokenizer, data=data)
    with pytest.raises(UserError, match="takes a tokenizer. Give processing_class too"):
        APTTrainer(two, args, rows, data=data)
    with pytest.raises(UserError, match="train_dataset is list. With data it has to be a datasets.Dataset"):
        APTTrainer(two, args, rows.to_list(), processing_class=tokenizer, data=data)
    with pytest.raises(UserError, match="verdict' of the training data is empty in 1 of 59 rows: row 7"):
        APTTrainer(two, args, rows, processing_class=tokenizer, data=DataSettings(**settings))


def test_a_run_that_gets_no_better_ends_after_the_last_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is better by so much: two evaluations after that at step 8, where the last units go, the run ends."""
    waits = {"early_stopping_patience": 2, "early_stopping_threshold": 1e9, "eval_strategy": "steps", "eval_steps": 1}
    options = {"eval_dataset": Rows(8)}
    saves = {"save_strategy": "steps", "save_steps": 10}
    failing = options | {"callbacks": [FailsAtTheEnd()]}
    trainer = make_trainer(tmp_path, tiny_model("bert"), options=failing, **SHORT_RUN | waits | saves)
    with pytest.raises(RunError, match="Training is done, .* is saved in"):
        trainer.train()
    assert trainer.state.global_step == 10 and load_pruned(tmp_path) is not None
    assert "Training ends at step 10 of 12: eval_loss has not got better in 2 evaluations" in caplog.text
    resumed = make_trainer(tmp_path, tiny_model("bert"), options=options, **SHORT_RUN | waits | saves)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.state.global_step == 10 and resumed.pruner.sparsity() >= 0.5
    for changes, said in (
        ({"eval_strategy": "no"}, "early_stopping_patience needs evaluations"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 must be at least 1"),
        ({"pruning_end": 12}, "early_stopping_patience counts evaluations after the last change of shape"),
    ):
        with pytest.raises(UserError, match=said):
            make_trainer(tmp_path, tiny_model("bert"), options=options, **SHORT_RUN | waits | changes)


def test_a_recipe_watches_the_metric_of_its_task(inside: Path) -> None:
    words = ["--model_name_or_path", "encoder", "--train_file", "reviews.csv", "--text_column", "Review"]
    words += [
        "--label_column",
        "verdict",
        "--drop_unlabeled",
        "--drop_empty_texts",
        "--max_length",
        "16",
        "--eval_strategy",
        "epoch",
    ]
    recipe = load_recipe(None, [*words, "--early_stopping_patience", "2", "--output_dir", "out/watches", "--use_cpu"])
    _, _, data = load_inputs(recipe.model, recipe)
    set_task_arguments(recipe.training, data, recipe.given)
    assert recipe.training.metric_for_best_model == "accuracy" and recipe.training.greater_is_better is True


# ---------------------------------------------------------------------------- contributors


def test_what_contributors_and_papers_read_is_true() -> None:
    github = ROOT / ".github"
    forms = {file.name: yaml.safe_load(file.read_text()) for file in (github / "ISSUE_TEMPLATE").glob("*.yml")}
    asked = {name: [part["attributes"]["label"] for part in form.get("body", [])] for name, form in forms.items()}
    assert all(any("`apt-trainer env`" in label for label in asked[name]) for name in ("bug.yml", "idea.yml"))
    cited, project = (
        yaml.safe_load((github / "CITATION.cff").read_text()),
        tomllib.loads(PYPROJECT.read_text())["project"],
    )
    assert cited["version"] == project["version"] == __version__ and cited["license"] == project["license"]
    assert cited["authors"] == project["authors"]
    changes = (ROOT / "apt_trainer/README.md").read_text(encoding="utf-8").split("## Changes")[1]
    assert re.findall(r"^### (\S+)", changes, flags=re.MULTILINE)[0] == __version__
    guide = (github / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert all((github / link).resolve().exists() for link in re.findall(r"\]\(([^)]+)\)", guide))
    assert all((ROOT / path).exists() for path in re.findall(r"(?:scripts|tests|recipes)/[\w/.]+", guide))
