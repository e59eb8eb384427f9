"""ALBERT: one layer of BERT that runs many times, so that its heads, neurons and sublayers go in all runs at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.base import Stub
from apt_trainer.models.families.bert import ATTENTION, BERT, MLP
from apt_trainer.models.family import Head, StackTable


def _one_layer(config: Any) -> str | None:
    if config.num_hidden_groups != 1 or config.inner_group_num != 1:
        return "it is supported with one layer for all runs (num_hidden_groups: 1, inner_group_num: 1)"
    return None


_ATTENTION = replace(
    ATTENTION,
    reads={f"attention.{name}": (name[0],) for name in ("query", "key", "value")},
    writes="attention.dense",
    keeping_norm=None,
    norms=("attention.LayerNorm",),
    head_dim=("attention", "attention_head_size"),
    sizes=(("attention", "num_attention_heads", "units"), ("attention", "all_head_size", "channels")),
)
_MLP = replace(
    MLP,
    reads={"ffn": ("n",)},
    writes="ffn_output",
    modules=("ffn", "ffn_output", "full_layer_layer_norm"),
    stubs=(
        Stub("ffn_output", "zero_feed_forward"),
        Stub("ffn", "pass_first", masked=False),
        Stub("full_layer_layer_norm", "pass_first"),
    ),
    keeping_norm=None,
    norms=("full_layer_layer_norm",),
)

ALBERT = replace(
    BERT,
    model_types=("albert",),
    stacks=(
        StackTable(
            "encoder.albert_layer_groups.0.albert_layers",
            (_ATTENTION, _MLP),
            embedding_norms=("embeddings.LayerNorm",),
        ),
    ),
    projection="encoder.embedding_hidden_mapping_in",
    base_reads=("pooler",),
    adapter_targets=("query", "value", "ffn"),
    config_sizes={"heads": ("num_attention_heads",), "neurons": ("intermediate_size",), "hidden": ("hidden_size",)},
    repeats=lambda config: int(config.num_hidden_layers),
    unsupported=_one_layer,
    heads={**BERT.heads, "ForMaskedLM": Head(reads=("predictions.dense",), masked_token=True)},
)
