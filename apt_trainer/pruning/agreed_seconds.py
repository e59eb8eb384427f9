"""Seconds by which a run chooses what goes: all processes take the mean of what each has measured when it begins, and
a resumed run goes on with that, on whatever machine.

Not for measuring (``pruning.latency_cost``, ``scoring.sublayers.costs``).
"""

from __future__ import annotations

from typing import Any

import torch

from apt_trainer.scoring import Reduce

Seconds = dict[str, list[float]]
"""What they are used for → seconds, in an order that the dense model fixes. For JSON."""


def agree_on_seconds(pruner: Any, reduce: Reduce, processes: int) -> None:
    """Have ``pruner`` choose by the mean over ``processes``, of which ``reduce`` gives the sum; collective where there
    are several."""
    seconds = _measured(pruner)
    if processes > 1:
        device = next(pruner.model.parameters()).device
        tensors = {name: torch.tensor(own, dtype=torch.float64, device=device) for name, own in seconds.items()}
        seconds = {name: (reduce(tensor) / processes).tolist() for name, tensor in tensors.items()}
    use_seconds(pruner, seconds)


def use_seconds(pruner: Any, seconds: Seconds) -> None:
    """Have ``pruner`` choose by ``seconds`` instead of those that it has measured."""
    if "budget" in seconds:
        pruner.cost = pruner.cost.with_coefficients(seconds["budget"])
    if "impact" in seconds:
        pruner.impact.costs = dict(zip(pruner.impact.costs, seconds["impact"], strict=True))
    pruner.seconds = seconds


def _measured(pruner: Any) -> Seconds:
    """Those that this process has measured: of the budget, and of sublayers where NRI is relative to them."""
    seconds: Seconds = {}
    if pruner.settings.sparsity_metric == "latency":
        seconds["budget"] = pruner.cost.coefficients()
    if pruner.impact is not None and pruner.impact.cost == "latency":
        seconds["impact"] = list(pruner.impact.costs.values())
    return seconds
