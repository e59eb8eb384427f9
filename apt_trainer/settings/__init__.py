"""Every setting of the method, the model and the data, validated once.

Plain standard-library dataclasses, so that ``apt-trainer train --help`` answers without importing torch.
:class:`apt_trainer.settings.config.APTConfig` adds the settings of the Hugging Face ``TrainingArguments``.
Not for training settings such as batch size: those are inherited.

Units: *steps* are optimizer steps; where they are expected, a float up to 1.0 is a fraction of all steps (1.0: the
whole run) and a whole number, 1 too, is that many steps.
Sources: "APT" is the ICML 2024 paper (arXiv 2401.12200); "official" is its released code.
"""

from __future__ import annotations

from dataclasses import fields

from apt_trainer.settings.choices import CHOICES, PRUNE_TARGETS, TASKS, TUNE_MODES, check_choices
from apt_trainer.settings.inputs import DataSettings, ModelSettings, resolve_path
from apt_trainer.settings.loop import LoopSettings
from apt_trainer.settings.measuring import MeasureSettings
from apt_trainer.settings.method import AdapterSettings, DistillationSettings, MethodSettings, PruningSettings

__all__ = [
    "CHOICES",
    "PRUNE_TARGETS",
    "SETTING_GROUPS",
    "TASKS",
    "TUNE_MODES",
    "AdapterSettings",
    "DataSettings",
    "DistillationSettings",
    "LoopSettings",
    "MeasureSettings",
    "MethodSettings",
    "ModelSettings",
    "PruningSettings",
    "check_choices",
    "known_settings",
    "resolve_path",
]

SETTING_GROUPS = (
    ModelSettings,
    DataSettings,
    PruningSettings,
    AdapterSettings,
    DistillationSettings,
    LoopSettings,
    MeasureSettings,
)


def known_settings() -> dict[str, str]:
    """All settings of this package with their help texts, in order."""
    return {f.name: f.metadata["help"] for group in SETTING_GROUPS for f in fields(group)}
