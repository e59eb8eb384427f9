"""MPNet: BERT with a relative position bias, one table for the heads of all layers.

The table belongs to the encoder and keeps all columns; an attention that lost heads picks its rows of the bias.
"""

from __future__ import annotations

from dataclasses import replace

from apt_trainer.models.base import Stub
from apt_trainer.models.families.bert import ATTENTION, MLP, ROBERTA
from apt_trainer.models.family import Removal, StackTable

_ATTENTION = replace(
    ATTENTION,
    reads={"attention.attn.q": ("q",), "attention.attn.k": ("k",), "attention.attn.v": ("v",)},
    writes="attention.attn.o",
    keeping_norm=Removal(modules=("attention.attn",), stubs=(Stub("attention.attn", "zero_attention"),)),
    norms=("attention.LayerNorm",),
    head_dim=("attention.attn", "attention_head_size"),
    sizes=(
        ("attention.attn", "num_attention_heads", "units"),
        ("attention.attn", "all_head_size", "channels"),
        ("attention.attn", "kept_heads", "kept"),
    ),
)

MPNET = replace(
    ROBERTA,
    model_types=("mpnet",),
    stacks=(StackTable("encoder.layer", (_ATTENTION, MLP), embedding_norms=("embeddings.LayerNorm",)),),
    adapter_targets=("q", "v", "intermediate.dense"),
)
