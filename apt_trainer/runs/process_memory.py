"""What each of several processes holds of a model's weights at most, and when, told before any are read.

Gradients, optimizer and activations are in the estimate of the dry run. Which engine holds what is said in
``training.engines``; these are its sums.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from apt_trainer.plan.cost import parameter_cost
from apt_trainer.plan.pruning_plan import PruningPlan
from apt_trainer.pruning.pruner import AdaptivePruner
from apt_trainer.report.tables import format_bytes


class WeightBytes(NamedTuple):
    """``whole``: the model as given, with adapters. ``layer``: the largest block, or all that is in no block if that
    is more. ``finished``: the model at its target."""

    whole: int
    layer: int
    finished: int


def weigh(pruner: AdaptivePruner, finished: PruningPlan) -> WeightBytes:
    """Bytes of the weights of the model of ``pruner``, which may be on the meta device."""
    model, dense = pruner.model, pruner.origin.dense
    blocks = [_bytes(model.get_submodule(path)) for path in pruner.family.block_modules(model)]
    whole = _bytes(model)
    cost = parameter_cost(dense, pruner.family, pruner.spaces, lambda name, p: p.element_size(), blocks_only=False)
    return WeightBytes(whole, max(*blocks, whole - sum(blocks)), int(cost.total(finished.counts)))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def process_lines(weights: WeightBytes, processes: int, before: bool, converted: bool) -> list[str]:
    """Of ``processes``, under engines that keep all weights on each and under those that split them; ``before``: the
    model is cut before it trains; ``converted``: its weights get another type, or form, than in their file as they
    load, and so are not left in a mapping of it."""
    whole, layer, finished = (format_bytes(number) for number in weights)
    share = format_bytes(weights.whole / processes + weights.layer)
    loaded = f", {whole} while they are converted as they load" if converted else ""
    scored = f", {whole} on its device while the model is scored before the cut" if before else ""
    return [
        f"processes    {processes}, weights alone. DDP, ZeRO-1, ZeRO-2: {whole} each while they load, "
        f"{format_bytes(weights.whole * processes)} in all",
        f"             ZeRO-3, FSDP2: {share} each (its share and a layer of {layer}) while they load and train"
        f"{loaded}{scored}; {whole} in the one that writes a checkpoint; the finished model, {finished}, in each at "
        "the end",
    ]
