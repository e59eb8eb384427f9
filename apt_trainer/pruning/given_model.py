"""What a model must not hold already when it is given to be pruned: wrappers, adapters, quantised or absent weights.

Each is one :class:`UserError` that says what the model holds and what to do. Not for whether its family is known
(``models``), nor for what a pruned model has left (``store.starting_point``).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from apt_trainer.errors import UserError
from apt_trainer.tensors.partitioned import is_partitioned

IN_USE = "_apt_in_use"
"""Attribute of a model whose run has begun and has not finished."""


def check_given(model: Any, is_copied: bool = False) -> None:
    """Raise :class:`UserError` for a model that cannot be pruned as it is given.

    ``is_copied``: copies of it will teach. A model on the meta device is let pass: it can be planned with.
    """
    _check_wrappers(model)
    _check_state(model)
    _check_weights(model)
    if is_copied:
        _check_forward(model)


def check_loaded(model: nn.Module) -> None:
    """As :func:`check_given`, for a model that is to train: its weights must be there too."""
    check_given(model)
    absent = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    if absent:
        raise UserError(
            f"{len(absent)} tensors of the model are on the meta device, such as {absent[0]}, and have no values. "
            "Load it with from_pretrained and without device_map."
        )


def _check_wrappers(model: Any) -> None:
    kind = type(model).__name__
    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise UserError(
            f"The model is a {kind} of PEFT, but adapters are put in here. Give the plain model: "
            "model.merge_and_unload(), or the base model before get_peft_model."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise UserError(f"The model is wrapped in {kind}. Give model.module; processes come from a launcher.")
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise UserError("The model is compiled, but its shapes are going to change. Give it without torch.compile.")
    if not hasattr(model, "config"):
        raise UserError(f"{kind} has no config. Give a model of transformers, such as AutoModelFor….from_pretrained.")


def _check_state(model: nn.Module) -> None:
    if hasattr(model, IN_USE):
        raise UserError(
            "The model is in use by another APTTrainer, whose run has not finished: it holds its adapters, and units "
            "may be cut. Load the model anew. To go on with an interrupted run, give the model that was loaded anew "
            "to a new trainer and call train(resume_from_checkpoint=True)."
        )
    tuned = [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if tuned:
        raise UserError(
            f"The model holds adapters of PEFT already, in {len(tuned)} layers such as {tuned[0]}. Give it without: "
            "load it anew, or merge them (PeftModel.merge_and_unload) and save it first."
        )


def _check_weights(model: Any) -> None:
    parameters = list(model.parameters())
    if any(is_partitioned(parameter) for parameter in parameters):
        raise UserError(
            "The model is partitioned already (deepspeed.zero.Init, or a sharded load), but adapters are put into a "
            "whole one. Load it as an ordinary model; under ZeRO-3 it is partitioned when training begins."
        )
    if getattr(model, "is_quantized", False) or not all(_is_plain(parameter) for parameter in parameters):
        raise UserError(
            "The model has quantised weights, which can be neither scored nor cut. Load it without quantising (a GGUF "
            "file with quantization_config=GgufConfig(dequantize=True)); quantise the finished model."
        )
    places = getattr(model, "hf_device_map", None) or {}
    if len(set(places.values())) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        where = ", ".join(sorted({str(place) for place in places.values()})) or "hooks of accelerate"
        raise UserError(
            f"The model is spread by device_map ({where}), but each process trains all of it on one device. Load it "
            "without device_map; for what does not fit one device, take --accelerate_config zero3 or fsdp2."
        )


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether values are ordinary numbers: no integers, no 8 bit floats, no tensor that only looks like one."""
    return parameter.is_floating_point() and parameter.element_size() > 1 and type(parameter.data) is torch.Tensor


def _check_forward(model: nn.Module) -> None:
    for path, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if forward is not None and not (isinstance(forward, MethodType) and forward.__self__ is module):
            raise UserError(
                f"forward of {path or type(model).__name__} is replaced by a function, which a copy of the model that "
                "teaches would share with it. Override forward in a subclass, use hooks, or set distillation: none."
            )
