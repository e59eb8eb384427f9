"""Weight-only quantisation of a finished model, to see what a smaller model still loses by it.

The linear layers of the blocks change; embeddings, norms and heads stay. By torchao: ``int8`` (one scale per row) and
``int4`` (one scale per 32 weights of a row; each takes a byte, which shows what int4 costs in accuracy, not what it
saves). By bitsandbytes: ``llm_int8`` (rows as int8; inputs too, but for outlier columns beyond 6.0) and ``nf4`` (64
weights at a time on the quantiles of a normal distribution, two in a byte).

Sources: LLM.int8(), https://arxiv.org/abs/2208.07339; NF4, https://arxiv.org/abs/2305.14314 section 3.
Not for training, nor for saving: quantise again after loading.
"""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from apt_trainer.errors import UserError, unknown_choice
from apt_trainer.models import family_of
from apt_trainer.settings.choices import QUANTIZE

GROUP_SIZE = 32
OUTLIER_THRESHOLD = 6.0
_ON_CPU = {"nf4": 64}
"""What the number of inputs has to be a multiple of on a CPU: rows that end within a block of 64 come back wrong from
kernels of bitsandbytes for AVX-512."""


class Quantised(NamedTuple):
    """``layers``: linear layers that were quantised; ``left``: those of the blocks whose width does not divide into
    groups; ``weight_bytes``: of the whole model in memory, scales included, before and after."""

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
        UserError: an unknown form, its library is missing, a model without a family or without a linear layer that
            fits.
    """
    if form not in QUANTIZE:
        raise unknown_choice("quantize", form, QUANTIZE)
    group, name, change = _FORMS[form]
    library = _imported(name)
    blocks = tuple(f"{path}." for path in family_of(model.config).block_modules(model))
    if model.device.type == "cpu":
        group = _ON_CPU.get(form, group)
    linear = [path for path, module in model.named_modules() if path.startswith(blocks) and type(module) is nn.Linear]
    chosen = [path for path in linear if model.get_submodule(path).in_features % group == 0]
    if not chosen:
        raise UserError(
            f"{type(model).__name__} has no linear layer in its blocks that can become {form}"
            f"{f': none has a multiple of {group} inputs' if linear else ''}. Leave quantize out."
        )
    before = _bytes_of(model)
    for path in chosen:
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, change(library, model.get_submodule(path)))
    return Quantised(form, len(chosen), len(linear) - len(chosen), before, _bytes_of(model))


def _int8(ao: Any, linear: nn.Linear) -> nn.Module:
    ao.quantize_(linear, ao.Int8WeightOnlyConfig(version=2))
    return linear


def _int4(ao: Any, linear: nn.Linear) -> nn.Module:
    ao.quantize_(linear, ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP_SIZE)))
    return linear


def _llm_int8(bnb: Any, linear: nn.Linear) -> nn.Module:
    changed = bnb.Linear8bitLt(
        linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD
    )
    changed.weight = bnb.Int8Params(linear.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    return _in_place_of(linear, changed)


def _nf4(bnb: Any, linear: nn.Linear) -> nn.Module:
    changed = bnb.LinearNF4(linear.in_features, linear.out_features, False, compute_dtype=linear.weight.dtype)
    changed.weight = bnb.Params4bit(linear.weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    changed.support_avx512bf16_for_cpu = False  # would compute in bfloat16, and only outputs in multiples of 32
    return _in_place_of(linear, changed)


def _in_place_of(linear: nn.Linear, changed: nn.Module) -> nn.Module:
    """``changed`` with bias, device and mode of ``linear``; moving its weight is what quantises it."""
    changed.bias = linear.bias
    return changed.to(linear.weight.device).requires_grad_(False).train(linear.training)


_FORMS: dict[str, tuple[int, str, Callable[[Any, nn.Linear], nn.Module]]] = {
    "int8": (1, "torchao.quantization", _int8),
    "int4": (GROUP_SIZE, "torchao.quantization", _int4),
    "llm_int8": (1, "bitsandbytes.nn", _llm_int8),
    "nf4": (1, "bitsandbytes.nn", _nf4),
}
"""(what the number of inputs has to be a multiple of, a module of a library, what it makes of a layer) by form."""


def _imported(name: str) -> Any:
    """A module that is no dependency; without what it says about kernels for accelerators that are not there."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"Quantising needs {package}: pip install 'apt-trainer[quantize]'.") from error
    finally:
        logging.disable(before)


def _bytes_of(model: nn.Module) -> int:
    """Of every parameter and buffer once, with the scales of quantised ones."""
    tensors = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return sum(_size(tensor) for tensor in tensors.values())


def _size(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a tensor made of tensors
        return sum(_size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    extra = [getattr(tensor, "SCB", None)]  # bitsandbytes keeps scales beside the weight
    if (state := getattr(tensor, "quant_state", None)) is not None:
        extra += state.as_dict().values()
    return tensor.nbytes + sum(scale.nbytes for scale in extra if isinstance(scale, torch.Tensor))
