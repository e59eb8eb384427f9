"""BERT, RoBERTa and XLM-RoBERTa: post-norm encoders with one layer layout. Encoder use only, no cross-attention."""

from __future__ import annotations

from apt_trainer.models.base import Head, ModelFamily, Stub, SublayerTable

_ATTENTION = SublayerTable(
    reads=("attention.self.query", "attention.self.key", "attention.self.value"),
    writes="attention.output.dense",
    modules=("attention",),
    stubs=(Stub("attention", "pass_attention"),),
    norms=("attention.output.LayerNorm",),
    head_dim=("attention.self", "attention_head_size"),
    unit_attributes=(("attention.self", "num_attention_heads"),),
    channel_attributes=(("attention.self", "all_head_size"),),
)
_MLP = SublayerTable(
    reads=("intermediate.dense",),
    writes="output.dense",
    modules=("intermediate", "output"),
    stubs=(Stub("intermediate", "pass_first"), Stub("output", "pass_second")),
    norms=("output.LayerNorm",),
)
_EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings")
_TARGETS = ("query", "value", "intermediate.dense")

BERT = ModelFamily(
    model_types=("bert",),
    layers="encoder.layer",
    attention=_ATTENTION,
    mlp=_MLP,
    embeddings=_EMBEDDINGS,
    embedding_norms=("embeddings.LayerNorm",),
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=_TARGETS,
    heads={
        "ForSequenceClassification": Head(trained=("classifier",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": Head(
            reads=("cls.predictions.transform.dense", "cls.predictions.decoder"),
            writes=("cls.predictions.transform.dense",),
            norms=("cls.predictions.transform.LayerNorm",),
        ),
    },
)

ROBERTA = ModelFamily(
    model_types=("roberta", "xlm-roberta"),
    layers="encoder.layer",
    attention=_ATTENTION,
    mlp=_MLP,
    embeddings=_EMBEDDINGS,
    embedding_norms=("embeddings.LayerNorm",),
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=_TARGETS,
    heads={
        "ForSequenceClassification": Head(reads=("classifier.dense",), trained=("classifier",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": Head(
            reads=("lm_head.dense", "lm_head.decoder"), writes=("lm_head.dense",), norms=("lm_head.layer_norm",)
        ),
    },
)
