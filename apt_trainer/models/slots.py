"""Where the layers of a model are listed, and which slot of the key-value cache each of their attentions writes to.

Not for caches themselves, which are transformers'.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.models.family import ModelFamily


def layer_list_path(model: nn.Module, family: ModelFamily) -> str:
    """Path of the list of layers; raises :class:`UserError` for a model with two of them."""
    if len(family.stacks) > 1:
        raise UserError(
            f"{type(model).__name__} has an encoder and a decoder, whose first layers make the position bias of all "
            "others. Execution plans are for models with one stack of layers."
        )
    if family.repeats(getattr(model, "config", None)) > 1:
        raise UserError(
            f"{type(model).__name__} runs one layer many times. Execution plans are for layers of their own."
        )
    return family.prefix(model) + family.stacks[0].layers


def slot_holders(layer: nn.Module) -> tuple[str, ...]:
    """Paths inside ``layer`` of what keeps the number of its cache slot; none in an encoder without a cache."""
    return tuple(path for path, module in layer.named_modules() if type(getattr(module, "layer_idx", None)) is int)


def set_slot(layer: nn.Module, holders: tuple[str, ...], slot: int) -> None:
    """Let the attentions of ``layer`` read and write cache slot ``slot`` from now on."""
    for path in holders:
        module: Any = layer.get_submodule(path)
        module.layer_idx = slot


def per_layer_values(config: Any) -> dict[str, Any]:
    """What ``config`` says layer by layer and a forward pass or a cache reads: name → value, as attributes set it."""
    found = {"num_hidden_layers": config.num_hidden_layers}
    if getattr(config, "layer_types", None) is not None:
        found["layer_types"] = list(config.layer_types)
    return found
