"""GTE, Nomic BERT and Jina Embeddings 3: post-norm encoders with rotary positions, most with a gated feed-forward."""

from __future__ import annotations

from dataclasses import replace

from apt_trainer.models.base import Stub
from apt_trainer.models.families.bert import BERT, EMBEDDINGS, ROBERTA, ROBERTA_PREDICTIONS
from apt_trainer.models.families.llama import ATTENTION, CONFIG_SIZES, MLP
from apt_trainer.models.family import Head, ModelFamily, Removal, StackTable

_ATTENTION = replace(
    ATTENTION,
    modules=("self_attn", "post_attention_layernorm"),
    stubs=(Stub("self_attn", "zero_attention"), Stub("post_attention_layernorm", "pass_first")),
    keeping_norm=Removal(modules=("self_attn",), stubs=(Stub("self_attn", "zero_attention"),)),
    norms=("post_attention_layernorm",),
    group=None,
)
_MLP = replace(
    MLP,
    modules=("mlp", "post_mlp_layernorm"),
    stubs=(Stub("mlp", "zero_feed_forward"), Stub("post_mlp_layernorm", "pass_first")),
    keeping_norm=Removal(modules=("mlp",), stubs=(Stub("mlp", "zero_feed_forward"),)),
    norms=("post_mlp_layernorm",),
)

GTE = ModelFamily(
    model_types=("gte",),
    stacks=(StackTable("layers", (_ATTENTION, _MLP), embedding_norms=("embeddings.LayerNorm",)),),
    embeddings=EMBEDDINGS,
    post_norm=True,
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=("q_proj", "v_proj", "gate_proj"),
    config_sizes=CONFIG_SIZES,
    heads={**BERT.heads, "ForMaskedLM": ROBERTA_PREDICTIONS},
)

NOMIC_BERT = replace(
    GTE,
    model_types=("nomic_bert",),
    heads={
        **BERT.heads,
        "ForMaskedLM": Head(
            reads=("cls.predictions.transform.dense", "cls.predictions.decoder"),
            writes=("cls.predictions.transform.dense",),
            norms=("cls.predictions.transform.layer_norm",),
            masked_token=True,
        ),
    },
)

JINA = replace(
    GTE,
    model_types=("jina_embeddings_v3",),
    stacks=(
        StackTable(
            "layers",
            (_ATTENTION, replace(_MLP, reads={"mlp.fc1": ("n",)}, writes="mlp.fc2")),
            embedding_norms=("embeddings.LayerNorm",),
        ),
    ),
    adapter_targets=("q_proj", "v_proj", "fc1"),
    heads=ROBERTA.heads,
)
