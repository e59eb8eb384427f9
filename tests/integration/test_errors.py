"""What cannot work stops with a :class:`UserError` that says what to do, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from texts import TOKENS, word_tokenizer, words
from tiny import tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

from apt_trainer import APTConfig, APTTrainer, UserError
from apt_trainer.runs import dry_run
from apt_trainer.runs.preflight import checkpoint_to_resume
from apt_trainer.runs.run import train
from apt_trainer.settings import DataSettings, ModelSettings
from apt_trainer.settings.recipe import Recipe
from apt_trainer.store import lock as output_lock
from apt_trainer.store.lock import FolderLock
from integration.factories import DEFAULTS, SHORT, Rows, SaveAt, config, make_trainer


def _written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


# ---------------------------------------------------------------------------- losses that are not finite


def _infinite_weight() -> tuple[Any, Any]:
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("inf")
    return model, Rows()


def _label_that_is_not_a_number() -> tuple[Any, Any]:
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=1))
    data = Rows(task="regression")
    data.labels["labels"][5] = float("nan")
    return model, data


@pytest.mark.parametrize("case", [_infinite_weight, _label_that_is_not_a_number])
@pytest.mark.parametrize("logging_steps", [1, 5, 1000])
def test_a_loss_that_is_not_finite_stops_the_run_with_nothing_saved(
    tmp_path: Path, case: Callable[[], tuple[Any, Any]], logging_steps: int
) -> None:
    model, data = case()
    changes = {**SHORT, "logging_steps": logging_steps, "save_strategy": "steps", "save_steps": 11, "max_steps": 14}
    trainer = make_trainer(tmp_path, model, data, options={"callbacks": [SaveAt([13])]}, **changes)
    with pytest.raises(UserError, match=r"not finite"):
        trainer.train()
    assert not [name for name in _written(tmp_path) if name.endswith((".safetensors", ".pt", "config.json"))]
    with pytest.raises(UserError, match=r"not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_hiding_such_losses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="logging_nan_inf_filter"):
        config(tmp_path, logging_nan_inf_filter=True)


# ---------------------------------------------------------------------------- settings that contradict each other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_targets": ["heads"], "target_sparsity": 0.9}, "Lower target_sparsity, widen prune_targets"),
        ({"min_neurons": 24, "min_heads": 4, "min_hidden": 16}, "min_heads, min_neurons"),
        ({"max_steps": 20}, "pruning_end=30 lies after the last step 20"),
        ({"pruning_start": 30}, "begin at step 30 and end at step 30 of 50"),
        ({"distillation_start": 45}, "distillation_start below distillation_end"),
        ({"pruning_time": "after"}, "distillation: none"),
        ({"lora_target_modules": ["quarry"]}, "'quarry'.*query"),
        ({"target_sparsity": 60}, "between 0 and 1"),
        ({"importance": "saliency"}, "Did you mean 'salience'"),
        ({"tune": "full", "tune_after_pruning": "adapters"}, "full → adapters"),
        ({"distillation": "model"}, "teacher_name_or_path"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}, "'reduce_lr_on_plateau' follows"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, options={"eval_dataset": Rows(10)}, **changes)
    assert _written(tmp_path) == []


def test_a_run_that_data_make_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies after the last step 13"):
        make_trainer(tmp_path, max_steps=-1, num_train_epochs=1)
    assert _written(tmp_path) == []


def test_a_model_of_no_family_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "n_head": 4, "d_inner": 24, "n_layer": 1}
    model = XLNetForSequenceClassification(XLNetConfig(vocab_size=40, **sizes))
    with pytest.raises(UserError, match="'xlnet' has no ModelFamily. Nearest is that of .*apt-trainer families"):
        make_trainer(tmp_path, model)
    assert _written(tmp_path) == []


def test_a_trainer_that_has_finished_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **SHORT)
    trainer.train()
    with pytest.raises(UserError, match="finished its run"):
        trainer.train()
    with pytest.raises(UserError, match="target_sparsity=0.5 is a fraction of the dense original, of which .* 0.5"):
        make_trainer(tmp_path / "again", trainer.model)
    assert _written(tmp_path / "again") == []


def test_a_decoder_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert", is_decoder=True)
    with pytest.raises(UserError, match="is_decoder"):
        make_trainer(tmp_path, model)


@pytest.mark.parametrize("distillation", ["self", "none"])
def test_a_teacher_without_distillation_from_a_model_is_refused(tmp_path: Path, distillation: str) -> None:
    with pytest.raises(UserError, match="belong together"):
        make_trainer(tmp_path, options={"teacher": tiny_model("bert")}, distillation=distillation)


def test_distillation_from_a_model_without_a_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="belong together"):
        make_trainer(tmp_path, distillation="model", teacher_name_or_path="given")


def test_a_teacher_of_another_width_needs_a_transform_that_can_learn(tmp_path: Path) -> None:
    teacher = AutoModelForSequenceClassification.from_config(tiny_config("bert", num_labels=3, hidden_size=24))
    changes = {**SHORT, "distillation": "model", "teacher_name_or_path": "given"}
    changes |= {"preset_overrides": {"distillation_transform": "identity"}}
    trainer = make_trainer(tmp_path, options={"teacher": teacher}, **changes)
    with pytest.raises(UserError, match="Leave distillation_transform at lora"):
        trainer.train()
    assert _written(tmp_path) == []


# ---------------------------------------------------------------------------- folders and checkpoints


def _recipe(folder: Path, **changes: Any) -> Recipe:
    training = APTConfig(output_dir=str(folder), **{**DEFAULTS, **changes})
    nowhere = ModelSettings(model_name_or_path="/nowhere/at/all")
    return Recipe(nowhere, DataSettings(train_file="/nowhere.jsonl"), training, path=None, given={})


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "checkpoint-5/x"])
def test_an_output_folder_with_an_older_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    before = _written(tmp_path)
    with pytest.raises(UserError, match="already holds a run .*Choose another output_dir"):
        train(_recipe(tmp_path))
    assert _written(tmp_path) == before


def test_the_recipe_of_a_start_that_came_to_nothing_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    assert checkpoint_to_resume(_recipe(tmp_path)) is None


@pytest.mark.parametrize("place", ["file", "file/below", "file/far/below"])
def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file is a file. Choose a folder"):
        train(_recipe(tmp_path / place))
    assert (tmp_path / "file").read_text() == "x"


def test_resuming_without_any_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(_recipe(tmp_path / "new", resume_from_checkpoint="true"))
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make_trainer(folder, options={"callbacks": [SaveAt([4])]}, **SHORT).train()
    return folder / "checkpoint-4"


def _resume(folder: Path, source: Path, **changes: Any) -> APTTrainer:
    trainer = make_trainer(folder, **{**SHORT, **changes})
    trainer.train(resume_from_checkpoint=str(source))
    return trainer


OPTIMIZER = ("apt_optimizer.safetensors", "apt_optimizer.json")
NEEDED = ("apt_state.json", "apt_state.safetensors", "apt_training.safetensors", "apt_teacher.safetensors")


@pytest.mark.parametrize("name", [*NEEDED, *OPTIMIZER, "trainer_state.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"not a complete checkpoint.*{name} is missing"):
        _resume(tmp_path / "resumed", copy)
    assert _written(tmp_path / "resumed") == []


@pytest.mark.parametrize("name", [*NEEDED, *OPTIMIZER, "trainer_state.json", "rng_state.pth"])
def test_a_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged .*Resume from an older"):
        _resume(tmp_path / "resumed", copy)
    assert _written(tmp_path / "resumed") == []


def test_the_last_checkpoint_that_is_whole_is_resumed(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One was killed while it was written, one is damaged; each is named."""
    for step in (4, 8, 12):
        shutil.copytree(checkpoint, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12" / "trainer_state.json").unlink()
    weights = tmp_path / "checkpoint-8" / "apt_training.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    recipe = _recipe(tmp_path, resume_from_checkpoint="true")
    assert checkpoint_to_resume(recipe) == str(tmp_path / "checkpoint-4")
    assert ["checkpoint-12" in m or "checkpoint-8" in m for m in caplog.messages] == [True, True]
    (tmp_path / "checkpoint-4" / OPTIMIZER[0]).write_bytes(b"")
    with pytest.raises(
        UserError, match="holds no checkpoint that is whole. To begin, set resume_from_checkpoint: auto"
    ):
        checkpoint_to_resume(recipe)


def test_a_run_is_not_resumed_with_other_settings(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoint-4")
    (tmp_path / "recipe.json").write_text(json.dumps({"target_sparsity": 0.5, "max_steps": 12, "logging_steps": 5}))
    asked = _recipe(tmp_path, resume_from_checkpoint="true")
    same = {"max_steps": 12, "target_sparsity": 0.5, "per_device_train_batch_size": 4, "output_dir": "elsewhere"}
    assert checkpoint_to_resume(replace(asked, given=same)) == str(tmp_path / "checkpoint-4")
    for key, value in (("target_sparsity", 0.3), ("max_steps", 20), ("importance", "taylor"), ("max_length", 64)):
        with pytest.raises(UserError, match=f"other settings: {key} was .*, is {value!r}"):
            checkpoint_to_resume(replace(asked, given=same | {key: value}))
    (tmp_path / "recipe.json").write_text(json.dumps(same | {"rank_rule": "paper"}))  # a key that a preset holds now
    as_then = same | {"preset_overrides": {"rank_rule": "paper"}}
    assert checkpoint_to_resume(replace(asked, given=as_then)) == str(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="preset_overrides was .*'paper'.*, is None"):
        checkpoint_to_resume(replace(asked, given=same))


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a complete checkpoint"):
            _resume(tmp_path / "resumed", folder)


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model("bert", layers=2), **SHORT)
    with pytest.raises(UserError, match="does not fit"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# ---------------------------------------------------------------------------- before weights load


@pytest.fixture
def ready(tmp_path: Path) -> Recipe:
    """A recipe that would run: a saved model with its tokenizer, and ten rows."""
    settings = tiny_config("bert", num_labels=3)
    settings.vocab_size = len(TOKENS)
    AutoModelForSequenceClassification.from_config(settings).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": words(5, i), "label": i % 3} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = APTConfig(output_dir=str(tmp_path / "out"), **{**DEFAULTS, **SHORT, "measure_latency": False})
    data = DataSettings(task="classification", train_file=str(tmp_path / "rows.jsonl"), max_length=16)
    return Recipe(ModelSettings(str(tmp_path / "model")), data, training, path=None, given={})


def _both_refuse(recipe: Recipe, message: str) -> None:
    """The dry run and the run itself, before anything is written."""
    for start in (dry_run.plan, train):
        with pytest.raises(UserError, match=message):
            start(recipe)
    assert not Path(recipe.training.output_dir).exists()


def test_the_recipe_is_fine_as_it_is(ready: Recipe) -> None:
    assert "| heads" in dry_run.plan(ready)


def test_a_folder_that_another_run_writes_to_is_refused(
    ready: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As when a launcher was killed and left its workers training."""
    output = Path(str(ready.training.output_dir))
    monkeypatch.setattr(output_lock, "PATIENCE", 0.3)
    output.mkdir(parents=True)
    with FolderLock(output), pytest.raises(UserError, match="Another run is writing to .* choose another output_dir"):
        train(ready)
    assert not _written(output)
    with FolderLock(output):  # the refused run has let go of it, and so has the first
        pass


def test_two_first_starts_do_not_share_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(output_lock, "PATIENCE", 0.3)
    with FolderLock(tmp_path / "new") as first, FolderLock(tmp_path / "new") as second:
        (tmp_path / "new").mkdir()
        first.take()
        first.take()
        with pytest.raises(UserError, match="Another run is writing"):
            second.take()


def test_speed_is_asked_for_at_a_length_the_model_has(ready: Recipe) -> None:
    ready.training.measure_latency, ready.training.latency_length = True, 21
    _both_refuse(ready, "latency_length=21 is more than the 20 positions")
    ready.training.measure_latency, ready.training.sparsity_metric = False, "flops"
    ready.training.reference_length = 64
    _both_refuse(ready, "reference_length=64 is more than the 20 positions")


def test_one_row_is_too_few_to_hold_any_out(ready: Recipe) -> None:
    _both_refuse(replace(ready, data=replace(ready.data, max_train_samples=1)), "1 row, all of it held out")


def test_an_empty_file_has_no_rows(ready: Recipe, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    _both_refuse(ready, "has no rows")


def test_a_family_without_a_table_is_refused_before_data_are_read(ready: Recipe, tmp_path: Path) -> None:
    config = XLNetConfig(vocab_size=60, d_model=16, n_head=2, d_head=8, d_inner=16, n_layer=1)
    XLNetForSequenceClassification(config).save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("no rows at all")
    _both_refuse(ready, "xlnet")


def test_weights_that_are_cut_off_are_refused(ready: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match="model could not be loaded"):
        train(ready)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_said_to_be_missing(ready: Recipe, tmp_path: Path) -> None:
    gone = ModelSettings(str(tmp_path / "nothing"))
    _both_refuse(replace(ready, model=gone), "nothing: there is no such folder")


def test_the_dry_run_refuses_a_folder_with_an_older_run(ready: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a run"):
        dry_run.plan(ready)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", -1.0),
        ("full_learning_rate", 0.0),
        ("dense_learning_rate", -1.0),
        ("learning_rate", float("nan")),
        ("tuning_growth", float("inf")),
        ("pruning_end", float("inf")),
        ("distillation_end", float("nan")),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 0.0),
        ("lora_dropout", 1.5),
        ("lora_target_modules", []),
        ("prediction_weight", -1.0),
        ("layer_weight", -1.0),
        ("distillation_start", -4.0),
        ("distillation_temperature", float("inf")),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        config(tmp_path, **{key: value})
