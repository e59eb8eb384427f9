"""T5 and mT5: an encoder and a decoder with one hidden space, three groups of heads, plain or gated feed-forward.

The position bias is made by the first self-attention of each stack for all of its heads and handed from layer to
layer; so that attention stays, its table keeps all columns, and an attention that lost heads picks its rows.
The last cross-attention stays too, without which the decoder would not see the encoder.
"""

from __future__ import annotations

from typing import Literal

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable


def _attention(
    name: str, path: str, module: str, stays: Literal["first", "last"], crosses: bool = False
) -> SublayerTable:
    inside = f"{path}.{module}"
    return SublayerTable(
        name,
        "heads",
        reads={f"{inside}.q": ("q",), f"{inside}.k": ("k",), f"{inside}.v": ("v",)},
        writes=f"{inside}.o",
        modules=(path,),
        stubs=(Stub(path, "pass_biased_attention"),),
        norms=(f"{path}.layer_norm",),
        head_dim=(inside, "key_value_proj_dim"),
        sizes=((inside, "n_heads", "units"), (inside, "inner_dim", "channels"), (inside, "kept_heads", "kept")),
        stays=stays,
        crosses=crosses,
    )


def _feed_forward(path: str) -> SublayerTable:
    inside = f"{path}.DenseReluDense"
    return SublayerTable(
        "neurons",
        "neurons",
        reads={f"{inside}.wi": ("n",), f"{inside}.wi_0": ("n",), f"{inside}.wi_1": ("n",)},
        writes=f"{inside}.wo",
        modules=(path,),
        stubs=(Stub(path, "pass_first"),),
        norms=(f"{path}.layer_norm",),
    )


_SELF = _attention("heads", "layer.0", "SelfAttention", "first")
_CROSS = _attention("cross_heads", "layer.1", "EncDecAttention", "last", crosses=True)

T5 = ModelFamily(
    model_types=("t5", "mt5"),
    stacks=(
        StackTable(
            "encoder.block",
            (_SELF, _feed_forward("layer.1")),
            spaces="encoder",
            final_norms=("encoder.final_layer_norm",),
        ),
        StackTable(
            "decoder.block",
            (_SELF, _CROSS, _feed_forward("layer.2")),
            stack="decoder",
            spaces="decoder",
            final_norms=("decoder.final_layer_norm",),
        ),
    ),
    embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
    adapter_targets=("q", "v", "wi_0", "wi"),
    heads={
        "ForConditionalGeneration": Head(reads=("lm_head",)),
        "ForSequenceClassification": Head(reads=("classification_head.dense",), trained=("classification_head",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
    },
)
