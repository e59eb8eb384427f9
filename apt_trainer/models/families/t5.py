"""T5, mT5 and UMT5: an encoder and a decoder with one hidden space, three groups of heads.

The position bias is made by the first self-attention of each stack for all of its heads and handed from layer to
layer; so that attention stays, its table keeps all columns, and an attention that lost heads picks its rows.
The last cross-attention stays too, without which the decoder would not see the encoder. In UMT5 each self-attention
makes a bias of its own, so that any may go and the columns of its table go with the heads.
"""

from __future__ import annotations

from dataclasses import replace
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
    # not the hidden space: predictions are scaled by d_model
    config_sizes={"heads": ("num_heads",), "neurons": ("d_ff",), "layers": ("num_layers", "num_decoder_layers")},
    heads={
        "ForConditionalGeneration": Head(reads=("lm_head",)),
        "ForSequenceClassification": Head(reads=("classification_head.dense",), trained=("classification_head",)),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
    },
)

_OWN = replace(
    _SELF,
    columns={"layer.0.SelfAttention.relative_attention_bias": ("u",)},
    modules=("layer.0.SelfAttention", "layer.0.layer_norm"),
    stubs=(Stub("layer.0.SelfAttention", "zero_attention"), Stub("layer.0.layer_norm", "pass_first", masked=False)),
    sizes=_SELF.sizes[:2],
    stays=None,
)
_OTHER = replace(_CROSS, stubs=(Stub("layer.1", "pass_attention"),), sizes=_CROSS.sizes[:2])
UMT5 = replace(
    T5,
    model_types=("umt5",),
    stacks=(
        replace(T5.stacks[0], sublayers=(_OWN, T5.stacks[0].sublayers[1])),
        replace(T5.stacks[1], sublayers=(_OWN, _OTHER, T5.stacks[1].sublayers[2])),
    ),
)
