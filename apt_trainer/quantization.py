"""Weight-only quantisation of a finished model by torchao, to see what a smaller model still loses by it.

The linear layers of the blocks become int8 (one scale per row) or int4 (one scale per 32 weights of a row);
embeddings, norms and heads stay. On a CPU torchao keeps each int4 weight in a byte: that shows what int4 costs in
accuracy, not what it saves. Not for training, nor for saving: quantise again after loading.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models import family_of
from apt_trainer.settings.choices import QUANTIZE

GROUP_SIZE = 32


class Quantised(NamedTuple):
    """``layers``: linear layers that were quantised; ``left``: those of the blocks whose width does not divide into
    groups; ``weight_bytes``: of the whole model in memory, before and after."""

    form: str
    layers: int
    left: int
    weight_bytes_before: int
    weight_bytes: int


def quantize(model: PreTrainedModel, form: str) -> Quantised:
    """Quantise ``model`` in place.

    Args:
        model: A model of a known family, pruned or not, on a CPU or an accelerator.
        form: One of ``settings.choices.QUANTIZE``.

    Raises:
        UserError: an unknown form, torchao is missing, a model without a family or without a linear layer that fits.
    """
    if form not in QUANTIZE:
        raise unknown_choice("quantize", form, QUANTIZE)
    quantize_, configs, size = _torchao()
    blocks = tuple(f"{path}." for path in family_of(model.config).block_modules(model))
    linear = [path for path, module in model.named_modules() if path.startswith(blocks) and type(module) is nn.Linear]
    group = GROUP_SIZE if form == "int4" else 1
    chosen = {path for path in linear if model.get_submodule(path).in_features % group == 0}
    if not chosen:
        raise UserError(
            f"{type(model).__name__} has no linear layer in its blocks that can become {form}"
            f"{f': none has a multiple of {group} inputs' if linear else ''}. Leave quantize out."
        )
    before = size(model)
    quantize_(model, configs[form](), filter_fn=lambda module, path: path in chosen)
    return Quantised(form, len(chosen), len(linear) - len(chosen), before, size(model))


def _torchao() -> tuple[Callable[..., Any], dict[str, Callable[[], Any]], Callable[[nn.Module], int]]:
    """(torchao's quantize_, its configs by form, bytes of a model)."""
    try:
        with _quiet():
            from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
            from torchao.utils import get_model_size_in_bytes
    except ImportError as error:
        raise UserError("Quantising needs torchao: pip install 'apt-trainer[quantize]'.") from error

    def int4() -> Any:
        return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP_SIZE))

    configs = {"int8": lambda: Int8WeightOnlyConfig(version=2), "int4": int4}
    return quantize_, configs, lambda model: math.ceil(get_model_size_in_bytes(model))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torchao says about kernels for accelerators that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
