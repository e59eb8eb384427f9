"""GPT-2, GPT-NeoX (Pythia), OPT and BioGPT: decoders with LayerNorm and a plain feed-forward.

GPT-2 keeps its linears transposed and its projections fused in three parts; GPT-NeoX fuses them head by head and adds
attention and feed-forward side by side; OPT and BioGPT have no module for their feed-forward.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.base import Stub
from apt_trainer.models.family import Head, ModelFamily, StackTable, SublayerTable

_LM_HEAD = Head(reads=("lm_head",), next_token=True)
_SCORE = Head(reads=("score",), trained=("score",))
_CLASSIFIER = Head(reads=("classifier",), trained=("classifier",))
_ANSWERS = Head(reads=("qa_outputs",), trained=("qa_outputs",))


def _no_cross_attention(config: Any) -> str | None:
    if getattr(config, "add_cross_attention", False):
        return "it is supported as a decoder by itself; this config sets add_cross_attention"
    return None


def _one_width_before_each_sublayer(config: Any) -> str | None:
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        return (
            "it is supported with do_layer_norm_before=True and word_embed_proj_dim equal to hidden_size "
            "(every size of OPT but 350m)"
        )
    return None


GPT2 = ModelFamily(
    model_types=("gpt2",),
    stacks=(
        StackTable(
            "h",
            (
                SublayerTable(
                    "heads",
                    "heads",
                    reads={"attn.c_attn": ("q", "k", "v")},
                    writes="attn.c_proj",
                    modules=("attn", "ln_1"),
                    stubs=(Stub("attn", "zero_attention"), Stub("ln_1", "pass_first", masked=False)),
                    norms=("ln_1",),
                    head_dim=("attn", "head_dim"),
                    sizes=(("attn", "num_heads", "units"), ("attn", "split_size", "channels")),
                ),
                SublayerTable(
                    "neurons",
                    "neurons",
                    reads={"mlp.c_fc": ("n",)},
                    writes="mlp.c_proj",
                    modules=("mlp", "ln_2"),
                    stubs=(Stub("mlp", "zero_feed_forward"), Stub("ln_2", "pass_first", masked=False)),
                    norms=("ln_2",),
                ),
            ),
            stack="decoder",
            final_norms=("ln_f",),
        ),
    ),
    embeddings=("wte", "wpe"),
    adapter_targets=("c_attn", "c_fc"),
    config_sizes={"heads": ("n_head",), "neurons": ("n_inner",), "hidden": ("n_embd",), "layers": ("n_layer",)},
    unsupported=_no_cross_attention,
    heads={
        "GPT2LMHeadModel": _LM_HEAD,
        "ForSequenceClassification": _SCORE,
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _ANSWERS,
    },
)

GPT_NEOX = ModelFamily(
    model_types=("gpt_neox",),
    stacks=(
        StackTable(
            "layers",
            (
                SublayerTable(
                    "heads",
                    "heads",
                    reads={"attention.query_key_value": ("qkv",)},
                    writes="attention.dense",
                    modules=("attention", "input_layernorm"),
                    stubs=(Stub("attention", "zero_attention"), Stub("input_layernorm", "pass_first", masked=False)),
                    norms=("input_layernorm",),
                    head_dim=("attention", "head_size"),
                ),
                SublayerTable(
                    "neurons",
                    "neurons",
                    reads={"mlp.dense_h_to_4h": ("n",)},
                    writes="mlp.dense_4h_to_h",
                    modules=("mlp", "post_attention_layernorm"),
                    stubs=(
                        Stub("mlp", "zero_feed_forward"),
                        Stub("post_attention_layernorm", "pass_first", masked=False),
                    ),
                    norms=("post_attention_layernorm",),
                ),
            ),
            stack="decoder",
            final_norms=("final_layer_norm",),
        ),
    ),
    embeddings=("embed_in",),
    adapter_targets=("query_key_value", "dense_h_to_4h"),
    config_sizes={
        "heads": ("num_attention_heads",),
        "neurons": ("intermediate_size",),
        "hidden": ("hidden_size",),
        "layers": ("num_hidden_layers",),
    },
    parallel=lambda config: bool(config.use_parallel_residual),
    heads={
        "ForCausalLM": _LM_HEAD,
        "ForSequenceClassification": _SCORE,
        "ForTokenClassification": _CLASSIFIER,
        "ForQuestionAnswering": _ANSWERS,
    },
)

OPT = ModelFamily(
    model_types=("opt",),
    stacks=(
        StackTable(
            "decoder.layers",
            (
                SublayerTable(
                    "heads",
                    "heads",
                    reads={"self_attn.q_proj": ("q",), "self_attn.k_proj": ("k",), "self_attn.v_proj": ("v",)},
                    writes="self_attn.out_proj",
                    modules=("self_attn", "self_attn_layer_norm"),
                    stubs=(
                        Stub("self_attn", "zero_attention"),
                        Stub("self_attn_layer_norm", "pass_first", masked=False),
                    ),
                    norms=("self_attn_layer_norm",),
                    head_dim=("self_attn", "head_dim"),
                    sizes=(("self_attn", "num_heads", "units"),),
                ),
                SublayerTable(
                    "neurons",
                    "neurons",
                    reads={"fc1": ("n",)},
                    writes="fc2",
                    modules=("fc1", "fc2", "final_layer_norm"),
                    stubs=(
                        Stub("fc2", "zero_feed_forward"),
                        Stub("fc1", "pass_first", masked=False),
                        Stub("final_layer_norm", "pass_first", masked=False),
                    ),
                    norms=("final_layer_norm",),
                ),
            ),
            stack="decoder",
            final_norms=("decoder.final_layer_norm",),
        ),
    ),
    embeddings=("decoder.embed_tokens", "decoder.embed_positions"),
    adapter_targets=("q_proj", "v_proj", "fc1"),
    config_sizes={
        "heads": ("num_attention_heads",),
        "neurons": ("ffn_dim",),
        "hidden": ("hidden_size", "word_embed_proj_dim"),
        "layers": ("num_hidden_layers",),
    },
    unsupported=_one_width_before_each_sublayer,
    heads={
        "ForCausalLM": _LM_HEAD,
        "ForSequenceClassification": _SCORE,
        "ForQuestionAnswering": _ANSWERS,
    },
)

BIOGPT = replace(
    OPT,
    model_types=("biogpt",),
    stacks=(replace(OPT.stacks[0], layers="layers", final_norms=("layer_norm",)),),
    embeddings=("embed_tokens", "embed_positions"),
    config_sizes={
        "heads": ("num_attention_heads",),
        "neurons": ("intermediate_size",),
        "hidden": ("hidden_size",),
        "layers": ("num_hidden_layers",),
    },
    unsupported=lambda config: None,
    heads={
        "ForCausalLM": Head(reads=("output_projection",), next_token=True),
        "ForSequenceClassification": _SCORE,
        "ForTokenClassification": _CLASSIFIER,
    },
)
