"""Frequencies of rotary positions, which a model computes itself: exact while it trains, as they are when it loads."""

from __future__ import annotations

from torch import nn


def make_exact(model: nn.Module) -> None:
    """Compute anew, in place, what ``model.to(torch.bfloat16)``, or an engine, rounded with the weights.

    It is not saved, so that the model would compute something else when loaded again.
    """
    for module in model.modules():
        buffers = {name: value for name, value in module.named_buffers(recurse=False) if value.is_floating_point()}
        rounded = [name for name, value in buffers.items() if value.element_size() < 4]
        if rounded and hasattr(module, "config") and next(module.parameters(), None) is None:
            exact = dict(type(module)(module.config).named_buffers(recurse=False))
            for name in rounded:
                setattr(module, name, exact[name].to(buffers[name].device))
