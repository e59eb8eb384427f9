"""What a save at the end needs, tried before the first step: the folder, room in it, config, tokenizer and card.

Not for the save itself (``store.saving``).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from apt_trainer.errors import Retold, UserError, reason
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.report.tables import format_bytes
from apt_trainer.store.saved_model import model_class
from apt_trainer.store.saving import STAGING, write_model


def check_output(output: Path) -> None:
    """Raise :class:`UserError` for a folder that cannot be made or written to; leaves nothing behind."""
    named = f"output_dir={str(output)!r}"
    try:
        place = next(place for place in (output, *output.absolute().parents) if place.exists() or place.is_symlink())
        if not place.is_dir():
            what = "is a file" if place.exists() else "leads nowhere"
            raise UserError(f"{named}: {place} {what}. Choose a folder.")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{named}: {place} cannot be written to. Choose another folder.")
        with tempfile.TemporaryDirectory(prefix=STAGING, dir=place) as trial:
            Path(trial, *output.absolute().relative_to(place.absolute()).parts).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{named} cannot be written to ({reason(error)}). Choose another folder.") from error


def check_room(output: Path, pruner: AdaptivePruner) -> None:
    """Raise :class:`UserError` where the file system of ``output`` has no room for the finished model."""
    needed = expected_bytes(pruner)
    free = shutil.disk_usage(_existing(output)).free
    if free < needed:
        raise UserError(
            f"output_dir={str(output)!r}: the finished model takes about {format_bytes(needed)}, but "
            f"{format_bytes(free)} are free there. Free some, or choose another folder."
        )


def _existing(output: Path) -> Path:
    """``output``, or the folder above it that is there already."""
    return next(place for place in (output, *output.absolute().parents) if place.exists())


def expected_bytes(pruner: AdaptivePruner) -> int:
    """Of the finished model, about: the share of the blocks that goes is the target's, whatever that counts."""
    named = [(name, p) for name, p in pruner.model.named_parameters() if ".lora_" not in name]
    dense = sum(p.numel() * p.element_size() for _, p in named)
    whole = pruner.block_cost.total(pruner.dense_plan.counts)
    gone = whole - pruner.block_cost.total(pruner.plan.counts)
    removed = max(0.0, (pruner.settings.target_sparsity or 0.0) * whole - gone)
    return dense - int(removed * named[0][1].element_size())


def check_padding(model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise :class:`UserError` where positions are counted from another padding token than the tokenizer's: its id
    goes into the config when a run begins, so that the saved model would count other ones than the trained."""
    pad = getattr(tokenizer, "pad_token_id", None)
    for module in model.modules():
        counted = getattr(module, "padding_idx", None)
        if hasattr(module, "position_embeddings") and type(counted) is int and pad not in (None, counted):
            raise UserError(
                f"{type(model).__name__} counts positions from its padding token, {counted}, and the tokenizer pads "
                f"with {tokenizer.pad_token!r}, {pad}. Give the tokenizer of the model, or set tokenizer.pad_token to "
                f"the token of number {counted}."
            )


def rehearse(model: PreTrainedModel, output: Path, pruner: AdaptivePruner, tokenizer: Any) -> None:
    """Save ``model`` without its weights to a folder where ``output`` is or will be, which is removed again.

    Raises:
        UserError: the end of a run would fail.
    """
    if pruner.settings.prunes and not pruner.origin.is_pruned:
        try:
            model_class(type(model).__name__)
        except ValueError as error:
            raise UserError(str(error)) from error
    check_padding(model, tokenizer)
    check_output(output)
    check_room(output, pruner)
    accept_generation_config(model)

    def retell(error: Exception) -> Exception:
        return UserError(
            f"The finished model could not be saved, so nothing was trained: {reason(error)}. Mend the config, "
            f"generation config or tokenizer of the model, or choose another output_dir than {str(output)!r}."
        )

    with Retold(retell), tempfile.TemporaryDirectory(prefix=STAGING, dir=_existing(output)) as folder:
        write_model(model, Path(folder), pruner.plan, tokenizer, state_dict={})


def accept_generation_config(model: PreTrainedModel) -> None:
    """Let a generation config be saved as it is where transformers would only warn when loading it.

    It refuses to save, for example, a temperature without do_sample, as many published models have it, once anything
    in the config was changed; and a Trainer does change it, to the padding token of the tokenizer. What cannot be
    loaded either is left to the save to tell.
    """
    config = getattr(model, "generation_config", None)
    if config is None or not model.can_generate():
        return
    try:
        config.validate(strict=True)
        return
    except ValueError:
        pass
    with suppress(ValueError), tempfile.TemporaryDirectory() as folder:
        config.to_json_file(Path(folder) / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
        model.generation_config = type(config).from_pretrained(folder)  # as one that was published so
