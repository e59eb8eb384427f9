"""What a checkpoint of a run in progress holds beyond what the Trainer writes, and whether one is complete.

Weights in training form, plan and scores of the pruner, the teacher. Only safetensors and JSON are written and read
here. The optimizer is ``training.engines.optimizer_file``'s; a finished model is ``store.saving``'s.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from apt_trainer.errors import UserError
from apt_trainer.store.events import parse_json, read_json_object, write_json
from apt_trainer.store.saving import remove_leftovers
from apt_trainer.training.checkpoints.form import check_state
from apt_trainer.training.engines import optimizer_file
from apt_trainer.training.engines.agreement import processes

STATE_FILE = "apt_state.json"
TENSORS_FILE = "apt_state.safetensors"
WEIGHTS_FILE = "apt_training.safetensors"
TEACHER_FILE = "apt_teacher.safetensors"
OF_WEIGHTS = (STATE_FILE, WEIGHTS_FILE)
"""What the weights of a checkpoint alone are read from."""


@dataclass(frozen=True)
class TrainingState:
    """``pruner`` and ``distillation``: JSON parts; ``tensors``: scores and masks; ``teacher``: its weights or None;
    ``teacher_shape``: what :meth:`AdaptivePruner.state` said when the snapshot was taken."""

    pruner: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    distillation: dict[str, Any]
    teacher: Mapping[str, torch.Tensor] | None
    teacher_shape: dict[str, Any] | None


def save_training_state(path: Path, weights: dict[str, torch.Tensor], state: TrainingState) -> None:
    """Write a checkpoint of a run in progress to ``path``; ``weights`` in training form, adapters unmerged.

    Raises :class:`UserError` before anything is written if a weight is not a number: no run could go on from it.
    """
    spoiled = next((name for name, value in weights.items() if bool(value.isnan().any())), None)
    if spoiled is not None:
        raise UserError(
            f"{spoiled} is not finite, so {path.name} was not written. Lower learning_rate or full_learning_rate, or "
            "look at the data; resume_from_checkpoint: true goes on from the checkpoint before."
        )
    path.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    save_file(weights, path / WEIGHTS_FILE, metadata={"format": "pt"})
    save_file(state.tensors, path / TENSORS_FILE)
    if state.teacher is not None:
        save_file(dict(state.teacher), path / TEACHER_FILE, metadata={"format": "pt"})
    write_json(
        path / STATE_FILE,
        {
            "format_version": 1,
            "processes": processes(),
            "pruner": state.pruner,
            "distillation": state.distillation,
            "teacher_shape": state.teacher_shape,
        },
    )


def read_training_state(path: Path) -> tuple[Mapping[str, Any], dict[str, torch.Tensor]]:
    """(JSON part, tensors) of a checkpoint; raises :class:`UserError` when it is none or is damaged."""
    described = check_complete(path)
    return described, load_file(path / TENSORS_FILE)


def read_description(path: Path) -> Mapping[str, Any]:
    """JSON part of a checkpoint of which only the weights are wanted; raises :class:`UserError` when it is none."""
    _require(path, *OF_WEIGHTS)
    return _described(path)


def check_complete(path: Path) -> Mapping[str, Any]:
    """JSON part of a checkpoint; raises :class:`UserError` when it is none, is incomplete, or has a truncated file."""
    _require(path, STATE_FILE, TENSORS_FILE, WEIGHTS_FILE, TRAINER_STATE_NAME)
    _require(path, optimizer_file.TENSORS_FILE, optimizer_file.NUMBERS_FILE)
    for file in sorted(file for file in path.iterdir() if file.is_file()):
        found = damage(file)
        if found is not None:
            raise UserError(f"{file} is damaged ({found}), so {path.name} cannot be used. Resume from an older one.")
    described = _described(path)
    if described["teacher_shape"] is not None:
        _require(path, TEACHER_FILE)
    # The first process can have ended its part while another has not written its random state yet.
    number = described.get("processes", 0)
    _require(path, *(["rng_state.pth"] if number == 1 else [f"rng_state_{rank}.pth" for rank in range(number)]))
    return described


def damage(file: Path) -> str | None:
    """What is wrong with a file, as far as its size and its ends tell."""
    if not file.is_file():
        return "missing"
    try:
        if file.suffix == ".json":
            parse_json(file.read_bytes())
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                pass
        elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            return "cut off"
    except (ValueError, RecursionError, SafetensorError) as error:
        return str(error).splitlines()[0]
    return None


def _described(path: Path) -> Mapping[str, Any]:
    described = read_json_object(path / STATE_FILE)
    check_state(described, path / STATE_FILE, path / WEIGHTS_FILE)
    return {"teacher_shape": None} | described


def load_training_weights(file: Path, model: nn.Module, leave_out: str | None = None) -> None:
    """Fill ``model``, whose shapes are those of the checkpoint, from ``file``; every tensor must be there.

    ``leave_out``: a module in ``file`` that ``model`` has no more. Raises :class:`UserError` where they do not fit.
    """
    try:
        missing, unexpected = load_model(model, str(file), strict=False)
        spare = [name for name in unexpected if leave_out is None or not name.startswith(f"{leave_out}.")]
        if missing or spare:
            raise RuntimeError(f"missing: {sorted(missing)}, unexpected: {sorted(spare)}")
    except SafetensorError as error:
        raise UserError(f"{file} is damaged ({error}). Resume from an older checkpoint.") from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{file} does not fit the run it is resumed into: {reason}") from error


def _require(path: Path, *names: str) -> None:
    for name in names:
        if not (path / name).is_file():
            raise UserError(
                f"{path} is not a complete checkpoint of apt_trainer: {name} is missing. Resume from an older one."
            )
