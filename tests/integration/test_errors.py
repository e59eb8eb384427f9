"""What cannot work stops with a :class:`UserError` that says what to do, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_model
from transformers import AutoModelForSequenceClassification, ElectraConfig, ElectraForSequenceClassification

from apt_trainer import APTConfig, APTTrainer, UserError
from apt_trainer.recipe import Recipe
from apt_trainer.run import train
from apt_trainer.settings import DataSettings, ModelSettings
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
        ({"pruning_start": 28}, "3 pruning events need at least 3 steps"),
        ({"distillation_start": 45}, "distillation_start below distillation_end"),
        ({"pruning_time": "after"}, "distillation: none"),
        ({"lora_target_modules": ["quarry"]}, "'quarry'.*query"),
        ({"target_sparsity": 60}, "between 0 and 1"),
        ({"importance": "saliency"}, "Did you mean 'salience'"),
        ({"tune": "full", "tune_after_pruning": "adapters"}, "full → adapters"),
        ({"distillation": "model"}, "teacher_name_or_path"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "load_best_model"),
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
    sizes = {"hidden_size": 16, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
    model = ElectraForSequenceClassification(ElectraConfig(vocab_size=40, num_hidden_layers=1, **sizes))
    with pytest.raises(UserError, match="'electra' has no ModelFamily. Supported: bert"):
        make_trainer(tmp_path, model)
    assert _written(tmp_path) == []


def test_a_pruned_model_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **SHORT)
    trainer.train()
    with pytest.raises(UserError, match="finished its run"):
        trainer.train()
    with pytest.raises(UserError, match="pruned one already"):
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
    changes = {**SHORT, "distillation": "model", "teacher_name_or_path": "given", "distillation_transform": "identity"}
    trainer = make_trainer(tmp_path, options={"teacher": teacher}, **changes)
    with pytest.raises(UserError, match="distillation_transform: lora"):
        trainer.train()
    assert _written(tmp_path) == []


# ---------------------------------------------------------------------------- folders and checkpoints


def _recipe(folder: Path, **changes: Any) -> Recipe:
    training = APTConfig(output_dir=str(folder), **{**DEFAULTS, **changes})
    nowhere = ModelSettings(model_name_or_path="/nowhere/at/all")
    return Recipe(nowhere, DataSettings(train_file="/nowhere.jsonl"), training, path=None, given={})


@pytest.mark.parametrize("name", ["config.json", "metrics.json", "events.jsonl", "recipe.json", "checkpoint-5/x"])
def test_an_output_folder_with_an_older_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    before = _written(tmp_path)
    with pytest.raises(UserError, match="already holds a run .*Choose another output_dir"):
        train(_recipe(tmp_path))
    assert _written(tmp_path) == before


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


@pytest.mark.parametrize("name", [*NEEDED, *OPTIMIZER])
def test_a_truncated_checkpoint_is_refused(checkpoint: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is damaged .*Resume from an older"):
        _resume(tmp_path / "resumed", copy)
    assert _written(tmp_path / "resumed") == []


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="not a complete checkpoint"):
            _resume(tmp_path / "resumed", folder)


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_model("bert", layers=2), **SHORT)
    with pytest.raises(UserError, match="does not fit"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
