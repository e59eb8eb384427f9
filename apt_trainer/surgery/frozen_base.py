"""The linear layers of the blocks in 4 or 8 bits, for adapters to train on, and plain again.

Not for what a finished model loses by quantisation (``evaluate.quantization``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from apt_trainer.errors import UserError
from apt_trainer.models import ModelFamily
from apt_trainer.models.base import linear_shape
from apt_trainer.tensors.partitioned import numel_of

BYTES = {"nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8, "int8": 1.0}
"""Of each weight, without the four of each row of int8."""


def base_linears(model: Any, family: ModelFamily) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every linear in the blocks, under its adapter if it has one, but for those that transformers
    keeps in float32."""
    blocks = tuple(f"{path}." for path in family.block_modules(model))
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for path, module in model.named_modules():
        inside = path.startswith(blocks) and ".lora_" not in path
        if inside and type(module) in (nn.Linear, Conv1D) and kept.isdisjoint(path.split(".")):
            yield path, module


def check_base(model: Any, family: ModelFamily, form: str) -> None:
    """Raise :class:`UserError` where :func:`freeze_base` would leave most of the blocks as they are, such as experts
    whose weights are fused."""
    blocks = (model.get_submodule(path) for path in family.block_modules(model))
    whole = sum(numel_of(p) for block in blocks for name, p in block.named_parameters() if ".lora_" not in name)
    share = sum(numel_of(layer.weight) for _, layer in base_linears(model, family)) / whole
    if share < 0.5:
        raise UserError(
            f"base_quantization: {form} is for linear layers, but of the blocks of {type(model).__name__} they are "
            f"{share:.1%}. Leave it out."
        )


@torch.no_grad()
def freeze_base(model: Any, family: ModelFamily, form: str) -> None:
    """Quantise those layers in place, one after the other; ``form``: "nf4" or "int8"."""
    from apt_trainer.surgery.quantized_layers import LAYERS  # needs bitsandbytes

    for path in [path for path, _ in base_linears(model, family)]:
        plain: Any = model.get_submodule(path)
        rows, columns = linear_shape(plain)
        frozen = LAYERS[form](columns, rows)
        frozen.take(plain)
        _replace(model, plain, frozen)


@torch.no_grad()
def make_plain(model: nn.Module) -> None:
    """Give ``model`` ordinary layers again, with the weights that the quantised ones compute with."""
    for frozen in _frozen(model):
        _replace(model, frozen, frozen.as_plain())


def frozen_bytes(model: nn.Module) -> dict[str, int]:
    """How many layers are quantised, their bytes with scales, and what those were before; empty where none is."""
    layers = _frozen(model)
    if not layers:
        return {}
    before = sum(layer.in_features * layer.out_features * layer.plain_dtype.itemsize for layer in layers)
    return {"layers": len(layers), "bytes_before": before, "bytes": sum(layer.held_bytes for layer in layers)}


def _frozen(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "held_bytes")]


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Wherever ``old`` is, for blocks may share it."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
