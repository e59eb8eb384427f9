"""Encoders with the modules of BERT that normalise before each sublayer: XLM-RoBERTa-XL, Megatron-BERT, ESM."""

from __future__ import annotations

from dataclasses import replace

from apt_trainer.models.base import Stub
from apt_trainer.models.families.bert import (
    ATTENTION,
    BERT,
    BERT_PREDICTIONS,
    CONFIG_SIZES,
    EMBEDDINGS,
    MLP,
    ROBERTA,
    ROBERTA_PREDICTIONS,
    TARGETS,
    encoder_only,
)
from apt_trainer.models.family import Head, ModelFamily, StackTable


def _family(
    model_type: str, attention_norm: str, mlp_norm: str, final_norm: str, heads: dict[str, Head], opening: str = ""
) -> ModelFamily:
    attention = replace(ATTENTION, norms=(attention_norm,), keeping_norm=None)
    inside = mlp_norm.startswith("intermediate.")  # goes with it
    stubs = MLP.stubs if inside else (*MLP.stubs, Stub(mlp_norm, "pass_first", masked=False))
    modules = MLP.modules if inside else (*MLP.modules, mlp_norm)
    mlp = replace(MLP, modules=modules, stubs=stubs, norms=(mlp_norm,), keeping_norm=None)
    stack = StackTable(
        "encoder.layer",
        (attention, mlp),
        embedding_norms=(opening,) if opening else (),
        final_norms=(final_norm,),
    )
    return ModelFamily(
        model_types=(model_type,),
        stacks=(stack,),
        embeddings=EMBEDDINGS,
        unsupported=encoder_only,
        base_reads=("pooler.dense",),
        trained_base=("pooler",),
        adapter_targets=TARGETS,
        config_sizes=CONFIG_SIZES,
        heads=heads,
    )


_OF_ROBERTA = {**ROBERTA.heads, "ForMaskedLM": ROBERTA_PREDICTIONS}
XLM_ROBERTA_XL = _family(
    "xlm-roberta-xl", "attention.self_attn_layer_norm", "LayerNorm", "encoder.LayerNorm", _OF_ROBERTA
)
ROBERTA_PRELAYERNORM = _family(
    "roberta-prelayernorm",
    "attention.LayerNorm",
    "intermediate.LayerNorm",
    "LayerNorm",
    _OF_ROBERTA,
    opening="embeddings.LayerNorm",
)
_ESM = _family(
    "esm",
    "attention.LayerNorm",
    "LayerNorm",
    "encoder.emb_layer_norm_after",
    _OF_ROBERTA,
    opening="embeddings.layer_norm",
)
_LAYERS = _ESM.stacks[0]
_RETURNS_STATES = replace(_LAYERS.sublayers[0], stubs=(Stub("attention", "pass_first"),))
ESM = replace(_ESM, stacks=(replace(_LAYERS, sublayers=(_RETURNS_STATES, _LAYERS.sublayers[1])),))
MEGATRON_BERT = _family(
    "megatron-bert", "attention.ln", "ln", "encoder.ln", {**BERT.heads, "ForMaskedLM": BERT_PREDICTIONS}
)
