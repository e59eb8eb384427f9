"""LLaMA and the decoders that share its layout: rotary positions, RMS norms, gated feed-forward, grouped heads.

What differs is where the norms are (before each sublayer, after it, or both) and whether projections are fused.
"""

from __future__ import annotations

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable

HEADS = {
    "ForCausalLM": Head(reads=("lm_head",), next_token=True),
    "ForSequenceClassification": Head(reads=("score",), trained=("score",)),
    "ForTokenClassification": Head(reads=("score",), trained=("score",)),
    "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
}
_ATTENTION = SublayerTable(
    "heads",
    "heads",
    reads={"self_attn.q_proj": ("q",), "self_attn.k_proj": ("k",), "self_attn.v_proj": ("v",)},
    writes="self_attn.o_proj",
    modules=("self_attn", "input_layernorm"),
    stubs=(Stub("self_attn", "zero_attention"), Stub("input_layernorm", "pass_first", masked=False)),
    norms=("input_layernorm",),
    head_dim=("self_attn", "head_dim"),
    group=("self_attn", "num_key_value_groups"),
)
_MLP = SublayerTable(
    "neurons",
    "neurons",
    reads={"mlp.gate_proj": ("n",), "mlp.up_proj": ("n",)},
    writes="mlp.down_proj",
    modules=("mlp", "post_attention_layernorm"),
    stubs=(Stub("mlp", "zero_feed_forward"), Stub("post_attention_layernorm", "pass_first", masked=False)),
    norms=("post_attention_layernorm",),
)


def _family(*model_types: str, attention: SublayerTable, mlp: SublayerTable, targets: tuple[str, ...]) -> ModelFamily:
    return ModelFamily(
        model_types=model_types,
        stacks=(StackTable("layers", (attention, mlp), stack="decoder", final_norms=("norm",)),),
        embeddings=("embed_tokens",),
        adapter_targets=targets,
        heads=HEADS,
    )


_TARGETS = ("q_proj", "v_proj", "gate_proj")

LLAMA = _family("llama", "mistral", "qwen2", "qwen3", attention=_ATTENTION, mlp=_MLP, targets=_TARGETS)
