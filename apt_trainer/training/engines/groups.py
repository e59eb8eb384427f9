"""Parameter groups of the optimizer: by learning rate, by weight decay, and by age where an engine asks for that.

Not for choosing what trains (``tuning``).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import nn

UNDECAYED = ["bias", "norm", "layernorm", "LayerNorm"]
"""Parts of names of parameters without weight decay."""


def parameter_groups(
    model: nn.Module,
    base: Set[str],
    ages: Mapping[str, int],
    rates: Mapping[bool, float],
    weight_decay: float,
    decayed: Set[str],
) -> list[dict[str, Any]]:
    """Groups of all that trains.

    Args:
        base: names of trained base weights.
        ages: steps done per name, where each group must be of one age; empty elsewhere.
        rates: learning rate of base weights (True) and of all else (False).
        weight_decay: of those named in ``decayed``.
    """
    groups: dict[tuple[bool, bool, int], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = name in base, name in decayed, ages.get(name, 0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": rates[is_base], "weight_decay": weight_decay if decays else 0.0}
        for (is_base, decays, _), members in sorted(groups.items(), key=lambda item: item[0])
    ]
