"""Gives a freshly built trainer the shapes, weights and teacher of a checkpoint, before an engine is made.

The optimizer's state is read by ``training.engines.optimizer_file``; scores and masks wait until the loop begins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apt_trainer.distillation.teacher import freeze
from apt_trainer.pruning.pruner import give_shapes
from apt_trainer.training.checkpoints import state
from apt_trainer.training.engines import engine_of


def load_run(trainer: Any, path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor], dict[str, Any] | None]:
    """Restore the dense model of ``trainer`` and its teacher from the checkpoint in ``path``.

    Returns what the pruner said (:meth:`AdaptivePruner.state`), and what it said when the teacher was taken.

    Raises:
        UserError: the checkpoint is incomplete or damaged, or does not fit the run.
    """
    described, tensors = state.read_training_state(path)
    shape = described["teacher_shape"]
    teacher = None if shape is None else _load_teacher(trainer, path, shape)
    trainer.distillation.restore(described["distillation"], teacher)
    trainer.pruner.restore_shapes(described["pruner"])
    trainer.distillation.restore_transform(described["distillation"], trainer.transformer)
    state.load_training_weights(path / state.WEIGHTS_FILE, trainer.model)
    return described["pruner"], tensors, shape


def _load_teacher(trainer: Any, path: Path, shape: dict[str, Any]) -> nn.Module:
    teacher, pruner = copy.deepcopy(trainer.transformer), trainer.pruner
    give_shapes(teacher, pruner.family, pruner.spaces, pruner.plan, shape)
    teacher = engine_of(trainer).place_teacher(freeze(teacher))
    state.load_training_weights(path / state.TEACHER_FILE, teacher)
    return teacher
