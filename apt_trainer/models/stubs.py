"""No-op modules that stand where a sublayer was, with the call signature of what they replace.

They keep stock modelling code running unchanged and hold no parameters. A stub is made from the module that it
replaces (:func:`put_stub`): it takes its arguments in the order and under the names that this module had, which
releases of transformers change, and one in a decoder knows which slot of the key-value cache was that module's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from apt_trainer.libraries.calls import by_name, cache_in, positional_names


class NoOp(nn.Module):
    """``replaced``: the module it stands for; None: one that takes all by position."""

    silent = False
    """Whether the output is nothing: zeros in the shape of what it replaces."""

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__()
        if isinstance(replaced, NoOp):
            self.names: tuple[str, ...] = replaced.names
        else:
            self.names = () if replaced is None else positional_names(type(replaced))

    def given(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Argument ``number`` of a call, which may be given by its name."""
        return args[number] if number < len(args) else kwargs[self.names[number]]  # type: ignore[no-any-return]


class PassAttention(NoOp):
    """Returns the hidden states it was given and no attention weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return self.given(0, args, kwargs), None


class ZeroAttention(NoOp):
    """Adds nothing to the residual stream; returns no attention weights.

    Puts a token of width 1 into its own slot of the key-value cache for each token it sees: the length of the cache
    is read from the first layer, whose attention may be this one.
    """

    silent = True

    def __init__(self, replaced: nn.Module | None = None) -> None:
        super().__init__(replaced)
        self.layer_idx = getattr(replaced, "layer_idx", None)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        hidden_states, cache = self.given(0, args, kwargs), cache_in(args, kwargs)
        if cache is not None and self.layer_idx is not None:
            token = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            getattr(cache, "self_attention_cache", cache).update(token, token, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class PassBiasedAttention(NoOp):
    """Returns the hidden states and the position bias that it was given, and no attention weights."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        return self.given(0, args, kwargs), by_name(self.names, args, kwargs).get("position_bias"), None


class ZeroFeedForward(NoOp):
    """Adds nothing to the residual stream."""

    silent = True

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros_like(self.given(0, args, kwargs))


class PassFirst(NoOp):
    """Returns its first argument."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.given(0, args, kwargs)


class PassSecond(NoOp):
    """Returns its second argument: the residual input of an output module that adds and normalises."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.given(1, args, kwargs)


STUBS: dict[str, type[NoOp]] = {
    "pass_attention": PassAttention,
    "pass_biased_attention": PassBiasedAttention,
    "zero_attention": ZeroAttention,
    "zero_feed_forward": ZeroFeedForward,
    "pass_first": PassFirst,
    "pass_second": PassSecond,
}
STUB_KINDS: dict[type[nn.Module], str] = {cls: kind for kind, cls in STUBS.items()}


def put_stub(model: nn.Module, path: str, kind: str) -> None:
    """Replace the module at ``path`` of ``model`` by a no-op of ``kind``."""
    model.set_submodule(path, STUBS[kind](model.get_submodule(path)))
