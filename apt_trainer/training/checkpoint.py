"""Writing results and resuming runs: atomic saves, a reload check, and the state a checkpoint needs beyond weights.

Only safetensors and JSON are written and read here. The format of a finished model is ``store.saved_model``'s.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from apt_trainer.errors import UserError
from apt_trainer.measure.latency import example_inputs
from apt_trainer.plan.pruning_plan import PLAN_FILE, PruningPlan
from apt_trainer.store.adapter_folder import ADAPTERS_FILE, save_adapters
from apt_trainer.store.events import parse_json, read_json_object, write_json
from apt_trainer.store.model_card import CARD_FILE, model_card
from apt_trainer.store.rescue import rescuing
from apt_trainer.store.saved_model import load_pruned
from apt_trainer.training.checkpoint_form import check_state
from apt_trainer.training.engines import optimizer_file
from apt_trainer.training.engines.agreement import processes

STATE_FILE = "apt_state.json"
TENSORS_FILE = "apt_state.safetensors"
WEIGHTS_FILE = "apt_training.safetensors"
TEACHER_FILE = "apt_teacher.safetensors"
OF_WEIGHTS = (STATE_FILE, WEIGHTS_FILE)
"""What the weights of a checkpoint alone are read from."""
STAGING, REPLACED = ".saving-", ".replaced-"


@dataclass(frozen=True)
class TrainingState:
    """``pruner`` and ``distillation``: JSON parts; ``tensors``: scores and masks; ``teacher``: its weights or None;
    ``teacher_shape``: what :meth:`AdaptivePruner.state` said when the snapshot was taken."""

    pruner: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    distillation: dict[str, Any]
    teacher: Mapping[str, torch.Tensor] | None
    teacher_shape: dict[str, Any] | None


def save_pruned(
    model: PreTrainedModel,
    path: Path,
    plan: PruningPlan,
    tokenizer: Any = None,
    start: PruningPlan | None = None,
    adapters: Mapping[str, torch.Tensor] | None = None,
) -> float:
    """Write the finished model, plan and tokenizer to ``path`` and check that it reloads.

    ``start``: what there was before this run, where that matters (``PruningPlan.to_json``). ``adapters``: what was
    merged into ``model``, to be kept beside it.
    Written to a temporary folder beside it first and checked there, then moved; if anything fails, an older model in
    ``path`` stays whole and ``model`` is kept elsewhere (``rescue``). What a save that was killed left there is
    removed. Returns the largest difference of logits between ``model`` and the reloaded one on a random batch; raises
    RunError when it is above 1e-5 of the largest logit, or anything else fails.
    """
    with rescuing(model, path, plan):
        path.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        return _save(model, path, plan, tokenizer, start, adapters)


def _save(
    model: PreTrainedModel,
    path: Path,
    plan: PruningPlan,
    tokenizer: Any,
    start: PruningPlan | None,
    adapters: Mapping[str, torch.Tensor] | None,
) -> float:
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=path))
    try:
        write_model(model, staging, plan, tokenizer, start=start)
        if adapters is not None:
            save_adapters(adapters, model, staging)
        difference = reload_difference(model, staging)
        move_in(staging, path)
        if adapters is None:
            (path / ADAPTERS_FILE).unlink(missing_ok=True)  # those of another model
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def write_model(
    model: PreTrainedModel,
    folder: Path,
    plan: PruningPlan,
    tokenizer: Any = None,
    card: ModelCard | None = None,
    start: PruningPlan | None = None,
    **options: Any,
) -> None:
    """Write all files of the finished model to an empty ``folder``; ``options``: of ``save_pretrained``."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_json(folder / PLAN_FILE, plan.to_json(start))
    (card or model_card(model, plan=plan)).save(folder / CARD_FILE)


def _remove_leftovers(path: Path) -> None:
    for pattern in (f"{STAGING}*", f"{REPLACED}*"):
        for folder in path.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for pattern in (".*.tmp", ".tmp*"):  # of report.events, of safetensors
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)


def move_in(staging: Path, path: Path) -> None:
    """Put the files of ``staging`` in the place of those in ``path``; the old ones come back if that fails.

    The config goes first and comes last: in between nothing loads, rather than a mixture of two models.
    """
    names = sorted((file.name for file in staging.iterdir()), key=lambda name: name == "config.json")
    old = Path(tempfile.mkdtemp(prefix=REPLACED, dir=path))
    complete = False
    try:
        for name in reversed(names):
            if (path / name).exists():
                os.replace(path / name, old / name)
        for name in names:
            os.replace(staging / name, path / name)
        complete = True
    finally:
        if not complete:
            for file in old.iterdir():
                os.replace(file, path / file.name)
        shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def reload_difference(model: PreTrainedModel, path: Path) -> float:
    """max |logits of ``model`` − logits of the model saved in ``path``| on one random batch.

    Raises RuntimeError above 1e-5 of the largest logit.
    """
    same = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if hasattr(model.config, "apt_structure"):
        again: Any = load_pruned(path, **same)
    else:
        again = type(model).from_pretrained(path, **same)
    device = next(model.parameters()).device
    was_training = model.training
    try:
        batch = example_inputs(model, 1, 16, device)
        outputs = [candidate.to(device).eval()(**batch) for candidate in (model, again)]
    except torch.OutOfMemoryError:  # the device has no room for both; equal weights are as good
        return _weight_difference(model, again, path)
    finally:
        model.train(was_training)
    ours, theirs = (next(v for v in out.values() if torch.is_tensor(v)).float() for out in outputs)
    difference = float((ours - theirs).abs().max())
    if not difference <= 1e-5 * max(1.0, float(ours.abs().max())):
        raise RuntimeError(
            f"The model saved in {path} gives other logits when loaded again (difference {difference:.3g})."
        )
    return difference


def _weight_difference(model: PreTrainedModel, again: PreTrainedModel, path: Path) -> float:
    """0.0; raises RuntimeError where a weight of ``again``, which was loaded from ``path``, is another."""
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        if not torch.equal(ours.cpu(), theirs.cpu()):
            raise RuntimeError(f"The model saved in {path} has another {name} when loaded again.")
    return 0.0


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
    _remove_leftovers(path)
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
