"""Studies: what is refused, what is run, continued and reported; tables and pages of their results."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
import warm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from apt_trainer import cli
from apt_trainer.cli.ablate import study_commands
from apt_trainer.errors import UserError
from apt_trainer.report.comparison import compare, read_results, rows, to_csv
from apt_trainer.report.html import to_html
from apt_trainer.settings.recipe import read_values
from apt_trainer.store.events import read_events
from apt_trainer.store.lock import FolderLock
from apt_trainer.studies.ablation import runner
from apt_trainer.studies.ablation.study import read_study

REPOSITORY = Path(__file__).resolve().parents[3]
VARIANTS = {"lora": {"target_sparsity": None, "distillation": "none"}, "apt": {"distillation": "none"}}


def make_base(folder: Path) -> Path:
    """A recipe of four steps, with its model, tokenizer and data."""
    words = ["[PAD]", "[UNK]", "good", "bad", "film"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "model"
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder / "model")
    lines = [json.dumps({"text": f"{words[2 + i % 2]} film", "label": i % 2}) for i in range(24)]
    (folder / "train.jsonl").write_text("\n".join(lines))
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "train.jsonl"),
        "max_length": 8,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_pruning_events": 1,
        "pruning_start": 1,
        "pruning_end": 2,
        "min_hidden": 8,
        "save_strategy": "steps",
        "save_steps": 2,
        "measure_latency": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "output_dir": "out/unused",
    }
    (folder / "base.yaml").write_text(json.dumps(recipe))
    return folder / "base.yaml"


def write_study(folder: Path, **changes: object) -> str:
    content = {"base": "base.yaml", "output_dir": str(folder / "out"), "seeds": [1], "variants": VARIANTS}
    path = folder / "study.yaml"
    path.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not ...}))
    return str(path)


def ablate(*words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the verb, run in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.chdir(REPOSITORY), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = cli.main(["ablate", *words])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, output.getvalue(), errors.getvalue()


def ablate_warm(*words: str) -> tuple[int, str, str]:
    """As ``ablate``; the runs of the study start warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm.python())
        return ablate(*words)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder with a study of two variants and one seed that has run, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    make_base(folder)
    code, output, errors = ablate_warm("--study", write_study(folder, baseline="lora"), "--jobs", "2")
    assert code == 0, errors + "".join(path.read_text() for path in folder.rglob("*.log"))
    return folder, output


@pytest.fixture
def copy(finished, tmp_path):
    """The finished study, to be changed by one test; it stays where its recipes say it is."""
    folder = finished[0]
    shutil.copytree(folder / "out", tmp_path / "kept")
    yield folder
    shutil.rmtree(folder / "out")
    shutil.copytree(tmp_path / "kept", folder / "out")


def test_common_keys_are_where_variants_start(tmp_path):
    make_base(tmp_path)
    variants = {"a": {}, "b": {"lora_r": 3}, "c": {"max_steps": 9}}
    study = read_study(write_study(tmp_path, common={"lora_r": 5, "max_steps": 7}, variants=variants))
    assert [(run.given["lora_r"], run.given["max_steps"]) for run in study.runs] == [(5, 7), (3, 7), (5, 9)]


def test_keys_of_the_command_line_hold_for_every_variant(tmp_path):
    make_base(tmp_path)
    path = write_study(tmp_path, variants={"a": {}, "b": {"lora_r": 3}})
    study = read_study(path, seeds=[5], overrides=["--max_steps", "9", "--use_cpu", "true"])
    assert [(run.seed, run.given["max_steps"], run.given["use_cpu"]) for run in study.runs] == [(5, 9, True)] * 2
    assert [run.given.get("lora_r", 8) for run in study.runs] == [8, 3]
    assert study.runs[0].digest != read_study(path).runs[0].digest


