"""DistilBERT: a post-norm encoder whose norms lie beside, not inside, the sublayers."""

from __future__ import annotations

from apt_trainer.models.base import Head, ModelFamily, Stub, SublayerTable

DISTILBERT = ModelFamily(
    model_types=("distilbert",),
    layers="transformer.layer",
    attention=SublayerTable(
        reads=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        writes="attention.out_lin",
        modules=("attention", "sa_layer_norm"),
        stubs=(Stub("attention", "zero_attention"), Stub("sa_layer_norm", "pass_first")),
        norms=("sa_layer_norm",),
        head_dim=("attention", "attention_head_size"),
        unit_attributes=(("attention", "n_heads"),),
        channel_attributes=(("attention", "dim"),),
    ),
    mlp=SublayerTable(
        reads=("ffn.lin1",),
        writes="ffn.lin2",
        modules=("ffn", "output_layer_norm"),
        stubs=(Stub("ffn", "zero_feed_forward"), Stub("output_layer_norm", "pass_first")),
        norms=("output_layer_norm",),
    ),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    embedding_norms=("embeddings.LayerNorm",),
    adapter_targets=("q_lin", "v_lin", "lin1"),
    heads={
        "ForSequenceClassification": Head(reads=("pre_classifier",), trained=("pre_classifier", "classifier")),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": Head(
            reads=("vocab_transform", "vocab_projector"), writes=("vocab_transform",), norms=("vocab_layer_norm",)
        ),
    },
)
