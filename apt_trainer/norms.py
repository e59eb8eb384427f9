"""Norms that keep less for the backward pass: their input in its own precision instead of its float32 copy.

RMS norms of transformers compute in float32, so that in a half-precision model autograd keeps four bytes per value of
the residual stream for each of them. Here only what came in is kept, two bytes, and the norm is computed once more in
the backward pass, from the same numbers to the same result (``torch.utils.checkpoint``). Not for whole layers: that is
``activation_checkpointing`` of the Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_HALF = (torch.bfloat16, torch.float16)


def recompute(model: nn.Module, paths: Iterable[str]) -> None:
    """Let the norms at ``paths`` compute anew what they need in the backward pass: those in half precision that are
    written in Python, ``nn.LayerNorm`` keeps its input alone anyway. Paths that are gone are left out. Undone by
    :func:`plain`."""
    present = dict(model.named_modules())
    for norm in {present[path] for path in paths if path in present}:
        weight = getattr(norm, "weight", None)
        if weight is not None and weight.dtype in _HALF and not isinstance(norm, nn.LayerNorm | _Recomputing):
            norm.__class__ = _recomputing(type(norm))  # type: ignore[arg-type]


def plain(model: nn.Module) -> None:
    """Give every norm of ``model`` its own class back."""
    for module in model.modules():
        if isinstance(module, _Recomputing):
            module.__class__ = type(module).__mro__[2]


class _Recomputing:
    """Before a norm's own class, as FSDP2 does with modules it wraps: copies of a model stay independent of it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        forward = super().forward  # type: ignore[misc]
        if not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return forward(hidden_states)  # type: ignore[no-any-return]
        return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]


@cache
def _recomputing(norm: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputing{norm.__name__}", (_Recomputing, norm), {})
