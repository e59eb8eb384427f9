"""The student's own past, or another model, as teacher: snapshots, losses, layer pairs and width transform.

Not for schedules (when distillation starts and how much it weighs) nor for the training loop. Source: APT, Sec. 4.4.
"""

from __future__ import annotations

from apt_trainer.distillation.layer_map import match_layers, sample_teacher_layers
from apt_trainer.distillation.losses import hidden_distance, layer_loss, layer_outputs, prediction_loss
from apt_trainer.distillation.teacher import Teacher, freeze, snapshot
from apt_trainer.distillation.transform import HiddenTransform

__all__ = [
    "HiddenTransform",
    "Teacher",
    "freeze",
    "hidden_distance",
    "layer_loss",
    "layer_outputs",
    "match_layers",
    "prediction_loss",
    "sample_teacher_layers",
    "snapshot",
]
