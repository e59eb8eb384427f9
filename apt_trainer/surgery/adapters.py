"""Stock PEFT LoRA layers inside a plain Hugging Face model: insert, grow, merge, list.

Injected in place, so the model keeps its class, its module paths and its ``save_pretrained``. The scaling stays
constant while ranks change. Not for deciding ranks (``plan.ranks``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import nn
from transformers.pytorch_utils import Conv1D

from apt_trainer.errors import UserError
from apt_trainer.models.base import linear_shape
from apt_trainer.surgery.slicing import EditLog
from apt_trainer.tensors.partitioned import numel_of, parameter_like, shape_of, whole, whole_modules

ADAPTER = "default"
SCALING = "scaling"


def insert_adapters(
    model: nn.Module, targets: Sequence[str], rank: int, alpha: float, dropout: float, layers: Sequence[str]
) -> None:
    """Put a LoRA layer round every linear below ``layers`` whose path ends in one of ``targets``; freeze all else.

    Adapters of half-precision weights are float32, as PEFT has them: an update is often smaller than bfloat16 can add.
    Raises :class:`UserError` when a target matches nothing.
    """
    prefixes = tuple(path + "." for path in layers)
    paths = [
        path
        for path, module in model.named_modules()
        if path.startswith(prefixes) and isinstance(module, nn.Linear | Conv1D)
    ]
    chosen = []
    for target in targets:
        found = [path for path in paths if path.endswith("." + target)]
        if not found:
            leaves = sorted({path.rsplit(".", 1)[1] for path in paths})
            raise UserError(
                f"lora_target_modules names {target!r}, which is no linear in a layer. "
                f"Names there: {', '.join(leaves)}."
            )
        chosen += found
    _inject(model, chosen, rank, alpha, dropout)


def insert_of_ranks(model: nn.Module, ranks: Mapping[str, int], rank: int, alpha: float) -> None:
    """Put adapters of ``ranks`` back round the plain linears they name, with the scaling of a first ``rank``.

    Their values are fresh: load them after it.
    """
    _inject(model, list(ranks), rank, alpha, dropout=0.0)
    grow_to(model, ranks)


def _inject(model: nn.Module, chosen: list[str], rank: int, alpha: float, dropout: float) -> None:
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=chosen,
        bias="none",  # type: ignore[arg-type]
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in chosen),
    )
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    cast_adapter_dtype(model, ADAPTER)
    for _, layer in adapters(model):
        layer._cast_input_dtype = _cast_unless_autocast  # type: ignore[method-assign, assignment]


def _cast_unless_autocast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """What PEFT does with the input of A, less a detour: under autocast the product casts it by itself.

    PEFT would make a float32 input of a bfloat16 one, of which autocast makes a bfloat16 one again, a copy that every
    adapter keeps until the backward pass (on LLaMA-2-7B a tenth of what training needs beside the weights).
    """
    if x is None or x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of every adapted linear, in the order of the model."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def ranks(model: nn.Module) -> dict[str, int]:
    """Rank per adapted linear."""
    return {path: layer.r[ADAPTER] for path, layer in adapters(model)}


def adapter_parameters(model: nn.Module) -> int:
    """Number of parameters in all A and B."""
    return sum(
        numel_of(p) for _, layer in adapters(model) for part in (layer.lora_A, layer.lora_B) for p in part.parameters()
    )


def with_adapters(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """``weight``, the base weight of ``module``, with what adapters add to it, if it has some."""
    if not isinstance(module, LoraLayer):
        return weight
    for adapter in module.active_adapters:
        weight = weight + module.get_delta_weight(adapter).to(weight)
    return weight


def grow_to(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Give adapters the ``ranks`` of a checkpoint, before its values are loaded."""
    generator = torch.Generator().manual_seed(0)
    for path, layer in adapters(model):
        if ranks.get(path, 0) > layer.r[ADAPTER]:
            grow_rank(path, layer, ranks[path], generator, EditLog())


@torch.no_grad()
def grow_rank(path: str, layer: LoraLayer, rank: int, generator: torch.Generator, log: EditLog) -> None:
    """Raise the rank of one adapter; outputs do not change, since new columns of B are zero.

    New rows of A are drawn from U(±1/√in) on the CPU with ``generator``, so every process draws the same.
    """
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    (old_rank, inputs), outputs = shape_of(a.weight), shape_of(b.weight)[0]
    extra = rank - old_rank
    assert extra > 0, f"{path}: rank {old_rank} cannot grow to {rank}"
    bound = 1.0 / math.sqrt(inputs)
    rows = (torch.rand(extra, inputs, generator=generator) * 2 - 1) * bound
    with whole(a.weight, b.weight) as (of_a, of_b):
        taller = torch.cat([of_a, rows.to(of_a)])
        wider = torch.cat([of_b, of_b.new_zeros(outputs, extra)], dim=1)
    a.weight, b.weight = parameter_like(a.weight, taller), parameter_like(b.weight, wider)
    log.grow(f"{path}.lora_A.{ADAPTER}.weight", 0, extra)
    log.grow(f"{path}.lora_B.{ADAPTER}.weight", 1, extra)
    a.out_features = b.in_features = rank
    layer.r[ADAPTER] = rank
    layer.lora_alpha[ADAPTER] = layer.scaling[ADAPTER] * rank


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """What :func:`merge_adapters` is going to add, on the CPU: ``PATH.A`` [rank, in] and ``PATH.B`` [out, rank] of
    every adapted linear, and ``scaling``, which all share."""
    state = {}
    for path, layer in adapters(model):
        for part, side in (("A", layer.lora_A), ("B", layer.lora_B)):
            state[f"{path}.{part}"] = side[ADAPTER].weight.detach().to("cpu", copy=True).contiguous()
        state[SCALING] = torch.tensor(layer.scaling[ADAPTER], dtype=torch.float64)
    return state


@torch.no_grad()
def merge_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Add what :func:`adapter_state` gave to the weights of ``model``, as :func:`merge_adapters` does.

    Raises :class:`UserError` for adapters that do not fit.
    """
    paths = [name.removesuffix(".A") for name in state if name.endswith(".A")]
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    for path in paths:
        rows, columns = linear_shape(model.get_submodule(path)) if path in linears else (0, 0)
        rank = len(state[f"{path}.A"])
        sides = [list(state[name].shape) for name in (f"{path}.A", f"{path}.B") if name in state]
        if rank == 0 or sides != [[rank, columns], [rows, rank]] or state.get(SCALING, state[f"{path}.A"]).dim():
            raise UserError(f"The adapter of {path} does not fit the model.")
    if not paths:
        return
    insert_of_ranks(model, {path: len(state[f"{path}.A"]) for path in paths}, 1, float(state[SCALING]))
    for path, layer in adapters(model):
        layer.lora_A[ADAPTER].weight.copy_(state[f"{path}.A"])
        layer.lora_B[ADAPTER].weight.copy_(state[f"{path}.B"])
    merge_adapters(model)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every s·B·A to its base weight and put the plain linear back; outputs do not change.

    The base weight is replaced, not written to, so that a teacher which shares it stays as it is.
    """
    for path, layer in list(adapters(model)):
        plain = layer.get_base_layer()
        with whole_modules(*layer.modules()):
            delta = layer.get_delta_weight(ADAPTER)
            merged = plain.weight + delta.to(plain.weight)
        plain.weight = parameter_like(plain.weight, merged)
        model.set_submodule(path, plain)
    model.__dict__.pop("peft_config", None)  # or PEFT takes the next adapters for further ones
