"""LLaMA and the models that share its layout: rotary positions, a gated feed-forward, grouped heads.

What differs is where the norms are (before each sublayer, after it, or both), what kind they are, whether projections
are fused and whether the feed-forward has a gate. Layers that add both sublayers side by side are in ``parallel``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.base import Stack, Stub
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable

HEADS = {
    "ForCausalLM": Head(reads=("lm_head",), next_token=True),
    "ForSequenceClassification": Head(reads=("score",), trained=("score",)),
    "ForTokenClassification": Head(reads=("score",), trained=("score",)),
    "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
}
ATTENTION = SublayerTable(
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
MLP = SublayerTable(
    "neurons",
    "neurons",
    reads={"mlp.gate_proj": ("n",), "mlp.up_proj": ("n",)},
    writes="mlp.down_proj",
    modules=("mlp", "post_attention_layernorm"),
    stubs=(Stub("mlp", "zero_feed_forward"), Stub("post_attention_layernorm", "pass_first", masked=False)),
    norms=("post_attention_layernorm",),
)

CONFIG_SIZES = {
    "heads": ("num_attention_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "neurons": ("intermediate_size",),
    "hidden": ("hidden_size",),
    "layers": ("num_hidden_layers",),
}
WITHOUT_HEAD_DIM = {kind: names for kind, names in CONFIG_SIZES.items() if kind != "head_dim"}


def _family(
    *model_types: str, attention: SublayerTable, mlp: SublayerTable, targets: tuple[str, ...], stack: Stack = "decoder"
) -> ModelFamily:
    return ModelFamily(
        model_types=model_types,
        stacks=(StackTable("layers", (attention, mlp), stack=stack, final_norms=("norm",)),),
        embeddings=("embed_tokens",),
        adapter_targets=targets,
        heads=HEADS,
        config_sizes=CONFIG_SIZES,
        per_layer=("layer_types", "no_rope_layers"),
    )


_TARGETS = ("q_proj", "v_proj", "gate_proj")

LLAMA = replace(
    _family("llama", "mistral", "qwen2", "qwen3", attention=ATTENTION, mlp=MLP, targets=_TARGETS),
    gguf={
        "llama": ("llama", "deci"),
        "mistral": ("llama", "deci"),
        "qwen2": ("qwen2", "deci"),
        "qwen3": ("qwen3", "openelm"),
    },
)

SMOLLM3 = _family(
    "cwm",
    "ernie4_5",
    "gemma",
    "hunyuan_v1_dense",
    "ministral",
    "ministral3",
    "seed_oss",
    "smollm3",
    attention=ATTENTION,
    mlp=MLP,
    targets=_TARGETS,
)

# What a sublayer writes is scaled before it is added.
GRANITE = replace(
    _family("granite", attention=ATTENTION, mlp=MLP, targets=_TARGETS),
    config_sizes=WITHOUT_HEAD_DIM,
    residual_multiplier=lambda config: float(config.residual_multiplier),
)

# The width of a head follows from the hidden size and the number of heads.
OLMO = replace(
    _family("helium", "olmo", attention=ATTENTION, mlp=MLP, targets=_TARGETS), config_sizes=WITHOUT_HEAD_DIM
)


def _as_stablelm_3b(config: Any) -> str | None:
    if config.use_parallel_residual or config.qk_layernorm:
        return "it is supported with use_parallel_residual=False and qk_layernorm=False (StableLM 3B and 2 1.6B)"
    return None


STABLELM = replace(
    _family(
        "stablelm",
        attention=replace(
            ATTENTION,
            sizes=(("self_attn", "num_heads", "queries"), ("self_attn", "num_key_value_heads", "units")),
        ),
        mlp=MLP,
        targets=_TARGETS,
    ),
    config_sizes=WITHOUT_HEAD_DIM,
    unsupported=_as_stablelm_3b,
)

# Without a gate.
_PLAIN_MLP = replace(MLP, reads={"mlp.up_proj": ("n",)})
_PLAIN_TARGETS = ("q_proj", "v_proj", "up_proj")
ARCEE = _family("arcee", "jais2", "nemotron", attention=ATTENTION, mlp=_PLAIN_MLP, targets=_PLAIN_TARGETS)

APERTUS = _family(
    "apertus",
    attention=replace(
        ATTENTION,
        modules=("self_attn", "attention_layernorm"),
        stubs=(Stub("self_attn", "zero_attention"), Stub("attention_layernorm", "pass_first", masked=False)),
        norms=("attention_layernorm",),
    ),
    mlp=replace(
        _PLAIN_MLP,
        modules=("mlp", "feedforward_layernorm"),
        stubs=(Stub("mlp", "zero_feed_forward"), Stub("feedforward_layernorm", "pass_first", masked=False)),
        norms=("feedforward_layernorm",),
    ),
    targets=_PLAIN_TARGETS,
)

STARCODER2 = _family(
    "starcoder2",
    attention=ATTENTION,
    mlp=replace(MLP, reads={"mlp.c_fc": ("n",)}, writes="mlp.c_proj"),
    targets=("q_proj", "v_proj", "c_fc"),
)

# An encoder.
EUROBERT = replace(
    _family("eurobert", attention=ATTENTION, mlp=MLP, targets=_TARGETS, stack="encoder"),
    heads={
        "ForMaskedLM": Head(reads=("lm_head",), masked_token=True),
        "ForSequenceClassification": Head(reads=("dense",), trained=("dense", "classifier")),
        "ForTokenClassification": Head(reads=("classifier",), trained=("classifier",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
    },
)

VAULTGEMMA = _family(
    "vaultgemma",
    attention=ATTENTION,
    mlp=replace(
        MLP,
        modules=("mlp", "pre_feedforward_layernorm"),
        stubs=(Stub("mlp", "zero_feed_forward"), Stub("pre_feedforward_layernorm", "pass_first", masked=False)),
        norms=("pre_feedforward_layernorm",),
    ),
    targets=_TARGETS,
)

# Norms before and after: what a removed sublayer would hand to the second one is nothing, which it leaves at nothing.
GEMMA = _family(
    "gemma2",
    "gemma3_text",
    attention=replace(
        ATTENTION,
        modules=("self_attn", "input_layernorm", "post_attention_layernorm"),
        stubs=(*ATTENTION.stubs, Stub("post_attention_layernorm", "pass_first", masked=False)),
        norms=("input_layernorm", "post_attention_layernorm"),
        closing=("post_attention_layernorm",),
    ),
    mlp=replace(
        MLP,
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


_BEYOND_GEMMA3 = ("hidden_size_per_layer_input", "num_kv_shared_layers", "attention_k_eq_v", "enable_moe_block")


def _as_dense_gemma4(config: Any) -> str | None:
    given = [name for name in _BEYOND_GEMMA3 if getattr(config, name, None)]
    if given:
        return f"it is supported without {', '.join(given)}, which its table does not describe"
    return None


# Its config says the width of a head layer by layer, so that none says that of equal layers.
GEMMA4 = replace(
    GEMMA,
    model_types=("gemma4_text", "gemma4_unified_text"),
    unsupported=_as_dense_gemma4,
    config_sizes={},
)

# Norms after each sublayer, and queries and keys of all heads normalised together.
_ATTENTION_BEFORE_NORM = replace(
    ATTENTION,
    modules=("self_attn", "post_attention_layernorm"),
    stubs=(Stub("self_attn", "zero_attention"), Stub("post_attention_layernorm", "pass_first", masked=False)),
    norms=("post_attention_layernorm",),
    closing=("post_attention_layernorm",),
    inner={"self_attn.q_norm": ("q",), "self_attn.k_norm": ("k",)},
)
_MLP_BEFORE_NORM = replace(
    MLP,
    modules=("mlp", "post_feedforward_layernorm"),
    stubs=(Stub("mlp", "zero_feed_forward"), Stub("post_feedforward_layernorm", "pass_first", masked=False)),
    norms=("post_feedforward_layernorm",),
    closing=("post_feedforward_layernorm",),
)
OLMO2 = _family("olmo2", "olmo3", attention=_ATTENTION_BEFORE_NORM, mlp=_MLP_BEFORE_NORM, targets=_TARGETS)

# The same, with the queries and keys of each head by themselves.
EXAONE4 = _family(
    "exaone4",
    attention=replace(_ATTENTION_BEFORE_NORM, inner={}),
    mlp=_MLP_BEFORE_NORM,
    targets=_TARGETS,
)

PHI3 = _family(
    "phi3",
    attention=replace(
        ATTENTION,
        reads={"self_attn.qkv_proj": ("q", "k", "v")},
        sizes=(
            ("self_attn", "num_key_value_heads", "units"),
            ("self_attn", "config.num_attention_heads", "queries"),
        ),
    ),
    mlp=replace(MLP, reads={"mlp.gate_up_proj": ("n", "n")}),
    targets=("qkv_proj", "gate_up_proj"),
)

_FUSED_MLP = replace(MLP, reads={"mlp.gate_up_proj": ("n", "n")})
_FUSED_TARGETS = ("q_proj", "v_proj", "gate_up_proj")
GLM = _family("glm", attention=ATTENTION, mlp=_FUSED_MLP, targets=_FUSED_TARGETS)


def _closed(table: SublayerTable, norm: str) -> SublayerTable:
    """With ``norm`` between what ``table`` writes and the residual stream, as in Gemma."""
    return replace(
        table,
        modules=(*table.modules, norm),
        stubs=(*table.stubs, Stub(norm, "pass_first", masked=False)),
        norms=(*table.norms, norm),
        closing=(norm,),
    )


GLM4 = _family(
    "glm4",
    attention=_closed(ATTENTION, "post_self_attn_layernorm"),
    mlp=_closed(_FUSED_MLP, "post_mlp_layernorm"),
    targets=_FUSED_TARGETS,
)
HYPERCLOVAX = replace(
    _family(
        "hyperclovax", attention=_closed(ATTENTION, "post_norm1"), mlp=_closed(MLP, "post_norm2"), targets=_TARGETS
    ),
    residual_multiplier=lambda config: float(config.residual_multiplier),
)
