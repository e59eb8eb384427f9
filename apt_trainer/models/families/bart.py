"""BART and the encoder–decoders with its layers: translation and summarisation.

Norms are after each sublayer (BART, PLBART, MVP, Blenderbot-small, Marian) or before it (mBART, Pegasus, Blenderbot).
The last cross-attention keeps a head, without which the decoder would not see the encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, Removal, StackTable, SublayerTable


def _attention(name: str, path: str, post_norm: bool, crosses: bool = False) -> SublayerTable:
    norm = f"{path}_layer_norm"
    nothing = Stub(path, "zero_cross_attention" if crosses else "zero_attention")
    stays: Literal["last"] | None = "last" if crosses else None
    return SublayerTable(
        name,
        "heads",
        reads={f"{path}.q_proj": ("q",), f"{path}.k_proj": ("k",), f"{path}.v_proj": ("v",)},
        writes=f"{path}.out_proj",
        modules=(path, norm),
        stubs=(nothing, Stub(norm, "pass_first", masked=post_norm)),
        keeping_norm=Removal(modules=(path,), stubs=(nothing,)) if post_norm else None,
        norms=(norm,),
        head_dim=(path, "head_dim"),
        sizes=((path, "num_heads", "units"), (path, "embed_dim", "channels")),
        stays=stays,
        crosses=crosses,
    )


def _feed_forward(post_norm: bool) -> SublayerTable:
    nothing = (Stub("fc2", "zero_feed_forward"), Stub("fc1", "pass_first", masked=False))
    return SublayerTable(
        "neurons",
        "neurons",
        reads={"fc1": ("n",)},
        writes="fc2",
        modules=("fc1", "fc2", "final_layer_norm"),
        stubs=(*nothing, Stub("final_layer_norm", "pass_first", masked=post_norm)),
        keeping_norm=Removal(modules=("fc1", "fc2"), stubs=nothing) if post_norm else None,
        norms=("final_layer_norm",),
    )


def _family(*model_types: str, post_norm: bool) -> ModelFamily:
    own = _attention("heads", "self_attn", post_norm)
    cross = _attention("cross_heads", "encoder_attn", post_norm, crosses=True)
    feed_forward = _feed_forward(post_norm)
    return ModelFamily(
        model_types=model_types,
        stacks=(
            StackTable(
                "encoder.layers",
                (own, feed_forward),
                spaces="encoder",
                embedding_norms=("encoder.layernorm_embedding",),
                final_norms=("encoder.layer_norm",),
            ),
            StackTable(
                "decoder.layers",
                (own, cross, feed_forward),
                stack="decoder",
                spaces="decoder",
                embedding_norms=("decoder.layernorm_embedding",),
                final_norms=("decoder.layer_norm",),
            ),
        ),
        embeddings=(
            "shared",
            "encoder.embed_tokens",
            "encoder.embed_positions",
            "decoder.embed_tokens",
            "decoder.embed_positions",
        ),
        post_norm=post_norm,
        adapter_targets=("q_proj", "v_proj", "fc1"),
        config_sizes={
            "heads": ("encoder_attention_heads", "decoder_attention_heads"),
            "neurons": ("encoder_ffn_dim", "decoder_ffn_dim"),
            "layers": ("encoder_layers", "decoder_layers"),
        },
        heads={
            "ForConditionalGeneration": Head(reads=("lm_head",)),
            "MTModel": Head(reads=("lm_head",)),
            "ForSequenceClassification": Head(reads=("classification_head.dense",), trained=("classification_head",)),
            "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
        },
    )


BART = _family("bart", "marian", "mvp", "plbart", post_norm=True)
BLENDERBOT_SMALL = replace(
    BART,
    model_types=("blenderbot-small",),
    stacks=(BART.stacks[0], replace(BART.stacks[1], added=("decoder.embed_positions",))),
)
MBART = _family("blenderbot", "mbart", "pegasus", post_norm=False)
