"""Curves of drops: each point equals the model without those units, a sweep goes on, and bad input is told first."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from texts import local_task, save_dense, tiny_llama, word_tokenizer, words

from apt_trainer import cli
from apt_trainer.errors import UserError
from apt_trainer.measure import count_parameters
from apt_trainer.report.curve import best_by_share, curve_markdown
from apt_trainer.scoring.sublayers.cosine import cosine_scores
from apt_trainer.scoring.sublayers.drop import drop
from apt_trainer.scoring.sublayers.loss import exp_loss
from apt_trainer.scoring.sublayers.units import find_units
from apt_trainer.scoring.sublayers.windows import from_text
from apt_trainer.studies.curve import Ranking
from apt_trainer.studies.select import CosineRanker, RandomRanker, candidates_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_dense(tmp_path_factory.mktemp("dense"), words(120), num_hidden_layers=4)
    (folder / "test.txt").write_text(words(80, 7))
    return folder


def command(saved: Path, out: Path, *more: str) -> list[str]:
    data = ["--data", str(saved / "text.txt"), "--test", str(saved / "test.txt"), "--length", "8"]
    return ["curve", "--model", str(saved / "model"), *data, "--device", "cpu", "--output", str(out), *more]


def found_in(out: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((out / "curve.json").read_text())  # type: ignore[no-any-return]


def test_each_point_is_the_loss_of_the_model_that_is_cut(saved: Path, tmp_path: Path, capsys) -> None:
    words_ = ["--rankings", "cosine", "cosine:iterative", "nri:none", "reverse", "random", "--counts", "1", "3"]
    assert cli.main(command(saved, tmp_path, *words_, "--seeds", "2")) == 0
    found = found_in(tmp_path)
    assert len(found["rows"]) == 4 * 5 * 2
    units = find_units(tiny_llama(num_hidden_layers=4))
    batches = from_text(words(80, 7), word_tokenizer(), tiny_llama(num_hidden_layers=4), units, 64, 8).batches
    labels = {units.label(unit): unit for unit in units.members}
    dense = count_parameters(tiny_llama(num_hidden_layers=4))
    blocks = sum(count_parameters(layer) for layer in tiny_llama(num_hidden_layers=4).model.layers)
    for row in found["rows"]:
        if row["ranking"] == "random":
            assert row["seeds"] == 2 and row["loss"] == pytest.approx(sum(row["losses"]) / 2)
            continue
        model = tiny_llama(num_hidden_layers=4)
        gone = [labels[label] for label in row["units"]]
        assert len(gone) == row["count"]
        drop(model, find_units(model), gone)
        assert row["loss"] == pytest.approx(math.log(exp_loss(model, units, batches)), rel=1e-5)
        removed = (dense - count_parameters(model)) / blocks
        assert row["parameter_share"] == pytest.approx(removed, abs=0.02)  # a norm before a sublayer may stay
    assert (tmp_path / "curve.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_the_figure_compares_kinds_by_drops_that_no_other_beats() -> None:
    points = [(0.1, 3.4), (0.1, 3.2), (0.2, 3.9), (0.25, 3.8), (0.3, None)]
    rows = [{"parameter_share": share, "loss": loss} for share, loss in points]
    assert best_by_share(rows) == [(0.1, 3.2), (0.25, 3.8)]


def test_orders_are_those_of_the_rankings(saved: Path, tmp_path: Path) -> None:
    words_ = ["--kinds", "joint", "--rankings", "cosine", "cosine:iterative", "random", "--counts", "1", "2", "3"]
    assert cli.main(command(saved, tmp_path, *words_, "--seeds", "1")) == 0
    rows = {(row["ranking"], row["count"]): row["units"] for row in found_in(tmp_path)["rows"]}
    model = tiny_llama(num_hidden_layers=4)
    units = find_units(model)
    candidates = candidates_of(units, "joint")
    batches = from_text(words(120), word_tokenizer(), model, units, 64, 8).batches
    once = [units.label(one.unit) for one in CosineRanker(model, units, batches).rank(candidates, ())]
    drawn = [units.label(one.unit) for one in RandomRanker(0).rank(candidates, ())]
    gone: list = []  # type: ignore[type-arg]
    for count in (1, 2, 3):
        assert rows["cosine", count] == once[:count] and rows["random", count] == drawn[:count]
        scores = cosine_scores(model, units, batches, off=gone).scores
        gone.append(min((unit for unit in candidates if unit not in gone), key=scores.__getitem__))
        assert rows["cosine:iterative", count] == [units.label(unit) for unit in gone]


def test_a_sweep_stops_goes_on_and_grows(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from apt_trainer.studies import curve as verb

    out, calls = tmp_path / "out", []

    def interrupted(*args):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return exp_loss(*args)

    monkeypatch.setattr(verb, "exp_loss", interrupted)
    sweep = command(saved, out, "--rankings", "cosine", "reverse", "--counts", "1", "2")
    assert cli.main(sweep) == 130 and not (out / "curve.json").exists()
    assert cli.main(sweep) == 2 and "--resume" in capsys.readouterr().err
    other = [word if word != "8" else "9" for word in sweep]
    assert cli.main([*other, "--resume"]) == 2 and "another model, data or tasks" in capsys.readouterr().err
    assert cli.main([*sweep, "--resume"]) == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    measured = [tuple(line["of"]) for line in lines[1:] if line["what"] == "loss"]
    assert len(set(measured)) == len(measured) == len(calls) - 1  # each once; the fourth was broken off
    before = found_in(out)["rows"]
    more = [*sweep[: sweep.index("--counts")], "--counts", "1", "2", "3", "--resume"]
    assert cli.main(more) == 0
    after = found_in(out)["rows"]
    assert [row for row in after if row["count"] < 3] == before and len(after) == len(before) * 3 // 2


def test_tasks_run_where_they_are_asked_for(saved: Path, tmp_path: Path) -> None:
    piqa = [
        {"goal": words(4, i), "sol1": words(3, 50 + i), "sol2": words(2, 99 + i), "label": i % 2} for i in range(6)
    ]
    task = local_task(tmp_path, "piqa", piqa)
    words_ = ["--kinds", "mlp", "--rankings", "reverse", "--counts", "1", "2", "--lm_eval", task, "--task_counts", "2"]
    assert cli.main(command(saved, tmp_path / "out", *words_, "--speed")) == 0
    found = found_in(tmp_path / "out")
    assert set(found["full"]["tasks"]) == {"my_piqa"} and [("tasks" in row) for row in found["rows"]] == [False, True]
    row, full = found["rows"][1], found["full"]["tasks"]["my_piqa"]
    assert 0 <= row["mean"] == row["tasks"]["my_piqa"] <= 1
    speed = row["speedup"]
    assert set(speed) == {"prefill", "decode", "whole", "cache"} and min(speed.values()) > 0 and speed["cache"] == 1.0
    if row["sdr"] is not None:
        assert row["sdr"] == pytest.approx(100 * (full - row["mean"]) / (speed["whole"] - 1) / 100)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["of"] for line in lines[1:] if line["what"] == "speed"] == [["2 mlp"]]
    assert "speed-up (decode) without units of kind mlp" in (tmp_path / "out" / "curve.md").read_text()
    table = (tmp_path / "out" / "curve.md").read_text()
    assert "my_piqa without units of kind mlp" in table
    assert "bytes of the cache over those of the full model without units of kind mlp" in table


def test_the_table_shows_relative_degradation_and_the_cache_where_they_were_measured() -> None:
    full = {"loss": 1.0, "perplexity": 2.7, "tasks": {}}
    row = {"kind": "attention", "ranking": "reverse", "count": 3, "parameter_share": 0.1, "perplexity": 3.0}
    found = {"model": "m", "loss_name": "perplexity", "full": full, "rows": [row]}
    assert "SDR" not in curve_markdown(found) and "cache" not in curve_markdown(found)
    measured = {"sdr": 0.123, "sdr_relative": 0.256, "speedup": {"whole": 1.1, "cache": 0.9}}
    table = curve_markdown(found | {"rows": [row | measured]})
    assert "relative SDR without units of kind attention" in table and "0.256" in table
    assert "bytes of the cache over those of the full model" in table and "90.0%" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--rankings", "taylor"], "ranking"),
        (["--rankings", "cosine:params"], "'params' does not go with cosine"),
        (["--rankings", "random:iterative"], "'iterative' does not go with random"),
        (["--counts", "99"], "count=99 is more than the"),
        (["--lm_eval", "x", "--task_counts", "7"], "task_counts"),
        (["--test", "missing.txt"], "there is no such file"),
        (["--test", "three words only"], "taken as the text"),
        (["--protect", "77"], "protect=77 is no layer"),
    ],
)
def test_bad_input_is_told_before_weights_load(
    changes: list[str], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    from apt_trainer.studies import inputs

    monkeypatch.setattr(inputs, "load_saved", lambda settings: pytest.fail("weights were loaded"))
    out = tmp_path / "out"
    assert cli.main(command(saved, out, *changes)) == 2
    assert message in capsys.readouterr().err and not out.exists()


def test_a_full_model_that_is_broken_writes_nothing(saved: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from apt_trainer.studies import curve as verb

    monkeypatch.setattr(verb, "exp_loss", lambda *args: math.inf)
    assert cli.main(command(saved, tmp_path / "out", "--counts", "1")) == 2
    assert "not finite" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["cosine", "cosine:iterative", "nri:latency", "nri:none:iterative", "random"])
def test_the_text_of_a_ranking_is_read_back(text: str) -> None:
    assert str(Ranking.read(text)) == text
    assert Ranking.read("nri") == Ranking("nri", "params")
    with pytest.raises(UserError, match="cosine, nri"):
        Ranking.read("best")
