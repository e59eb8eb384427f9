"""LLaMA and the decoders that share its layout: rotary positions, RMS norms, gated feed-forward, grouped heads.

What differs is where the norms are (before each sublayer, after it, or both) and whether projections are fused.
"""

from __future__ import annotations

from dataclasses import replace

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

LLAMA = replace(
    _family("llama", "mistral", "qwen2", "qwen3", attention=_ATTENTION, mlp=_MLP, targets=_TARGETS),
    gguf={
        "llama": ("llama", "deci"),
        "mistral": ("llama", "deci"),
        "qwen2": ("qwen2", "deci"),
        "qwen3": ("qwen3", "openelm"),
    },
)

SMOLLM3 = _family("smollm3", attention=_ATTENTION, mlp=_MLP, targets=_TARGETS)

# Norms before and after: what a removed sublayer would hand to the second one is nothing, which it leaves at nothing.
GEMMA = _family(
    "gemma2",
    "gemma3_text",
    attention=replace(
        _ATTENTION,
        modules=("self_attn", "input_layernorm", "post_attention_layernorm"),
        stubs=(*_ATTENTION.stubs, Stub("post_attention_layernorm", "pass_first", masked=False)),
        norms=("input_layernorm", "post_attention_layernorm"),
        closing=("post_attention_layernorm",),
    ),
    mlp=replace(
        _MLP,
        modules=("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        stubs=(
            Stub("mlp", "zero_feed_forward"),
            Stub("pre_feedforward_layernorm", "pass_first", masked=False),
            Stub("post_feedforward_layernorm", "pass_first", masked=False),
        ),
        norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        closing=("post_feedforward_layernorm",),
    ),
    targets=_TARGETS,
)

# Norms after each sublayer, and queries and keys of all heads normalised together.
OLMO2 = _family(
    "olmo2",
    attention=replace(
        _ATTENTION,
        modules=("self_attn", "post_attention_layernorm"),
        stubs=(
            Stub("self_attn", "zero_attention"),
            Stub("post_attention_layernorm", "pass_first", masked=False),
        ),
        norms=("post_attention_layernorm",),
        closing=("post_attention_layernorm",),
        inner={"self_attn.q_norm": ("q",), "self_attn.k_norm": ("k",)},
    ),
    mlp=replace(
        _MLP,
        modules=("mlp", "post_feedforward_layernorm"),
        stubs=(Stub("mlp", "zero_feed_forward"), Stub("post_feedforward_layernorm", "pass_first", masked=False)),
        norms=("post_feedforward_layernorm",),
        closing=("post_feedforward_layernorm",),
    ),
    targets=_TARGETS,
)

PHI3 = _family(
    "phi3",
    attention=replace(
        _ATTENTION,
        reads={"self_attn.qkv_proj": ("q", "k", "v")},
        sizes=(
            ("self_attn", "num_key_value_heads", "units"),
            ("self_attn", "config.num_attention_heads", "queries"),
        ),
    ),
    mlp=replace(_MLP, reads={"mlp.gate_up_proj": ("n", "n")}),
    targets=("qkv_proj", "gate_up_proj"),
)
