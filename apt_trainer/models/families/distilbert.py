"""DistilBERT: a post-norm encoder whose norms lie beside, not inside, the sublayers."""

from __future__ import annotations

from apt_trainer.models.base import Stub
from apt_trainer.models.families.bert import encoder_only
from apt_trainer.models.family import Head, ModelFamily, Removal, StackTable, SublayerTable

_ATTENTION = SublayerTable(
    "heads",
    "heads",
    reads={"attention.q_lin": ("q",), "attention.k_lin": ("k",), "attention.v_lin": ("v",)},
    writes="attention.out_lin",
    modules=("attention", "sa_layer_norm"),
    stubs=(Stub("attention", "zero_attention"), Stub("sa_layer_norm", "pass_first")),
    keeping_norm=Removal(modules=("attention",), stubs=(Stub("attention", "zero_attention"),)),
    norms=("sa_layer_norm",),
    head_dim=("attention", "attention_head_size"),
    sizes=(("attention", "n_heads", "units"), ("attention", "dim", "channels")),
)
_MLP = SublayerTable(
    "neurons",
    "neurons",
    reads={"ffn.lin1": ("n",)},
    writes="ffn.lin2",
    modules=("ffn", "output_layer_norm"),
    stubs=(Stub("ffn", "zero_feed_forward"), Stub("output_layer_norm", "pass_first")),
    keeping_norm=Removal(modules=("ffn",), stubs=(Stub("ffn", "zero_feed_forward"),)),
    norms=("output_layer_norm",),
)
DISTILBERT = ModelFamily(
    model_types=("distilbert",),
    stacks=(StackTable("transformer.layer", (_ATTENTION, _MLP), embedding_norms=("embeddings.LayerNorm",)),),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    post_norm=True,
    unsupported=encoder_only,
    adapter_targets=("q_lin", "v_lin", "lin1"),
    heads={
        "ForSequenceClassification": Head(reads=("pre_classifier",), trained=("pre_classifier", "classifier")),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": Head(
            reads=("vocab_transform", "vocab_projector"),
            writes=("vocab_transform",),
            norms=("vocab_layer_norm",),
            masked_token=True,
        ),
    },
)