def test_null_on_the_command_line_unsets_a_list_of_the_study(tmp_path):
    make_base(tmp_path)
    path = write_study(tmp_path, variants={"a": {"lm_eval_tasks": ["piqa_local"]}})
    run = read_study(path, overrides=["--lm_eval_tasks", "null"]).runs[0]
    assert run.given["lm_eval_tasks"] == [] and "--lm_eval_tasks=[]" in run.words


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--seed", "2"], "sets seed, which the study sets for each run"),
        (["--lora_rr", "2"], "lora_rr"),
        (["--lora_r", "4"], "variant 'b' equals 'a' in all settings"),
    ],
)
def test_keys_of_the_command_line_that_no_study_can_take_are_refused(tmp_path, overrides, message):
    make_base(tmp_path)
    with pytest.raises(UserError, match=message):
        read_study(write_study(tmp_path, variants={"a": {}, "b": {"lora_r": 3}}), overrides=overrides)


# ---- running ----


def test_a_study_runs_and_its_table_shows_what_was_measured(finished):
    folder, output = finished
    metrics = {name: json.loads((folder / f"out/{name}/seed-1/metrics.json").read_text()) for name in VARIANTS}
    assert metrics["lora"]["sparsity"] == 0 < metrics["apt"]["sparsity"]
    assert [m["train_steps"] for m in metrics.values()] == [4, 4]
    records = read_events(folder / "out/results.jsonl")
    assert sorted(record["variant"] for record in records) == ["apt", "lora"]
    cells = compare(read_results([str(folder / "out")])).cells
    for name, of in metrics.items():
        for key in ("task_metric", "sparsity", "train_seconds", "peak_memory_bytes", "disk_bytes"):
            assert cells[name][key].mean == of[key]
    assert cells["apt"]["sparsity"].change == metrics["apt"]["sparsity"]
    assert cells["apt"]["disk_bytes"].ratio == metrics["apt"]["disk_bytes"] / metrics["lora"]["disk_bytes"]
    row = next(line for line in output.splitlines() if line.startswith("| apt"))
    assert f"{metrics['apt']['sparsity']:.4f} (+{metrics['apt']['sparsity']:.4f})" in row


