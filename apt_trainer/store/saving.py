"""Writes a finished model: as a whole or not at all, and checked by loading it again.

Not for what the format is (``store.saved_model``), nor for checkpoints of a run in progress
(``training.checkpoints``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from apt_trainer.measure.latency import example_inputs
from apt_trainer.plan.pruning_plan import PLAN_FILE, PruningPlan
from apt_trainer.store.adapter_folder import ADAPTERS_FILE, save_adapters
from apt_trainer.store.events import write_json
from apt_trainer.store.model_card import CARD_FILE, model_card
from apt_trainer.store.rescue import rescuing
from apt_trainer.store.saved_model import load_pruned

STAGING, REPLACED = ".saving-", ".replaced-"
"""How folders begin in which a save is written, and in which what it replaces waits."""


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
        remove_leftovers(path)
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


def remove_leftovers(path: Path) -> None:
    """Remove what saves to ``path`` have left that were killed."""
    for pattern in (f"{STAGING}*", f"{REPLACED}*"):
        for folder in path.glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)
    for pattern in (".*.tmp", ".tmp*"):  # of store.events, of safetensors
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
