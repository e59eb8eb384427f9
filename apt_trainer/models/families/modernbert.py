"""ModernBERT and its decoder: pre-norm, with rotary positions and a fused feed-forward."""

from __future__ import annotations

from dataclasses import replace

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable

_CLASSIFIER = Head(reads=("head.dense",), trained=("head", "classifier"))
_ATTENTION = SublayerTable(
    "heads",
    "heads",
    reads={"attn.Wqkv": ("q", "k", "v")},
    writes="attn.Wo",
    modules=("attn", "attn_norm"),
    stubs=(Stub("attn", "zero_attention"), Stub("attn_norm", "pass_first", masked=False)),
    norms=("attn_norm",),  # an identity in the first layer, which reads the norm of the embeddings
    head_dim=("attn", "head_dim"),
)
_MLP = SublayerTable(
    "neurons",
    "neurons",
    reads={"mlp.Wi": ("n", "n")},
    writes="mlp.Wo",
    modules=("mlp", "mlp_norm"),
    stubs=(Stub("mlp", "zero_feed_forward"), Stub("mlp_norm", "pass_first", masked=False)),
    norms=("mlp_norm",),
)
MODERNBERT = ModelFamily(
    model_types=("modernbert",),
    stacks=(
        StackTable("layers", (_ATTENTION, _MLP), embedding_norms=("embeddings.norm",), final_norms=("final_norm",)),
    ),
    embeddings=("embeddings.tok_embeddings",),
    adapter_targets=("Wqkv", "Wi"),
    config_sizes={
        "heads": ("num_attention_heads",),
        "neurons": ("intermediate_size",),
        "hidden": ("hidden_size",),
        "layers": ("num_hidden_layers",),
    },
    heads={
        "ForSequenceClassification": _CLASSIFIER,
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _CLASSIFIER,
        "ForMaskedLM": Head(
            reads=("head.dense", "decoder"), writes=("head.dense",), norms=("head.norm",), masked_token=True
        ),
    },
)

DECODER = replace(
    MODERNBERT,
    model_types=("modernbert-decoder",),
    stacks=(
        StackTable(
            "layers",
            (replace(_ATTENTION, reads={"attn.q_proj": ("q",), "attn.k_proj": ("k",), "attn.v_proj": ("v",)}), _MLP),
            stack="decoder",
            embedding_norms=("embeddings.norm",),
            final_norms=("final_norm",),
        ),
    ),
    adapter_targets=("q_proj", "v_proj", "Wi"),
    heads={
        "ForCausalLM": Head(
            reads=("lm_head.dense", "decoder"), writes=("lm_head.dense",), norms=("lm_head.norm",), next_token=True
        ),
        "ForSequenceClassification": _CLASSIFIER,
    },
)
