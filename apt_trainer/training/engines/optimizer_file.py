"""Optimizer and learning-rate schedule of a checkpoint: tensors by parameter name, so that a run can go on with
another number of processes or under another engine.

Safetensors and JSON; no pickle is written or read. Not for weights, nor for what a run needs beyond them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from apt_trainer.errors import UserError
from apt_trainer.store.events import read_json
from apt_trainer.training.checkpoints.form import check_optimizer
from apt_trainer.training.engines import engine_of
from apt_trainer.training.engines.state import STEP, State

TENSORS_FILE = "apt_optimizer.safetensors"
NUMBERS_FILE = "apt_optimizer.json"


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the optimizer of ``trainer``; all processes must call it, one writes."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, float]] = {}
    for name, state in engine_of(trainer).whole_states():
        if not trainer.args.should_save:
            continue
        for key, value in state.items():
            if torch.is_tensor(value) and value.dim() > 0:
                tensors[f"{key}/{name}"] = value.contiguous()
            else:
                numbers.setdefault(key, {})[name] = float(value)
    if not trainer.args.should_save:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS_FILE)
    schedule = trainer.lr_scheduler.state_dict()
    described = {
        "format_version": 1,
        "last_epoch": schedule["last_epoch"],
        "_step_count": schedule["_step_count"],
        "numbers": numbers,
    }
    (folder / NUMBERS_FILE).write_text(json.dumps(described, indent=1))


def read_optimizer(folder: Path) -> tuple[State, dict[str, Any]]:
    """(state by parameter name, position of the schedule) of a checkpoint.

    Raises:
        UserError: a file is damaged.
    """
    try:
        described = read_json(folder / NUMBERS_FILE)
        tensors = load_file(folder / TENSORS_FILE)
    except SafetensorError as error:
        raise UserError(f"The optimizer in {folder} is damaged ({error}). Resume from an older checkpoint.") from error
    check_optimizer(described, folder / NUMBERS_FILE)
    state: State = {}
    for path, tensor in tensors.items():
        key, _, name = path.partition("/")
        state.setdefault(name, {})[key] = tensor
    for key, of_key in described["numbers"].items():
        for name, number in of_key.items():
            state.setdefault(name, {})[key] = torch.tensor(number) if key == STEP else number
    return state, described
