"""BERT, RoBERTa, ELECTRA and others: post-norm encoders with one layer layout. Not with cross-attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, Removal, StackTable, SublayerTable


def encoder_only(config: Any) -> str | None:
    """Refuses the decoder form of a BERT layout, which has cross-attention and another mask."""
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is supported as an encoder; this config sets is_decoder or add_cross_attention"
    return None


ATTENTION = SublayerTable(
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
MLP = SublayerTable(
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
STACKS = (StackTable("encoder.layer", (ATTENTION, MLP), embedding_norms=("embeddings.LayerNorm",)),)
EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings")
CONFIG_SIZES = {
    "heads": ("num_attention_heads",),
    "neurons": ("intermediate_size",),
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
}
TARGETS = ("query", "value", "intermediate.dense")
BERT_PREDICTIONS = Head(
    reads=("cls.predictions.transform.dense", "cls.predictions.decoder"),
    writes=("cls.predictions.transform.dense",),
    norms=("cls.predictions.transform.LayerNorm",),
    masked_token=True,
)
ROBERTA_PREDICTIONS = Head(
    reads=("lm_head.dense", "lm_head.decoder"),
    writes=("lm_head.dense",),
    norms=("lm_head.layer_norm",),
    masked_token=True,
)

BERT = ModelFamily(
    model_types=("bert", "ernie"),
    stacks=STACKS,
    embeddings=EMBEDDINGS,
    post_norm=True,
    unsupported=encoder_only,
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=TARGETS,
    config_sizes=CONFIG_SIZES,
    heads={
        "ForSequenceClassification": Head(trained=("classifier",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": BERT_PREDICTIONS,
    },
)

ROBERTA = ModelFamily(
    model_types=("camembert", "data2vec-text", "roberta", "xlm-roberta"),
    stacks=STACKS,
    embeddings=EMBEDDINGS,
    post_norm=True,
    unsupported=encoder_only,
    base_reads=("pooler.dense",),
    trained_base=("pooler",),
    adapter_targets=TARGETS,
    config_sizes=CONFIG_SIZES,
    heads={
        "ForSequenceClassification": Head(reads=("classifier.dense",), trained=("classifier",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        "ForMaskedLM": ROBERTA_PREDICTIONS,
    },
)

# Embeddings may be narrower than the layers; the head that predicts tokens is then as narrow.
ELECTRA = replace(
    ROBERTA,
    model_types=("electra",),
    projection="embeddings_project",
    base_reads=(),
    trained_base=(),
    heads={
        **ROBERTA.heads,
        "ForMaskedLM": Head(
            reads=("generator_predictions.dense", "generator_lm_head"),
            writes=("generator_predictions.dense",),
            norms=("generator_predictions.LayerNorm",),
            masked_token=True,
            projected=Head(reads=("generator_predictions.dense",), masked_token=True),
        ),
    },
)

ROFORMER = replace(
    ELECTRA,
    model_types=("roformer",),
    heads={
        **ROBERTA.heads,
        "ForMaskedLM": replace(
            BERT_PREDICTIONS, projected=Head(reads=("cls.predictions.transform.dense",), masked_token=True)
        ),
    },
)

REMBERT = replace(
    BERT,
    model_types=("rembert",),
    projection="encoder.embedding_hidden_mapping_in",
    heads={**BERT.heads, "ForMaskedLM": Head(reads=("cls.predictions.dense",), masked_token=True)},
)
