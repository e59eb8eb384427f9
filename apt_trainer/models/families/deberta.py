"""DeBERTa 2 and 3: BERT whose attentions compare tokens with relative positions too.

The positions are rows of one table on the hidden space, normalised once and projected in each layer: by what projects
the tokens (``share_att_key``), or by linears of their own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.families.bert import ATTENTION, BERT, BERT_PREDICTIONS, EMBEDDINGS, MLP, encoder_only
from apt_trainer.models.family import Head, Positions, StackTable


def _unsupported(config: Any) -> str | None:
    if getattr(config, "conv_kernel_size", 0) > 0:
        return "it is supported without a convolution beside the first layer (conv_kernel_size: 0)"
    if config.relative_attention and "layer_norm" not in config.norm_rel_ebd.lower():
        return "it is supported with a norm on its relative positions (norm_rel_ebd: layer_norm)"
    return encoder_only(config)


def _positions(config: Any) -> Positions | None:
    kinds = [kind for kind in ("c2p", "p2c") if kind in (config.pos_att_type or ())]
    if not (config.relative_attention and kinds):
        return None
    most = config.max_relative_positions if config.max_relative_positions > 0 else config.max_position_embeddings
    number = 2 * (config.position_buckets if config.position_buckets > 0 else most)
    if config.share_att_key:
        return Positions(number, len(kinds), shared=("attention.self.query_proj", "attention.self.key_proj"))
    return Positions(number, len(kinds), own=("attention.self.pos_key_proj", "attention.self.pos_query_proj"))


_ATTENTION = replace(
    ATTENTION,
    reads={
        "attention.self.query_proj": ("q",),
        "attention.self.key_proj": ("k",),
        "attention.self.value_proj": ("v",),
        "attention.self.pos_key_proj": ("k",),
        "attention.self.pos_query_proj": ("q",),
    },
)

DEBERTA = replace(
    BERT,
    model_types=("deberta-v2",),
    stacks=(StackTable("encoder.layer", (_ATTENTION, MLP), embedding_norms=("embeddings.LayerNorm",)),),
    embeddings=(*EMBEDDINGS, "encoder.rel_embeddings"),
    projection="embeddings.embed_proj",
    base_reads=(),
    base_norms=("encoder.LayerNorm",),
    trained_base=(),
    adapter_targets=("query_proj", "value_proj", "intermediate.dense"),
    unsupported=_unsupported,
    positions=_positions,
    heads={
        **BERT.heads,
        "ForSequenceClassification": Head(reads=("pooler.dense",), trained=("pooler", "classifier")),
        "ForMaskedLM": replace(
            BERT_PREDICTIONS, projected=Head(reads=("cls.predictions.transform.dense",), masked_token=True)
        ),
    },
)
