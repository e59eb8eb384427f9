"""What a module keeps about its own size, set the same way at a cut and at a load.

Most are plain attributes. Two are not: a number that a module reads from the config it shares with the whole model,
named "config.…", and "kept_heads" of an attention whose position bias is made for all heads of the dense model.
Not for shapes of parameters (``surgery.slicing``).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

Size = int | tuple[int, ...]


class ConfigView:
    """The shared config, of which one module sees some values changed."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared

    def __getattr__(self, name: str) -> Any:  # only for what is not changed
        if name == "shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)


def get_size(module: nn.Module, name: str) -> Any:
    """Value of a size attribute; None where the module has none."""
    owner, _, last = name.rpartition(".")
    return getattr(getattr(module, owner) if owner else module, last, None)


def set_size(module: nn.Module, name: str, value: Size) -> None:
    """Set a size attribute of ``module`` and of no other."""
    if get_size(module, name) == value:
        return
    owner, _, last = name.rpartition(".")
    if not owner:
        if last == "kept_heads" and not isinstance(module, BiasOfKeptHeads):
            module.__class__ = _with_bias_of_kept_heads(type(module))  # type: ignore[arg-type]
        setattr(module, last, value)
        return
    config = getattr(module, owner)
    if not isinstance(config, ConfigView):
        config = ConfigView(config)
        setattr(module, owner, config)
    setattr(config, last, value)


class BiasOfKeptHeads(nn.Module):
    """Mixed into an attention that lost heads and shares its position bias with all layers of its stack.

    The bias [1, heads of the dense model, T, S] passes through whole; of it, only the rows of ``kept_heads`` are used
    here. Where none comes in, it is made by the attention's own table, whose columns are those of all dense heads; an
    attention without such a table (cross-attention) has none and hands none on. Keeps nothing between calls.
    """

    kept_heads: tuple[int, ...]

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        # Read before the attention itself appends to the cache; a static cache counts in place.
        seen: Any = 0 if past_key_values is None else past_key_values.get_seq_length(self.layer_idx)
        seen = seen.clone() if torch.is_tensor(seen) else seen
        output, used, weights = super().forward(
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=None if position_bias is None else self._chosen(position_bias),
            past_key_values=past_key_values,
            **kwargs,
        )
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = super().compute_bias(*used.shape[-2:], device=used.device, past_seen_tokens=seen)  # type: ignore[misc]
        return output, position_bias, weights

    def compute_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Bias [1, kept heads, T, S], for the attention's own forward."""
        return self._chosen(super().compute_bias(*args, **kwargs))  # type: ignore[misc]

    def _chosen(self, bias: torch.Tensor) -> torch.Tensor:
        return bias.index_select(1, torch.tensor(self.kept_heads, device=bias.device))


@cache
def _with_bias_of_kept_heads(attention: type[nn.Module]) -> type[nn.Module]:
    return type(attention.__name__, (BiasOfKeptHeads, attention), {"__module__": __name__})
