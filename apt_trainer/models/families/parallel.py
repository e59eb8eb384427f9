"""Phi, Cohere and GPT-J: decoders that add attention and feed-forward side by side, both read from one norm.

The norm stays in its layer even where both sublayers are gone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from apt_trainer.models.base import Stub
from apt_trainer.models.families.llama import ATTENTION, CONFIG_SIZES, HEADS, MLP, WITHOUT_HEAD_DIM
from apt_trainer.models.family import Head, ModelFamily, StackTable

_ATTENTION = replace(ATTENTION, modules=("self_attn",), stubs=(Stub("self_attn", "zero_attention"),))
_MLP = replace(MLP, modules=("mlp",), stubs=(Stub("mlp", "zero_in_graph"),), norms=())


def _one_norm_for_all_heads(config: Any) -> str | None:
    if getattr(config, "use_qk_norm", False):
        return "it is supported without norms of each head (use_qk_norm)"
    return None


COHERE = ModelFamily(
    model_types=("cohere", "cohere2"),
    stacks=(StackTable("layers", (_ATTENTION, _MLP), stack="decoder", final_norms=("norm",)),),
    embeddings=("embed_tokens",),
    adapter_targets=("q_proj", "v_proj", "gate_proj"),
    heads=HEADS,
    config_sizes=CONFIG_SIZES,
    parallel=lambda config: True,
    unsupported=_one_norm_for_all_heads,
)

PHI = replace(
    COHERE,
    model_types=("phi",),
    stacks=(
        StackTable(
            "layers",
            (
                replace(_ATTENTION, writes="self_attn.dense"),
                replace(_MLP, reads={"mlp.fc1": ("n",)}, writes="mlp.fc2"),
            ),
            stack="decoder",
            final_norms=("final_layernorm",),
        ),
    ),
    adapter_targets=("q_proj", "v_proj", "fc1"),
    config_sizes=WITHOUT_HEAD_DIM,
)

GPTJ = ModelFamily(
    model_types=("gptj",),
    stacks=(
        StackTable(
            "h",
            (
                replace(
                    _ATTENTION,
                    reads={"attn.q_proj": ("q",), "attn.k_proj": ("k",), "attn.v_proj": ("v",)},
                    writes="attn.out_proj",
                    modules=("attn",),
                    stubs=(Stub("attn", "zero_attention"),),
                    norms=("ln_1",),
                    head_dim=("attn", "head_dim"),
                    group=None,
                    sizes=(("attn", "num_attention_heads", "units"),),
                ),
                replace(_MLP, reads={"mlp.fc_in": ("n",)}, writes="mlp.fc_out"),
            ),
            stack="decoder",
            final_norms=("ln_f",),
        ),
    ),
    embeddings=("wte",),
    adapter_targets=("q_proj", "v_proj", "fc_in"),
    config_sizes={"heads": ("n_head",), "neurons": ("n_inner",), "hidden": ("n_embd",), "layers": ("n_layer",)},
    parallel=lambda config: True,
    heads={
        "ForCausalLM": Head(reads=("lm_head",), next_token=True),
        "ForSequenceClassification": Head(reads=("score",), trained=("score",)),
        "ForQuestionAnswering": Head(reads=("qa_outputs",), trained=("qa_outputs",)),
    },
)
