"""``peft_config`` of a user, as settings of the adapters that are put in here and grow.

What cannot grow is one error at the start. Not for inserting adapters (``surgery.adapters``).
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from apt_trainer.errors import UserError
from apt_trainer.models import family_of
from apt_trainer.settings import AdapterSettings

ALL_LINEAR = "all-linear"
_TAKEN = {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "fan_in_fan_out"}
_WITHOUT_EFFECT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "peft_version",
    "init_lora_weights",
}


def adopt(peft_config: Any, args: Any, model: nn.Module) -> Any:
    """A copy of ``args`` with the adapters that ``peft_config`` describes.

    Raises:
        UserError: it describes adapters whose ranks cannot grow, or others than ``args`` do.
    """
    if type(peft_config) is not LoraConfig:
        raise UserError(
            f"peft_config is {type(peft_config).__name__}, but the adapters that grow are those of LoRA. Give a "
            "LoraConfig, or leave it out and set lora_r, lora_alpha and lora_target_modules."
        )
    plain = LoraConfig()
    names = {each.name for each in fields(LoraConfig)} - _TAKEN - _WITHOUT_EFFECT
    changed = sorted(name for name in names if getattr(peft_config, name) != getattr(plain, name))
    if peft_config.init_lora_weights is not True:
        changed.append("init_lora_weights")
    if changed:
        shown = ", ".join(f"{name}={getattr(peft_config, name)!r}" for name in changed)
        raise UserError(
            f"peft_config sets {shown}, which does not go with ranks that grow and units that are cut. Leave it out: "
            "r, lora_alpha, lora_dropout, target_modules and use_rslora are taken."
        )
    rank = peft_config.r
    # the scaling stays while ranks grow: that of rsLoRA, alpha / √r, is another alpha / r
    alpha = peft_config.lora_alpha * (math.sqrt(rank) if peft_config.use_rslora else 1.0)
    wanted = {
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": peft_config.lora_dropout,
        "lora_target_modules": _targets(peft_config.target_modules, model),
    }
    defaults = AdapterSettings()
    for name, value in wanted.items():
        given = getattr(args, name)
        if given != getattr(defaults, name) and given != value:
            raise UserError(f"{name}={given!r}, but peft_config says {value!r}. Set one of them.")
    if not args.uses_adapters:
        raise UserError("peft_config describes adapters, but tune: full trains without. Leave one of them out.")
    args = copy.copy(args)
    for name, value in wanted.items():
        setattr(args, name, value)
    args.max_rank = max(args.max_rank, rank)
    args.check()
    return args


def _targets(given: Any, model: nn.Module) -> list[str] | None:
    if given is None:
        return None
    if not isinstance(given, str):
        return sorted(given)
    if given != ALL_LINEAR:
        raise UserError(
            f"target_modules={given!r} of peft_config is a pattern. Give a list of names of linears, or "
            f"{ALL_LINEAR!r}."
        )
    layers = tuple(path + "." for path in family_of(model.config).layer_paths(model))
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return sorted({name.rpartition(".")[2] for name in linears if name.startswith(layers)})
