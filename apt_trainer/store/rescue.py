"""A finished model whose save fails is written in a plain form, so that what was trained is not lost.

Weights, config and pruning plan alone, written by nothing that has just failed: no tokenizer, no generation config, no
check. Not for the save itself (``store.saving``).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from apt_trainer.errors import Retold, RunError, reason
from apt_trainer.plan.pruning_plan import PLAN_FILE, PruningPlan

RESCUED = "rescued-"
"""How folders of rescued models begin."""


def rescuing(model: PreTrainedModel, path: Path, plan: PruningPlan) -> Retold:
    """Context for the save of ``model`` to ``path``: what fails becomes a :class:`RunError` that names the folder
    which the weights are in now: one inside ``path``, or else in the folder for temporary files of the system."""

    def retell(error: Exception) -> Exception:
        failed = f"The model could not be saved in {path} ({reason(error)})."
        problems = []
        for place in (path, Path(tempfile.gettempdir())):
            try:
                return RunError(f"{failed} {_write(model, place, plan)}")
            except (OSError, SafetensorError) as another:
                problems.append(f"{place}: {reason(another)}")
        return RunError(f"{failed} Its weights could not be written elsewhere either ({'; '.join(problems)}).")

    return Retold(retell)


def how_to_load(model: PreTrainedModel, folder: Path) -> str:
    """The call that reads ``model`` from ``folder``."""
    if hasattr(model.config, "apt_structure"):
        return f"load_pruned({str(folder)!r})"
    return f"{type(model).__name__}.from_pretrained({str(folder)!r})"


def _write(model: PreTrainedModel, place: Path, plan: PruningPlan) -> str:
    """Write to a new folder in ``place``; a sentence that says what is there."""
    folder = Path(tempfile.mkdtemp(prefix=RESCUED, dir=place))
    complete = False
    try:
        save_file(_weights(model), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / PLAN_FILE).write_text(json.dumps(plan.to_json()), encoding="utf-8")
        model.config.architectures = [type(model).__name__]
        model.config.dtype = model.dtype
        model.config.to_json_file(folder / CONFIG_NAME)
        complete = True
    finally:
        if not complete:  # half of it would only take the room of the next try
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    return f"Its weights, config and {PLAN_FILE} are in {folder}: {how_to_load(model, folder)} loads them."


def _weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and saved buffers, tied ones once, on the CPU."""
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    named = dict(model.named_parameters())
    named |= {name: value for name, value in model.state_dict().items() if name not in tied}
    return {name: value.detach().cpu().contiguous() for name, value in named.items()}
