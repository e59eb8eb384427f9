"""Config of vLLM's DeciLMForCausalLM, whose layers differ in size, and the same model in transformers.

A folder of the format ``decilm`` carries a copy of this file. ``block_configs`` lists per layer ``attention``
({no_op, n_heads_in_group}) and ``ffn`` ({no_op, intermediate_size}); all layers have ``num_attention_heads`` query
heads. It imports torch and transformers only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


class Block(dict[str, Any]):
    """A dictionary whose entries are attributes too, which is how vLLM reads them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """Config of LLaMA with ``block_configs``."""

    model_type = "nemotron-nas"
    block_configs: list | None = None  # type: ignore[type-arg]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs" and value is not None:
            value = [Block({part: Block(sizes) for part, sizes in block.items()}) for block in value]
        super().__setattr__(name, value)


class _NoAttention(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class _NoFeedForward(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def _layer(config: Any, number: int) -> LlamaDecoderLayer:
    """Layer ``number``, with the sizes of its block."""
    attention, ffn = config.block_configs[number].attention, config.block_configs[number].ffn
    own = copy.copy(config)
    if not attention.no_op:
        own.num_key_value_heads = config.num_attention_heads // attention.n_heads_in_group
    if not ffn.no_op:
        own.intermediate_size = ffn.intermediate_size
    layer = LlamaDecoderLayer(own, number)
    layer.self_attn.config = config
    if attention.no_op:
        layer.self_attn, layer.input_layernorm = _NoAttention(), nn.Identity()
    if ffn.no_op:
        layer.mlp, layer.post_attention_layernorm = _NoFeedForward(), nn.Identity()
    return layer


class DeciLMModel(LlamaModel):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(_layer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    config_class = DeciLMConfig

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
