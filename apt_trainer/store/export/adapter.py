"""What sets a model apart from its dense base, in the format of ``store.adapter_folder``: for whoever has the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from apt_trainer.errors import UserError
from apt_trainer.store.adapter_folder import WEIGHTS_FILE, load_difference, write_difference
from apt_trainer.store.export.check import batches

QUANTIZATIONS: tuple[str, ...] = ()
IS_RUN = False
TOLERANCE = 1e-5
"""Of the largest logit, as of a save."""


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for a model that runs by an execution plan."""
    if getattr(model.config, "apt_plan", None) is not None:
        raise UserError("A model with an execution plan is not exported. Drop layers instead: apt-trainer drop.")


def file_of(folder: Path, quantize: str | None) -> Path:
    return folder / WEIGHTS_FILE


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    """Write what is not in the base of ``model``, which was loaded from the folder of a run with keep_adapters."""
    write_difference(model, Path(model.config._name_or_path), folder)


@torch.no_grad()
def compare(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> dict[str, Any]:
    """Logits of several shapes with padding, of the model put together again."""
    again = load_difference(folder, dtype=model.dtype).eval()
    largest, scale = 0.0, 0.0
    for batch in batches(model):
        outputs = [candidate(**batch, return_dict=True) for candidate in (model, again)]
        for ours, theirs in zip(*(output.to_tuple() for output in outputs), strict=True):
            if torch.is_tensor(ours):
                largest = max(largest, float((ours - theirs).abs().max()))
                scale = max(scale, float(ours.abs().max()))
    numbers = {"loaded_by": "apt_trainer", "largest_difference": largest, "largest_output": scale}
    return numbers | {"equal": largest <= TOLERANCE * max(1.0, scale)}
