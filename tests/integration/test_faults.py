"""What a fault may leave behind, and what a run does about it; ``scripts/fault_test.py`` tries it with processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import warm
from tiny import tiny_model

import apt_trainer
from apt_trainer import UserError
from apt_trainer.cli import launch
from apt_trainer.errors import RunError
from apt_trainer.models import family_of
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.runs.preflight import checkpoint_to_resume, finished_run
from apt_trainer.runs.run import train
from apt_trainer.settings.recipe import load_recipe
from apt_trainer.store.saving import save_pruned
from apt_trainer.training.checkpoints.state import STATE_FILE, check_complete, save_training_state
from apt_trainer.training.engines import silence
from apt_trainer.training.engines.silence import naming_the_silent
from integration.factories import SHORT, SaveAt, make_trainer

ROOT = Path(apt_trainer.__file__).parents[1]


def test_a_checkpoint_without_the_random_state_of_a_process_is_none(tmp_path: Path) -> None:
    """The first process may have written all of its own before another one was killed."""
    trainer = make_trainer(tmp_path, tiny_model("bert"), options={"callbacks": [SaveAt([4])]}, **SHORT)
    trainer.train()
    path = tmp_path / "checkpoint-4"
    check_complete(path)
    (path / "rng_state.pth").rename(path / "rng_state_0.pth")
    with pytest.raises(UserError, match="rng_state.pth is missing"):
        check_complete(path)
    described = json.loads((path / STATE_FILE).read_text())
    (path / STATE_FILE).write_text(json.dumps(described | {"processes": 2}))
    with pytest.raises(UserError, match="rng_state_1.pth is missing"):
        check_complete(path)


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """A gradient that spoils the step before a save shows in no loss yet."""
    trainer = make_trainer(tmp_path, tiny_model("bert"), **SHORT)
    weights = {"fine": torch.ones(2), "spoiled": torch.tensor([0.0, float("nan")])}
    with pytest.raises(UserError, match="spoiled is not finite, so checkpoint-4 was not written"):
        save_training_state(tmp_path / "checkpoint-4", weights, trainer.training_state())
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_terminated_launcher_gives_143() -> None:
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(1)); print(1, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    child.stdout.readline()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert launch._wait(child) == 143


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    model = tiny_model("bert")
    for name in (".saving-x", ".replaced-y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    (tmp_path / ".metrics.json.77.tmp").write_text("{")
    (tmp_path / ".gitignore").write_text("")
    save_pruned(model, tmp_path, PruningPlan.dense(family_of(model.config).spaces(model)))
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".gitignore"]


def test_auto_starts_goes_on_and_stops_at_a_finished_run(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "auto"]

    def asked(*more: str) -> str | None:
        model = ["--model_name_or_path", "m", "--dataset_name", "d"]
        return checkpoint_to_resume(load_recipe(None, [*words, *model, *more]))

    assert asked() is None
    trainer = make_trainer(tmp_path / "out", tiny_model("bert"), options={"callbacks": [SaveAt([4, 6])]}, **SHORT)
    trainer.train()
    assert asked() == str(tmp_path / "out/checkpoint-6")
    (tmp_path / "out/checkpoint-6" / STATE_FILE).unlink()
    assert asked() == str(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/checkpoint-4" / STATE_FILE).unlink()
    assert asked() is None  # events are there, but nothing to go on from
    (tmp_path / "out/recipe.json").write_text(json.dumps({"model_name_or_path": "m", "dataset_name": "other"}))
    with pytest.raises(UserError, match="dataset_name was 'other', is 'd'"):
        asked()
    (tmp_path / "out/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="holds a finished run"):
        asked()
    with pytest.raises(UserError, match="dataset_name was 'other', is 'd'"):
        finished_run(load_recipe(None, [*words, "--model_name_or_path", "m", "--dataset_name", "d"]))
    same = load_recipe(None, [*words, "--model_name_or_path", "m", "--dataset_name", "other"])
    (tmp_path / "out/metrics.json").write_text('{"task_metric": 0.5}')
    assert train(same) == {"task_metric": 0.5}  # nothing is loaded, nothing left to do


def test_a_checkpoint_that_was_cut_off_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    for name in (".apt_state.json.77.tmp", ".tmpAB7sXH"):
        (tmp_path / "checkpoint-4" / name).write_text("{")
    trainer = make_trainer(tmp_path, tiny_model("bert"), options={"callbacks": [SaveAt([4])]}, **SHORT)
    trainer.train()
    check_complete(tmp_path / "checkpoint-4")
    assert not list(tmp_path.rglob(".*"))


def test_the_rank_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen by rank 0 of three; what the store says comes from a real one."""
    store = torch.distributed.HashStore()
    store.set("apt_trainer/answers/2", "1")
    monkeypatch.setattr(silence, "PATIENCE", 0.3)
    monkeypatch.setattr(silence, "processes", lambda: 3)
    monkeypatch.setattr(silence.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(silence.dist.distributed_c10d, "_get_default_store", lambda: store)
    with pytest.raises(RunError, match=r"rank\(s\) 1 did not answer for 10 s \(ddp_timeout\)"), naming_the_silent(10):
        raise RuntimeError("Timed out waiting 10000ms for send operation to complete")
    with pytest.raises(RuntimeError, match="something else"), naming_the_silent(10):
        raise RuntimeError("something else")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("engine", "faults"), [("ddp", ["step", "save"]), ("zero3", ["event"])])
def test_killed_runs_end_equal(engine: str, faults: list[str]) -> None:
    script = [warm.python(), str(ROOT / "scripts/fault_test.py"), "--engine", engine, "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*script, "--kills", "0", "--seed", "2", "--faults", *faults],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    number = len(faults)
    equal = f"{number} equal to the undisturbed run bit by bit, {number} without any remark."
    assert f"{number} faults: {equal}" in ended.stdout
