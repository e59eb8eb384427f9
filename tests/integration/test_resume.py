"""A run that was interrupted and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import randomise, tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification

from apt_trainer import APTTrainer, UserError
from apt_trainer.training.checkpoints.state import WEIGHTS_FILE, check_complete
from apt_trainer.training.checkpoints.whole import STAGED
from integration.factories import (
    EVENTS,
    SHORT,
    Rows,
    SaveAt,
    events_of,
    losses_of,
    make_trainer,
    weights_of,
)

MOMENTS = {
    "in warm-up": 3,
    "before the first event": 8,
    "inside a mask window": 12,
    "at an event": 14,
    "between events": 16,
    "after pruning, distilling": 34,
    "when distillation ended": 40,
    "after distillation": 45,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"tune_after_distillation": "full"},
    "accumulation": {
        "gradient_accumulation_steps": 2,
        "tune_after_pruning": "adapters_and_norms",
        "prune_targets": ["hidden", "neurons"],
        "min_neurons": 20,
    },
    "sublayers": {"prune_targets": ["sublayers"], "importance": "cosine", "target_sparsity": 0.4},
}


def _trainer(folder: Path, variant: str, steps: tuple[int, ...] = ()) -> APTTrainer:
    model = tiny_model("bert", dropout=0.1)
    trainer = make_trainer(folder, model, options={"callbacks": [SaveAt(steps)]}, **VARIANTS[variant])
    if variant == "accumulation":  # each snapshot replaces the one before it
        trainer.between_steps._heldout_loss = lambda: 1.0 / trainer.state.global_step  # type: ignore[method-assign]
    return trainer


@pytest.fixture(scope="module")
def straight(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, APTTrainer]:
    """A run with dropout that was not interrupted, with a checkpoint of each moment."""
    folder = tmp_path_factory.mktemp(request.param)
    trainer = _trainer(folder, request.param, tuple(MOMENTS.values()))
    trainer.train()
    return request.param, folder, trainer


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("straight", VARIANTS, indirect=True)
def test_straight_and_resumed_are_bit_equal(
    straight: tuple[str, Path, APTTrainer], moment: str, tmp_path: Path
) -> None:
    variant, folder, whole = straight
    step = MOMENTS[moment]
    resumed = _trainer(tmp_path, variant)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert resumed.pruner.plan == whole.pruner.plan
    assert losses_of(resumed) == losses_of(whole)
    later = [_timeless(record) for record in events_of(folder) if record["step"] > step]
    assert [_timeless(record) for record in _written(tmp_path)] == later


def _written(folder: Path) -> list[dict[str, Any]]:
    return events_of(folder) if (folder / "events.jsonl").exists() else []


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "seconds"}


def test_the_straight_runs_cover_what_resuming_has_to(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, "accumulation")
    schedule = trainer.schedule
    assert schedule.events == EVENTS
    assert [schedule.in_window(step) for step in (3, 8, 12, 14, 16, 34)] == [None, None, 0, None, None, None]
    assert [schedule.distils(step) for step in (3, 8, 34, 40)] == [False, True, True, False]
    trainer.train()
    assert [record["step"] for record in events_of(tmp_path, "teacher")] == [6, 14, 22]
    assert trainer.pruner.plan.counts["hidden"] == 8


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "random"])
def test_every_importance_resumes(tmp_path: Path, importance: str) -> None:
    whole, resumed = (
        make_trainer(
            tmp_path / name, options={"callbacks": [SaveAt([4])]}, importance=importance, preset="paper", **SHORT
        )
        for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    _assert_equal(whole, resumed)


@pytest.mark.parametrize(("width", "step"), [(16, 3), (16, 6), (24, 3), (24, 6)])
def test_a_run_with_an_external_teacher_resumes(tmp_path: Path, width: int, step: int) -> None:
    def trainer(name: str) -> APTTrainer:
        teacher = AutoModelForSequenceClassification.from_config(
            tiny_config("bert", num_labels=3, hidden_size=width, intermediate_size=32)
        )
        randomise(teacher, seed=5)
        changes = {**SHORT, "distillation": "model", "teacher_name_or_path": "given", "prune_targets": ["hidden"]}
        changes["target_sparsity"] = 0.4
        options = {"teacher": teacher, "callbacks": [SaveAt([step])]}
        return make_trainer(tmp_path / name, options=options, **changes)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert whole.pruner.plan.counts["hidden"] < 16
    _assert_equal(whole, resumed)


def _assert_equal(whole: APTTrainer, resumed: APTTrainer) -> None:
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert losses_of(resumed) == losses_of(whole)


@pytest.mark.parametrize("step", [4, 6])
def test_a_run_in_mixed_precision_resumes(tmp_path: Path, step: int) -> None:
    changes = {**SHORT, "bf16": True}
    whole, resumed = (
        make_trainer(tmp_path / name, options={"callbacks": [SaveAt([step])]}, **changes)
        for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    _assert_equal(whole, resumed)


def test_resuming_in_the_same_folder_drops_the_records_of_later_steps(tmp_path: Path) -> None:
    make_trainer(tmp_path, options={"callbacks": [SaveAt([6])]}, **SHORT).train()
    first = [_timeless(record) for record in events_of(tmp_path)]
    again = make_trainer(tmp_path, **SHORT)
    again.train(resume_from_checkpoint=True)
    assert [_timeless(record) for record in events_of(tmp_path)] == first
    assert [record["step"] for record in events_of(tmp_path, "prune")] == [5, 8]


def test_a_run_that_was_at_its_end_takes_no_further_step(tmp_path: Path) -> None:
    """Killed after its last checkpoint, with a learning rate that another step would use."""
    options = {**SHORT, "lr_scheduler_type": "constant"}
    first = make_trainer(tmp_path, options={"callbacks": [SaveAt([SHORT["max_steps"]])]}, **options)
    first.train()
    again = make_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == SHORT["max_steps"] and losses_of(again) == losses_of(first)
    assert all(torch.equal(value, weights_of(again.model)[name]) for name, value in weights_of(first.model).items())


def test_a_checkpoint_holds_safe_formats_and_what_a_run_needs(tmp_path: Path) -> None:
    make_trainer(tmp_path, options={"callbacks": [SaveAt([6])]}, data=Rows(60), **SHORT).train()
    folder = tmp_path / "checkpoint-6"
    names = {file.name for file in folder.iterdir()}
    ours = {"apt_state.json", "apt_state.safetensors", "apt_training.safetensors", "apt_teacher.safetensors"}
    assert ours <= names
    assert not {"model.safetensors", "config.json", "pytorch_model.bin"} & names
    state = json.loads((folder / "apt_state.json").read_text())
    assert state["format_version"] == 1
    assert state["pruner"]["tune"] == "adapters"


SPARSE = {"pruning_start": 4, "pruning_end": 36, "num_pruning_events": 2, "mask_window": 8, "observe_every": 2}
SPARSE |= {"distillation": "none", "distillation_end": None, "max_steps": 40}


@pytest.mark.parametrize("step", [13, 14, 15, 17])
def test_a_checkpoint_between_observations_resumes_bit_equal(tmp_path: Path, step: int) -> None:
    """Masks follow a choice made at the last observation; it is made again from the same scores."""
    whole, resumed = (
        make_trainer(
            tmp_path / name, tiny_model("bert", dropout=0.1), options={"callbacks": [SaveAt(saved)]}, **SPARSE
        )
        for name, saved in (("whole", [step]), ("resumed", []))
    )
    assert whole.schedule.observe_every == 2 and whole.schedule.in_window(step) == 0
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    expected, got = weights_of(whole.model), weights_of(resumed.model)
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert resumed.pruner.plan == whole.pruner.plan


def test_a_checkpoint_is_there_with_all_its_files_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is written the one before it is still there, whatever ``save_total_limit`` says."""
    seen: list[tuple[list[str], bool]] = []
    trainer = make_trainer(tmp_path, options={"callbacks": [SaveAt((5, 10))]}, **SHORT, save_total_limit=1)
    save = trainer._save_rng_state

    def watched(folder: str) -> None:  # the last of its files but one
        names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        seen.append((names, (Path(folder) / WEIGHTS_FILE).is_file()))
        save(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", watched)
    trainer.train()
    assert seen == [([], True), (["checkpoint-5"], True)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["checkpoint-10"]
    check_complete(tmp_path / "checkpoint-10")


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, options={"callbacks": [SaveAt((5, 10))]}, **SHORT, save_total_limit=1)
    save = trainer._save_rng_state

    def full(folder: str) -> None:
        if trainer.state.global_step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-5"]
    check_complete(tmp_path / "checkpoint-5")


def test_a_checkpoint_written_again_replaces_the_old_one(tmp_path: Path) -> None:
    make_trainer(tmp_path, options={"callbacks": [SaveAt((5, 10))]}, **SHORT).train()
    old = tmp_path / "checkpoint-10"
    (old / "of_old").touch()
    (tmp_path / STAGED / "checkpoint-10").mkdir(parents=True)  # left by a killed save
    (tmp_path / STAGED / "checkpoint-10" / "half").touch()
    again = make_trainer(tmp_path, options={"callbacks": [SaveAt((10,))]}, **SHORT)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not (old / "of_old").exists() and not (old / "half").exists() and not (tmp_path / STAGED).exists()
    check_complete(old)


def test_true_goes_on_from_the_last_checkpoint_that_is_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    straight = make_trainer(tmp_path, options={"callbacks": [SaveAt((5, 10))]}, **SHORT)
    straight.train()
    (tmp_path / "checkpoint-10" / "rng_state.pth").unlink()
    resumed = make_trainer(tmp_path, **SHORT)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-10" in caplog.text and "passed over" in caplog.text
    assert all(
        torch.equal(value, weights_of(resumed.model)[name]) for name, value in weights_of(straight.model).items()
    )
    with pytest.raises(UserError, match="holds no checkpoint"):
        make_trainer(tmp_path / "other", **SHORT).train(resume_from_checkpoint=True)
