"""What is measured of a drop on held-out data: numbers of the full and of the saved model; refusals come first."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import local_task, model_and_data, save_dense, tiny_llama, word_tokenizer, words
from transformers import BertConfig, BertForSequenceClassification

from apt_trainer import cli, load_pruned
from apt_trainer.evaluate.bootstrap import mean_interval
from apt_trainer.evaluate.harness import run_tasks
from apt_trainer.scoring.sublayers.impact import Losses
from apt_trainer.scoring.sublayers.loss import exp_loss, loss_sums
from apt_trainer.scoring.sublayers.units import find_units
from apt_trainer.scoring.sublayers.windows import from_text
from apt_trainer.studies import held_out
from apt_trainer.studies.held_out import loss_with_interval, mean_of_tasks
from apt_trainer.studies.metrics import sdr, sdr_relative


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_dense(tmp_path_factory.mktemp("dense"), words(120), num_hidden_layers=3)
    (folder / "test.txt").write_text(words(80, 7))
    return folder


def pairs(folder: Path) -> str:
    rows = [{"UID": "x", "sentence_good": words(5, 200 + i), "sentence_bad": words(6, 300 + i)} for i in range(12)]
    return local_task(folder, "blimp", rows)  # type: ignore[arg-type]


def drop(saved: Path, out: Path, *more: str) -> int:
    return cli.main(["drop", *model_and_data(saved), "--output", str(out), *more])


def metrics_in(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())  # type: ignore[no-any-return]


def test_both_models_are_measured_on_text_tasks_and_in_speed(saved: Path, tmp_path: Path, capsys) -> None:
    task = pairs(tmp_path)
    asked = ["--test", str(saved / "test.txt"), "--lm_eval", task, "--speed"]
    assert drop(saved, tmp_path / "out", "--kind", "mlp", "--count", "1", "--method", "nri", *asked) == 0
    found = metrics_in(tmp_path / "out")
    full, small = tiny_llama(num_hidden_layers=3), load_pruned(tmp_path / "out").eval()
    units = find_units(full)
    batches = from_text(words(80, 7), word_tokenizer(), full, units, 64, 8).batches
    for model, scores in ((full, found["dense"]), (small, found)):
        perplexity = scores["perplexity"]
        assert perplexity["value"] == pytest.approx(exp_loss(model, units, batches), rel=1e-6)
        low, high = mean_interval([total / n for total, n in loss_sums(model, units, batches)])
        assert (perplexity["low"], perplexity["high"]) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-6)
        (expected,) = run_tasks(model, word_tokenizer(), [task]).values()
        assert scores["tasks"]["my_blimp"]["value"] == expected["metrics"]["acc"]["value"]
        assert scores["accuracy"]["value"] == scores["tasks"]["my_blimp"]["value"]
    assert set(found["speedup"]) == {"prefill", "decode", "whole", "cache"} and found["speedup"]["cache"] == 1.0
    accuracies = found["dense"]["accuracy"]["value"], found["accuracy"]["value"]
    assert found["sdr"] == sdr(*(100 * value for value in accuracies), found["speedup"]["whole"])
    assert found["sdr_relative"] == sdr_relative(*accuracies, found["speedup"]["whole"])
    assert found["units"] == 1 and found["total_params"] == sum(p.numel() for p in small.parameters())
    printed = capsys.readouterr().out
    assert "speed, whole" in printed and "my_blimp" in printed and "perplexity" in printed


def test_a_quantised_model_is_measured_beside_the_full_one(saved: Path, tmp_path: Path) -> None:
    asked = ["--count", "1", "--test", str(saved / "test.txt")]
    assert drop(saved, tmp_path / "plain", *asked) == 0 == drop(saved, tmp_path / "int8", *asked, "--quantize", "int8")
    plain, quantised = metrics_in(tmp_path / "plain"), metrics_in(tmp_path / "int8")
    assert quantised["quantised"]["form"] == "int8" and quantised["quantised"]["layers"] == 3 * 7 - 4
    assert quantised["dense"] == plain["dense"]
    assert 0 < abs(quantised["perplexity"]["value"] / plain["perplexity"]["value"] - 1) < 0.05
    saved_weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "int8")]
    assert saved_weights[0] == saved_weights[1]  # what is saved is not quantised


def test_rows_with_labels_have_a_loss_that_is_no_perplexity(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, num_labels=3, max_position_embeddings=32, **sizes)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": words(4, i), "label": i % 3}) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    place = ["drop", "--model", str(tmp_path / "model"), "--device", "cpu", "--batch_size", "4"]
    data = ["--data", str(tmp_path / "rows.jsonl"), "--test", str(tmp_path / "rows.jsonl")]
    assert cli.main([*place, *data, "--count", "1", "--output", str(tmp_path / "out")]) == 0
    found = metrics_in(tmp_path / "out")
    assert "perplexity" not in found and found["exp_loss"]["value"] == pytest.approx(found["loss_after"], rel=1e-6)
    assert found["dense"]["exp_loss"]["value"] == pytest.approx(found["loss_before"], rel=1e-6)
    assert cli.main([*place, "--data", "some text", "--lm_eval", "piqa_local", "--count", "1", "--output", "x"]) == 2


def test_the_full_model_is_not_measured_twice(saved: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    asked = ["--count", "1", "--test", str(saved / "test.txt")]
    assert drop(saved, tmp_path / "first", *asked, "--kind", "mlp") == 0
    first = tmp_path / "first" / "metrics.json"
    measured, sums = [], held_out.loss_sums
    monkeypatch.setattr(held_out, "loss_sums", lambda model, *rest: measured.append(model) or sums(model, *rest))
    assert drop(saved, tmp_path / "second", *asked, "--full", str(first)) == 0
    assert len(measured) == 1  # the smaller model
    assert metrics_in(tmp_path / "second")["dense"] == metrics_in(tmp_path / "first")["dense"]
    capsys.readouterr()
    for more, file, message in (
        (["--test_samples", "3"], first, "was measured on another model, text or tasks"),
        ([], tmp_path / "first" / "drop_report.json", "holds no scores of a full model"),
        ([], tmp_path / "none.json", "cannot be read"),
    ):
        assert drop(saved, tmp_path / "third", *asked, *more, "--full", str(file)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "third").exists()


@pytest.mark.parametrize("kind", ["joint", "block"])
def test_a_drop_after_an_analysis_measures_nothing_twice(kind: str, saved: Path, tmp_path: Path, monkeypatch) -> None:
    assert cli.main(["analyze", *model_and_data(saved), "--methods", "nri", "--output", str(tmp_path / "scores")]) == 0
    asked = ["--kind", kind, "--count", "2", "--method", "nri"]
    assert drop(saved, tmp_path / "alone", *asked) == 0
    measured: list[tuple[str, ...]] = []
    without = Losses.without
    monkeypatch.setattr(Losses, "without", lambda self, off: measured.append(self.key(off)) or without(self, off))
    known: dict[tuple[str, ...], float] = {}
    init = Losses.__init__
    monkeypatch.setattr(Losses, "__init__", lambda self, *args: (known.update(args[3]), init(self, *args))[1])
    assert drop(saved, tmp_path / "after", *asked, "--scores", str(tmp_path / "scores" / "scores.json")) == 0
    assert measured and set(measured) <= known.keys()
    steps = [json.loads((tmp_path / name / "drop_report.json").read_text())["steps"] for name in ("alone", "after")]
    assert steps[0] == steps[1]


def test_scores_that_do_not_fit_are_told_first(saved: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["analyze", *model_and_data(saved), "--methods", "cosine", "--output", str(tmp_path / "a")]) == 0
    scores = tmp_path / "a" / "scores.json"
    for more, message in (
        (["--method", "nri"], "holds no losses of apt-trainer analyze"),
        (["--method", "cosine"], "only method nri ranks by"),
    ):
        assert drop(saved, tmp_path / "out", "--count", "1", *more, "--scores", str(scores)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert drop(saved, tmp_path / "out", "--count", "1", "--method", "nri", "--scores", "missing.json") == 2
    found = json.loads(scores.read_text()) | {"loss_dense": 1.0, "dtype": "bfloat16"}
    scores.write_text(json.dumps(found))
    assert drop(saved, tmp_path / "out", "--count", "1", "--method", "nri", "--scores", str(scores)) == 2
    assert "of another model or other data" in capsys.readouterr().err


def test_numbers_that_are_not_finite_are_none_and_an_only_batch_has_no_interval() -> None:
    assert loss_with_interval([(1e9, 2), (1.0, 2)]) == {"value": None}
    assert loss_with_interval([(2.0, 2), (0.0, 0)]) == {"value": pytest.approx(math.e)}
    found = loss_with_interval([(2.0, 2), (6.0, 2)])
    assert found["value"] == pytest.approx(math.exp(2)) and found["low"] == pytest.approx(math.e)


def test_a_mean_of_tasks_is_surer_than_each() -> None:
    one = {"value": 0.5, "low": 0.4, "high": 0.6}
    found = mean_of_tasks({"a": one, "b": {"value": 0.7, "low": 0.6, "high": 0.8}})
    assert found["value"] == pytest.approx(0.6)
    assert found["high"] - found["value"] == pytest.approx(0.1 / math.sqrt(2)) == pytest.approx(0.6 - found["low"])
    assert mean_of_tasks({"a": one, "b": {"value": 0.7}}) == {"value": pytest.approx(0.6)}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--test", "missing.txt"], "there is no such file"),
        (["--lm_eval", "piqa_lokal"], "piqa_lokal"),
        (["--quantize", "int8"], "quantize goes with what is measured"),
    ],
)
def test_what_cannot_be_measured_is_told_first(saved: Path, tmp_path: Path, capsys, more, message: str) -> None:
    assert drop(saved, tmp_path / "out", "--count", "1", *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
