"""Runs of a study that need what another run of it saves: started after it, never without it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from test_ablation import REPOSITORY, ablate, make_base, write_study

from apt_trainer.errors import UserError
from apt_trainer.store.events import read_events
from apt_trainer.studies.ablation import runner
from apt_trainer.studies.ablation.order import find_needs, name_of
from apt_trainer.studies.ablation.study import TRAIN, Run, Study, read_study

SHORT = {"target_sparsity": None, "distillation": "none"}


def taught_by(folder: Path | str, **changes: Any) -> dict[str, Any]:
    return {"target_sparsity": None, "distillation": "model", "teacher_name_or_path": str(folder), **changes}


def study_of(folder: Path, variants: dict[str, Any], **changes: Any) -> Study:
    make_base(folder)
    return read_study(write_study(folder, variants=variants, **changes))


def needs_of(study: Study) -> dict[str, list[str]]:
    return {name_of(run): [name_of(other) for other in needed] for run, needed in find_needs(study).items()}


class Processes:
    """Stand-ins for runs: each lasts some polls and then leaves its metrics, or fails."""

    def __init__(self, failing: tuple[str, ...] = (), lasting: int = 3) -> None:
        self.failing, self.lasting = failing, lasting
        self.events: list[str] = []
        self.most = self.alive = 0

    def start(self, run: Run, jobs: int, lock: int) -> Processes.One:
        self.events.append(f"start {run.variant}")
        self.alive += 1
        self.most = max(self.most, self.alive)
        return Processes.One(self, run)

    class One:
        def __init__(self, of: Processes, run: Run) -> None:
            self.of, self.run, self.polls, self.returncode = of, run, 0, 1

        def poll(self) -> int | None:
            self.polls += 1
            if self.polls < self.of.lasting:
                return None
            self.of.alive -= 1
            self.of.events.append(f"end {self.run.variant}")
            self.run.folder.mkdir(parents=True)
            self.run.folder.with_name(f"{self.run.folder.name}.log").write_text("what went wrong\n")
            if self.run.variant not in self.of.failing:
                (self.run.folder / "recipe.json").write_text(json.dumps(self.run.given))
                (self.run.folder / "metrics.json").write_text(json.dumps({"metric_name": "accuracy"}))
            return self.returncode


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Processes:
    processes = Processes()
    monkeypatch.setattr(runner, "_start", processes.start)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)
    return processes


# ---------------------------------------------------------------------------------------- what needs what


def test_the_shipped_study_tunes_its_teacher_first() -> None:
    needs = needs_of(read_study(str(REPOSITORY / "recipes/ablations/apt_parts.yaml")))
    assert {name for name, needed in needs.items() if needed} == {f"tuned_teacher, seed {seed}" for seed in (1, 2, 3)}
    assert needs["tuned_teacher, seed 3"] == ["full, seed 1"]


def test_folders_are_found_however_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    variants = {
        "absolute": taught_by(out / "full/seed-1"),
        "full": SHORT,
        "relative": taught_by("./x/../out/full/seed-1/"),
        "model": {"model_name_or_path": "out/full/seed-1/checkpoint-4", "target_sparsity": 0.3},
        "other_run": taught_by("out/full/seed-2"),
        "beside": taught_by("out/full/seed-10"),
        "elsewhere": taught_by("elsewhere/full/seed-1"),
    }
    study = study_of(tmp_path, variants, output_dir="out", seeds=[1, 2])
    needs = {name: needed for name, needed in needs_of(study).items() if name.endswith("seed 1")}
    assert needs == {
        "absolute, seed 1": ["full, seed 1"],
        "full, seed 1": [],
        "relative, seed 1": ["full, seed 1"],
        "model, seed 1": ["full, seed 1"],
        "other_run, seed 1": ["full, seed 2"],
        "beside, seed 1": [],
        "elsewhere, seed 1": [],
    }


def test_options_of_other_verbs_name_folders_and_files(tmp_path: Path) -> None:
    given: dict[str, dict[str, Any]] = {
        "a": {"model": "elsewhere", "drop_list": None},
        "b": {"model": str(tmp_path / "a"), "text": str(tmp_path / "c")},
        "c": {
            "model": "elsewhere",
            "scores": str(tmp_path / "a/scores.json"),
            "drop_list": str(tmp_path / "b/x.json"),
        },
    }
    runs = [Run(name, 1, tmp_path / name, TRAIN, [], values, name) for name, values in given.items()]
    needs = needs_of(Study("study.yaml", tmp_path, runs, None, None))
    assert needs == {"a, seed 1": [], "b, seed 1": ["a, seed 1"], "c, seed 1": ["a, seed 1", "b, seed 1"]}


def test_runs_that_need_each_other_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    variants = {"a": taught_by(out / "b/seed-1"), "b": taught_by(out / "a/seed-1"), "c": SHORT}
    with pytest.raises(UserError, match=r"needs the next one's result first: (a, seed 1 → b|b, seed 1 → a), seed 1 →"):
        runner.run_study(study_of(tmp_path, variants))
    with pytest.raises(UserError, match="first: a, seed 1 → a, seed 1. Name another folder"):
        runner.run_study(study_of(tmp_path, {"a": taught_by(out / "a/seed-1")}))
    assert not out.exists()


# ---------------------------------------------------------------------------------------- the order of starts


def test_a_run_starts_after_those_it_needs_while_others_run(tmp_path: Path, started: Processes) -> None:
    out = tmp_path / "out"
    variants = {
        "last": taught_by(out / "taught/seed-1", model_name_or_path=str(out / "full/seed-1")),
        "taught": taught_by(out / "full/seed-1"),
        "full": SHORT,
        "free": SHORT | {"lora_r": 3},
        "free_too": SHORT | {"lora_r": 4},
    }
    assert runner.run_study(study_of(tmp_path, variants), jobs=2) == {}
    events = started.events
    assert events[:2] == ["start full", "start free"] and started.most == 2
    assert events.index("end full") < events.index("start taught") < events.index("end taught")
    assert events.index("end taught") < events.index("start last")
    assert sorted(events) == sorted(f"{what} {name}" for what in ("start", "end") for name in variants)


def test_what_needs_a_failed_run_is_not_started(tmp_path: Path, started: Processes) -> None:
    out, told = tmp_path / "out", []
    started.failing = ("full",)
    variants = {
        "last": taught_by(out / "taught/seed-1"),
        "taught": taught_by(out / "full/seed-1"),
        "full": SHORT,
        "free": SHORT | {"lora_r": 3},
    }
    failures = runner.run_study(study_of(tmp_path, variants), 2, told.append)
    assert failures == {
        "full, seed 1": "what went wrong",
        "taught, seed 1": "Not started: it needs the result of full, seed 1, which failed.",
        "last, seed 1": "Not started: it needs the result of taught, seed 1, which failed.",
    }
    assert sorted(started.events) == ["end free", "end full", "start free", "start full"]
    assert "taught, seed 1: not started, for full, seed 1 failed" in told
    assert (out / "free/seed-1/metrics.json").is_file() and not (out / "taught").exists()


def test_a_run_that_finished_earlier_is_there_to_be_needed(tmp_path: Path, started: Processes) -> None:
    teacher = tmp_path / "out/full/seed-1"
    variants = {"taught": taught_by(teacher), "full": SHORT}
    runner.run_study(study_of(tmp_path, {"full": SHORT}))
    runner.run_study(study_of(tmp_path, variants))
    assert started.events == ["start full", "end full", "start taught", "end taught"]


@pytest.mark.slow
def test_a_teacher_is_trained_before_its_student_in_real_runs(tmp_path: Path) -> None:
    make_base(tmp_path)
    variants = {"taught": taught_by(tmp_path / "out/full/seed-1"), "full": SHORT | {"tune": "full"}}
    code, _, errors = ablate("--study", write_study(tmp_path, variants=variants), "--jobs", "2")
    assert code == 0, errors + "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    lines = [re.sub(r";.*", "", line) for line in errors.splitlines() if "seed 1" in line]
    assert lines == [f"{name}, seed 1: {what}" for name in ("full", "taught") for what in ("started", "finished")]


# ---------------------------------------------------------------------------------------- some of the variants


def test_named_variants_run_with_what_they_need_and_the_others_later(tmp_path: Path, started: Processes) -> None:
    out = tmp_path / "out"
    variants = {
        "pupil": taught_by(out / "student/seed-1"),
        "other": {"target_sparsity": 0.4},
        "student": taught_by(out / "full/seed-1", max_steps=7),
        "full": SHORT,
    }
    study = study_of(tmp_path, variants, baseline="other")
    assert runner.run_study(study, 2, variants=["pupil"]) == {}
    assert [event for event in started.events if event.startswith("start")] == [
        "start full",
        "start student",
        "start pupil",
    ]
    assert [record["variant"] for record in read_events(out / "results.jsonl")] == ["pupil", "student", "full"]
    assert runner.run_study(study) == {}
    assert started.events[-2:] == ["start other", "end other"]
    assert len(read_events(out / "results.jsonl")) == 4


def test_an_unknown_variant_is_refused_before_anything_runs(tmp_path: Path, started: Processes) -> None:
    study = study_of(tmp_path, {"full": SHORT, "other": {}})
    with pytest.raises(UserError, match="variant='ful' is not known. Choose one of: full, other. Did you mean 'full'"):
        runner.run_study(study, variants=["other", "ful"])
    assert started.events == [] and not (tmp_path / "out").exists()
