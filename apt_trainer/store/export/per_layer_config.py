"""As ``hf``, with ``per_layer_config``: transformers' standard for layers of different size, which servers read too.

vLLM runs such a folder by its transformers back end (``--model-impl transformers --trust-remote-code``). It takes no
layer without attention; so in the place of a sublayer that is gone there is the smallest one, of zeros, which adds
nothing to the residual stream.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.models.modeling_apt import REMOTE_CODE
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.store.events import read_json_object, write_json
from apt_trainer.store.export import hf
from apt_trainer.store.export.hf import IS_RUN, QUANTIZATIONS, compare, file_of
from apt_trainer.store.saved_model import as_pruned
from apt_trainer.store.starting_point import starting_point
from apt_trainer.surgery.cutting import apply_plan

__all__ = ["IS_RUN", "QUANTIZATIONS", "compare", "file_of", "refuse", "write"]

HEADS, NEURONS = ("num_attention_heads", "num_key_value_heads"), "intermediate_size"
LEAST_NEURONS = 8


def refuse(model: PreTrainedModel, tokenizer: Any, quantize: str | None, cut: bool = False) -> None:
    """Raise :class:`UserError` for a model that the standard does not describe, or that needs no description."""
    hf.refuse(model, tokenizer, quantize, cut)
    uneven = hasattr(model.config, "apt_structure")
    sizes = family_of(model.config).config_sizes
    reason = None
    if sizes.get("heads") != HEADS or sizes.get("neurons") != (NEURONS,):
        reason = "it counts heads and neurons by other names than per_layer_config has. Leave --style out"
    elif not family_of(model.config).head(model).next_token:
        reason = "it is no language model. Leave --style out"
    elif uneven and model.config.apt_structure.get("hidden") is not None:
        reason = "it lost hidden dimensions, which are the same in all layers. Leave --style out, or prune heads and "
        reason += "neurons only (prune_targets: [heads, neurons])"
    elif not uneven and not cut:
        reason = "its layers are alike, so that any server loads the saved folder itself. Leave --style out"
    if reason is not None:
        raise UserError(f"{type(model).__name__} is not written with per_layer_config: {reason}.")


def write(model: PreTrainedModel, tokenizer: Any, folder: Path, quantize: str | None) -> None:
    """Write ``model`` with the sizes of each layer in its config."""
    start = starting_point(model)
    least = _least(start.plan)
    shape, family = start.dense, family_of(model.config)
    apply_plan(shape, family, start.spaces, PruningPlan.dense(start.spaces), least)
    as_pruned(shape, family, least, remote_code=getattr(model.config, REMOTE_CODE, True))
    shape.config.architectures, shape.config.dtype = [type(model).__name__], model.dtype
    folder.mkdir(parents=True)
    shape.config.save_pretrained(folder)
    described = read_json_object(folder / CONFIG_NAME)
    described["per_layer_config"] = _sizes_of_layers(described, least)
    described["allow_global_per_layer_attribute_access"] = True  # the dense sizes, by which the layers are built
    write_json(folder / CONFIG_NAME, described)
    weights = {name: value.detach() for name, value in model.named_parameters()}
    for name, value in shape.named_parameters():
        if name not in weights:
            weights[name] = torch.zeros(value.shape, dtype=model.dtype)
    save_torch_state_dict(weights, folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _least(plan: PruningPlan) -> PruningPlan:
    """``plan`` with the first units of each sublayer that is gone."""
    units = {
        name: kept or tuple(range(LEAST_NEURONS if name.endswith("neurons") else 1))
        for name, kept in plan.kept.items()
    }
    return PruningPlan(units)


def _sizes_of_layers(described: dict[str, Any], plan: PruningPlan) -> dict[str, dict[str, int]]:
    """What ``per_layer_config`` says: number of a layer → its sizes."""
    group = described[HEADS[0]] // described[HEADS[1]]
    sizes = {}
    for i in range(described["num_hidden_layers"]):
        heads, neurons = (plan.counts[f"layers.{i}.{kind}"] for kind in ("heads", "neurons"))
        sizes[str(i)] = {HEADS[0]: group * heads, HEADS[1]: heads, NEURONS: neurons}
    return sizes