def test_single_runs_give_the_same_table_as_their_study(finished, capsys):
    folder, output = finished
    runs = [str(folder / f"out/{name}/seed-1") for name in ("lora", "apt")]
    assert cli.main(["report", *runs, "--baseline", "lora"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(output.splitlines())


def test_what_has_finished_is_not_run_again(copy, monkeypatch):
    monkeypatch.setattr(runner, "_start", lambda *_: pytest.fail("started"))
    before = (copy / "out/results.jsonl").read_bytes()
    study = write_study(copy, baseline="lora")
    assert ablate("--study", study)[0] == 0
    assert sorted((copy / "out/results.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())
    (copy / "out/results.jsonl").unlink()  # made from the folders again
    assert ablate("--study", study)[0] == 0
    assert sorted((copy / "out/results.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())


def test_a_killed_run_continues_and_a_failed_one_is_reported(copy):
    apt, broken = (copy / f"out/{name}/seed-1" for name in ("apt", "broken"))
    (apt / "metrics.json").unlink()
    (apt / "checkpoint-4/trainer_state.json").unlink()  # killed while saving
    broken.mkdir(parents=True)
    (broken / "left.over").touch()  # killed before the first checkpoint
    study = write_study(copy, variants=VARIANTS | {"broken": {"lora_target_modules": ["nothing"]}})
    code, output, errors = ablate_warm("--study", study, "--jobs", "2")
    assert code == 1
    assert errors.startswith("3 runs, 1 of them finished earlier\n")
    assert "failed: broken, seed 1" in errors
    assert "error: lora_target_modules names 'nothing', which is no linear in a layer." in errors
    assert "no linear in a layer" in (copy / "out/broken/seed-1.log").read_text()
    assert not (broken / "left.over").exists()
    assert sorted(line.split()[1] for line in output.splitlines()[2:4]) == ["apt", "lora"]
    assert json.loads((apt / "recipe.json").read_text())["resume_from_checkpoint"] is True
    assert json.loads((apt / "metrics.json").read_text())["train_steps"] == 4
    assert len(read_events(copy / "out/results.jsonl")) == 2
    cells = compare(read_results([str(copy / "out")])).cells
    assert cells["apt"]["train_seconds"].mean is None  # of the last part only, so not comparable
    assert cells["lora"]["train_seconds"].mean > 0


def test_a_termination_stops_the_runs(tmp_path, monkeypatch):
    make_base(tmp_path)
    processes, start = [], runner._start

    def start_and_terminate(*words):
        processes.append(start(*words))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return processes[0]

    monkeypatch.setattr(runner, "_start", start_and_terminate)
    with pytest.raises(SystemExit) as caught:
        ablate("--study", write_study(tmp_path))
    assert caught.value.code == 143
    assert processes[0].poll() == -signal.SIGTERM


def test_runs_die_with_a_study_that_is_killed(tmp_path):
    make_base(tmp_path)
    command = [sys.executable, "-m", "apt_trainer", "ablate", "--study", write_study(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    while "lora, seed 1: started" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.communicate()
    with FolderLock(tmp_path / "out", patience=10):  # a run that still lives holds it
        pass


def test_runs_share_the_cores(monkeypatch, tmp_path):
    make_base(tmp_path)
    environments = []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, env, **kw: environments.append(env))
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    run = read_study(write_study(tmp_path)).runs[0]
    runner._start(run, 3, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    runner._start(run, 3, 0)
    assert [environment["OMP_NUM_THREADS"] for environment in environments] == ["2", "5"]


# ---- reading ----


def test_overrides_reach_the_run_as_the_study_gives_them(tmp_path):
    make_base(tmp_path)
    overrides = {"run_name": "5", "learning_rate": 1e-5, "prune_targets": ["heads"], "target_sparsity": None}
    overrides |= {
        "eval_strategy": "no",
        "lr_scheduler_kwargs": {"a": [1]},
        "text_column": "null",
    }
    study = read_study(write_study(tmp_path, seeds=[3, 1], variants={"a": None, "b": overrides}))
    assert [(run.seed, run.variant) for run in study.runs] == [(3, "a"), (3, "b"), (1, "a"), (1, "b")]
    run = study.runs[1]
    assert run.folder == tmp_path / "out/b/seed-3"
    assert overrides.items() <= run.given.items()
    assert run.words[:2] == ["--config", str(tmp_path / "base.yaml")]
    assert read_values(run.words[1], run.words[2:]) == run.given
    assert study.runs[3].digest == run.digest != study.runs[0].digest


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes/ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path):
    study = read_study(str(path), commands=study_commands())
    assert study.output_dir == Path("out/ablations") / path.stem
    assert len({run.digest for run in study.runs}) * len({run.seed for run in study.runs}) == len(study.runs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": {}}, "key='variant' is not known. Choose one of: base, output_dir, seeds, variants"),
        ({"base": ...}, "base=None must be text."),
        ({"output_dir": 3}, "output_dir=3 must be text."),
        ({"base": "none.yaml"}, "base='none.yaml' does not exist. Looked for"),
        ({"seeds": ...}, "seeds=None must be a list of different whole numbers."),
        ({"seeds": []}, "seeds=[] must be"),
        ({"seeds": [1, 1]}, "seeds=[1, 1] must be"),
        ({"seeds": [True]}, "seeds=[True] must be"),
        ({"variants": {}}, "variants={} must be a mapping of names"),
        ({"variants": {"../a": {}}}, "variants={'../a': {}} must be"),
        ({"variants": {"a": 1}}, "variants={'a': 1} must be"),
        ({"variants": {"a": {"lora_R": 4}}}, "variant 'a': unknown key 'lora_R'. Did you mean 'lora_r'?"),
        ({"variants": {"a": {"lora_r": "x"}}}, "variant 'a': lora_r='x' has the wrong type: expected a whole number."),
        ({"common": [1]}, "common=[1] must be a mapping of keys"),
        ({"common": {"lora_R": 4}}, "variant 'lora': unknown key 'lora_R'. Did you mean 'lora_r'?"),
        ({"variants": {"a": {"seed": 1}}}, "variant 'a' sets seed, which the study sets for each run. Remove it."),
        ({"variants": {"a": {}, "b": {"lora_r": 8}}}, "variant 'b' equals 'a' in all settings. Remove one of them."),
        ({"baseline": "ap"}, "baseline='ap' is not known. Choose one of: lora, apt. Did you mean 'apt'?"),
        ({"metrics": []}, "metrics=[] must be a list of keys of metrics.json"),
    ],
)
def test_a_bad_study_is_refused(tmp_path, changes, message):
    make_base(tmp_path)
    path = write_study(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_study(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_values_that_no_run_could_use_are_refused(tmp_path):
    make_base(tmp_path)
    with pytest.raises(UserError, match=r"variant 'a': .*base.yaml: lora_r=0 must be at least 1"):
        read_study(write_study(tmp_path, variants={"a": {"lora_r": 0}}))


def test_a_name_given_twice_is_refused(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("variants:\n  a: {}\n  a: {lora_r: 4}\n")
    with pytest.raises(UserError, match="line 3: key 'a' appears twice"):
        read_study(str(path))


def test_a_missing_study_is_refused(capsys):
    assert cli.main(["ablate", "--study", "none.yaml"]) == 2
    assert "error: none.yaml: no such file. Give a study with --study, or one that comes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": {"lora": VARIANTS["lora"]}}, "results.jsonl is of another study: .* has no variant 'apt'"),
        ({"variants": VARIANTS | {"apt": {"lora_r": 4}}}, "or gives it another recipe. Choose another output_dir"),
        ({"seeds": [2]}, "has no variant '(lora|apt)' with seed 1"),
    ],
)
def test_results_of_another_study_are_refused_and_stay(copy, changes, message):
    before = (copy / "out/results.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        runner.run_study(read_study(write_study(copy, **changes)))
    assert (copy / "out/results.jsonl").read_bytes() == before


def test_a_folder_with_another_run_is_refused_and_stays(copy):
    (copy / "out/results.jsonl").unlink()
    (copy / "out/apt/seed-1/metrics.json").unlink()
    study = read_study(write_study(copy, variants=VARIANTS | {"apt": {"lora_r": 4, "distillation": "none"}}))
    with pytest.raises(UserError, match=r"seed-1 holds a run with another recipe; different: lora_r\. Choose"):
        runner.run_study(study)
    assert (copy / "out/apt/seed-1/recipe.json").exists()


def test_a_folder_in_use_is_refused(copy):
    study = read_study(write_study(copy))
    with FolderLock(study.output_dir), pytest.raises(UserError, match="Another run is writing to .* Wait for it"):
        runner.run_study(study)
    with pytest.raises(UserError, match="jobs=0 must be at least 1"):
        runner.run_study(study, jobs=0)


def test_a_full_disk_leaves_earlier_results(copy, monkeypatch):
    before = (copy / "out/results.jsonl").read_bytes()

    def full(path, record):
        Path(path).write_text('{"cut')
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(runner, "append_event", full)
    code, _, errors = ablate("--study", write_study(copy))
    assert code == 1
    assert "error: no space left on device" in errors
    assert (copy / "out/results.jsonl").read_bytes() == before


# ---- comparing ----


def record(variant: str, seed: int, accuracy: float, **changes: object) -> dict:
    names = {"0": 4, "1": 4, "10": 4}
    metrics = {
        "metric_name": "accuracy",
        "task_metric": accuracy,
        "train_seconds": 10.0 * seed,
        "peak_memory_bytes": 5e8,
        "latency_ms": {"pruned": {"32": {"median_ms": 8.0}, "1": {"median_ms": 2.0 if variant == "apt" else 4.0}}},
    }
    kept = {
        "heads": {"0": 1, "1": 2, "10": 3},
        "neurons": names,
        "hidden": 8,
        "dense": {"heads": names, "neurons": names, "hidden": 16},
    }
    return {"variant": variant, "seed": seed, "resumed": False, "metrics": metrics, "kept": kept} | changes


RECORDS = [
    *(record("full", seed, accuracy, kept=None) for seed, accuracy in ((1, 0.9), (2, 0.8))),
    *(record("apt", seed, accuracy) for seed, accuracy in ((2, 0.7), (1, 0.6), (3, 0.8))),
]


def test_means_spreads_and_changes():
    comparison = compare(RECORDS, "full")
    full, apt = (comparison.cells[name]["task_metric"] for name in ("full", "apt"))
    assert (full.n, full.change, apt.n) == (2, None, 3)
    assert [full.mean, full.std] == pytest.approx([0.85, 0.1 / 2**0.5])
    assert [apt.mean, apt.std] == pytest.approx([0.7, 0.1])
    assert [apt.change, apt.change_std] == pytest.approx([-0.2, 0.2 / 2**0.5])  # seeds 1 and 2: -0.3 and -0.1
    assert apt.ratio is None
    assert comparison.cells["apt"]["train_seconds"].ratio == 1.0  # over the seeds that both have
    row = rows(comparison)[1]
    assert row["seeds"] == "3"
    assert row["accuracy"] == "0.7000 ± 0.1000 (-0.2000 ± 0.1414)"
    assert row["training time"] == "20.0 s ± 10.0 s (1.00×)"
    assert row["latency, batch 1"] == "2.00 ms ± 0.00 ms (0.50×)"
    assert list(row)[-2:] == ["latency, batch 1", "latency, batch 32"]


def test_the_table_shows_the_metrics_of_the_study():
    shown = [r | {"shown": ["scores.f1", "latency_ms.pruned.1.median_ms"], "baseline": "full"} for r in RECORDS]
    comparison = compare(shown)
    assert comparison.baseline == "full"
    assert rows(comparison)[1] == {
        "variant": "apt",
        "seeds": "3",
        "scores.f1": "–",
        "latency, batch 1": "2.00 ms ± 0.00 ms (0.50×)",
    }


def test_costs_are_told_by_the_last_word_whatever_parts_it_from_the_rest():
    key = "time_to_accuracy.seconds"
    records = [record(name, 1, 0.9, shown=[key], baseline="full") for name in ("full", "apt")]
    for each, seconds in zip(records, (810.0, 405.0), strict=True):
        each["metrics"]["time_to_accuracy"] = {"seconds": seconds}
    assert list(rows(compare(records))[1].values())[2:] == ["6 min 45 s (0.50×)"]


def test_a_cell_says_over_how_many_of_the_seeds_it_is():
    key = "time_to_accuracy.seconds"
    records = [record(name, seed, 0.9, shown=[key, "sparsity"]) for name in ("full", "apt") for seed in (1, 2, 3)]
    for each, seconds in zip(records, (60.0, 60.0, 60.0, None, 30.0, None), strict=True):
        each["metrics"] |= {"time_to_accuracy": {"seconds": seconds}, "sparsity": 0.5}
    full, apt = (list(row.values()) for row in rows(compare(records, "full")))
    assert full == ["full", "3", "1 min 00 s ± 0.0 s", "0.5000 ± 0.0000"]
    assert apt == ["apt", "3", "30.0 s (1 of 3; 0.50×)", "0.5000 ± 0.0000 (+0.0000 ± 0.0000)"]
    for each in records:
        each["metrics"]["time_to_accuracy"]["seconds"] = each["metrics"]["sparsity"] = None
    assert [row["seeds"] for row in rows(compare(records))] == ["3", "3"]


def test_memory_of_a_resumed_run_counts_as_little_as_its_time():
    resumed, whole = record("apt", 1, 0.9, resumed=True), record("apt", 2, 0.9)
    cells = compare([resumed, whole]).cells["apt"]
    assert (cells["peak_memory_bytes"].n, cells["train_seconds"].n, cells["task_metric"].n) == (1, 1, 2)
    assert rows(compare([resumed, whole]))[0]["peak memory"] == "500.0 MB (1 of 2)"


def test_a_metric_that_no_run_has_is_named(caplog):
    shown = ["task_metric", "peak_memory_byte", "time_to_accuracy.seconds"]
    records = [record("apt", 1, 0.9, shown=shown)]
    records[0]["metrics"]["time_to_accuracy"] = {"mark": 0.8, "seconds": None}  # measured, and never reached
    compare(records)
    assert [each.getMessage() for each in caplog.records] == [
        "metrics: no run has 'peak_memory_byte'. Did you mean peak_memory_bytes?"
    ]
    caplog.clear()
    compare([records[0] | {"shown": ["task_metric", "qqqq"]}])
    assert [each.getMessage() for each in caplog.records] == [
        "metrics: no run has 'qqqq'. They have task_metric, train_seconds, peak_memory_bytes, "
        "latency_ms.pruned.1.median_ms, latency_ms.pruned.32.median_ms."
    ]
    with pytest.raises(UserError, match="no run has 'qqqq'. They have task_metric"):
        compare([records[0] | {"shown": ["qqqq"]}])


def test_results_of_another_verb_are_refused(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text('{"kind": "heads", "ranking": "nri", "seed": 0, "loss": 3.0}\n')
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}/results.jsonl, line 1, is of no run" in capsys.readouterr().err


def test_a_full_disk_leaves_an_earlier_report(finished, tmp_path, monkeypatch, capsys):
    output = tmp_path / "table.md"
    output.write_text("earlier")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert cli.main(["report", str(finished[0] / "out"), "--output", str(output)]) == 1
    assert "no space left on device" in capsys.readouterr().err
    assert output.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [output]


def test_csv_has_every_number():
    table = list(csv.DictReader(io.StringIO(to_csv(compare(RECORDS, "full")))))
    assert [line["variant"] for line in table] == ["full", "apt"]
    assert float(table[1]["task_metric.change"]) == pytest.approx(-0.2)
    assert table[0]["task_metric.change"] == ""
    assert float(table[1]["latency_ms.pruned.1.median_ms.ratio"]) == 0.5


class Page(HTMLParser):
    """Raises for tags that do not close in order; collects texts, ids and references."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts, self.ids, self.links = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            self.ids += [value] if name == "id" else []
            self.links += (
                [value] if name in ("href", "xlink:href", "src") else re.findall(r"url\((.*?)\)", value or "")
            )

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_page_is_whole_and_needs_nothing_else():
    records = [*RECORDS, record("<b>&", 1, 0.5)]
    page = Page(to_html(compare(records, "full"), records, "A & B"))
    assert page.tags.count("svg") == 3
    assert len(page.ids) == len(set(page.ids))
    assert page.links and {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert "script" not in page.tags
    for text in ("A & B", "<b>&", "0.7000 ± 0.1000 (-0.2000 ± 0.1414)", "latency, batch 32 (ms)", "peak memory (MB)"):
        assert text in page.texts
    layers = page.texts[len(page.texts) - page.texts[::-1].index("peak memory (MB)") :]
    assert [text for text in layers if text in ("0", "1", "10")] == ["0", "1", "10"] * 2
    assert [layers.count(share) for share in ("25", "75")] == [2, 2]  # % of heads, in two rows


def test_page_of_dense_runs_says_what_is_missing():
    records = [record("full", 1, 0.9, kept=None, metrics={"metric_name": "f1", "task_metric": 0.9})]
    page = Page(to_html(compare(records), records, "x"))
    assert "svg" not in page.tags
    assert "Not measured: task_metric against latency." in page.texts
    assert "Nothing was removed from any layer." in page.texts


def test_report_writes_the_kind_of_file_that_is_asked_for(finished, tmp_path, capsys):
    study = str(finished[0] / "out")
    for suffix, start in ((".md", "| variant"), (".csv", "variant,task_metric.n,"), (".html", "<!DOCTYPE html>")):
        assert cli.main(["report", study, "--output", str(tmp_path / f"new/table{suffix}")]) == 0
        assert (tmp_path / f"new/table{suffix}").read_text().startswith(start)
    assert "Kept per layer" in (tmp_path / "new/table.html").read_text()
    capsys.readouterr()
    for words, message in (
        ([study, "--output", "x.pdf"], "--output='x.pdf' must end in .md, .csv or .html."),
        ([study, "--baseline", "appt"], "baseline='appt' is not known. Choose one of: lora, apt. Did you mean 'apt'?"),
        ([str(tmp_path)], "holds neither results.jsonl nor metrics.json"),
        ([study, f"{study}/apt/seed-1"], "Two runs are called 'apt' with seed 1."),
    ):
        assert cli.main(["report", *words]) == 2
        assert message in capsys.readouterr().err
