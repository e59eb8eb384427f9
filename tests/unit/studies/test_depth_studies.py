"""Studies of drops and of execution plans: variants of options, run, stopped and shown as training runs are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_ablation import ablate, ablate_warm
from texts import save_dense, words

from apt_trainer import load_pruned
from apt_trainer.report.comparison import compare, read_results
from apt_trainer.report.html import to_html
from apt_trainer.studies.ablation import runner


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_dense(tmp_path_factory.mktemp("dense"), words(120), num_hidden_layers=3)
    (folder / "test.txt").write_text(words(80, 7))
    return folder


def base(saved: Path, **more: Any) -> dict[str, Any]:
    place = {"model": str(saved / "model"), "data": str(saved / "text.txt"), "length": 8, "device": "cpu"}
    return place | more


def drops(saved: Path, **more: Any) -> dict[str, Any]:
    return base(saved, count=1, test=str(saved / "test.txt")) | more


def write(folder: Path, options: dict[str, Any], variants: dict[str, Any], **more: Any) -> str:
    (folder / "base.yaml").write_text(json.dumps(options))
    study = {"base": "base.yaml", "output_dir": str(folder / "out"), "seeds": [1], "variants": variants} | more
    (folder / "study.yaml").write_text(json.dumps(study))
    return str(folder / "study.yaml")


METRICS = ["sparsity", "perplexity.value", "dense.perplexity.value"]
KINDS = {"attention": {"kind": "attention"}, "mlp": {"kind": "mlp", "method": "nri"}}


@pytest.fixture(scope="module")
def finished(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """Folder, path and printed table of a study of drops that has run."""
    folder = tmp_path_factory.mktemp("study")
    study = write(folder, drops(saved), KINDS, command="drop", metrics=METRICS, baseline="attention")
    code, output, errors = ablate_warm("--study", study, "--jobs", "2")
    assert code == 0, errors + "".join(path.read_text() for path in folder.rglob("*.log"))
    return folder / "out", study, output


def test_a_study_of_drops(finished: tuple[Path, str, str]) -> None:
    out, study, output = finished
    records = read_results([str(out)])
    assert [record["variant"] for record in records] == ["attention", "mlp"]
    for record in records:
        folder = out / record["variant"] / "seed-1"
        assert record["metrics"]["total_params"] == sum(p.numel() for p in load_pruned(folder).parameters())
        recipe = json.loads((folder / "recipe.json").read_text())
        assert recipe.get("kind", "attention") == record["variant"] and recipe["seed"] == 1
    perplexity = records[1]["metrics"]["perplexity"]
    shown = f"{perplexity['value']:.4f} ({perplexity['low']:.4f} to {perplexity['high']:.4f}; "
    assert shown in output and "95 % interval of an only run" in output
    page = to_html(compare(records), records, "study")
    assert "perplexity against removed" in page and "Not measured" not in page
    assert ablate("--study", study)[2].startswith("2 runs, 2 of them finished earlier")
    code, _, errors = ablate("--study", study, "--count", "2")
    assert code == 2 and "is of another study" in errors


def test_a_drop_that_was_stopped_goes_on(finished: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    out, study, _ = finished
    folder, started = out / "mlp" / "seed-1", []
    whole = json.loads((folder / "metrics.json").read_text())
    report = json.loads((folder / "drop_report.json").read_text())
    (folder / "metrics.json").unlink()
    (folder / "impact.jsonl").write_text(_progress(report))
    run = runner.subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda words, **more: started.append(words) or run(words, **more))
    code, _, errors = ablate_warm("--study", study)
    assert code == 0, errors
    assert started[0][-1] == "--resume"
    again = json.loads((folder / "metrics.json").read_text())
    assert {**again, "choosing_seconds": 0} == {**whole, "choosing_seconds": 0}


def _progress(report: dict[str, Any]) -> str:
    """The file of a drop that was stopped after it had measured the full model."""
    same = {key: report[key] for key in ("model", "model_type", "parameters", "dtype", "calibration")}
    return "".join(json.dumps(line) + "\n" for line in (same, {"without": [], "loss": report["loss_before"]}))


def test_a_study_of_plans(saved: Path, tmp_path: Path) -> None:
    variants = {"full": {"methods": []}, "skip": {"methods": ["skip"]}}
    metrics = ["perplexity.value", "affected"]
    study = write(tmp_path, base(saved, starts=[0]), variants, command="paint", metrics=metrics, baseline="full")
    code, output, errors = ablate_warm("--study", study, "--jobs", "2")
    assert code == 0, errors + "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    full, skip = (record["metrics"] for record in read_results([str(tmp_path / "out")]))
    assert full["plans"]["full"]["perplexity"] == full["perplexity"]
    assert skip["plans"]["full"] == full["plans"]["full"] and skip["perplexity"] != full["perplexity"]
    assert {"low", "high"} <= skip["perplexity"].keys() and (full["affected"], skip["affected"]) == (0, 2)
    assert "| full" in output


@pytest.mark.parametrize(
    ("options", "study", "message"),
    [
        ({"knd": "mlp"}, {}, "variant 'a': unrecognized arguments: --knd=mlp"),
        ({"kind": "mpl"}, {}, "variant 'a': argument --kind: invalid choice: 'mpl'"),
        ({"kind": "heads"}, {}, "variant 'a': kind heads is ranked by nri"),
        ({"count": None}, {}, "variant 'a': one of the arguments --count --fraction --drop_list is required"),
        ({"output": "x"}, {}, "variant 'a' sets output, which the study sets"),
        ({"count": 1}, {"variants": {"a": {}, "b": {"kind": "attention"}}}, "variant 'b' equals 'a'"),
        ({}, {"command": "dorp"}, "command='dorp' is not known"),
    ],
)
def test_what_cannot_run_is_told_first(saved: Path, tmp_path: Path, options, study, message: str) -> None:
    path = write(tmp_path, drops(saved), **{"variants": {"a": options}, "command": "drop", **study})
    code, _, errors = ablate("--study", path)
    assert code == 2 and message in errors, errors
    assert not (tmp_path / "out").exists()
