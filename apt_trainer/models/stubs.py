"""No-op modules that stand where a sublayer was, with the call signature of what they replace.

They keep stock modelling code running unchanged and hold no parameters. Not for pre-norm decoders with a key-value
cache, whose stub also has to feed the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PassAttention(nn.Module):
    """Returns the hidden states it was given and no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None


class ZeroAttention(nn.Module):
    """Adds nothing to the residual stream; returns no attention weights."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class ZeroFeedForward(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class PassFirst(nn.Module):
    """Returns its first argument."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class PassSecond(nn.Module):
    """Returns its second argument: the residual input of an output module that adds and normalises."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual


STUBS: dict[str, type[nn.Module]] = {
    "pass_attention": PassAttention,
    "zero_attention": ZeroAttention,
    "zero_feed_forward": ZeroFeedForward,
    "pass_first": PassFirst,
    "pass_second": PassSecond,
}
STUB_KINDS = {cls: kind for kind, cls in STUBS.items()}
