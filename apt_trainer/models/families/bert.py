"""BERT, RoBERTa and XLM-RoBERTa: post-norm encoders with one layer layout. Encoder use only, no cross-attention."""

from __future__ import annotations

from typing import Any

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, Removal, StackTable, SublayerTable


def encoder_only(config: Any) -> str | None:
    """Refuses the decoder form of a BERT layout, which has cross-attention and another mask."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is supported as an encoder; this config sets is_decoder or add_cross_attention"
    return None


_ATTENTION = SublayerTable(
    "heads",
    "heads",
    reads={"attention.self.query": ("q",), "attention.self.key": ("k",), "attention.self.value": ("v",)},
    writes="attention.output.dense",
    modules=("attention",),
    stubs=(Stub("attention", "pass_attention"),),
    keeping_norm=Removal(
        modules=("attention.self", "attention.output.dense"),
        stubs=(
            Stub("attention.self", "pass_attention", masked=False),
            Stub("attention.output.dense", "zero_feed_forward"),
        ),
    ),
    norms=("attention.output.LayerNorm",),
    head_dim=("attention.self", "attention_head_size"),
    sizes=(
        ("attention.self", "num_attention_heads", "units"),
        ("attention.self", "all_head_size", "channels"),
    ),
)
_MLP = SublayerTable(
    "neurons",
    "neurons",
    reads={"intermediate.dense": ("n",)},
    writes="output.dense",
    modules=("intermediate", "output"),
    stubs=(Stub("intermediate", "pass_first", masked=False), Stub("output", "pass_second")),
    keeping_norm=Removal(
        modules=("intermediate", "output.dense"),
        stubs=(Stub("intermediate", "pass_first", masked=False), Stub("output.dense", "zero_feed_forward")),
    ),
    norms=("output.LayerNorm",),
)
_STACKS = (StackTable("encoder.layer", (_ATTENTION, _MLP), embedding_norms=("embeddings.LayerNorm",)),)
_EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings")
_TARGETS = ("query", "value", "intermediate.dense")

BERT = ModelFamily(
    model_types=("bert",),
    stacks=_STACKS,
    embeddings=_EMBEDDINGS,
    post_norm=True,
    unsupported=encoder_only,
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
            masked_token=True,
        ),
    },
)

ROBERTA = ModelFamily(
    model_types=("roberta", "xlm-roberta"),
    stacks=_STACKS,
    embeddings=_EMBEDDINGS,
    post_norm=True,
    unsupported=encoder_only,
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=_TARGETS,
    heads={
        "ForSequenceClassification": Head(reads=("classifier.dense",), trained=("classifier",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": Head(
            reads=("lm_head.dense", "lm_head.decoder"),
            writes=("lm_head.dense",),
            norms=("lm_head.layer_norm",),
            masked_token=True,
        ),
    },
)
