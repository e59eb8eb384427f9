"""Norms that keep less for the backward pass: their input in its own precision instead of its float32 copy.

RMS norms of transformers compute in float32, so that in a half-precision model autograd keeps four bytes per value
that each of them normalises. Here only what came in is kept, two bytes, and the norm is computed once more in the
backward pass, from the same numbers to the same result (``torch.utils.checkpoint``). Not for whole layers: that is
``activation_checkpointing`` of the Trainer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_HALF = (torch.bfloat16, torch.float16)


def recompute(model: nn.Module, paths: Iterable[str]) -> None:
    """Let norms compute anew what they need in the backward pass: all of the classes found at ``paths``, such as those
    of single heads too, that are in half precision and written in Python; ``nn.LayerNorm`` keeps its input alone
    anyway. Paths that are gone are left out. Undone by :func:`plain`."""
    present = dict(model.named_modules())
    found = {type(present[path]) for path in paths if path in present}
    classes = tuple(one for one in found if not issubclass(one, nn.LayerNorm | _Recomputing))
    for norm in present.values():
        weight = getattr(norm, "weight", None) if isinstance(norm, classes) else None
        if weight is not None and weight.dtype in _HALF and not isinstance(norm, _Recomputing):
            norm.__class__ = _recomputing(type(norm))  # type: ignore[arg-type]


def plain(model: nn.Module) -> None:
    """Give every norm of ``model`` its own class back."""
    for module in model.modules():
        if isinstance(module, _Recomputing):
            module.__class__ = type(module).__mro__[2]


class _Recomputing:
    """Before a norm's own class, as FSDP2 does with modules it wraps; copies are of the own class again."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        forward = super().forward  # type: ignore[misc]
        if not (torch.is_grad_enabled() and hidden_states.requires_grad):
            return forward(hidden_states)  # type: ignore[no-any-return]
        return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__mro__[2],), *super().__reduce_ex__(protocol)[2:]


def _empty(norm: Any) -> Any:
    return norm.__new__(norm)


@cache
def _recomputing(norm: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputing{norm.__name__}", (_Recomputing, norm), {})
