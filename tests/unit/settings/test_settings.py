"""Settings: what is checked, and that an error says what was given, what is allowed and what to do."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import apt_trainer
from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.settings import (
    CHOICES,
    PRUNE_TARGETS,
    SETTING_GROUPS,
    TUNE_MODES,
    MethodSettings,
    check_choices,
    known_settings,
    resolve_path,
)

REMEDY = re.compile(r"must|choose one of|raise|lower|name at least|use |belong together|only widen", re.IGNORECASE)

OUT_OF_RANGE: list[tuple[str, float]] = [
    ("target_sparsity", 0.0),
    ("target_sparsity", 1.0),
    ("target_sparsity", 60),
    ("target_sparsity", -0.1),
    ("target_sparsity", float("nan")),
    ("num_pruning_events", 0),
    ("round_to", 0),
    ("reference_batch_size", 0),
    ("reference_length", -1),
    ("min_heads", -1),
    ("min_neurons", -2),
    ("min_hidden", -1),
    ("min_hidden", 0),  # a model without hidden dimensions cannot run
    ("pruning_start", -0.1),
    ("pruning_end", -5),
    ("salience_decay", 1.0),
    ("salience_decay", -0.1),
    ("mask_step", 0.0),
    ("mask_step", 1.5),
    ("mask_window", -1),
    ("lora_r", 0),
    ("max_rank", 4),
    ("tuning_growth", 0.5),
    ("distillation_weight", 1.1),
    ("distillation_weight", -0.1),
    ("distillation_temperature", 0.0),
    ("distillation_temperature", -2.0),
    ("distillation_layers", 0),
    ("heldout_fraction", 0.0),
    ("heldout_fraction", 0.5),
]

INCONSISTENT: list[tuple[dict[str, object], str, str]] = [
    # settings, name in the message, value in the message
    ({"prune_targets": []}, "prune_targets", "empty"),
    ({"prune_targets": ["heads", "neuron"]}, "prune_targets", "'neuron'"),
    ({"tune": "full", "tune_after_pruning": "adapters"}, "tune_after_pruning", "adapters"),
    ({"tune_after_pruning": "full", "tune_after_distillation": "adapters"}, "tune_after_distillation", "adapters"),
    ({"tune": "adapters_and_norms", "tune_after_distillation": "adapters"}, "tune_after_distillation", "adapters"),
    ({"distillation": "model"}, "teacher_name_or_path", "None"),
    ({"teacher_name_or_path": "x"}, "teacher_name_or_path", "'x'"),
]


def message(given: dict[str, object]) -> str:
    with pytest.raises(UserError) as error:
        MethodSettings(**given).check()  # type: ignore[arg-type]
    return str(error.value)


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_number_out_of_range_is_named_with_its_value_and_a_remedy(name: str, value: float) -> None:
    text = message({name: value})
    assert f"{name}={value}" in text and REMEDY.search(text)


@pytest.mark.parametrize(("given", "name", "value"), INCONSISTENT, ids=str)
def test_inconsistent_settings_are_named_with_a_remedy(given: dict[str, object], name: str, value: str) -> None:
    text = message(given)
    assert name in text and value in text and REMEDY.search(text)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target_sparsity": None, "prune_targets": []},
        {"target_sparsity": 0.999, "salience_decay": 0, "mask_step": 1, "mask_window": 0, "pruning_start": 0},
        {"round_to": 1, "min_neurons": 0, "min_heads": 0, "min_hidden": 1, "num_pruning_events": 1},
        {"lora_r": 8, "max_rank": 8, "tuning_growth": 1},
        {"tune": "full", "tune_after_pruning": "full", "tune_after_distillation": None},
        {"tune_after_distillation": "full"},
        {"distillation": "model", "teacher_name_or_path": "x", "distillation_weight": 0, "distillation_layers": 1},
        {"prune_targets": ["hidden"]},
    ],
    ids=str,
)
def test_settings_at_the_edge_are_fine(given: dict[str, object]) -> None:
    MethodSettings(**given).check()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name: str) -> None:
    group = next(group for group in SETTING_GROUPS if name in {f.name for f in dataclasses.fields(group)})
    settings = group()
    default = getattr(settings, name)
    optional = name in ("tune_after_pruning", "tune_after_distillation", "base_quantization")
    assert default in CHOICES[name] or (optional and default is None)
    for choice in CHOICES[name]:
        setattr(settings, name, choice)
        check_choices(settings)
        assert optional or choice in known_settings()[name], f"the help of {name} does not tell of {choice}"
    wrong = CHOICES[name][0] + "x"
    setattr(settings, name, wrong)
    with pytest.raises(UserError) as error:
        check_choices(settings)
    text = str(error.value)
    assert f"{name}='{wrong}' is not known" in text and all(choice in text for choice in CHOICES[name])
    assert f"Did you mean '{CHOICES[name][0]}'?" in text


def test_a_choice_cannot_be_null_unless_that_is_its_default() -> None:
    accepted = []
    for group in SETTING_GROUPS:
        for field in dataclasses.fields(group):
            if field.name in CHOICES and field.default is not None:
                settings = group()
                setattr(settings, field.name, None)
                try:
                    check_choices(settings)
                except UserError as error:
                    assert f"{field.name}=None is not known" in str(error)
                else:
                    accepted.append(field.name)
    assert accepted == []


def test_choices_are_checked_before_anything_else() -> None:
    with pytest.raises(UserError, match="importance='salince' is not known.*Did you mean 'salience'"):
        MethodSettings(importance="salince", target_sparsity=2.0).check()
    assert set(TUNE_MODES) == set(CHOICES["tune"]) and set(PRUNE_TARGETS) == {
        "heads",
        "neurons",
        "hidden",
        "sublayers",
        "experts",
    }


def test_unknown_choice_without_a_near_one_makes_no_guess() -> None:
    text = str(unknown_choice("task", "zzz", ["a", "b"]))
    assert text == "task='zzz' is not known. Choose one of: a, b."


def test_every_setting_has_a_help_text() -> None:
    settings = known_settings()
    names = [f.name for group in SETTING_GROUPS for f in dataclasses.fields(group)]
    assert list(settings) == names and len(names) == len(set(names))
    for name, help_text in settings.items():
        assert len(help_text) > 15 and help_text.rstrip().endswith("."), name
    assert {f.name for f in dataclasses.fields(MethodSettings)} <= set(names)


def test_lists_are_not_shared_between_instances() -> None:
    first, second = MethodSettings(), MethodSettings()
    first.prune_targets.remove("hidden")
    assert second.prune_targets == ["heads", "neurons", "hidden"] == MethodSettings().prune_targets


def test_derived_properties() -> None:
    assert MethodSettings().prunes and not MethodSettings(target_sparsity=None).prunes
    assert MethodSettings().uses_adapters and not MethodSettings(tune="full").uses_adapters
    assert MethodSettings(tune="adapters_and_norms").uses_adapters


def test_paths_inside_installed_packages() -> None:
    root = Path(apt_trainer.__file__).parent
    assert Path(resolve_path("package:apt_trainer/models")) == root / "models"
    assert Path(resolve_path("package:apt_trainer")) == root
    assert resolve_path("some/folder") == "some/folder"
    for missing in ("package:no_such_package/x", "package:string/x"):  # the second is no folder
        with pytest.raises(UserError, match="is not installed. Install it, or give a local path"):
            resolve_path(missing)


def test_settings_import_nothing_heavy() -> None:
    code = "import sys, apt_trainer.settings; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    root = Path(apt_trainer.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"
